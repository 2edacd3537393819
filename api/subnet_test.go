package api_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/api/apitest"
)

// TestBadSubnets: each is refused with the field and a sentence that says what
// to do instead, and nothing is made.
func TestBadSubnets(t *testing.T) {
	c := apitest.New()
	if _, err := c.Init(context.Background(), weft.InitRequest{}); err != nil {
		t.Fatal(err)
	}
	h := handler(t, c)
	create := func(ipam, flags string) string {
		return `{"Name":"x","Driver":"overlay"` + flags + `,"IPAM":{"Config":[` + ipam + `]}}`
	}
	const six = `,"EnableIPv6":true`
	for _, c := range []struct{ name, body, want string }{
		{"host bits", create(`{"Subnet":"10.1.0.1/24"}`, ""), "IPAM.Config[0].Subnet: 10.1.0.1/24 has host bits set: it should be 10.1.0.0/24"},
		{"host bits of IPv6", create(`{"Subnet":"fd00::1/64"}`, six), "IPAM.Config[0].Subnet: fd00::1/64 has host bits set: it should be fd00::/64"},
		{"too small", create(`{"Subnet":"10.1.0.0/30"}`, ""), "IPAM.Config[0].Subnet: 10.1.0.0/30 must be /8 to /29"},
		{"too large", create(`{"Subnet":"10.0.0.0/7"}`, ""), "IPAM.Config[0].Subnet: 10.0.0.0/7 must be /8 to /29"},
		{"IPv6 too small", create(`{"Subnet":"fd00::/126"}`, six), "IPAM.Config[0].Subnet: fd00::/126 must be /16 to /125"},
		{"IPv6 not asked for", create(`{"Subnet":"fd00::/64"}`, ""), "--ipv6"},
		{"no prefix length", create(`{"Subnet":"10.1.0.0"}`, ""), "Subnet"},
		{"IPv6 without a prefix length", create(`{"Subnet":"fd00::"}`, six), "Subnet"},
		{"gateway alone", create(`{"Gateway":"10.1.0.1"}`, ""), "IPAM.Config[0].Subnet: missing: a gateway needs the subnet that it is in"},
		{"gateway outside", create(`{"Subnet":"10.1.0.0/24","Gateway":"10.2.0.1"}`, ""), "IPAM.Config[0].Gateway: 10.2.0.1 is not in 10.1.0.0/24: use an address of it, such as 10.1.0.1"},
		{"gateway of the other family", create(`{"Subnet":"fd00::/64","Gateway":"10.2.0.1"}`, six), "IPAM.Config[0].Gateway: 10.2.0.1 is not in fd00::/64: use an address of it, such as fd00::1"},
		{"gateway is the network", create(`{"Subnet":"10.1.0.0/24","Gateway":"10.1.0.0"}`, ""), "IPAM.Config[0].Gateway: 10.1.0.0 is the address of the network itself: use another, such as 10.1.0.1"},
		{"gateway is broadcast", create(`{"Subnet":"10.1.0.0/24","Gateway":"10.1.0.255"}`, ""), "IPAM.Config[0].Gateway: 10.1.0.255 is the broadcast address of 10.1.0.0/24: use another, such as 10.1.0.1"},
		{"each other", create(`{"Subnet":"10.1.0.0/16"},{"Subnet":"10.1.2.0/24"}`, ""), "IPAM.Config[1].Subnet: 10.1.2.0/24 overlaps 10.1.0.0/16: leave one of them out"},
		{"two at once", create(`{"Subnet":"10.1.0.1/24"},{"Subnet":"10.2.0.0/31"}`, ""), "IPAM.Config[1].Subnet: 10.2.0.0/31 must be"},
	} {
		w := do(h, "POST", "/networks/create", c.body)
		var e struct{ Message string }
		if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || w.Code != 400 || !strings.Contains(e.Message, c.want) {
			t.Errorf("%s: %d %s, want 400 %q", c.name, w.Code, w.Body, c.want)
		}
	}
	if w := do(h, "GET", "/networks?filters=%7B%22name%22:%5B%22x%22%5D%7D", ""); strings.TrimSpace(w.Body.String()) != "[]" {
		t.Errorf("there is a network now: %s", w.Body)
	}
}
