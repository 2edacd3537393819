package nft

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	if err := New(dir).Probe(context.Background()); err != nil {
		t.Fatal(err)
	}
	left, err := netns.List(dir, "")
	if err != nil || len(left) != 0 {
		t.Errorf("probe left %v, %v", left, err)
	}
}

func TestServiceAddress(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	a, b := f.task(11), f.task(12)
	s := service(a, b)
	ns := f.client(50, s)
	f.apply(e, s)

	count := map[string]int{}
	var first net.Conn
	var firstName string
	for i := range 200 {
		name, seen, c, err := f.get(ns, vipText+":80")
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		if !strings.HasPrefix(seen, "10.0.16.50:") {
			t.Fatalf("the backend saw %s, not the client", seen)
		}
		if count[name]++; first == nil {
			first, firstName = c, name
		}
	}
	// Two backends, 200 connections: chi-square with one degree of freedom is
	// above 15.1 once in 10,000 runs.
	d := float64(count["task11"] - count["task12"])
	if chi := d * d / 200; chi > 15.1 {
		t.Errorf("distribution %v: chi-square %.1f", count, chi)
	}

	// The backend of an open connection drains: the connection goes on, new
	// ones go elsewhere.
	drained := service(a, b)
	for i := range drained.Backends {
		drained.Backends[i].Draining = string(drained.Backends[i].Task) == firstName
	}
	f.apply(e, drained)
	for range 50 {
		if name, _, _, err := f.get(ns, vipText+":80"); err != nil || name == firstName {
			t.Fatalf("while %s drains: %q, %v", firstName, name, err)
		}
	}
	if err := echo(first); err != nil {
		t.Errorf("the open connection to the draining backend: %v", err)
	}
}

// needRefusal probes: the kernel must be able to refuse on a bridge or at ports.
func needRefusal(t *testing.T, e *Engine) {
	t.Helper()
	must(t, e.Probe(context.Background()))
	if !e.CanRefuse() {
		netnstest.Missing(t, "userns", fmt.Errorf("neither nft_reject_bridge nor nft_reject_netdev: %w", weft.ErrUnsupported))
	}
}

func TestServiceWithoutBackendsIsRefusedAtOnce(t *testing.T) {
	f := newFabric(t)
	s := service()
	ns := f.client(50, s)
	e := New(f.dir)
	needRefusal(t, e)
	f.apply(e, s)
	began := time.Now()
	_, _, _, err := f.get(ns, vipText+":80")
	if err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("connect = %v, want refused", err)
	}
	if d := time.Since(began); d > 2*time.Second {
		t.Errorf("it took %s: silence, not a reset", d)
	}
}

// TestLastBackendDrains: what is open goes on, what is new is refused at once.
func TestLastBackendDrains(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	needRefusal(t, e)
	a := f.task(11)
	ns := f.client(50, service(a))
	f.apply(e, service(a))
	_, _, open, err := f.get(ns, vipText+":80")
	must(t, err)
	a.Draining = true
	f.apply(e, service(a))
	if _, _, _, err := f.get(ns, vipText+":80"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a new connection while the last backend drains: %v, want refused", err)
	}
	if err := echo(open); err != nil {
		t.Errorf("the open connection: %v", err)
	}
}

// TestUDPWithoutBackendsIsUnreachable: the sender learns it from ICMP.
func TestUDPWithoutBackendsIsUnreachable(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	needRefusal(t, e)
	s := service()
	ns := f.client(50, s)
	f.apply(e, s)
	f.in(ns, func() error {
		c, err := net.Dial("udp4", vipText+":7")
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(3 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		if _, err := c.Read(make([]byte, 8)); err == nil || !strings.Contains(err.Error(), "refused") {
			return fmt.Errorf("read = %v, want refused", err)
		}
		return nil
	})
}

func TestDeadBackendsFlowsAreReleased(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	a, b := f.task(11), f.task(12)
	ns := f.client(50, service(a, b))
	f.apply(e, service(a, b))
	for range 40 {
		if _, _, _, err := f.get(ns, vipText+":80"); err != nil {
			t.Fatal(err)
		}
	}
	f.apply(e, service(b))
	flows := elements(t, f.br, bridgeRules(ingress.Network{}, false), "flows")
	if len(flows) == 0 {
		t.Fatal("no flow is left at all: the test shows nothing")
	}
	for _, mac := range flows {
		if mac != string(b.MAC) {
			t.Errorf("a flow still leads to %s", net.HardwareAddr(mac))
		}
	}
}

func TestApplyRepairsAndRepeats(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	s := service(f.task(11))
	ns := f.client(50, s)
	f.apply(e, s)
	rules := bridgeRules(ingress.Network{Services: []ingress.Service{s}}, false)
	ring := rules.sets[slices.IndexFunc(rules.sets, func(s set) bool { return s.name == "seats" })]
	var got []weft.Repair
	e.Repaired = func(r weft.Repair) { got = append(got, r) }
	breakIt := map[string]struct {
		damage func(*nftables.Conn, *nftables.Table)
		want   weft.Repair // "" = none
	}{
		"elements deleted": {func(c *nftables.Conn, tb *nftables.Table) { c.FlushSet(ring.object(tb)) },
			weft.Repair{Kind: kindElements, Object: "set " + ring.name + " of network 4097", Reason: "1 elements were missing, 0 wrong, 0 stray"}},
		"set deleted": {func(c *nftables.Conn, tb *nftables.Table) {
			for _, ch := range rules.chains {
				c.FlushChain(&nftables.Chain{Table: tb, Name: ch.name})
			}
			c.DelSet(ring.object(tb))
		}, weft.Repair{Kind: kindTable, Object: "table weft of network 4097", Reason: "its set " + ring.name + " was gone"}},
		"rules deleted": {func(c *nftables.Conn, tb *nftables.Table) {
			c.FlushChain(&nftables.Chain{Table: tb, Name: "prerouting"})
		}, weft.Repair{Kind: kindTable, Object: "table weft of network 4097", Reason: fmt.Sprintf("its chain prerouting had 0 rules instead of %d", len(rules.chains[0].rules))}},
		"table deleted": {func(c *nftables.Conn, tb *nftables.Table) { c.DelTable(tb) },
			weft.Repair{Kind: kindTable, Object: "table weft of network 4097", Reason: "it was gone"}},
		"nothing": {func(*nftables.Conn, *nftables.Table) {}, weft.Repair{}},
	}
	for name, c := range breakIt {
		t.Run(name, func(t *testing.T) {
			must(t, withConn(f.br, func(conn *nftables.Conn) error {
				c.damage(conn, &nftables.Table{Name: weft.TableName, Family: nftables.TableFamilyBridge})
				return conn.Flush()
			}))
			got = nil
			f.apply(e, s)
			f.apply(e, s)
			if len(got) > 1 || len(got) == 1 && got[0] != c.want || len(got) == 0 && c.want.Kind != "" {
				t.Errorf("repairs %+v, want %+v once", got, c.want)
			}
			if _, _, _, err := f.get(ns, vipText+":80"); err != nil {
				t.Errorf("after repair: %v", err)
			}
		})
	}
}

// outside gives the host its ingress leg and a link to a client's namespace.
func (f *fabric) outside() string {
	t := f.t
	f.port("", weft.IngressLeg, legText, leg)
	path := f.namespace("outside")
	ns, err := netns.Open(path)
	must(t, err)
	defer ns.Close()
	must(t, netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "up0", Flags: net.FlagUp}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.FD()),
	}))
	must(t, errors.Join(addAddr("up0", hostText+"/24"), addAddr("up0", host6Text+"/64")))
	f.in(path, func() error {
		return errors.Join(setUp("eth0"), addAddr("eth0", clientText+"/24"), addAddr("eth0", client6Text+"/64"))
	})
	t.Cleanup(func() { // at once: the kernel takes its time to end a namespace
		for _, name := range []string{weft.IngressLeg, "up0"} {
			l, err := netlink.LinkByName(name)
			if err == nil {
				err = netlink.LinkDel(l)
			}
			if err != nil {
				t.Errorf("remove %s: %v", name, err)
			}
		}
	})
	return path
}

func TestPublishedPort(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	a, b := f.task(11), f.task(12)
	outside := f.outside()
	table := ingress.Table{
		Ingress: f.entry(),
		Published: []ingress.Published{
			{Service: "web", Protocol: weft.TCP, Port: 30000, Target: 80, Backends: []ingress.Backend{a, b}},
			{Service: "web", Protocol: weft.UDP, Port: 30000, Target: 7, Backends: []ingress.Backend{a, b}},
			{Service: "idle", Protocol: weft.TCP, Port: 30001, Target: 80},
		},
	}
	must(t, e.Apply(context.Background(), table))
	t.Cleanup(func() { must(t, e.Close(context.Background())) })

	if v6, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + weft.IngressLeg + "/disable_ipv6"); err == nil && string(v6) != "1\n" {
		t.Error("the host's leg speaks IPv6, which no rule covers")
	}
	seen := map[string]int{}
	for range 60 {
		name, from, _, err := f.get(outside, hostText+":30000")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(from, clientText+":") {
			t.Fatalf("the backend saw %s, want the client's address", from)
		}
		seen[name]++
	}
	if len(seen) != 2 {
		t.Errorf("60 connections reached %v, want both backends", seen)
	}
	for _, addr := range []string{hostText + ":30000", "127.0.0.1:30000"} {
		if _, _, _, err := f.get("", addr); err != nil {
			t.Errorf("from the host itself to %s: %v", addr, err)
		}
	}
	if _, _, _, err := f.get(outside, hostText+":30001"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a published port without backends: %v, want refused", err)
	}
	f.in(outside, func() error {
		c, err := net.Dial("udp4", hostText+":30000")
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(3 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		if err == nil && !strings.HasPrefix(string(buf[:n]), "task") {
			err = fmt.Errorf("udp answer %q", buf[:n])
		}
		return err
	})

	// Nothing reaches the overlay from outside but by a published port.
	must(t, netns.Do(outside, func() error {
		gw := net.ParseIP(hostText)
		_, dst, _ := net.ParseCIDR("10.0.16.0/24")
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: gw})
	}))
	if name, _, _, err := f.get(outside, "10.0.16.11:80"); err == nil {
		t.Errorf("an outside client reached %s directly through the host", name)
	}
}

// gateway makes the gateway bridge with tasks on isolated ports, as the sandbox
// does; the tasks route to each other by the bridge's own address.
func (f *fabric) gateway(subnet string, tasks ...string) {
	gw := netip.MustParsePrefix(subnet).Addr()
	must(f.t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: weft.GatewayBridge, Flags: net.FlagUp}}))
	must(f.t, addAddr(weft.GatewayBridge, subnet))
	br, err := netlink.LinkByName(weft.GatewayBridge)
	must(f.t, err)
	f.t.Cleanup(func() { must(f.t, netlink.LinkDel(br)) })
	for i, addr := range tasks {
		path := f.namespace("leg" + strconv.Itoa(i))
		ns, err := netns.Open(path)
		must(f.t, err)
		defer ns.Close()
		must(f.t, netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "leg" + strconv.Itoa(i), MasterIndex: br.Attrs().Index, Flags: net.FlagUp},
			PeerName:  "gw0", PeerNamespace: netlink.NsFd(ns.FD()),
		}))
		l, err := netlink.LinkByName("leg" + strconv.Itoa(i))
		must(f.t, err)
		must(f.t, netlink.LinkSetIsolated(l, true))
		f.t.Cleanup(func() { must(f.t, netlink.LinkDel(l)) }) // at once: the namespace takes its time
		f.in(path, func() error {
			for _, c := range []string{"all", "gw0"} { // a redirect would lead past the gateway
				if err := writeSysctl("net/ipv4/conf/"+c+"/accept_redirects", "0"); err != nil {
					return err
				}
			}
			if err := errors.Join(setUp("lo"), setUp("gw0"), addAddr("gw0", addr+"/20")); err != nil {
				return err
			}
			for _, dst := range []string{"0.0.0.0/0", tasks[len(tasks)-1-i] + "/32"} {
				_, to, _ := net.ParseCIDR(dst)
				if err := netlink.RouteAdd(&netlink.Route{Dst: to, Gw: gw.AsSlice()}); err != nil {
					return err
				}
			}
			return nil
		})
		f.serve(path, "leg"+strconv.Itoa(i))
	}
}

// Tasks have raw sockets, so the absence of a route does not hold them.
func TestHostLeadsNowhere(t *testing.T) {
	const gw, legA, legB = "172.31.240.1/20", "172.31.240.2", "172.31.240.3"
	f := newFabric(t)
	e := New(f.dir)
	f.task(11)
	outside := f.outside()
	f.gateway(gw, legA, legB)
	must(t, writeSysctl("net/ipv4/ip_forward", "1"))
	must(t, netns.Do(outside, func() error {
		_, dst, _ := net.ParseCIDR("172.31.240.0/20")
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(hostText)})
	}))
	f.serve("/proc/thread-self/ns/net", "host")
	f.serve(outside, "outside")
	reach := func() map[string]bool {
		got := map[string]bool{}
		for _, c := range []struct{ what, from, to string }{
			{"task to task by the gateway", f.dir + "/leg0", legB},
			{"outside to a task's leg", outside, legB},
			{"overlay to the host's sockets", f.dir + "/task11", legText},
			{"task to the outside", f.dir + "/leg0", clientText},
			{"host to its task", "", legB},
		} {
			_, _, _, err := f.get(c.from, c.to+":80")
			got[c.what] = err == nil
		}
		return got
	}
	for what, ok := range reach() {
		if !ok {
			t.Errorf("without rules the kernel must route: %s", what)
		}
	}
	must(t, e.Apply(t.Context(), ingress.Table{
		Ingress: f.entry(),
		Gateway: ingress.Gateway{Bridge: weft.GatewayBridge, Subnet: netip.MustParsePrefix("172.31.240.0/20")},
	}))
	t.Cleanup(func() { must(t, e.Close(context.Background())) })
	want := map[string]bool{
		"task to task by the gateway": false, "outside to a task's leg": false, "overlay to the host's sockets": false,
		"task to the outside": true, "host to its task": true,
	}
	if got := reach(); !maps.Equal(got, want) {
		t.Errorf("reached %v, want %v", got, want)
	}
}

// patience bounds the wait for an answer that is to come. What SCTP has lost it sends
// again after 3 s at first.
const patience = 12 * time.Second

func echo(c net.Conn) error {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("still here\n")); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && line != "still here\n" {
		err = fmt.Errorf("echo %q", line)
	}
	return err
}

func elements(t testing.TB, ns string, r ruleset, name string) map[string]string {
	t.Helper()
	var out map[string]string
	must(t, netns.Do(ns, func() (err error) {
		for _, s := range r.sets {
			if s.name == name {
				out, err = readElements(s.object(&nftables.Table{Name: weft.TableName, Family: r.family}))
			}
		}
		return err
	}))
	return out
}

func setUp(link string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

func addAddr(link, addr string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(addr)
	if err != nil {
		return err
	}
	if a.IP.To4() == nil {
		a.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(l, a)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A host that can be asked over IPv6 answers there, on its loopback address,
// too, and stays no router for what is not published.
func TestPublishedPortIPv6(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	must(t, e.Probe(t.Context()))
	if !e.CanPublish6() {
		netnstest.Missing(t, "userns", fmt.Errorf("this kernel does not translate IPv6: %w", weft.ErrUnsupported))
	}
	must(t, addAddr("lo", "2001:db8:1::1/128"))
	a := f.task(11)
	outside := f.outside()
	table := ingress.Table{
		Ingress: f.entry6(),
		Published: []ingress.Published{
			{Service: "web", Protocol: weft.TCP, Port: 30000, Target: 80, Backends: []ingress.Backend{a}},
			{Service: "idle", Protocol: weft.TCP, Port: 30001, Target: 80},
		},
	}
	must(t, e.Apply(t.Context(), table))
	t.Cleanup(func() { must(t, e.Close(context.Background())) })
	for _, addr := range []string{"[" + host6Text + "]:30000", hostText + ":30000"} {
		name, seen, _, err := f.get(outside, addr)
		if err != nil || name != string(a.Task) || !strings.Contains(seen, clientText) && !strings.Contains(seen, client6Text) {
			t.Errorf("%s: %s saw %s, %v", addr, name, seen, err)
		}
	}
	for _, addr := range []string{"[" + host6Text + "]:30000", "[2001:db8:1::1]:30000", "localhost:30000"} {
		if _, _, _, err := f.get("", addr); err != nil {
			t.Errorf("from the host itself to %s: %v", addr, err)
		}
	}
	// A connection from ::1 cannot leave the host; it must not hang either.
	if _, _, _, err := f.get("", "[::1]:30000"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("[::1]: %v, want refused", err)
	}
	if _, _, _, err := f.get(outside, "["+host6Text+"]:30001"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a published port without backends: %v, want refused", err)
	}
	// Nothing reaches the overlay from outside but by a published port, and
	// the overlay reaches nothing of the host's.
	ln, err := net.Listen("tcp6", ":4000")
	must(t, err)
	defer ln.Close()
	must(t, netns.Do(outside, func() error {
		_, dst, _ := net.ParseCIDR("fd00:16::/64")
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(host6Text)})
	}))
	if name, _, _, err := f.get(outside, "["+a.Addr6.String()+"]:80"); err == nil {
		t.Errorf("an outside client reached %s directly through the host", name)
	}
	if _, _, _, err := f.get(filepath.Join(f.dir, string(a.Task)), "["+leg6Text+"]:4000"); err == nil || strings.Contains(err.Error(), "refused") {
		t.Errorf("a task asked the host's listener by way of the ingress leg: %v", err)
	}
	// Without an address the host's leg speaks no IPv6 and the table goes.
	table.Ingress.Addr6 = netip.Prefix{}
	must(t, e.Apply(t.Context(), table))
	if v6, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + weft.IngressLeg + "/disable_ipv6"); err != nil || string(v6) != "1\n" {
		t.Errorf("disable_ipv6 of the leg is %q, %v", v6, err)
	}
	conn, err := nftables.New()
	must(t, err)
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyIPv6)
	must(t, err)
	if len(tables) != 0 {
		t.Errorf("%d IPv6 tables are left", len(tables))
	}
}

// Turning forwarding on must not cost the host what routers tell it.
func TestForwardingKeepsRouterAdvertisements(t *testing.T) {
	f := newFabric(t)
	f.in(f.namespace("host"), func() error {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "up0"}}); err != nil {
			return err
		}
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "up1"}}); err != nil {
			return err
		}
		if err := writeSysctl("net/ipv6/conf/up1/accept_ra", "0"); err != nil {
			return err
		}
		for range 2 {
			if err := forward6(); err != nil {
				return err
			}
		}
		for key, want := range map[string]string{"all/forwarding": "1", "up0/accept_ra": "2", "up1/accept_ra": "0", "default/accept_ra": "2"} {
			if got, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + key); err != nil || string(got) != want+"\n" {
				t.Errorf("%s is %q, %v, want %s", key, got, err, want)
			}
		}
		return nil
	})
}
