package ipvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Addresses of tests: services 10.0.16.200 and above, backends 10.0.16.1 and above;
// the IPv6 twin of a last byte N is fd00::N.
func addr4(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 16, n}) }
func addr6(n byte) netip.Addr { return netip.AddrFrom16([16]byte{0: 0xfd, 15: n}) }

func backend(n byte, isDraining bool) ingress.Backend {
	return ingress.Backend{Task: weft.ID([]byte{'t', n}), Addr: addr4(n), Addr6: addr6(n), MAC: net.HardwareAddr{2, 0, 0, 0, 0, n}, Draining: isDraining}
}

func service(vip netip.Addr, b ...ingress.Backend) ingress.Service {
	return ingress.Service{ID: "web", VIP: vip, Backends: b}
}

func TestPlan(t *testing.T) {
	got, err := plan(ingress.Network{Speakers: []ingress.Speaker{{Addrs: []netip.Addr{addr4(9), addr6(9)}}}, Services: []ingress.Service{
		service(addr4(200), backend(2, true), backend(1, false)), service(addr6(200), backend(1, false)), service(addr4(201)),
	}})
	must(t, err)
	want := state{
		local: map[netip.Addr]bool{addr4(200): true, addr6(200): true, addr4(201): true},
		near:  map[netip.Addr]bool{addr4(9): true}, // IPv6 goes by the bridge
		neigh: map[netip.Addr]mac{addr4(1): {2, 0, 0, 0, 0, 1}, addr4(2): {2, 0, 0, 0, 0, 2}, addr6(1): {2, 0, 0, 0, 0, 1}},
		services: map[key][]dest{
			keyOf(addr4(200)): {{addr4(1), takes}, {addr4(2), drains}},
			keyOf(addr6(200)): {{addr6(1), takes}},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
	if k := keyOf(addr4(200)); k.is6 || !reflect.DeepEqual(binary.NativeEndian.AppendUint32(nil, k.mark), []byte{10, 0, 16, 200}) || k.String() != "service 10.0.16.200" {
		t.Errorf("mark %08x, %s", k.mark, k)
	}
	if k := keyOf(netip.MustParseAddr("fd00::1:2c8")); k.String() != "service ::1:2c8" {
		t.Errorf("got %s", k)
	}
}

func TestPlanRefuses(t *testing.T) {
	bare := backend(1, false)
	bare.Addr6 = netip.Addr{}
	for _, tc := range []struct {
		name  string
		bad   ingress.Service
		err   error
		words string
	}{
		{"another subnet, the same last bytes", service(netip.MustParseAddr("fd01::c8")), weft.ErrConflict, "service address fd01::c8: its last 32 bits are zero, or those of service address fd00::c8"},
		{"no last bytes", service(netip.MustParseAddr("fd00:1::")), weft.ErrConflict, "fd00:1::"},
		{"a backend of one family", service(addr6(201), bare), weft.ErrInvalid, "service address fd00::c9: backend t\x01 has no address of that family"},
	} {
		_, err := plan(ingress.Network{Services: []ingress.Service{service(addr6(200), backend(1, false)), tc.bad}})
		if !errors.Is(err, tc.err) || !strings.Contains(err.Error(), tc.words) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func drawState(t *rapid.T, name string) state {
	s := state{local: map[netip.Addr]bool{}, near: map[netip.Addr]bool{}, neigh: map[netip.Addr]mac{}, services: map[key][]dest{}}
	for _, n := range rapid.SliceOfDistinct(rapid.ByteRange(0, 3), rapid.ID).Draw(t, name+" tasks") {
		s.near[addr4(100+n)] = true
	}
	for _, n := range rapid.SliceOfDistinct(rapid.ByteRange(0, 7), rapid.ID).Draw(t, name+" services") {
		of := addr4
		if n%2 == 1 {
			of = addr6
		}
		vip := of(200 + n)
		s.local[vip] = true
		for _, b := range rapid.SliceOfDistinct(rapid.ByteRange(1, 5), rapid.ID).Draw(t, name+" backends") {
			s.neigh[of(b)] = mac{5: rapid.ByteRange(1, 2).Draw(t, name+" mac")}
			s.services[keyOf(vip)] = append(s.services[keyOf(vip)], dest{of(b), rapid.IntRange(drains, takes).Draw(t, name+" weight")})
		}
		sortDests(s.services[keyOf(vip)])
	}
	return s
}

// flat is the slow twin's view: one line for each object.
func flat(s state) map[string]string {
	out := map[string]string{}
	for a := range s.local {
		out["local "+a.String()] = ""
	}
	for a := range s.near {
		out["near "+a.String()] = ""
	}
	for a, m := range s.neigh {
		out["neigh "+a.String()] = fmt.Sprint(m)
	}
	for k, ds := range s.services {
		out["service "+fmt.Sprint(k.is6, k.mark)] = ""
		for _, d := range ds {
			out[fmt.Sprint("dest ", k.is6, k.mark, " ", d.addr)] = fmt.Sprint(d.weight)
		}
	}
	return out
}

// perform is a kernel in lines: what a service stands on must be there, and a
// service goes with its backends.
func perform(t *rapid.T, lines map[string]string, o op) {
	name, value := "service "+fmt.Sprint(o.key.is6, o.key.mark), ""
	switch {
	case o.local.IsValid():
		name = "local " + o.local.String()
	case o.near.IsValid():
		name = "near " + o.near.String()
	case o.neigh.IsValid():
		name, value = "neigh "+o.neigh.String(), fmt.Sprint(o.mac)
	case o.dest.addr.IsValid():
		if _, ok := lines[name]; !ok {
			t.Fatalf("%s: there is no such service", o)
		}
		name, value = fmt.Sprint("dest ", o.key.is6, o.key.mark, " ", o.dest.addr), fmt.Sprint(o.dest.weight)
	}
	_, there := lines[name]
	if there != (o.verb != add || o.neigh.IsValid() && there) {
		t.Fatalf("%s: there before: %v", o, there)
	}
	if o.verb != remove {
		lines[name] = value
		return
	}
	delete(lines, name)
	if prefix, ok := strings.CutPrefix(name, "service "); ok {
		maps.DeleteFunc(lines, func(l, _ string) bool { return strings.HasPrefix(l, "dest "+prefix+" ") })
	}
}

// TestDiff holds diff against flat lists: it leads there, does nothing twice and
// takes as many steps as lines differ, those of a service that goes being one.
func TestDiff(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		have, want := drawState(t, "have"), drawState(t, "want")
		ops := diff(have, want)
		h, w := flat(have), flat(want)
		least := 0
		for l, v := range w {
			if x, ok := h[l]; !ok || x != v {
				least++
			}
		}
		for l := range h {
			_, kept := w[l]
			parent := "service " + strings.TrimPrefix(l[:max(0, strings.LastIndexByte(l, ' '))], "dest ")
			if _, stays := w[parent]; !kept && (!strings.HasPrefix(l, "dest ") || stays) {
				least++
			}
		}
		if len(ops) != least {
			t.Fatalf("%d steps, want %d: %v", len(ops), least, ops)
		}
		for _, o := range ops {
			perform(t, h, o)
		}
		if !maps.Equal(h, w) {
			t.Fatalf("led to %v\nwant %v", h, w)
		}
		if again := diff(want, want); len(again) != 0 {
			t.Fatalf("again: %v", again)
		}
	})
}

// TestDamage: what is as it was left is no damage, and neither is what the wish
// explains; each object that differs from both is one.
func TestDamage(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		left, have, want := drawState(t, "left"), drawState(t, "have"), drawState(t, "want")
		if d := damage(7, left, left, want); len(d) != 0 {
			t.Fatalf("of nothing: %v", d)
		}
		got := damage(7, left, have, want)
		n := 0
		objects := func(s state) map[string]string {
			out := map[string]string{}
			for l, v := range flat(s) {
				if !strings.HasPrefix(l, "dest ") {
					out[l] = v
				}
			}
			for k, d := range s.services {
				out["service "+fmt.Sprint(k.is6, k.mark)] = fmt.Sprint(d)
			}
			return out
		}
		l, h, w := objects(left), objects(have), objects(want)
		for o := range h {
			_, inLeft := l[o]
			_, inWant := w[o]
			if !inLeft && !inWant {
				n++
			}
		}
		for o, v := range l {
			x, there := h[o]
			if y, wanted := w[o]; wanted && !(there && (x == v || x == y)) {
				n++
			}
		}
		if len(got) != n {
			t.Fatalf("%d repairs, want %d: %v", len(got), n, got)
		}
	})
}

// print is the kernel's list of services, in its words.
func print(services map[key][]dest) string {
	var b strings.Builder
	b.WriteString("IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n  -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n")
	for _, k := range slices.SortedFunc(maps.Keys(services), compareKeys) {
		fmt.Fprintf(&b, "FWM  %08X rr \n", k.mark)
		for _, d := range slices.Backward(services[k]) {
			a := d.addr.As16()
			if d.addr.Is6() {
				fmt.Fprintf(&b, "  -> [%s]:0000      %-7s %-6d %-10d %-10d\n", netip.AddrFrom16(a).StringExpanded(), "Route", d.weight, 3, 0)
			} else {
				fmt.Fprintf(&b, "  -> %08X:0000      %-7s %-6d %-10d %-10d\n", binary.BigEndian.Uint32(a[12:]), "Route", d.weight, 0, 12)
			}
		}
	}
	return b.String()
}

func TestParse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := drawState(t, "list").services
		got, err := parse(print(want))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("got %v, %v\nwant %v", got, err, want)
		}
	})
	head := print(nil)
	for name, list := range map[string]string{
		"a service of a port":      "TCP  0A0010C8:0050 rr \n",
		"another scheduler":        "FWM  C810000A wrr \n",
		"persistent":               "FWM  C810000A rr persistent 300 FFFFFFFF\n",
		"one without backends":     "FWM  C810000A rr \n",
		"the first without":        "FWM  C810000A rr \nFWM  C910000A rr \n  -> 0A00100B:0000      Route   1      0          0         \n",
		"a backend of a port":      "FWM  C810000A rr \n  -> 0A00100B:0050      Route   1      0          0         \n",
		"a translated backend":     "FWM  C810000A rr \n  -> 0A00100B:0000      Masq    1      0          0         \n",
		"backends of two families": "FWM  C810000A rr \n  -> 0A00100B:0000      Route   1      0          0         \n  -> [fd00:0000:0000:0000:0000:0000:0000:000b]:0000      Route   1      0          0         \n",
		"an address cut short":     "FWM  C810000A rr \n  -> 0A001:0000      Route   1      0          0         \n",
	} {
		if got, err := parse(head + list); !errors.Is(err, errOdd) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(print(map[key][]dest{keyOf(addr4(200)): {{addr4(1), takes}}, keyOf(addr6(200)): {{addr6(1), drains}}}))
	f.Fuzz(func(t *testing.T, list string) {
		services, err := parse(list)
		if err != nil {
			return
		}
		if again, err := parse(print(services)); err != nil || !reflect.DeepEqual(again, services) {
			t.Errorf("%q read as %v, printed and read as %v, %v", list, services, again, err)
		}
	})
}

// TestNames: which links Close takes for its own.
func TestNames(t *testing.T) {
	for name, want := range map[string]bool{"wi4097": true, "wi0": true, "wi": false, "wi04097": false, "wb4097": false, "wi4097x": false, "wi-1": false} {
		if got := isNamed(name, weft.BalancerName); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, c := range []Config{{NetNSDir: "/run/x"}, {Node: "n", NetNSDir: "x"}} {
		if _, err := New(c); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	e, err := New(Config{Node: "n", NetNSDir: t.TempDir()})
	must(t, err)
	if err := e.Apply(t.Context(), ingress.Table{Published: []ingress.Published{{Port: 80}}}); !errors.Is(err, weft.ErrUnsupported) {
		t.Errorf("published ports: %v", err)
	}
}
