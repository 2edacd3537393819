package bpf

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// expressRig is an engine and its slow twin, which reads everything in each pass.
// What somebody else does is done to the maps of both.
type expressRig struct {
	t       *rapid.T
	dir     func(engine int) string
	engines [2]*Engine
	// networks have the services; damaged are the entries, as text, that somebody
	// has spoilt since the first engine read everything.
	networks []ingress.Network
	damaged  map[string]bool
	repairs  [2]int
	flows    []flowKey
}

func (x *expressRig) open(engine int, name string) *ebpf.Map {
	m, err := ebpf.LoadPinnedMap(filepath.Join(x.dir(engine), name), nil)
	if err != nil {
		x.t.Fatal(err)
	}
	return m
}

// both calls f with the map of each engine.
func (x *expressRig) both(name string, f func(*ebpf.Map) error) {
	for i := range x.engines {
		m := x.open(i, name)
		if err := f(m); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			x.t.Fatal(err)
		}
		m.Close()
	}
}

// change edits services of a network, whose backends are of few tasks,
// so that rings and backends have several services.
func (x *expressRig) change() {
	networks := slices.Clone(x.networks)
	for range rapid.IntRange(1, 3).Draw(x.t, "edits") {
		n := &networks[rapid.IntRange(0, len(networks)-1).Draw(x.t, "network")]
		vip := netip.AddrFrom4([4]byte{10, 0, 16, rapid.ByteRange(200, 203).Draw(x.t, "vip")})
		s := slices.Clone(n.Services)
		i := slices.IndexFunc(s, func(s ingress.Service) bool { return s.VIP == vip })
		switch {
		case i < 0:
			s = slices.Insert(s, rapid.IntRange(0, len(s)).Draw(x.t, "place"), ingress.Service{VIP: vip, Backends: x.backends()})
		case rapid.IntRange(0, 3).Draw(x.t, "goes") == 0:
			s = slices.Delete(s, i, i+1)
		default:
			s[i].Backends = x.backends()
		}
		n.Services = s
	}
	x.networks = networks
}

func (x *expressRig) backends() []ingress.Backend {
	pick := rapid.SliceOfNDistinct(rapid.ByteRange(1, 12), 0, 10, rapid.ID)
	var out []ingress.Backend
	for _, n := range pick.Draw(x.t, "backends") {
		b := ingress.Backend{Task: weft.ID(fmt.Sprint("t", n)), Addr: netip.AddrFrom4([4]byte{10, 0, 16, n}), MAC: []byte{2, 0, 0, 0, 0, n},
			Draining: rapid.IntRange(0, 3).Draw(x.t, "drains") == 0}
		if rapid.IntRange(0, 9).Draw(x.t, "other address") == 0 {
			b.Addr6 = netip.AddrFrom16([16]byte{0xfd, 15: n})
		}
		out = append(out, b)
	}
	return out
}

// spoil does to an entry what weft would not.
func (x *expressRig) spoil() {
	have := x.have(1) // as a pass over everything left it
	services := slices.SortedFunc(maps.Keys(have.services), func(a, b overlay.AddrKey) int { return slices.Compare(a.Addr[:], b.Addr[:]) })
	if len(services) == 0 {
		return
	}
	key := rapid.SampledFrom(services).Draw(x.t, "spoilt")
	value := have.services[key]
	switch what := rapid.SampledFrom([]string{"service gone", "service wrong", "service stray", "slots gone", "slots wrong", "backend gone"}).Draw(x.t, "spoil"); what {
	case "service gone":
		x.damaged[fmt.Sprint(key)] = true
		x.both("balance/"+balanceMapServices, func(m *ebpf.Map) error { return m.Delete(key) })
	case "service wrong":
		x.damaged[fmt.Sprint(key)] = true
		x.both("balance/"+balanceMapServices, func(m *ebpf.Map) error { return m.Put(key, serviceValue{Ring: 7, Size: 64}) })
	case "service stray":
		key.Addr[15] = 99
		x.damaged[fmt.Sprint(key)] = true
		x.both("balance/"+balanceMapServices, func(m *ebpf.Map) error { return m.Put(key, value) })
	case "slots gone", "slots wrong":
		k := slotKey{Ring: value.Ring}
		if value.Ring == 0 {
			return
		}
		x.damaged[fmt.Sprint(k)] = true
		x.both("balance/"+balanceMapSlots, func(m *ebpf.Map) error {
			if what == "slots gone" {
				return m.Delete(k)
			}
			return m.Put(k, chunkValue{})
		})
	case "backend gone":
		k := backendKey{VNI: key.VNI, MAC: vxlan.MAC{2, 0, 0, 0, 0, 1}}
		x.damaged[fmt.Sprint(k)] = true
		x.both("balance/"+socketMapBackends, func(m *ebpf.Map) error { return m.Delete(k) })
	}
}

// flow is one that the kernel remembers: it leads where the service may.
func (x *expressRig) flow() {
	n := rapid.SampledFrom(x.networks).Draw(x.t, "flow of network")
	if len(n.Services) == 0 {
		return
	}
	s := rapid.SampledFrom(n.Services).Draw(x.t, "flow to")
	if len(s.Backends) == 0 {
		return
	}
	b := rapid.SampledFrom(s.Backends).Draw(x.t, "flow at")
	f := flowKey{VNI: n.VNI, Dst: overlay.KeyOf(n.VNI, s.VIP).Addr, SPort: uint16(len(x.flows)), Proto: 6}
	x.flows = append(x.flows, f)
	x.both("balance/"+balanceMapFlows, func(m *ebpf.Map) error { return m.Put(f, overlay.ValueOf(vxlan.MACOf(b.MAC))) })
}

func (x *expressRig) have(engine int) tables {
	dir := filepath.Join(x.dir(engine), "balance")
	p := &pinned{maps: map[string]*ebpf.Map{}}
	defer p.close()
	for _, name := range []string{balanceMapServices, balanceMapSlots, socketMapTasks, socketMapBackends} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if err != nil {
			x.t.Fatal(err)
		}
		p.maps[name] = m
	}
	var out tables
	var errs [4]error
	out.services, errs[0] = overlay.Dump[overlay.AddrKey, serviceValue](p.maps[balanceMapServices])
	out.slots, errs[1] = overlay.Dump[slotKey, chunkValue](p.maps[balanceMapSlots])
	out.tasks, errs[2] = overlay.Dump[uint64, taskValue](p.maps[socketMapTasks])
	out.backends, errs[3] = overlay.Dump[backendKey, backendValue](p.maps[socketMapBackends])
	if err := errors.Join(errs[:]...); err != nil {
		x.t.Fatal(err)
	}
	return out
}

// differing are the keys, as text, that two maps do not have alike.
func differing[K, V comparable](a, b map[K]V) []string {
	var out []string
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			out = append(out, fmt.Sprint(k))
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			out = append(out, fmt.Sprint(k))
		}
	}
	return out
}

// apply has both engines apply, and looks at what they made of it.
func (x *expressRig) apply() {
	t := ingress.Table{Networks: x.networks}
	before := x.engines[0].express
	x.engines[1].whole = wholePass{} // the twin remembers nothing
	for _, e := range x.engines {
		if err := e.Apply(context.Background(), t); err != nil {
			x.t.Fatal(err)
		}
		e.sockets.sweepAt = time.Time{}
	}
	if x.engines[0].express == before {
		x.damaged = map[string]bool{}
	}
	want, keep := plan(x.networks)
	want.socketTables = planSockets(x.networks, x.engines[0].sockets.cookie)
	for i := range x.engines {
		have := x.have(i)
		for _, key := range slices.Concat(differing(want.services, have.services), differing(want.slots, have.slots),
			differing(want.tasks, have.tasks), differing(want.backends, have.backends)) {
			if i == 1 || !x.damaged[key] {
				x.t.Fatalf("engine %d (%d express passes): %s is not as it should be, and nobody has spoilt it since", i, x.engines[0].express, key)
			}
		}
		m := x.open(i, "balance/"+balanceMapFlows)
		flows, err := overlay.Dump[flowKey, overlay.MACValue](m)
		m.Close()
		if err != nil {
			x.t.Fatal(err)
		}
		for f, v := range flows {
			if !keep.allows(f, v.MAC) {
				x.t.Fatalf("engine %d: a flow to %x leads to %v, which is gone", i, f.Dst, v.MAC)
			}
		}
	}
}

// TestExpressIsAsGood: an engine that changes a few entries has the maps that its twin
// has, which reads everything each time, but for what somebody else has spoilt and
// no change was about; a pass that brings nothing new mends that. Nothing is repaired
// that nobody has spoilt.
func TestExpressIsAsGood(t *testing.T) {
	bed := newBed(t, "")
	_, client := bed.task(0, 50)
	bed.apply()
	cgroup := placeOf(t, bed.nodes[0])
	var engines [2]*Engine
	for i := range engines {
		var err error
		engines[i], err = New(Config{Node: bed.nodes[i], Dir: bed.mount(i), Cgroup: cgroup})
		must(t, err)
		defer func() { must(t, engines[i].Close(context.Background())) }()
	}
	express := 0
	rapid.Check(t, func(r *rapid.T) {
		x := &expressRig{t: r, damaged: map[string]bool{}, engines: engines}
		x.dir = func(i int) string { return overlay.PinDir(bed.mount(i), bed.nodes[i]) }
		x.apply() // what the last round left goes
		x.apply()
		for i, e := range engines {
			e.repaired, e.express = func(weft.Repair) { x.repairs[i]++ }, 0
		}
		x.networks = []ingress.Network{{VNI: vni, NetNS: "a", Tasks: []string{client}, Services: []ingress.Service{{VIP: netip.MustParseAddr("10.0.16.210")}}}}
		x.apply()
		spoilt := false
		for range rapid.IntRange(1, 8).Draw(r, "steps") {
			switch rapid.IntRange(0, 4).Draw(r, "step") {
			case 0:
				x.spoil()
				spoilt = true
			case 1:
				x.flow()
			default:
				x.change()
				x.apply()
			}
		}
		x.apply() // the same again, or what was not applied yet
		x.apply()
		if len(x.damaged) > 0 {
			r.Fatalf("nothing is new, and nobody looked at %v", x.damaged)
		}
		if !spoilt && x.repairs != [2]int{} {
			r.Fatalf("%v repairs of what nobody spoilt", x.repairs)
		}
		express += x.engines[0].express
		if x.engines[1].express > 0 {
			r.Fatal("the twin has not read everything")
		}
	})
	if express == 0 {
		t.Error("no pass was express")
	}
}

// TestExpressLooksFirst: what forbids a pass over few entries.
func TestExpressLooksFirst(t *testing.T) {
	bed := newBed(t, "")
	_, client := bed.task(0, 50)
	bed.apply()
	cgroup, _ := CgroupOf(bed.nodes[0])
	var repaired []string
	e, err := New(Config{Node: bed.nodes[0], Dir: bed.mount(0), Cgroup: cgroup, Repaired: func(r weft.Repair) { repaired = append(repaired, r.Kind) }})
	must(t, err)
	defer func() { must(t, e.Close(context.Background())) }()
	services := manyServices(3, 10)
	network := ingress.Network{VNI: vni, NetNS: bed.dir, Tasks: []string{client}, Services: services}
	apply := func(n ingress.Network) {
		must(t, e.Apply(context.Background(), ingress.Table{Networks: []ingress.Network{n}}))
	}
	less := func(n int) ingress.Network {
		out := network
		out.Services = slices.Clone(services)
		out.Services[1].Backends = services[1].Backends[:n]
		return out
	}
	dir := overlay.PinDir(bed.mount(0), bed.nodes[0])
	for _, c := range []struct {
		name    string
		spoil   func() error
		then    ingress.Network
		express bool
		repairs string
	}{
		{"nothing", nil, less(9), true, "[]"},
		{"nothing new", nil, network, false, "[]"},
		{"another task", nil, func() ingress.Network { n := less(9); n.Tasks = nil; return n }(), false, "[]"},
		{"no services", nil, func() ingress.Network { n := less(9); n.Services = nil; return n }(), false, "[]"},
		{"long after", func() error { e.whole.at = time.Now().Add(-time.Hour); return nil }, less(9), false, "[]"},
		{"connections that were spared", func() error { e.sockets.sweepAt = time.Now(); return nil }, less(9), false, "[]"},
		{"the hook is empty", func() error {
			m, err := ebpf.LoadPinnedMap(filepath.Join(dir, overlay.MapHooks), nil)
			if err != nil {
				return err
			}
			defer m.Close()
			return m.Delete(overlay.HookBalance)
		}, less(9), false, "[hook wrong]"},
		{"a map is another one", func() error {
			path := filepath.Join(dir, "balance", balanceMapSlots)
			m, err := ebpf.LoadPinnedMap(path, nil)
			if err != nil {
				return err
			}
			defer m.Close()
			return m.Unpin()
		}, less(9), false, "[map missing]"},
		{"its service is gone", func() error {
			m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "balance", balanceMapServices), nil)
			if err != nil {
				return err
			}
			defer m.Close()
			return m.Delete(overlay.KeyOf(vni, services[1].VIP))
		}, less(9), false, "[service missing]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			apply(network)
			apply(network)
			if e.sockets.sweepAt = (time.Time{}); e.whole.memory == nil {
				t.Fatal("a pass without fault is not remembered")
			}
			repaired = nil
			if c.spoil != nil {
				must(t, c.spoil())
			}
			before := e.express
			apply(c.then)
			if got := e.express > before; got != c.express || fmt.Sprint(repaired) != c.repairs {
				t.Errorf("express: %v, repaired %v; want %v, %s", got, repaired, c.express, c.repairs)
			}
		})
	}
}
