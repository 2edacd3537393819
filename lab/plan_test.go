package lab

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestNewPlanRefusesBadNames(t *testing.T) {
	for _, tc := range []struct{ name, run, data string }{
		{"", "/run/x", "/var/x"},
		{"Lab", "/run/x", "/var/x"},
		{"a/b", "/run/x", "/var/x"},
		{"..", "/run/x", "/var/x"},
		{"-a", "/run/x", "/var/x"},
		{"a-", "/run/x", "/var/x"},
		{strings.Repeat("a", 33), "/run/x", "/var/x"},
		{"lab", "run/x", "/var/x"},
		{"lab", "/run/x", "/"},
	} {
		if _, err := newPlan(tc.name, tc.run, tc.data); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("newPlan(%q, %q, %q) = %v, want ErrInvalid", tc.name, tc.run, tc.data, err)
		}
	}
}

func TestPlanIsStable(t *testing.T) {
	p, err := newPlan("lab", "/run/weft/lab", "/var/lib/weft/lab")
	if err != nil {
		t.Fatal(err)
	}
	h := p.host(2)
	// A lab made by one version is found by the next: these never change.
	for what, pair := range map[string][2]string{
		"subnet": {p.subnet.String(), "10.99.181.0/24"},
		"addr":   {h.Addr.String(), "10.99.181.2"},
		"mac":    {h.MAC.String(), "02:77:6c:b5:00:02"},
		"socket": {h.Paths.Socket, "/run/weft/lab/lab/h2/weft.sock"},
		"data":   {h.Paths.DataRoot, "/var/lib/weft/lab/lab/h2"},
		"netns":  {h.Paths.NetNS, "/run/weft/lab/lab/netns/h2"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s = %s, want %s", what, pair[0], pair[1])
		}
	}
}

func TestPlanOfAnyName(t *testing.T) {
	under := netip.MustParsePrefix("10.99.0.0/16")
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringMatching(`[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?`).Draw(t, "name")
		p, err := newPlan(name, "/run/weft/lab", "/var/lib/weft/lab")
		if err != nil {
			t.Fatal(err)
		}
		seen := map[netip.Addr]bool{p.gateway(): true}
		for _, h := range p.hosts(MaxHosts) {
			if seen[h.Addr] || !under.Contains(h.Addr) || !p.subnet.Contains(h.Addr) {
				t.Fatalf("%s has address %s in %s", h.Name, h.Addr, p.subnet)
			}
			seen[h.Addr] = true
			if len(portName(h.Index)) > 15 {
				t.Fatalf("link name %s is too long", portName(h.Index))
			}
			// A daemon refuses a longer run folder: sockets lie below it.
			if dir := filepath.Dir(h.Paths.Socket); len(dir) > 29 {
				t.Fatalf("run folder %s is too long", dir)
			}
			if i, err := parseHost(h.Name, MaxHosts); err != nil || i != h.Index {
				t.Fatalf("parseHost(%s) = %d, %v", h.Name, i, err)
			}
		}
	})
}

func TestParseHost(t *testing.T) {
	for name, want := range map[string]error{
		"h1": nil, "h3": nil, "h4": weft.ErrNotFound,
		"h0": weft.ErrInvalid, "h01": weft.ErrInvalid, "1": weft.ErrInvalid, "": weft.ErrInvalid,
		"h-1": weft.ErrInvalid, "h+1": weft.ErrInvalid, "h1 ": weft.ErrInvalid, "client": weft.ErrInvalid,
	} {
		if _, err := parseHost(name, 3); !errors.Is(err, want) {
			t.Errorf("parseHost(%q) = %v, want %v", name, err, want)
		}
	}
}

func TestMerge(t *testing.T) {
	is := &record{Version: recordVersion, Hosts: 3, Managers: 1, MTU: 1500}
	for _, tc := range []struct {
		name string
		old  *record
		spec Spec
		want record
		err  error
	}{
		{"new, defaults", nil, Spec{}, record{Version: 1, Hosts: 3, Managers: 1, MTU: 1500}, nil},
		{"new, given", nil, Spec{Hosts: 5, Managers: 3, MTU: 9000}, record{Version: 1, Hosts: 5, Managers: 3, MTU: 9000}, nil},
		{"as it is", is, Spec{}, *is, nil},
		{"grows", is, Spec{Hosts: 4}, record{Version: 1, Hosts: 4, Managers: 1, MTU: 1500}, nil},
		{"same again", is, Spec{Hosts: 3, Managers: 1, MTU: 1500}, *is, nil},
		{"no shrinking", is, Spec{Hosts: 2}, record{}, weft.ErrConflict},
		{"managers are fixed", is, Spec{Managers: 3}, record{}, weft.ErrConflict},
		{"mtu is fixed", is, Spec{MTU: 1400}, record{}, weft.ErrConflict},
		{"engine is fixed", is, Spec{OverlayEngine: "bridge"}, record{}, weft.ErrConflict},
		{"even managers", nil, Spec{Managers: 2}, record{}, weft.ErrInvalid},
		{"more managers than hosts", nil, Spec{Hosts: 1, Managers: 3}, record{}, weft.ErrInvalid},
		{"too many hosts", nil, Spec{Hosts: MaxHosts + 1}, record{}, weft.ErrInvalid},
		{"negative hosts", nil, Spec{Hosts: -1}, record{}, weft.ErrInvalid},
		{"mtu too small", nil, Spec{MTU: 1279}, record{}, weft.ErrInvalid},
		{"mtu too large", nil, Spec{MTU: 65536}, record{}, weft.ErrInvalid},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := merge(tc.old, tc.spec)
			if !errors.Is(err, tc.err) {
				t.Fatalf("error %v, want %v", err, tc.err)
			}
			if err != nil {
				return
			}
			g, _ := got.encode()
			w, _ := tc.want.encode()
			if string(g) != string(w) {
				t.Errorf("got %s, want %s", g, w)
			}
		})
	}
}

// TestHostEngines: a host's own engines stand before the lab's, and stay.
func TestHostEngines(t *testing.T) {
	r := record{OverlayEngine: "bridge", ServiceEngine: "nft"}
	for _, c := range []struct {
		told             HostEngines
		overlay, service string
	}{
		{HostEngines{}, "bridge", "nft"},
		{HostEngines{Overlay: "ebpf", Service: AnyEngine}, "ebpf", ""},
		{HostEngines{}, "ebpf", ""},
		{HostEngines{Service: "ipvs"}, "ebpf", "ipvs"},
		{HostEngines{Overlay: AnyEngine}, "", "ipvs"},
	} {
		before, _ := r.encode()
		next := r.withEngines("h2", c.told)
		if after, _ := r.encode(); string(after) != string(before) {
			t.Fatal("the old record was changed")
		}
		r = next
		if o, s := r.engines("h2"); o != c.overlay || s != c.service {
			t.Errorf("told %+v: %q, %q; want %q, %q", c.told, o, s, c.overlay, c.service)
		}
		if o, s := r.engines("h1"); o != "bridge" || s != "nft" {
			t.Errorf("another host: %q, %q", o, s)
		}
	}
}

// TestRecordGolden holds version 1 of lab.json. The file is never edited: a new
// version gets a new file.
func TestRecordGolden(t *testing.T) {
	const file = "testdata/lab.v1.json"
	r := record{
		Version: 1, Hosts: 3, Managers: 1, MTU: 1500, OverlayEngine: "bridge", ServiceEngine: "nft",
		Nodes: map[string]weft.ID{"h1": "0abcdefghijklmnopqrstuvw1"}, HostMTU: map[string]int{"h2": 1400},
	}
	b, err := r.encode()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != string(golden) {
		t.Errorf("encoded:\n%s\nwant:\n%s", b, golden)
	}
	back, err := decodeRecord(golden)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := back.encode(); string(again) != string(golden) {
		t.Errorf("decoded and encoded again:\n%s", again)
	}
}

func TestDecodeRecordRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		in  string
		err error
	}{
		"newer version": {`{"version":2,"hosts":3,"managers":1,"mtu":1500}`, weft.ErrUnsupported},
		"no hosts":      {`{"version":1,"hosts":0,"managers":1,"mtu":1500}`, weft.ErrInvalid},
		"too many":      {`{"version":1,"hosts":100000,"managers":1,"mtu":1500}`, weft.ErrInvalid},
		"empty":         {``, nil},
		"torn":          {`{"version":1,"hos`, nil},
	} {
		_, err := decodeRecord([]byte(tc.in))
		if err == nil || tc.err != nil && !errors.Is(err, tc.err) {
			t.Errorf("%s: %v, want %v", name, err, tc.err)
		}
	}
}
