package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	kernel "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// need ends the test where the kernel has no IPVS.
func need(t testing.TB) {
	t.Helper()
	netnstest.NeedRoot(t)
	e, err := New(Config{Node: "probe", NetNSDir: t.TempDir()})
	must(t, err)
	if err := e.Probe(t.Context()); errors.Is(err, weft.ErrUnsupported) {
		netnstest.Missing(t, "ipvs", err)
	} else {
		must(t, err)
	}
}

// TestProbeNamesWhatIsMissing holds where the others cannot run.
func TestProbeNamesWhatIsMissing(t *testing.T) {
	netnstest.NeedRoot(t)
	dir := t.TempDir()
	e, err := New(Config{Node: "probe", NetNSDir: dir})
	must(t, err)
	if err := e.Probe(t.Context()); err != nil && (!errors.Is(err, weft.ErrUnsupported) || !strings.Contains(err.Error(), "ip_vs")) {
		t.Errorf("got %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestStraight: a kernel that can take a frame out at its port does.
func TestStraight(t *testing.T) {
	h := newHall(t)
	if err := h.e.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := h.e.Note(); n != "" {
		netnstest.Missing(t, "broute", errors.New(n))
	}
}

// TestBridgeIsNotThereYet, as when the host has just booted: the next pass finds
// it. It needs no IPVS. The daemon died of it once.
func TestBridgeIsNotThereYet(t *testing.T) {
	netnstest.NeedRoot(t)
	path, err := netns.Create(t.TempDir(), "weft-early")
	must(t, err)
	t.Cleanup(func() { must(t, netns.Remove(path)) })
	must(t, netns.Do(path, func() error {
		if l, _, err := openLeg("br", "lb", false); l != nil || !errors.Is(err, weft.ErrUnavailable) || !strings.Contains(err.Error(), "bridge br") {
			t.Errorf("without a bridge: %v, %v", l, err)
		}
		return nil
	}))
}

// hall is a hidden namespace with a bridge and an engine.
type hall struct {
	t        testing.TB
	e        *Engine
	path     string
	speakers []ingress.Speaker
	ports    []string
	repaired []string
}

const hallVNI = 4097

func newHall(t testing.TB) *hall {
	need(t)
	h := &hall{t: t}
	dir := t.TempDir()
	node := weft.ID("hall")
	path, err := netns.Create(dir, weft.OverlayNetNS(node, hallVNI))
	must(t, err)
	h.path = path
	t.Cleanup(func() { must(t, netns.Remove(path)) })
	h.in(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Flags, attrs.HardwareAddr = "br", net.FlagUp, net.HardwareAddr{0x0e, 0, 0, 0, 16, 1}
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	})
	h.e, err = New(Config{Node: node, NetNSDir: dir, Repaired: func(r weft.Repair) { h.repaired = append(h.repaired, r.Kind) }})
	must(t, err)
	return h
}

func (h *hall) in(f func() error) {
	h.t.Helper()
	must(h.t, netns.Do(h.path, f))
}

func (h *hall) table(services ...ingress.Service) ingress.Table {
	return ingress.Table{Networks: []ingress.Network{{VNI: hallVNI, NetNS: h.path, Bridge: "br", IPv6: true, Ports: h.ports, Speakers: h.speakers, Services: services}}}
}

func (h *hall) apply(services ...ingress.Service) {
	h.t.Helper()
	must(h.t, h.e.Apply(h.t.Context(), h.table(services...)))
}

// read is what the namespace holds.
func (h *hall) read() (s state) {
	h.t.Helper()
	h.in(func() error {
		k, err := kernel.New("")
		if err != nil {
			return err
		}
		defer k.Close()
		l, _, err := openLeg("br", weft.BalancerName(hallVNI), true)
		if err != nil {
			return err
		}
		defer l.close()
		if err = l.setOut(hallVNI); err != nil {
			return err
		}
		want, err := plan(h.table().Networks[0])
		if err != nil {
			return err
		}
		if s, err = l.read(true, want.near); err != nil {
			return err
		}
		s.services, _, err = readServices(k, hallVNI)
		return err
	})
	return s
}

func (h *hall) wants(services ...ingress.Service) {
	h.t.Helper()
	want, err := plan(h.table(services...).Networks[0])
	must(h.t, err)
	if have := h.read(); !reflect.DeepEqual(have, want) {
		h.t.Errorf("the namespace has %v\nwant %v", have, want)
	}
}

// TestSequence: what stands there is what was asked for last, whether the pass was
// over everything or not, and nothing of it is a repair.
func TestSequence(t *testing.T) {
	h := newHall(t)
	four, six := addr4(200), addr6(200)
	for i, step := range []struct {
		name     string
		services []ingress.Service
		express  bool
	}{
		{"one", []ingress.Service{service(four, backend(1, false))}, false},
		{"the other family", []ingress.Service{service(four, backend(1, false)), service(six, backend(1, false))}, true},
		{"a backend joins", []ingress.Service{service(four, backend(1, false), backend(2, false)), service(six, backend(1, false))}, true},
		{"one drains", []ingress.Service{service(four, backend(1, true), backend(2, false)), service(six, backend(1, true))}, true},
		{"and goes", []ingress.Service{service(four, backend(2, false)), service(six)}, true},
		{"the same again", []ingress.Service{service(four, backend(2, false)), service(six)}, false},
		{"another service", []ingress.Service{service(addr4(201), backend(2, false))}, true},
		{"none", nil, true},
		{"and none", nil, false},
	} {
		before := h.e.express
		h.apply(step.services...)
		if was := h.e.express > before; was != step.express {
			t.Errorf("step %d, %s: express %v", i, step.name, was)
		}
		if !step.express { // neighbours that nobody needs go with a whole pass
			h.wants(step.services...)
		}
	}
	if len(h.repaired) > 0 {
		t.Errorf("repaired %v", h.repaired)
	}
}

// TestRepairs: whatever of ours is damaged, the next Apply mends and counts once.
func TestRepairs(t *testing.T) {
	h := newHall(t)
	services := []ingress.Service{service(addr4(200), backend(1, false), backend(2, true)), service(addr6(200), backend(1, false))}
	ipvs := func(f func(*kernel.Handle) error) func() error {
		return func() error {
			k, err := kernel.New("")
			if err != nil {
				return err
			}
			defer k.Close()
			return f(k)
		}
	}
	link := func(f func(netlink.Link) error) func() error {
		return func() error {
			l, err := netlink.LinkByName(weft.BalancerName(hallVNI))
			if err != nil {
				return err
			}
			return f(l)
		}
	}
	four := &kernel.Service{FWMark: keyOf(addr4(200)).mark, AddressFamily: unix.AF_INET, SchedName: roundRobin}
	first := &kernel.Destination{Address: addr4(1).AsSlice(), AddressFamily: unix.AF_INET, Weight: 5, ConnectionFlags: kernel.ConnFwdDirectRoute}
	neigh := func(l netlink.Link, m byte) *netlink.Neigh {
		return &netlink.Neigh{LinkIndex: l.Attrs().Index, IP: addr4(1).AsSlice(), HardwareAddr: net.HardwareAddr{2, 9, 9, 9, 9, m}, State: netlink.NUD_PERMANENT}
	}
	for _, c := range []struct {
		name  string
		spoil func() error
		want  string
	}{
		{"nothing", func() error { return nil }, ""},
		{"all services gone", ipvs((*kernel.Handle).Flush), "service missing,service missing"},
		{"a service gone", ipvs(func(k *kernel.Handle) error { return k.DelService(four) }), "service missing"},
		{"a backend gone", ipvs(func(k *kernel.Handle) error { return k.DelDestination(four, first) }), "service wrong"},
		{"a backend's weight", ipvs(func(k *kernel.Handle) error { return k.UpdateDestination(four, first) }), "service wrong"},
		{"another mark", ipvs(func(k *kernel.Handle) error {
			s := *four
			s.FWMark, s.Netmask = 7, 0xffffffff
			return errors.Join(k.NewService(&s), k.NewDestination(&s, first))
		}), "service stray"},
		{"a service of a port", ipvs(func(k *kernel.Handle) error {
			return k.NewService(&kernel.Service{Address: addr4(200).AsSlice(), Protocol: unix.IPPROTO_TCP, Port: 80, AddressFamily: unix.AF_INET, SchedName: roundRobin, Netmask: 0xffffffff})
		}), "service stray"},
		{"timeouts", ipvs(func(k *kernel.Handle) error { return k.SetConfig(&kernel.Config{TimeoutTCP: 900 * time.Second}) }), "ipvs timeouts wrong"},
		{"device gone", link(netlink.LinkDel), "balancer wrong"},
		{"device down", link(netlink.LinkSetDown), "balancer wrong"},
		{"device narrow", link(func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) }), "balancer wrong"},
		{"route gone", link(func(l netlink.Link) error {
			return netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Protocol: routeProtocol,
				Dst: &net.IPNet{IP: addr4(200).AsSlice(), Mask: net.CIDRMask(32, 32)}})
		}), "service route missing"},
		{"ways gone", link(func(l netlink.Link) error {
			return netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
		}), "balancer wrong"},
		{"neighbour gone", link(func(l netlink.Link) error { return netlink.NeighDel(neigh(l, 0)) }), "backend missing"},
		{"neighbour wrong", link(func(l netlink.Link) error { return netlink.NeighSet(neigh(l, 1)) }), "backend wrong"},
		{"neighbour stray", link(func(l netlink.Link) error {
			n := neigh(l, 1)
			n.IP = addr4(77).AsSlice()
			return netlink.NeighSet(n)
		}), "backend stray"},
		{"sysctl", func() error { return os.WriteFile("/proc/sys/net/ipv4/vs/expire_nodest_conn", []byte("0"), 0) }, "sysctl wrong"},
		{"table replaced", func() error {
			d := nft.NewDiverter(nil)
			return d.Remove(h.path)
		}, "nft table wrong"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h.apply(services...)
			h.repaired = nil
			h.in(c.spoil)
			h.apply(services...)
			h.apply(services...) // nothing is counted again
			slices.Sort(h.repaired)
			if got := strings.Join(h.repaired, ","); got != c.want {
				t.Errorf("repaired %q, want %q", got, c.want)
			}
			h.wants(services...)
		})
	}
}

// TestExpressLooksFirst: a change of a service that somebody has damaged leads to
// a whole pass.
func TestExpressLooksFirst(t *testing.T) {
	h := newHall(t)
	h.apply(service(addr4(200), backend(1, false), backend(2, false)))
	h.in(func() error {
		k, err := kernel.New("")
		if err != nil {
			return err
		}
		defer k.Close()
		return k.Flush()
	})
	now := service(addr4(200), backend(1, false), backend(3, false))
	h.apply(now)
	if h.e.express != 0 || !slices.Equal(h.repaired, []string{"service missing"}) {
		t.Errorf("%d express passes, repaired %v", h.e.express, h.repaired)
	}
	h.wants(now)
}

// TestCloseLeavesNothing, also after a daemon that was killed.
func TestCloseLeavesNothing(t *testing.T) {
	h := newHall(t)
	for _, forgets := range []bool{false, true} {
		h.apply(service(addr4(200), backend(1, false)), service(addr6(200), backend(1, false)))
		e := h.e
		if forgets {
			var err error
			e, err = New(h.e.cfg)
			must(t, err)
		}
		must(t, e.Close(context.Background()))
		must(t, e.Close(context.Background()))
		h.in(func() error {
			list, err := os.ReadFile("/proc/thread-self/net/ip_vs")
			if err != nil {
				return err
			}
			if s, err := parse(string(list)); err != nil || len(s) > 0 {
				t.Errorf("services left: %v, %v", s, err)
			}
			links, err := netlink.LinkList()
			if err != nil {
				return err
			}
			for _, l := range links {
				if n := l.Attrs().Name; n != "lo" && n != "br" {
					t.Errorf("link left: %s", n)
				}
			}
			routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: routeProtocol, Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
			if len(routes) > 0 {
				t.Errorf("routes left: %v", routes)
			}
			return err
		})
		if tables := tables(t, h.path); len(tables) > 0 {
			t.Errorf("tables left: %v", tables)
		}
	}
}

// tables are the nftables tables of a namespace.
func tables(t *testing.T, path string) []string {
	t.Helper()
	var out []string
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(f.Fd())))
	must(t, err)
	all, err := conn.ListTables()
	must(t, err)
	for _, x := range all {
		out = append(out, x.Name)
	}
	return out
}

// TestAdopts: a new process finds what an old one left, changes nothing of it and
// counts nothing.
func TestAdopts(t *testing.T) {
	h := newHall(t)
	services := []ingress.Service{service(addr4(200), backend(1, false), backend(2, false))}
	h.apply(services...)
	// A mark on what is there, which the engine neither sets nor reads.
	h.in(func() error {
		k, err := kernel.New("")
		if err != nil {
			return err
		}
		defer k.Close()
		return k.UpdateDestination(&kernel.Service{FWMark: keyOf(addr4(200)).mark, AddressFamily: unix.AF_INET, SchedName: roundRobin},
			&kernel.Destination{Address: addr4(1).AsSlice(), AddressFamily: unix.AF_INET, Weight: takes, ConnectionFlags: kernel.ConnFwdDirectRoute, UpperThreshold: 77})
	})
	e, err := New(h.e.cfg)
	must(t, err)
	must(t, e.Apply(t.Context(), h.table(services...)))
	h.in(func() error {
		k, err := kernel.New("")
		if err != nil {
			return err
		}
		defer k.Close()
		d, err := k.GetDestinations(&kernel.Service{FWMark: keyOf(addr4(200)).mark, AddressFamily: unix.AF_INET, SchedName: roundRobin})
		if err == nil && (len(d) != 2 || d[0].UpperThreshold+d[1].UpperThreshold != 77) {
			t.Errorf("backends were made anew: %v", d)
		}
		return err
	})
	if len(h.repaired) > 0 {
		t.Errorf("repaired %v", h.repaired)
	}
}

// many is n services of ten backends each.
func many(n int) []ingress.Service {
	out := make([]ingress.Service, n)
	for i := range out {
		out[i].VIP = netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)})
		for j := range 10 {
			b := i*10 + j
			out[i].Backends = append(out[i].Backends, ingress.Backend{Task: weft.ID(fmt.Sprint(b)),
				Addr: netip.AddrFrom4([4]byte{10, 64 + byte(b>>16), byte(b >> 8), byte(b)}), MAC: net.HardwareAddr{2, 0, 0, byte(b >> 16), byte(b >> 8), byte(b)}})
		}
	}
	return out
}

// TestManyServices: 1,000, and 10,000 where the long forms are asked for. The times
// are for people, the limits are bench's.
func TestManyServices(t *testing.T) {
	h := newHall(t)
	n := 1000
	if netnstest.Required("soak") {
		n = 10000
	}
	services := many(n)
	start := time.Now()
	h.apply(services...)
	t.Logf("%d services of 10 backends from nothing: %s", n, time.Since(start))
	start = time.Now()
	h.apply(services...)
	t.Logf("the same again: %s", time.Since(start))
	h.wants(services...)
	least := time.Hour
	for i := range 20 {
		services = slices.Clone(services)
		services[i].Backends = slices.Clone(services[i].Backends)
		services[i].Backends[3].Draining = true
		start = time.Now()
		h.apply(services...)
		least = min(least, time.Since(start))
	}
	t.Logf("one service of them changed: %s at least", least)
	if h.e.express == 0 {
		t.Error("every change was a pass over everything")
	}
	h.wants(services...)
	start = time.Now()
	must(t, h.e.Close(t.Context()))
	t.Logf("all of them removed: %s", time.Since(start))
	if len(h.repaired) > 0 {
		t.Errorf("repaired %v", h.repaired)
	}
}

// TestCloseOfAnEmptyFolder: a node that never had a network.
func TestCloseOfAnEmptyFolder(t *testing.T) {
	e, err := New(Config{Node: "n", NetNSDir: filepath.Join(t.TempDir(), "none")})
	must(t, err)
	must(t, e.Close(context.Background()))
}

// BenchmarkOneChanged changes one service among 10,000, as the agent does: with a
// new table each time.
func BenchmarkOneChanged(b *testing.B) {
	h := newHall(b)
	services := many(10000)
	h.apply(services...)
	h.e.took = time.Hour // no pass over everything in between
	h.e.whole = time.Now()
	before, i := h.e.express, 0
	for b.Loop() {
		services = slices.Clone(services)
		s := &services[i%len(services)]
		s.Backends = slices.Clone(s.Backends)
		s.Backends[i%10].Draining = !s.Backends[i%10].Draining
		i++
		h.apply(services...)
	}
	if h.e.express-before != i {
		b.Errorf("%d of %d passes were express", h.e.express-before, i)
	}
}

// BenchmarkMemory: what services take in the kernel.
func BenchmarkMemory(b *testing.B) {
	h := newHall(b)
	ingresstest.MemoryOf(b, 10000, func(count, backends int) {
		h.apply()
		services := many(count)
		for i := range services {
			services[i].Backends = services[i].Backends[:backends]
		}
		h.apply(services...)
	})
}
