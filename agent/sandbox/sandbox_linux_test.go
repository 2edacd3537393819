package sandbox

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

func maker(t *testing.T) *Linux {
	t.Helper()
	m, err := New(Config{Node: weft.NewID(), NetNSDir: filepath.Join(t.TempDir(), "netns"), FilesDir: filepath.Join(t.TempDir(), "files"), Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	must(t, err)
	t.Cleanup(func() {
		ctx := context.Background()
		all, err := m.List(ctx)
		must(t, err)
		for _, s := range all {
			must(t, m.Destroy(ctx, s.Task))
		}
		must(t, m.Close(ctx))
		if names, err := netns.List(m.cfg.NetNSDir, ""); err != nil || len(names) != 0 {
			t.Errorf("namespaces left: %v %v", names, err)
		}
		if left, err := filepath.Glob(filepath.Join(m.cfg.FilesDir, "*")); err != nil || len(left) != 0 {
			t.Errorf("files left: %q %v", left, err)
		}
		links, err := netlink.LinkList()
		must(t, err)
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, "w") {
				t.Errorf("link left: %s", l.Attrs().Name)
			}
		}
	})
	return m
}

func spec() Spec {
	return Spec{Task: weft.NewID(), Hostname: "web-1", Gateway: true,
		VIPs: []netip.Addr{netip.MustParseAddr("10.100.0.5"), netip.MustParseAddr("fd77::5")}, Search: []string{"example.com"},
		Hosts: map[string][]netip.Addr{"web-1": {netip.MustParseAddr("10.100.0.11"), netip.MustParseAddr("fd77::11")}}}
}

func TestMakeIsRepeatable(t *testing.T) {
	m, ctx := maker(t), context.Background()
	s := spec()
	one, err := m.Make(ctx, s)
	must(t, err)
	two, err := m.Make(ctx, s)
	must(t, err)
	if !reflect.DeepEqual(one, two) || one.GatewayAddr != netip.MustParsePrefix("172.31.240.2/20") {
		t.Errorf("first %+v, then %+v", one, two)
	}
	s.VIPs = []netip.Addr{netip.MustParseAddr("10.100.0.6")}
	s.Hosts = nil
	before := inode(t, one.HostsPath)
	_, err = m.Make(ctx, s)
	must(t, err)
	if inode(t, one.HostsPath) != before {
		t.Error("hosts was replaced, a bind mount of it would not follow")
	}
	must(t, netns.Do(one.NetNS, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(lo, netlink.FAMILY_ALL)
		var got []string
		for _, a := range addrs {
			if !a.IP.IsLoopback() {
				got = append(got, a.IPNet.String())
			}
		}
		if strings.Join(got, " ") != "10.100.0.6/32" {
			t.Errorf("lo has %v", got)
		}
		for key, want := range map[string]string{"net/ipv4/conf/all/arp_ignore": "1", "net/ipv4/conf/default/arp_announce": "2", "net/ipv4/ip_unprivileged_port_start": "0"} {
			if b, err := os.ReadFile("/proc/sys/" + key); err != nil || strings.TrimSpace(string(b)) != want {
				t.Errorf("%s is %q, %v", key, b, err)
			}
		}
		return err
	}))
	text := ""
	for _, p := range []string{one.HostsPath, one.ResolvConfPath, one.HostnamePath} {
		b, err := os.ReadFile(p)
		must(t, err)
		text += string(b)
	}
	want := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nnameserver 127.0.0.11\nsearch example.com\noptions ndots:0\nweb-1\n"
	if text != want {
		t.Errorf("files:\n%s", text)
	}
	s.Gateway = false
	sb, err := m.Make(ctx, s)
	must(t, err)
	if sb.GatewayAddr.IsValid() {
		t.Error("the leg stayed")
	}
}

func TestGatewayReachesHostNotTasks(t *testing.T) {
	m, ctx := maker(t), context.Background()
	a, err := m.Make(ctx, spec())
	must(t, err)
	b, err := m.Make(ctx, spec())
	must(t, err)
	if a.GatewayAddr == b.GatewayAddr {
		t.Fatalf("both have %s", a.GatewayAddr)
	}
	_, subnet, err := m.Gateway(ctx)
	must(t, err)
	host, err := net.Listen("tcp", subnet.Addr().Next().String()+":0")
	must(t, err)
	defer host.Close()
	var task net.Listener
	must(t, netns.Do(b.NetNS, func() (err error) { task, err = net.Listen("tcp", b.GatewayAddr.Addr().String()+":0"); return err }))
	defer task.Close()
	dial := func(to string) error {
		return netns.Do(a.NetNS, func() error {
			// Longer than one retransmission (1 s): the kernel opens a new
			// bridge port from a work queue, which a busy machine delays.
			c, err := net.DialTimeout("tcp", to, 4*time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	if err := dial(host.Addr().String()); err != nil {
		t.Errorf("to the host: %v", err)
	}
	if err := dial(task.Addr().String()); err == nil {
		t.Error("one task reaches another by the gateway bridge")
	}
	if c, err := net.DialTimeout("tcp", task.Addr().String(), time.Second); err != nil {
		t.Errorf("host to task: %v", err)
	} else {
		c.Close()
	}
}

func TestCrashRestIsCompleted(t *testing.T) {
	m, ctx := maker(t), context.Background()
	// A bridge without alias and address, a leg without alias and address.
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = weft.GatewayBridge, m.bridgeMAC()
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
	s := spec()
	path, err := netns.Create(m.cfg.NetNSDir, weft.TaskNetNS(m.cfg.Node, s.Task))
	must(t, err)
	br, err := netlink.LinkByName(weft.GatewayBridge)
	must(t, err)
	_, err = addLeg(weft.HostVethName(s.Task), path, br)
	must(t, err)
	sb, err := m.Make(ctx, s)
	must(t, err)
	list, err := m.List(ctx)
	must(t, err)
	if len(list) != 1 || !reflect.DeepEqual(list[0], sb) {
		t.Errorf("list %+v, want %+v", list, sb)
	}
	must(t, m.Destroy(ctx, s.Task))
	must(t, m.Destroy(ctx, s.Task))
}

// A power cut takes the namespaces and leaves the folders.
func TestListAfterAPowerCut(t *testing.T) {
	m, ctx := maker(t), context.Background()
	sb, err := m.Make(ctx, spec())
	must(t, err)
	must(t, netns.Remove(sb.NetNS))
	list, err := m.List(ctx)
	must(t, err)
	if len(list) != 1 || list[0].Task != sb.Task || list[0].NetNS != "" {
		t.Errorf("list %+v, want task %s without a namespace", list, sb.Task)
	}
	must(t, m.Destroy(ctx, sb.Task))
}

func TestForeignObjectsAreLeft(t *testing.T) {
	m, ctx := maker(t), context.Background()
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: weft.GatewayBridge}}
	must(t, netlink.LinkAdd(br))
	_, _, err := m.Gateway(ctx)
	if !errors.Is(err, weft.ErrConflict) {
		t.Errorf("Gateway: %v", err)
	}
	must(t, m.Close(ctx))
	if l, err := find(weft.GatewayBridge); err != nil || l == nil {
		t.Error("a foreign bridge was deleted")
	}
	must(t, netlink.LinkDel(br))
}

func TestPoolInUseMovesOn(t *testing.T) {
	m, ctx := maker(t), context.Background()
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "other"}}
	must(t, netlink.LinkAdd(br))
	defer netlink.LinkDel(br)
	must(t, netlink.AddrAdd(br, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("172.31.241.1/24"))}))
	must(t, netlink.LinkSetUp(br))
	_, subnet, err := m.Gateway(ctx)
	must(t, err)
	if subnet.String() != "172.16.0.0/20" {
		t.Errorf("got %s", subnet)
	}
}

// What a task asks of its own service leaves by the overlay, from the task's own
// address, in both families.
func TestOwnServiceAddressLeaves(t *testing.T) {
	m, ctx := maker(t), context.Background()
	sb, err := m.Make(ctx, spec())
	must(t, err)
	own := map[string]string{"10.100.0.5": "10.100.0.11", "fd77::5": "fd77::11"}
	must(t, netns.Do(sb.NetNS, func() error {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}}); err != nil {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		err = errors.Join(
			setAddr("eth0", Op{Object: Object{Address, "10.100.0.11/24"}}),
			setAddr("eth0", Op{Object: Object{Address, "fd77::11/64"}}),
			netlink.LinkSetUp(l))
		if err != nil {
			return err
		}
		for vip, from := range own {
			routes, err := netlink.RouteGet(net.ParseIP(vip))
			if err != nil || len(routes) != 1 || routes[0].LinkIndex != l.Attrs().Index {
				t.Errorf("route to %s: %v, %v", vip, routes, err)
			}
			c, err := net.Dial("udp", net.JoinHostPort(vip, "9"))
			if err != nil {
				t.Error(err)
				continue
			}
			if got := c.LocalAddr().(*net.UDPAddr).IP.String(); got != from {
				t.Errorf("to %s from %s, want %s", vip, got, from)
			}
			c.Close()
		}
		return nil
	}))
	s := spec()
	s.Task, s.VIPs = sb.Task, nil
	_, err = m.Make(ctx, s)
	must(t, err)
	must(t, netns.Do(sb.NetNS, func() error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := netlink.RuleList(family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				if r.Priority == ruleVIP {
					t.Errorf("rule %v stays without a service address", r)
				}
			}
		}
		return nil
	}))
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	return st.Ino
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
