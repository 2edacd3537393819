package state

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/weftnet/weft"
)

// dualCommands has every record that holds a second address, and frees what they
// hold.
func dualCommands() []Command {
	six := func(s string) netip.Prefix { return netip.MustParsePrefix(s) }
	cluster := *goldenCommands()[0].Changes[0].Cluster
	cluster.ULA = six("fd12:3456:789a::/48")
	dual := func(n *weft.Network, subnet string) *weft.Network {
		n.Spec.IPv6 = true
		n.Spec.Subnets = append(n.Spec.Subnets, weft.Subnet{Prefix: six(subnet), Gateway: six(subnet).Addr().Next()})
		return n
	}
	only := testNetwork(6, 4098)
	only.Spec.IPv6, only.Spec.NoIPv4, only.Spec.Subnets = true, true, []weft.Subnet{{Prefix: six("fd77::/64"), Gateway: netip.MustParseAddr("fd77::1")}}
	node := testNode(3)
	node.IngressAddr6 = six("fd12:3456:789a::2/64")
	svc := testService(4, id(2), id(6))
	svc.VIPs = []weft.VIP{{Network: id(2), Addr: six("10.0.16.2/20"), Addr6: six("fd12:3456:789a:1::2/64")}, {Network: id(6), Addr: six("fd77::2/64")}}
	task := testTask(5, 4, id(3))
	task.Attachments = []weft.Attachment{{Network: id(2), Addr: six("10.0.16.3/20"), Addr6: six("fd12:3456:789a:1::3/64")}, {Network: id(6), Addr: six("fd77::3/64")}}
	return []Command{{At: t0, Changes: []Change{
		{Cluster: &cluster},
		{Network: dual(ingressNetwork(8), "fd12:3456:789a::/64")},
		{Network: dual(testNetwork(2, 4097), "fd12:3456:789a:1::/64")},
		{Network: only}, {Node: node}, {Service: svc}, {Task: task},
	}}, {At: t0, Changes: []Change{
		{Delete: &Ref{Kind: KindTask, ID: id(5)}},
		{Delete: &Ref{Kind: KindNode, ID: id(3)}},
	}}}
}

// TestGoldenDual is a recording of version 1 with addresses of both families; the
// others have none of IPv6 and keep their bytes. Both addresses rest when they
// are freed.
func TestGoldenDual(t *testing.T) {
	b, err := EncodeEntry(dualCommands())
	if err != nil {
		t.Fatal(err)
	}
	s := New()
	errs, err := s.Apply(7, golden(t, "entry-v1-dual.cbor", b))
	if err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	snap := golden(t, "snapshot-v2-dual.cbor", persist(t, s))
	r := New()
	if err := r.Restore(bytes.NewReader(snap)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(persist(t, r), snap) {
		t.Error("a restored snapshot is another state")
	}
	v := r.View()
	c, _ := v.Cluster()
	svc, _ := v.Service(id(4))
	only, _ := v.Network(id(6))
	if c.ULA.String() != "fd12:3456:789a::/48" || !slices.Equal(svc.VIPs, dualCommands()[0].Changes[5].Service.VIPs) || !only.Spec.IPv6 || !only.Spec.NoIPv4 {
		t.Errorf("range %s, service %v, network %+v", c.ULA, svc.VIPs, only.Spec)
	}
	var got []string
	for _, a := range v.AllResting() {
		got = append(got, a.Addr.String())
	}
	slices.Sort(got)
	want := []string{"10.0.16.3", "10.255.0.2", "fd12:3456:789a:1::3", "fd12:3456:789a::2", "fd77::3"}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v rest, want %v", got, want)
	}
}
