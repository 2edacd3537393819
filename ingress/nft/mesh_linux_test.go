package nft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/vxlan/netns"
)

// Address plan: entry hosts 0, 1 and 2 have the legs 10.0.16.250 to 252 and are
// 192.0.2.1, 198.18.1.1 and 198.18.2.1 (2001:db8:N::1) to the client, which is
// 198.51.100.7 and 2001:db8:7::7 wherever it asks. Host 0 is the test's own
// namespace. Tasks are fabric's; 203.0.113.9 is nobody's.
const (
	meshClient  = "198.51.100.7"
	meshClient6 = "2001:db8:7::7"
	meshForeign = "203.0.113.9"
)

// meshHost is a node by which requests enter.
type meshHost struct {
	ns          string // "" = the test's own
	e           *Engine
	entry       ingress.Entry
	addr, addr6 string
}

// mesh is a bridge with tasks, hosts with legs on it and a client outside.
type mesh struct {
	*fabric
	client string
	hosts  []*meshHost
}

func newMesh(t *testing.T, hosts int) *mesh {
	m := &mesh{fabric: newFabric(t)}
	m.client = m.namespace("client")
	m.in(m.client, func() error {
		if err := setUp("lo"); err != nil {
			return err
		}
		return errors.Join(addAddr("lo", meshClient+"/32"), addAddr("lo", meshClient6+"/128"))
	})
	var nodes []ingress.EntryNode
	for i := range hosts {
		h := &meshHost{e: New(m.dir), addr: "192.0.2.1", addr6: "2001:db8:0::1"}
		if i > 0 {
			h.ns, h.addr, h.addr6 = m.namespace(fmt.Sprintf("host%d", i)), fmt.Sprintf("198.18.%d.1", i), fmt.Sprintf("2001:db8:%d::1", i)
		}
		leg := netip.AddrFrom4([4]byte{10, 0, 16, byte(250 + i)})
		mac := weft.NodeMAC(weft.ID(fmt.Sprintf("host%d", i)), leg)
		// As the overlay makes it: without a link-local address.
		must(t, h.do(func() error { return writeSysctl("net/ipv6/conf/default/addr_gen_mode", "1") }))
		m.port(h.ns, weft.IngressLeg, leg.String(), mac)
		must(t, h.do(func() error { return writeSysctl("net/ipv6/conf/default/addr_gen_mode", "0") }))
		nodes = append(nodes, ingress.EntryNode{MAC: mac, Addr: leg})
		h.entry = ingress.Entry{Link: weft.IngressLeg, Addr: netip.PrefixFrom(leg, 24), Addr6: netip.PrefixFrom(twin(leg.String()), 64)}
		m.wire(i, h)
		must(t, h.do(func() error { return h.e.Probe(t.Context()) }))
		m.hosts = append(m.hosts, h)
		t.Cleanup(func() { must(t, h.do(func() error { return h.e.Close(context.Background()) })) })
	}
	for _, h := range m.hosts {
		h.entry.Nodes = nodes
	}
	return m
}

func (h *meshHost) do(f func() error) error {
	if h.ns == "" {
		return f()
	}
	return netns.Do(h.ns, f)
}

// wire joins the client to a host, in both families.
func (m *mesh) wire(i int, h *meshHost) {
	client, err := netns.Open(m.client)
	must(m.t, err)
	defer client.Close()
	up, down := fmt.Sprintf("up%d", i), fmt.Sprintf("eth%d", i)
	must(m.t, h.do(func() error {
		if err := writeSysctl("net/ipv6/conf/default/accept_dad", "0"); err != nil {
			return err
		}
		if err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: up, Flags: net.FlagUp}, PeerName: down, PeerNamespace: netlink.NsFd(client.FD()),
		}); err != nil {
			return err
		}
		return errors.Join(setUp("lo"), addAddr(up, h.addr+"/24"), addAddr(up, h.addr6+"/64"))
	}))
	next, next6 := netip.MustParseAddr(h.addr).Next().String(), netip.MustParseAddr(h.addr6).Next().String()
	m.in(m.client, func() error {
		if err := writeSysctl("net/ipv6/conf/default/accept_dad", "0"); err != nil {
			return err
		}
		return errors.Join(setUp(down), addAddr(down, next+"/24"), addAddr(down, next6+"/64"))
	})
	must(m.t, h.do(func() error {
		return errors.Join(addRoute(meshClient+"/32", next, 0), addRoute(meshClient6+"/128", next6, 0))
	}))
	m.t.Cleanup(func() { // at once: the kernel takes its time to end a namespace
		must(m.t, h.do(func() error {
			for _, name := range []string{weft.IngressLeg, up} {
				l, err := netlink.LinkByName(name)
				if err != nil {
					return err
				}
				if err := netlink.LinkDel(l); err != nil {
					return err
				}
			}
			return nil
		}))
	})
}

func addRoute(dst, via string, table int) error {
	p := netip.MustParsePrefix(dst)
	return netlink.RouteAdd(&netlink.Route{
		Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, Gw: net.ParseIP(via), Table: table,
	})
}

// publish applies the same ports on all hosts.
func (m *mesh) publish(ports ...ingress.Published) {
	m.t.Helper()
	for _, h := range m.hosts {
		h.entry.Tasks = m.tasks
		must(m.t, h.do(func() error { return h.e.Apply(m.t.Context(), ingress.Table{Ingress: h.entry, Published: ports}) }))
	}
}

// ask sends from the client's address and the given port, or any port with 0,
// and says who answered, and as whom the client was seen.
func (m *mesh) ask(network, to string, from int) (net.Conn, string, netip.AddrPort, error) {
	m.t.Helper()
	ip := net.ParseIP(meshClient)
	if strings.HasPrefix(to, "[") {
		ip = net.ParseIP(meshClient6)
	}
	d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: ip, Port: from}, Control: reuse}
	if network == "udp" {
		d.LocalAddr = &net.UDPAddr{IP: ip, Port: from}
	}
	var c net.Conn
	if err := netns.Do(m.client, func() (err error) {
		if network == "sctp" {
			own, _ := netip.AddrFromSlice(ip)
			c, err = ingresstest.DialSCTP(netip.AddrPortFrom(own.Unmap(), uint16(from)), netip.MustParseAddrPort(to))
			return err
		}
		c, err = d.DialContext(m.t.Context(), network, to)
		return err
	}); err != nil {
		return nil, "", netip.AddrPort{}, err
	}
	m.t.Cleanup(func() { c.Close() })
	name, seen, err := greeted(c, network == "udp")
	return c, name, seen, err
}

func greeted(c net.Conn, udp bool) (string, netip.AddrPort, error) {
	must := c.SetDeadline(time.Now().Add(patience))
	if udp {
		_, err := c.Write([]byte("x"))
		must = errors.Join(must, err)
	}
	if must != nil {
		return "", netip.AddrPort{}, must
	}
	buf := make([]byte, 100)
	n, err := c.Read(buf)
	if err != nil {
		return "", netip.AddrPort{}, err
	}
	name, addr, _ := strings.Cut(strings.TrimSpace(string(buf[:n])), " ")
	seen, err := netip.ParseAddrPort(addr)
	return name, netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port()), err
}

// reuse lets a port be used towards several hosts at once.
func reuse(_, _ string, c syscall.RawConn) error {
	var opt error
	err := c.Control(func(fd uintptr) {
		opt = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
	})
	return errors.Join(err, opt)
}

func (m *mesh) ports(b ...ingress.Backend) []ingress.Published {
	return []ingress.Published{
		{Service: "web", Protocol: weft.TCP, Port: 30000, Target: 80, Backends: b},
		{Service: "web", Protocol: weft.UDP, Port: 30000, Target: 7, Backends: b},
		{Service: "web", Protocol: weft.UDP, Port: 30001, Target: 9, Backends: b}, // nobody is there
		{Service: "web", Protocol: weft.SCTP, Port: 30000, Target: 80, Backends: b},
	}
}

// addresses of a host at port 30000, in both families.
func (h *meshHost) addresses() map[string]string {
	return map[string]string{meshClient: h.addr + ":30000", meshClient6: "[" + h.addr6 + "]:30000"}
}

// networks are those by which tasks can be asked.
func (m *mesh) networks() []string {
	if ingresstest.HasSCTP() != nil {
		return []string{"tcp", "udp"}
	}
	return []string{"tcp", "udp", "sctp"}
}

// wantKept asks by every host for itself and checks what the task sees.
func (m *mesh) wantKept(when string) {
	m.t.Helper()
	for i, h := range m.hosts {
		for client, to := range h.addresses() {
			for _, network := range m.networks() {
				_, name, seen, err := m.ask(network, to, 0)
				if err != nil || seen.Addr().String() != client {
					m.t.Errorf("%s: %s by host %d to %s: %q saw %s, %v; want %s", when, network, i, to, name, seen, err, client)
				}
			}
		}
	}
}

// A task sees its client's own address, by whichever node the client comes, with
// and without a way out of its own.
func TestMeshKeepsClients(t *testing.T) {
	m := newMesh(t, 3)
	b := m.task(11)
	m.publish(m.ports(b)...)
	m.wantKept("no way out")
	m.in(m.tasks[0].NetNS, moveLocal)
	m.wantKept("local addresses behind service addresses")
	m.in(m.tasks[0].NetNS, func() error {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "gw0", Flags: net.FlagUp}}); err != nil {
			return err
		}
		return errors.Join(addAddr("gw0", "172.31.240.2/20"), addRoute("0.0.0.0/0", "172.31.240.1", 0))
	})
	m.wantKept("a way out elsewhere")
	m.in(m.tasks[0].NetNS, func() error { return writeSysctl("net/ipv4/conf/all/rp_filter", "1") })
	m.wantKept("strict reverse paths")
	// The way out leads to the very network that the client is of.
	m.in(m.tasks[0].NetNS, func() error { return addAddr("gw0", "198.51.100.1/24") })
	m.wantKept("a neighbour's address")
}

// moveLocal puts the rule of local addresses where agent/sandbox does, so that a
// task's requests to its own service leave it.
func moveLocal() error {
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		for _, priority := range []int{100, 0} {
			r := netlink.NewRule()
			r.Family, r.Priority, r.Table = fam, priority, unix.RT_TABLE_LOCAL
			change := netlink.RuleAdd
			if priority == 0 {
				change = netlink.RuleDel
			}
			if err := change(r); err != nil {
				return fmt.Errorf("move rule %d: %w", priority, err)
			}
		}
	}
	return nil
}

// The same client may use the same port by several nodes at once: its port may
// be another for the task, its address never.
func TestMeshOnePortByAllNodes(t *testing.T) {
	m := newMesh(t, 3)
	m.publish(m.ports(m.task(11))...)
	for client := range m.hosts[0].addresses() {
		for _, network := range []string{"tcp", "udp"} {
			ports := map[uint16]bool{}
			var open []net.Conn
			for round := range 2 {
				for i, h := range m.hosts {
					c, _, seen, err := net.Conn(nil), "", netip.AddrPort{}, error(nil)
					if round == 0 {
						c, _, seen, err = m.ask(network, h.addresses()[client], 20000)
						open = append(open, c)
					} else if network == "udp" {
						_, seen, err = greeted(open[i], true)
					} else {
						err = echo(open[i])
						seen = netip.AddrPortFrom(netip.MustParseAddr(client), 1)
					}
					if err != nil || seen.Addr().String() != client {
						t.Fatalf("%s by host %d, round %d: seen as %s, %v; want %s", network, i, round, seen, err, client)
					}
					ports[seen.Port()] = true
				}
			}
			if network == "udp" && len(ports) != len(m.hosts) {
				t.Errorf("udp of %s was seen with the ports %v, want one for each of %d nodes", client, ports, len(m.hosts))
			}
		}
	}
}

// What goes wrong on the way is said to both ends; what is large arrives.
func TestMeshErrorsAndFragments(t *testing.T) {
	m := newMesh(t, 2)
	b := m.task(11)
	// The task's: one answers with what it got, one with as much as is asked
	// for, never cut.
	var pc [2]net.PacketConn
	m.in(m.tasks[0].NetNS, func() (err error) {
		for i, port := range []string{":10", ":11"} {
			lc := net.ListenConfig{}
			if i == 1 {
				lc.Control = neverCut
			}
			if pc[i], err = lc.ListenPacket(t.Context(), "udp", port); err != nil {
				return err
			}
		}
		return nil
	})
	var wg sync.WaitGroup
	t.Cleanup(func() { pc[0].Close(); pc[1].Close(); wg.Wait() })
	tooBig := make(chan error, 100)
	for i := range pc {
		wg.Go(func() {
			buf := make([]byte, 9000)
			for {
				n, from, err := pc[i].ReadFrom(buf)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if i == 1 && err == nil {
					n, err = strconv.Atoi(string(buf[:n]))
				}
				if err == nil {
					_, err = pc[i].WriteTo(buf[:n], from)
				}
				if err != nil {
					tooBig <- err
				}
			}
		})
	}
	m.publish(append(m.ports(b),
		ingress.Published{Service: "web", Protocol: weft.UDP, Port: 30010, Target: 10, Backends: []ingress.Backend{b}},
		ingress.Published{Service: "web", Protocol: weft.UDP, Port: 30011, Target: 11, Backends: []ingress.Backend{b}})...)
	for i, h := range m.hosts {
		for _, host := range []string{h.addr, "[" + h.addr6 + "]"} {
			if _, _, _, err := m.ask("udp", host+":30001", 0); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a port where the task has no socket, by %s: %v, want refused", host, err)
			}
			c := m.dial("udp", host+":30010")
			for _, size := range []int{100, 4000, 8000} {
				if err := echoed(c, size); err != nil {
					t.Errorf("%d bytes by %s and back: %v", size, host, err)
				}
			}
		}
		// The way from the host to the client narrows: the host says so to the
		// task, and to nobody else.
		must(t, h.do(func() error {
			l, err := netlink.LinkByName(fmt.Sprintf("up%d", i))
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(l, 1290)
		}))
		for _, host := range []string{h.addr, "[" + h.addr6 + "]"} {
			c := m.dial("udp", host+":30011")
			for range 2 {
				if err := answered(c, "1400", 1400); err == nil {
					t.Errorf("1400 bytes came by %s on a way of 1290", host)
				}
			}
			select {
			case err := <-tooBig:
				if !errors.Is(err, syscall.EMSGSIZE) {
					t.Errorf("the task's socket says %v, want %v", err, syscall.EMSGSIZE)
				}
			default:
				t.Errorf("the task does not learn that the way by %s is narrow", host)
			}
			if err := answered(c, "1200", 1200); err != nil {
				t.Errorf("1200 bytes by %s: %v", host, err)
			}
			for len(tooBig) > 0 {
				<-tooBig
			}
		}
	}
}

// neverCut is IP_PMTUDISC_DO in both families (linux/in.h).
func neverCut(_, _ string, c syscall.RawConn) error {
	var opt error
	err := c.Control(func(fd uintptr) {
		opt = errors.Join(
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO))
	})
	return errors.Join(err, opt)
}

func (m *mesh) dial(network, to string) net.Conn {
	m.t.Helper()
	ip := net.ParseIP(meshClient)
	if strings.HasPrefix(to, "[") {
		ip = net.ParseIP(meshClient6)
	}
	var c net.Conn
	m.in(m.client, func() (err error) {
		c, err = (&net.Dialer{LocalAddr: &net.UDPAddr{IP: ip}}).DialContext(m.t.Context(), network, to)
		return err
	})
	m.t.Cleanup(func() { c.Close() })
	return c
}

func echoed(c net.Conn, size int) error { return answered(c, strings.Repeat("x", size), size) }

// answered sends and waits for an answer of that size.
func answered(c net.Conn, text string, size int) error {
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte(text)); err != nil {
		return err
	}
	n, err := c.Read(make([]byte, 9000))
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes came back", n)
	}
	return err
}

// Nodes come and go: the others' flows do not notice.
func TestMeshNodesComeAndGo(t *testing.T) {
	m := newMesh(t, 3)
	m.publish(m.ports(m.task(11))...)
	c, _, _, err := m.ask("tcp", m.hosts[1].addr+":30000", 0)
	must(t, err)
	all := m.hosts[0].entry.Nodes
	for _, nodes := range [][]ingress.EntryNode{all[1:], all[1:2], all} {
		for _, h := range m.hosts {
			h.entry.Nodes = nodes
		}
		m.publish(m.ports(m.backend(11))...)
		if err := echo(c); err != nil {
			t.Errorf("an open connection with %d nodes: %v", len(nodes), err)
		}
	}
	m.wantKept("all are back")
}

// backend is a task that was made before.
func (f *fabric) backend(n int) ingress.Backend {
	id, addr := weft.ID(fmt.Sprintf("task%d", n)), netip.AddrFrom4([4]byte{10, 0, 16, byte(n)})
	return ingress.Backend{Task: id, Addr: addr, Addr6: twin(addr.String()), MAC: weft.EndpointMAC(id, addr)}
}

// Nobody but an entry node brings packets from afar to a task, and a task opens
// nothing by an entry node, whatever mark it gives its packets.
func TestMeshIsNoWayForOthers(t *testing.T) {
	m := newMesh(t, 2)
	m.task(11)
	m.publish(m.ports(m.backend(11))...)
	m.wantKept("at first")
	var pc net.PacketConn
	m.in(m.tasks[0].NetNS, func() (err error) {
		pc, err = net.ListenPacket("udp4", ":4000")
		return err
	})
	defer pc.Close()
	peer := m.namespace("peer")
	m.port(peer, "eth0", "10.0.16.60", nil)
	m.in(peer, func() error {
		if err := addAddr("lo", meshForeign+"/32"); err != nil {
			return err
		}
		for _, from := range []string{meshForeign, "10.0.16.60"} {
			c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}).Dial("udp4", "10.0.16.11:4000")
			if err != nil {
				return err
			}
			_, err = c.Write([]byte(from))
			if err = errors.Join(err, c.Close()); err != nil {
				return err
			}
		}
		return nil
	})
	buf := make([]byte, 100)
	must(t, pc.SetDeadline(time.Now().Add(3*time.Second)))
	n, _, err := pc.ReadFrom(buf)
	if got := string(buf[:n]); err != nil || got != "10.0.16.60" {
		t.Errorf("the task got %q, %v; want its neighbour's packet only", got, err)
	}

	var ln net.Listener
	m.in(m.client, func() (err error) {
		ln, err = net.Listen("tcp4", meshClient+":4000")
		return err
	})
	defer ln.Close()
	mark := int(m.hosts[1].entry.Nodes[1].Mark())
	for what, d := range map[string]net.Dialer{
		"no mark":           {},
		"its own address":   {LocalAddr: &net.TCPAddr{IP: net.ParseIP("10.0.16.11")}},
		"an entry's mark":   {Control: func(_, _ string, c syscall.RawConn) error { return withMark(c, mark) }},
		"mark and own port": {LocalAddr: &net.TCPAddr{IP: net.ParseIP("10.0.16.11"), Port: 80}, Control: func(a, b string, c syscall.RawConn) error { return errors.Join(reuse(a, b, c), withMark(c, mark)) }},
	} {
		d.Timeout = 300 * time.Millisecond
		err := netns.Do(m.tasks[0].NetNS, func() error {
			c, err := d.Dial("tcp4", meshClient+":4000")
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			t.Errorf("with %s the task has opened a connection to the outside", what)
		}
	}
}

func withMark(c syscall.RawConn, mark int) error {
	var opt error
	err := c.Control(func(fd uintptr) { opt = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) })
	return errors.Join(err, opt)
}

// TestMeshRemembersWhatWasAsked: a pass of the engine leaves alone what tasks know of
// datagrams, which they may answer later.
func TestMeshRemembersWhatWasAsked(t *testing.T) {
	m := newMesh(t, 1)
	b := m.task(11)
	m.publish(m.ports(b)...)
	if _, _, _, err := m.ask("udp", m.hosts[0].addr+":30000", 0); err != nil {
		t.Fatal(err)
	}
	rules := ipv4.insideRules(m.hosts[0].entry, wish{EntryTask: m.tasks[0]})
	asked := func() (n int) {
		must(t, withConn(m.tasks[0].NetNS, func(c *nftables.Conn) error {
			all, err := readElements(rules.sets[slices.IndexFunc(rules.sets, func(s set) bool { return s.name == "asked" })].object(rules.table()))
			n = len(all)
			return err
		}))
		return n
	}
	if n := asked(); n != 1 {
		t.Fatalf("%d datagrams are remembered", n)
	}
	for range 2 { // one that is the same looks at all
		m.publish(m.ports(b)...)
	}
	if n := asked(); n != 1 {
		t.Errorf("after a pass %d datagrams are remembered", n)
	}
}
