package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// repaired is a maker of two sandboxes with what it has counted.
type repaired struct {
	t     *testing.T
	m     *Linux
	specs []Spec
	got   []string
}

func newRepaired(t *testing.T) *repaired {
	t.Helper()
	r := &repaired{t: t, m: maker(t), specs: []Spec{spec(), spec()}}
	r.m.cfg.Repaired = r.note
	for _, s := range r.specs {
		_, err := r.m.Make(context.Background(), s)
		must(t, err)
	}
	r.want("make")
	return r
}

func (r *repaired) note(x weft.Repair) {
	if x.Object == "" || x.Reason == "" {
		r.t.Errorf("repair without object or reason: %+v", x)
	}
	r.got = append(r.got, x.Kind)
}

// restart is another daemon for the same sandboxes.
func (r *repaired) restart() {
	cfg := r.m.cfg
	cfg.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	m, err := New(cfg)
	must(r.t, err)
	r.m = m
}

func (r *repaired) keep() {
	r.t.Helper()
	must(r.t, r.m.Keep(context.Background(), r.specs))
}

// want checks what was counted since the last call.
func (r *repaired) want(when string, kinds ...string) {
	r.t.Helper()
	slices.Sort(r.got)
	slices.Sort(kinds)
	if !slices.Equal(r.got, kinds) {
		r.t.Errorf("%s: counted %q, want %q", when, r.got, kinds)
	}
	r.got = nil
}

func (r *repaired) path(i int) string { return r.m.describe(r.specs[i].Task).NetNS }

func (r *repaired) in(i int, f func() error) {
	r.t.Helper()
	must(r.t, netns.Do(r.path(i), f))
}

// seen is all that the kernel has of the sandboxes, read without the reader.
func (r *repaired) seen() string {
	r.t.Helper()
	var b strings.Builder
	dump := func(where string) error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		slices.SortFunc(links, func(a, b netlink.Link) int { return strings.Compare(a.Attrs().Name, b.Attrs().Name) })
		for _, l := range links {
			a := l.Attrs()
			if where == "host" && !strings.HasPrefix(a.Name, "w") {
				continue
			}
			fmt.Fprintln(&b, where, a.Name, a.Flags&net.FlagUp != 0, a.Alias, a.MasterIndex != 0)
			if p, err := netlink.LinkGetProtinfo(l); err == nil && a.MasterIndex != 0 {
				filters, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
				fmt.Fprintln(&b, where, a.Name, p.Isolated, a.HardwareAddr, err)
				for _, f := range filters {
					for _, action := range f.(*netlink.U32).Actions {
						to := action.(*netlink.MirredAction)
						name := "nowhere"
						if l, err := netlink.LinkByIndex(to.Ifindex); err == nil {
							name = l.Attrs().Name
						}
						fmt.Fprintln(&b, where, a.Name, f.Attrs().Priority, f.Attrs().Protocol, to.MirredAction, name)
					}
				}
			}
			addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			var lines []string
			for _, x := range addrs {
				if !x.IP.IsLinkLocalUnicast() {
					lines = append(lines, fmt.Sprintln(where, a.Name, x.IPNet, x.Scope))
				}
			}
			slices.Sort(lines)
			b.WriteString(strings.Join(lines, ""))
		}
		if where == "host" {
			value, err := os.ReadFile("/proc/sys/" + forwardKey)
			fmt.Fprint(&b, where, forwardKey, string(value))
			return err
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := netlink.RuleList(family)
			if err != nil {
				return err
			}
			for _, x := range rules {
				fmt.Fprintln(&b, where, x.Priority, x.Table, x.Dst, x.IifName)
			}
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		for _, x := range routes {
			fmt.Fprintln(&b, where, x.Dst, x.Gw, x.Priority)
		}
		for _, o := range slices.SortedFunc(maps.Keys(settings("")), func(a, b Object) int { return strings.Compare(a.Name, b.Name) }) {
			value, err := os.ReadFile("/proc/sys/" + o.Name)
			if err != nil {
				return err
			}
			fmt.Fprint(&b, where, o.Name, string(value))
		}
		return err
	}
	must(r.t, dump("host"))
	for i := range r.specs {
		r.in(i, func() error { return dump(fmt.Sprint("task ", i)) })
	}
	return b.String()
}

func write(key, value string) error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0o644) }

// on calls f with a link by name.
func on(name string, f func(netlink.Link) error) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return f(l)
}

func delAddr(link, addr string) error {
	return on(link, func(l netlink.Link) error {
		return netlink.AddrDel(l, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(addr))})
	})
}

func delDefault() error {
	return netlink.RouteDel(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
}

// damage is what somebody does behind weft's back to task 0 or the host, and what
// is counted for it.
var damage = []struct {
	name    string
	inside  func() error
	outside func(near string) error
	kinds   []string
}{
	{name: "service address deleted", inside: func() error { return delAddr("lo", "10.100.0.5/32") }, kinds: []string{"service address missing"}},
	{name: "IPv6 service address deleted", inside: func() error { return delAddr("lo", "fd77::5/128") }, kinds: []string{"service address missing"}},
	{name: "resolver's address deleted", inside: func() error { return delAddr("lo", "127.0.0.1/8") }, kinds: []string{"service address missing"}},
	{name: "lo down", inside: func() error { return on("lo", netlink.LinkSetDown) }, kinds: []string{"loopback wrong"}},
	{name: "arp_ignore flipped", inside: func() error { return write("net/ipv4/conf/all/arp_ignore", "0") }, kinds: []string{"task sysctl wrong"}},
	{name: "arp_announce flipped", inside: func() error { return write("net/ipv4/conf/default/arp_announce", "0") }, kinds: []string{"task sysctl wrong"}},
	{name: "accept_dad flipped", inside: func() error { return write("net/ipv6/conf/all/accept_dad", "1") }, kinds: []string{"task sysctl wrong"}},
	{name: "ports closed", inside: func() error { return write("net/ipv4/ip_unprivileged_port_start", "1024") }, kinds: []string{"task sysctl wrong"}},
	{name: "rule of a service address deleted", inside: func() error {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.IifName, r.Dst = netlink.FAMILY_V4, ruleVIP, unix.RT_TABLE_MAIN, "lo", ipNet(netip.MustParsePrefix("10.100.0.5/32"))
		return netlink.RuleDel(r)
	}, kinds: []string{"service address rule missing"}},
	{name: "rule of another address", inside: func() error {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.IifName, r.Dst = netlink.FAMILY_V4, ruleVIP, unix.RT_TABLE_MAIN, "lo", ipNet(netip.MustParsePrefix("10.100.0.9/32"))
		return netlink.RuleAdd(r)
	}, kinds: []string{"service address rule stray"}},
	{name: "local rule deleted", inside: func() error {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table = netlink.FAMILY_V6, ruleLocal, unix.RT_TABLE_LOCAL
		return netlink.RuleDel(r)
	}, kinds: []string{"task local rule missing"}},
	{name: "local rule first again", inside: func() error {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table = netlink.FAMILY_V4, 0, unix.RT_TABLE_LOCAL
		return netlink.RuleAdd(r)
	}, kinds: []string{"task local rule wrong"}},
	{name: "default route deleted", inside: delDefault, kinds: []string{"gateway route missing"}},
	{name: "default route elsewhere", inside: func() error {
		return on(LegName, func(l netlink.Link) error {
			return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IPv4(172, 31, 240, 99), Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
		})
	}, kinds: []string{"gateway route wrong"}},
	{name: "inner end down", inside: func() error { return on(LegName, netlink.LinkSetDown) }, kinds: []string{"gateway leg wrong"}},
	{name: "leg's address deleted", inside: func() error { return delAddr(LegName, "172.31.240.2/20") }, kinds: []string{"gateway leg address missing"}},
	{name: "leg deleted inside", inside: func() error { return on(LegName, netlink.LinkDel) }, kinds: []string{"gateway leg missing"}},
	{name: "leg down", outside: func(n string) error { return on(n, netlink.LinkSetDown) }, kinds: []string{"gateway leg wrong"}},
	{name: "leg detached", outside: func(n string) error { return on(n, netlink.LinkSetNoMaster) }, kinds: []string{"gateway leg wrong"}},
	{name: "isolation off", outside: func(n string) error {
		return on(n, func(l netlink.Link) error { return netlink.LinkSetIsolated(l, false) })
	}, kinds: []string{"gateway leg wrong"}},
	{name: "leg's shortcut gone", outside: func(n string) error { return on(n, delIngress) }, kinds: []string{"gateway leg wrong"}},
	{name: "leg's shortcut for IPv4 alone", outside: func(n string) error {
		return on(n, func(l netlink.Link) error {
			return netlink.FilterDel(&netlink.U32{FilterAttrs: netlink.FilterAttrs{
				LinkIndex: l.Attrs().Index, Parent: netlink.MakeHandle(0xffff, 0), Priority: shortcutPriority + 1, Protocol: unix.ETH_P_IPV6}})
		})
	}, kinds: []string{"gateway leg wrong"}},
	{name: "leg's shortcut elsewhere", outside: func(n string) error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return on(n, func(l netlink.Link) error {
			return errors.Join(delIngress(l), new(shortcuts).make(l, &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: lo.Attrs().Index, HardwareAddr: l.Attrs().HardwareAddr}}))
		})
	}, kinds: []string{"gateway leg wrong"}},
	{name: "leg's hardware address", outside: func(n string) error {
		return on(n, func(l netlink.Link) error { return netlink.LinkSetHardwareAddr(l, net.HardwareAddr{2, 0, 0, 0, 0, 9}) })
	}, kinds: []string{"gateway leg wrong"}},
	{name: "leg's alias lost", outside: func(n string) error {
		return on(n, func(l netlink.Link) error { return netlink.LinkSetAlias(l, "") })
	}, kinds: []string{"gateway leg wrong"}},
	{name: "leg deleted", outside: func(n string) error { return on(n, netlink.LinkDel) }, kinds: []string{"gateway leg missing"}},
	{name: "bridge down", outside: func(string) error { return on(weft.GatewayBridge, netlink.LinkSetDown) }, kinds: []string{"gateway bridge wrong"}},
	{name: "bridge's address deleted", outside: func(string) error { return delAddr(weft.GatewayBridge, "172.31.240.1/20") }, kinds: []string{"gateway bridge address missing"}},
	{name: "bridge deleted", outside: func(string) error { return on(weft.GatewayBridge, netlink.LinkDel) }, kinds: []string{"gateway bridge missing"}},
	{name: "forwarding off", outside: func(string) error { return write(forwardKey, "0") }, kinds: []string{"gateway sysctl wrong"}},
}

func delIngress(l netlink.Link) error {
	return netlink.QdiscDel(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}})
}

// TestDamageIsRepaired: each damage is put right in one pass and counted once, by
// the daemon that made the sandbox, and by one that has adopted it.
func TestDamageIsRepaired(t *testing.T) {
	for _, when := range []string{"running", "restarted"} {
		for _, d := range damage {
			t.Run(when+"/"+d.name, func(t *testing.T) {
				r := newRepaired(t)
				r.keep()
				r.want("untouched")
				was := r.seen()
				if d.inside != nil {
					r.in(0, d.inside)
				} else {
					must(t, d.outside(weft.HostVethName(r.specs[0].Task)))
				}
				if is := r.seen(); is == was {
					t.Fatal("nothing was damaged")
				}
				if when == "restarted" {
					r.restart()
				}
				r.keep()
				r.want("repair", d.kinds...)
				if is := r.seen(); is != was {
					t.Errorf("after the repair:\n%s\nbefore the damage:\n%s", is, was)
				}
				r.keep()
				r.want("next pass")
			})
		}
	}
}

// All at once is repaired in one pass, too, and what went along is not counted.
func TestAllDamageAtOnce(t *testing.T) {
	r := newRepaired(t)
	was := r.seen()
	for i := range r.specs {
		r.in(i, func() error {
			for _, f := range []func() error{
				func() error { return delAddr("lo", "10.100.0.5/32") }, func() error { return on("lo", netlink.LinkSetDown) },
				func() error { return write("net/ipv4/conf/all/arp_ignore", "0") }, delDefault,
			} {
				if err := f(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	must(t, on(weft.GatewayBridge, netlink.LinkDel))
	must(t, on(weft.HostVethName(r.specs[0].Task), netlink.LinkDel))
	r.keep()
	r.want("repair", "gateway bridge missing", "gateway leg missing", "gateway route missing", "loopback wrong", "loopback wrong",
		"service address missing", "service address missing", "task sysctl wrong", "task sysctl wrong")
	if is := r.seen(); is != was {
		t.Errorf("after the repair:\n%s\nbefore the damage:\n%s", is, was)
	}
	r.keep()
	r.want("next pass")
}

// What the wish changes is no repair, and what a task has made itself is its own.
func TestChangesAreNoRepairs(t *testing.T) {
	r := newRepaired(t)
	r.in(0, func() error {
		for _, l := range []string{"lo", LegName} {
			if err := setAddr(l, Op{Object: Object{Address, "192.0.2.7/32"}}); err != nil {
				return err
			}
		}
		return on(LegName, func(l netlink.Link) error {
			return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Priority: 100, Gw: net.IPv4(172, 31, 240, 1), Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
		})
	})
	own := r.seen()
	r.keep()
	r.want("a task's own addresses and routes")
	if is := r.seen(); is != own {
		t.Errorf("what the task made has changed:\n%s\nbefore:\n%s", is, own)
	}
	r.specs[0].VIPs = []netip.Addr{netip.MustParseAddr("10.100.0.6")}
	r.specs[1].Gateway = false
	r.keep()
	r.restart()
	r.keep()
	r.want("change")
	is := r.seen()
	for text, want := range map[string]bool{"task 0 lo 10.100.0.6/32": true, "task 0 lo 10.100.0.5/32": false, "task 0 lo 192.0.2.7/32": true, "task 1 gw0": false, "task 0 gw0": true} {
		if strings.Contains(is, text) != want {
			t.Errorf("%q is there: %t, want %t:\n%s", text, !want, want, is)
		}
	}
	// Nothing is known of what an earlier version left: it is put right all the same.
	must(t, os.Remove(r.m.boxRecord(r.specs[0].Task)))
	r.restart()
	r.in(0, func() error { return delAddr("lo", "10.100.0.6/32") })
	r.keep()
	r.want("nothing known")
	if !strings.Contains(r.seen(), "task 0 lo 10.100.0.6/32") {
		t.Error("the service address is not back")
	}
}

// A repair that fails is owed, and holds up no other sandbox.
func TestFailedRepairIsOwed(t *testing.T) {
	r := newRepaired(t)
	name := weft.HostVethName(r.specs[0].Task)
	must(t, on(name, netlink.LinkDel))
	// Somebody's link has the name.
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}))
	r.in(1, delDefault)
	for range 2 {
		if err := r.m.Keep(context.Background(), r.specs); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("with a foreign link: %v", err)
		}
	}
	r.want("while it fails", "gateway route missing")
	must(t, on(name, netlink.LinkDel))
	r.keep()
	r.want("when it succeeds", "gateway leg missing")
}

// A sandbox that is gone, or never was, is not made by Keep.
func TestKeepMakesNoSandbox(t *testing.T) {
	r := newRepaired(t)
	must(t, r.m.Destroy(context.Background(), r.specs[0].Task))
	r.specs = append(r.specs, spec())
	r.keep()
	r.want("gone")
	if names, err := netns.List(r.m.cfg.NetNSDir, ""); err != nil || len(names) != 1 {
		t.Errorf("namespaces %v, %v", names, err)
	}
	if len(r.m.boxes) != 1 {
		t.Errorf("%d boxes are remembered", len(r.m.boxes))
	}
	if all, err := filepath.Glob(filepath.Join(r.m.cfg.FilesDir, "*", recordName)); err != nil || len(all) != 1 {
		t.Errorf("records %v, %v", all, err)
	}
	// Made anew under its old name, it is new.
	_, err := r.m.Make(context.Background(), r.specs[0])
	must(t, err)
	r.want("made anew")
}

// A record that cannot be written holds up nothing, and an old one is not believed.
func TestRecordThatCannotBeWritten(t *testing.T) {
	r := newRepaired(t)
	path := r.m.boxRecord(r.specs[0].Task)
	must(t, os.Mkdir(path+".new", 0o755)) // in the way of writing
	r.specs[0].VIPs = []netip.Addr{netip.MustParseAddr("10.100.0.6")}
	r.keep()
	if !strings.Contains(r.seen(), "task 0 lo 10.100.0.6/32") {
		t.Error("the change was not made")
	}
	r.in(0, func() error { return delAddr("lo", "10.100.0.6/32") })
	r.keep()
	r.want("this daemon remembers", "service address missing")
	r.in(0, func() error { return delAddr("lo", "10.100.0.6/32") })
	r.restart()
	r.keep()
	r.want("the next does not")
	must(t, os.Remove(path+".new"))
}

// BenchmarkKeep is a pass over a hundred sandboxes in order.
func BenchmarkKeep(b *testing.B) {
	m, err := New(Config{Node: weft.NewID(), NetNSDir: filepath.Join(b.TempDir(), "netns"), FilesDir: filepath.Join(b.TempDir(), "files"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	ctx := context.Background()
	var specs []Spec
	for range 100 {
		specs = append(specs, spec())
		if _, err := m.Make(ctx, specs[len(specs)-1]); err != nil {
			b.Fatal(err)
		}
	}
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := m.Keep(ctx, specs); err != nil {
			b.Fatal(err)
		}
	}
	if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
		b.Fatal(err)
	}
	cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	b.ReportMetric(float64(cpu)/1e6/float64(b.N), "cpu-ms/op")
	for _, s := range specs {
		if err := m.Destroy(ctx, s.Task); err != nil {
			b.Fatal(err)
		}
	}
	if err := m.Close(ctx); err != nil {
		b.Fatal(err)
	}
}

// Sandboxes that come and go while others are kept are nobody's damage, and nothing
// of them stays.
func TestKeepBesideMakeAndDestroy(t *testing.T) {
	r := newRepaired(t)
	var mu sync.Mutex // guards: specs, r.got
	r.m.cfg.Repaired = func(x weft.Repair) { mu.Lock(); defer mu.Unlock(); r.note(x) }
	specs := slices.Clone(r.specs)
	ctx, cancel := context.WithCancel(context.Background())
	var makers, keeper errgroup.Group
	for range 4 {
		makers.Go(func() error {
			for range 6 {
				s := spec()
				mu.Lock()
				specs = append(specs, s) // sooner than an agent would
				mu.Unlock()
				if _, err := r.m.Make(ctx, s); err != nil {
					return err
				}
				if err := r.m.Destroy(ctx, s.Task); err != nil {
					return err
				}
			}
			return nil
		})
	}
	keeper.Go(func() error {
		for ctx.Err() == nil {
			mu.Lock()
			now := slices.Clone(specs)
			mu.Unlock()
			if err := r.m.Keep(ctx, now); err != nil && ctx.Err() == nil {
				return err
			}
		}
		return nil
	})
	must(t, makers.Wait())
	cancel()
	must(t, keeper.Wait())
	r.want("nobody has broken anything")
	if len(r.m.boxes) != 2 {
		t.Errorf("%d boxes are remembered, want 2", len(r.m.boxes))
	}
}
