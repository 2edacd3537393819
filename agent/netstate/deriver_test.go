package netstate

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// derived is an Input that a test changes step by step: by one service, endpoint or
// local task most often. Few addresses and ids make them clash.
type derived struct{ in Input }

func newDerived(t *rapid.T) *derived {
	secret := network("secret", 4099, "10.0.48.0/20", false)
	secret.Spec.Options = map[string]string{weft.OptionEncrypted: ""}
	bare := network("bare", 4100, "10.0.64.0/20", false)
	bare.Spec.Options = map[string]string{weft.OptionEncap: weft.EncapNative}
	dual := network("dual", 4101, "10.0.80.0/20", false)
	dual.Spec.IPv6 = true
	dual.Spec.Subnets = append(dual.Spec.Subnets, weft.Subnet{Prefix: netip.MustParsePrefix("fd00:1::/64")})
	third := Node{ID: "n3", Hostname: "h3", VTEP: netip.MustParseAddr("10.99.0.3"), IngressAddr: netip.MustParsePrefix("10.255.0.9/16")}
	return &derived{Input{
		Self: self, NetNSDir: "/ns", DataPathPort: 4789, MTU: 1500, Proven: map[vxlan.NativeWay]bool{},
		Networks:  []weft.Network{back, bare, dual, front, mesh, secret},
		Nodes:     []Node{self, other, third},
		Paths:     map[netip.Addr]int{vtep2: rapid.SampledFrom([]int{1400, 1500}).Draw(t, "path")},
		HostAddrs: []weft.HostAddr{{Interface: "eth0", Addr: vtep1}},
		NoIPv6:    rapid.IntRange(0, 4).Draw(t, "without IPv6") == 0,
	}}
}

var derivedNetworks = []weft.ID{"front", "front", "ingress", "ingress", "dual", "back", "secret", "bare"}

// addr is one of a few addresses of a network, of two families where it has them.
func (d *derived) addr(t *rapid.T, network weft.ID) weft.Attachment {
	all := append(slices.Clone(d.in.Networks), back) // it comes and goes
	i := slices.IndexFunc(all, func(n weft.Network) bool { return n.ID == network })
	at := weft.Attachment{Network: network}
	for _, s := range all[i].Spec.Subnets {
		a := s.Prefix.Addr().AsSlice()
		a[len(a)-1] = byte(rapid.IntRange(1, 40).Draw(t, "host part"))
		p := netip.PrefixFrom(addrOf(a), s.Prefix.Bits())
		if p.Addr().Is6() {
			at.Addr6 = p
			continue
		}
		at.Addr = p
	}
	return at
}

func addrOf(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a
}

func (d *derived) service(t *rapid.T) Service {
	id := weft.ID(fmt.Sprintf("s%d", rapid.IntRange(0, 9).Draw(t, "service")))
	s := Service{ID: id, Name: string(id), Mode: rapid.SampledFrom([]weft.EndpointMode{weft.EndpointVIP, weft.EndpointVIP, weft.EndpointDNSRR}).Draw(t, "mode"),
		HideClient: rapid.IntRange(0, 5).Draw(t, "hides") == 0}
	nets := map[weft.ID]bool{}
	for range rapid.IntRange(0, 2).Draw(t, "networks") {
		nets[rapid.SampledFrom(derivedNetworks).Draw(t, "network")] = true
	}
	for _, n := range slices.Sorted(maps.Keys(nets)) {
		s.VIPs = append(s.VIPs, weft.VIP(d.addr(t, n)))
		if n != "ingress" {
			s.Networks = append(s.Networks, weft.NetworkTarget{Network: n, Aliases: rapid.SampledFrom([][]string{nil, {"www"}}).Draw(t, "aliases")})
		}
	}
	for range rapid.IntRange(0, 2).Draw(t, "ports") {
		s.Ports = append(s.Ports, d.port(t))
	}
	return s
}

func (d *derived) port(t *rapid.T) weft.PortSpec {
	p := weft.PortSpec{
		Protocol: weft.TCP, Target: uint16(rapid.IntRange(80, 82).Draw(t, "target")), Published: uint16(rapid.IntRange(8000, 8012).Draw(t, "published")),
		Count: uint16(rapid.SampledFrom([]int{0, 0, 3}).Draw(t, "count")), Name: rapid.SampledFrom([]string{"", "web"}).Draw(t, "name"),
	}
	if rapid.IntRange(0, 4).Draw(t, "in mode host") == 0 {
		p.Mode = weft.PublishHost
	}
	if rapid.IntRange(0, 4).Draw(t, "bound") == 0 {
		p.IPs = []netip.Addr{vtep1}
	}
	return p
}

func (d *derived) state(t *rapid.T) weft.EndpointState {
	return rapid.SampledFrom([]weft.EndpointState{weft.EndpointStarting, weft.EndpointReady, weft.EndpointDraining}).Draw(t, "state")
}

func (d *derived) endpoint(t *rapid.T) weft.OwnedEndpoint {
	n := rapid.IntRange(0, 30).Draw(t, "task")
	network := rapid.SampledFrom(derivedNetworks).Draw(t, "network")
	at := d.addr(t, network)
	e := weft.OwnedEndpoint{Owner: "n2", VTEP: vtep2, Endpoint: weft.Endpoint{
		Network: network, Task: weft.ID(fmt.Sprintf("t%d", n)), Service: weft.ID(fmt.Sprintf("s%d", n%10)), Slot: uint64(n),
		Addr: at.Addr.Addr(), Addr6: at.Addr6.Addr(), State: d.state(t),
	}}
	switch rapid.IntRange(0, 9).Draw(t, "owner") {
	case 0:
		e.Owner = "stranger"
	case 1, 2, 3:
		e.Owner, e.VTEP = "n3", netip.MustParseAddr("10.99.0.3")
	case 4:
		e.Owner, e.VTEP = "n1", vtep1
	}
	return e
}

func (d *derived) localTask(t *rapid.T) LocalTask {
	n := rapid.IntRange(40, 46).Draw(t, "task")
	l := LocalTask{
		Task:  weft.Task{ID: weft.ID(fmt.Sprintf("t%d", n)), Service: weft.ID(fmt.Sprintf("s%d", n%10)), Slot: uint64(n)},
		NetNS: fmt.Sprint("/ns/", n), State: d.state(t), Gateway: netip.MustParseAddr("172.31.0.9"),
	}
	for range rapid.IntRange(1, 2).Draw(t, "attachments") {
		l.Task.Attachments = append(l.Task.Attachments, d.addr(t, rapid.SampledFrom(derivedNetworks).Draw(t, "network")))
	}
	if rapid.IntRange(0, 3).Draw(t, "with ports") == 0 {
		p := d.port(t)
		p.Mode = weft.PublishHost
		l.Task.Ports = []weft.PortSpec{p}
	}
	return l
}

// step changes the Input, without writing to what a Deriver may have kept.
func (d *derived) step(t *rapid.T) {
	in := &d.in
	switch rapid.IntRange(0, 13).Draw(t, "step") {
	case 0, 1, 2:
		s := d.service(t)
		in.Services = append(without1(in.Services, func(o Service) bool { return o.ID == s.ID }), s)
	case 3:
		in.Services = removeAny(t, in.Services)
	case 4, 5, 6:
		e := d.endpoint(t)
		in.Endpoints = append(without1(in.Endpoints, func(o weft.OwnedEndpoint) bool {
			return o.Task == e.Task && o.Network == e.Network && o.Owner == e.Owner
		}), e)
	case 7:
		in.Endpoints = removeAny(t, in.Endpoints)
	case 8, 9:
		l := d.localTask(t)
		in.Local = append(without1(in.Local, func(o LocalTask) bool { return o.Task.ID == l.Task.ID }), l)
	case 10:
		in.Local = removeAny(t, in.Local)
	case 11, 12: // the most frequent: a task gets ready, or drains
		if len(in.Local) > 0 {
			in.Local = slices.Clone(in.Local)
			in.Local[rapid.IntRange(0, len(in.Local)-1).Draw(t, "which")].State = d.state(t)
		}
	case 13:
		switch rapid.IntRange(0, 3).Draw(t, "what else") {
		case 0:
			in.Paths = map[netip.Addr]int{vtep2: rapid.SampledFrom([]int{1300, 1400, 1500}).Draw(t, "path")}
		case 1:
			in.Nodes = slices.Clone(in.Nodes)
			in.Nodes[2].IngressAddr = d.addr(t, "ingress").Addr
		case 2:
			in.Networks = slices.Clone(in.Networks)
			if n := &in.Networks[0]; n.ID == "back" {
				in.Networks = in.Networks[1:]
			} else {
				in.Networks = append(in.Networks, back)
			}
		case 3:
			in.Services, in.Endpoints = shuffled(t, in.Services), shuffled(t, in.Endpoints)
		}
	}
}

func without1[T any](list []T, is func(T) bool) []T { return slices.DeleteFunc(slices.Clone(list), is) }

func removeAny[T any](t *rapid.T, list []T) []T {
	if len(list) == 0 {
		return list
	}
	i := rapid.IntRange(0, len(list)-1).Draw(t, "which")
	return slices.Delete(slices.Clone(list), i, i+1)
}

func shuffled[T any](t *rapid.T, list []T) []T { return rapid.Permutation(list).Draw(t, "order") }

// TestDeriverIsDerive: what a Deriver makes of each Input after the other is what
// Derive makes of it alone, and what it has given out stays as it was.
func TestDeriverIsDerive(t *testing.T) {
	var all, wholes int
	rapid.Check(t, func(t *rapid.T) {
		w := newDerived(t)
		var d Deriver
		var given, twins []Output
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			w.step(t)
			given, twins = append(given, d.Derive(w.in)), append(twins, Derive(w.in))
			if n := len(given) - 1; !reflect.DeepEqual(given[n], twins[n]) {
				t.Fatalf("step %d: %s", n, difference("Output", reflect.ValueOf(given[n]), reflect.ValueOf(twins[n])))
			}
			all++
		}
		for i := range given {
			if !reflect.DeepEqual(given[i], twins[i]) {
				t.Fatalf("the Output of step %d was changed by a later one", i)
			}
		}
		wholes += d.wholes
	})
	t.Logf("%d of %d Outputs were made whole", wholes, all)
	if all > 500 && (wholes == 0 || wholes > all*4/5) {
		t.Errorf("%d of %d Outputs were made whole: both ways are to be tried", wholes, all)
	}
}

// difference names the first part in which two values differ.
func difference(path string, a, b reflect.Value) string {
	at := func(key any, x, y reflect.Value) string {
		if reflect.DeepEqual(x.Interface(), y.Interface()) {
			return ""
		}
		return difference(fmt.Sprintf("%s.%v", path, key), x, y)
	}
	switch a.Kind() {
	case reflect.Struct:
		for i := range a.NumField() {
			if f := a.Type().Field(i); f.IsExported() {
				if d := at(f.Name, a.Field(i), b.Field(i)); d != "" {
					return d
				}
			}
		}
	case reflect.Map:
		for _, k := range a.MapKeys() {
			if y := b.MapIndex(k); y.IsValid() {
				if d := at(k, a.MapIndex(k), y); d != "" {
					return d
				}
			}
		}
	}
	return fmt.Sprintf("%s by the last one\n%+v\nwhole\n%+v", path, a, b)
}
