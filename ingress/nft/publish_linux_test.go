package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Address plan: mesh's, with one host. Ports from 10000 to 20000 and from 40001
// on are a task's; 192.0.2.9 is another address of the host.

// answerAt answers datagrams at ports of a task with the port and who asked.
func (m *mesh) answerAt(ports ...int) {
	var wg sync.WaitGroup
	m.t.Cleanup(wg.Wait) // behind the closing of all sockets
	for _, port := range ports {
		var pc net.PacketConn
		m.in(m.tasks[0].NetNS, func() (err error) {
			pc, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
			return err
		})
		wg.Go(func() {
			buf := make([]byte, 100)
			for {
				_, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				fmt.Fprintf(writerTo{pc, from}, "%d %s\n", port, from)
			}
		})
		m.t.Cleanup(func() { pc.Close() })
	}
}

// A range is a rule, however many ports it has: each leads to the one as far
// behind the target.
func TestPublishedRange(t *testing.T) {
	m := newMesh(t, 1)
	b := []ingress.Backend{m.task(11)}
	m.answerAt(10000, 15000, 20000, 40001, 40003)
	began := time.Now()
	m.publish(
		ingress.Published{Service: "s", Protocol: weft.UDP, Port: 10000, Target: 10000, Count: 10001, Backends: b},
		ingress.Published{Service: "s", Protocol: weft.UDP, Port: 20001, Target: 40001, Count: 3, Backends: b, HideClient: true})
	if d := time.Since(began); d > 2*time.Second {
		t.Errorf("a range of 10,001 ports took %s, want less than 2 s", d)
	}
	for port, want := range map[int]string{10000: "10000", 15000: "15000", 20000: "20000", 20001: "40001", 20003: "40003"} {
		for client, host := range map[string]string{meshClient: "192.0.2.1", meshClient6: "[2001:db8:0::1]"} {
			if port > 20000 {
				client = map[string]string{meshClient: legText, meshClient6: leg6Text}[client]
			}
			_, name, seen, err := m.ask("udp", fmt.Sprintf("%s:%d", host, port), 0)
			if err != nil || name != want || seen.Addr() != netip.MustParseAddr(client) {
				t.Errorf("port %d of %s: port %s saw %s, %v; want %s and %s", port, host, name, seen, err, want, client)
			}
		}
	}
	for _, port := range []int{9999, 20002, 20004} { // 20002: the task has no socket
		if _, name, _, err := m.ask("udp", fmt.Sprintf("192.0.2.1:%d", port), 0); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("port %d: %s answered, %v; want refused", port, name, err)
		}
	}
}

// wantRefused asks a port that is not for the client.
func (m *mesh) wantRefused(what, to string) {
	m.t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		if _, name, _, err := m.ask(network, to, 0); !errors.Is(err, syscall.ECONNREFUSED) {
			m.t.Errorf("%s: %s to %s: %q, %v; want refused", what, network, to, name, err)
		}
	}
}

// A port may be bound to addresses and kept to clients: all others meet a host
// where nothing listens.
func TestPublishedToSome(t *testing.T) {
	m := newMesh(t, 1)
	b := m.task(11)
	// Each refusal is waited for.
	must(t, errors.Join(writeSysctl("net/ipv4/icmp_ratelimit", "0"), writeSysctl("net/ipv6/icmp/ratelimit", "0")))
	must(t, addAddr("lo", "192.0.2.9/32"))
	t.Cleanup(func() {
		l, err := netlink.LinkByName("lo")
		must(t, err)
		a, err := netlink.ParseAddr("192.0.2.9/32")
		must(t, errors.Join(err, netlink.AddrDel(l, a)))
	})
	host4, host6, other, loop := "192.0.2.1:30000", "[2001:db8:0::1]:30000", "192.0.2.9:30000", "127.0.0.1:30000"
	m.in(m.client, func() error { return addRoute("192.0.2.9/32", "192.0.2.1", 0) })
	ip, net4, net6 := netip.MustParseAddr, netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:7::/64")
	for _, tc := range []struct {
		name          string
		ips           []netip.Addr
		allow         []netip.Prefix
		open, refused []string
		loopback      bool
	}{
		{"all", nil, nil, []string{host4, host6, other}, nil, true},
		{"one address", []netip.Addr{ip("192.0.2.9")}, nil, []string{other}, []string{host4, host6}, false},
		{"one of each family", []netip.Addr{ip("192.0.2.1"), ip("2001:db8:0::1")}, nil, []string{host4, host6}, []string{other}, false},
		{"loopback", []netip.Addr{ip("127.0.0.1")}, nil, nil, []string{host4, host6, other}, true},
		{"clients", nil, []netip.Prefix{net4, net6}, []string{host4, host6, other}, nil, false},
		{"clients of one family", nil, []netip.Prefix{net4}, []string{host4, other}, []string{host6}, false},
		{"clients around ours", nil, []netip.Prefix{netip.MustParsePrefix("198.51.100.0/30"), netip.MustParsePrefix("198.51.100.8/29"), netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("2001:db8:8::/45")}, nil, []string{host4, host6}, false},
		{"address and clients", []netip.Addr{ip("192.0.2.9")}, []netip.Prefix{net4}, []string{other}, []string{host4, host6}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inner := &mesh{fabric: &fabric{t: t, dir: m.dir, br: m.br, tasks: m.tasks}, client: m.client, hosts: m.hosts}
			var ports []ingress.Published
			for _, p := range m.ports(b)[:2] {
				p.IPs, p.Allow = tc.ips, tc.allow
				ports = append(ports, p)
				p.Port, p.Count = 30100, 2 // the same of a range
				ports = append(ports, p)
			}
			inner.publish(ports...)
			for _, port := range []string{":30000", ":30100"} {
				for _, to := range tc.open {
					to = strings.Replace(to, ":30000", port, 1)
					for _, network := range []string{"tcp", "udp"} {
						if _, name, _, err := inner.ask(network, to, 0); err != nil || name != string(b.Task) {
							t.Errorf("%s to %s: %q, %v", network, to, name, err)
						}
					}
				}
				for _, to := range tc.refused {
					inner.wantRefused(tc.name, strings.Replace(to, ":30000", port, 1))
				}
				_, _, c, err := inner.get("", strings.Replace(loop, ":30000", port, 1))
				if (err == nil) != tc.loopback {
					t.Errorf("from the host's loopback: %v", err)
				}
				if c != nil {
					c.Close()
				}
			}
		})
	}
}

// A port in mode host leads to a task of the host, behind the gateway bridge; it is
// reached from outside and from the host.
func TestPublishedOnTheHost(t *testing.T) {
	const gw, legA, legB = "172.31.240.1/20", "172.31.240.2", "172.31.240.3"
	m := newMesh(t, 1)
	m.gateway(gw, legA, legB)
	h := m.hosts[0]
	must(t, h.e.Apply(t.Context(), ingress.Table{
		Ingress: h.entry, Gateway: ingress.Gateway{Bridge: weft.GatewayBridge, Subnet: netip.MustParsePrefix("172.31.240.0/20")},
		Published: []ingress.Published{
			{Service: "h", Protocol: weft.TCP, Port: 8080, Target: 80, Host: true, Backends: []ingress.Backend{{Task: "h", Addr: netip.MustParseAddr(legA)}}},
			{Service: "h", Protocol: weft.UDP, Port: 8080, Target: 7, Host: true, Backends: []ingress.Backend{{Task: "h", Addr: netip.MustParseAddr(legA)}}},
		},
	}))
	for _, network := range []string{"tcp", "udp"} {
		if _, name, seen, err := m.ask(network, "192.0.2.1:8080", 0); err != nil || name != "leg0" || seen.Addr().String() != meshClient {
			t.Errorf("%s from outside: %s saw %s, %v", network, name, seen, err)
		}
	}
	for _, from := range []struct{ ns, to, seen string }{
		{"", "192.0.2.1", "192.0.2.1"}, {"", "127.0.0.1", "172.31.240.1"}, {"", "172.31.240.1", "172.31.240.1"},
	} {
		name, seen, _, err := m.get(from.ns, from.to+":8080")
		if err != nil || name != "leg0" || !strings.HasPrefix(seen, from.seen+":") {
			t.Errorf("from %q to %s: %s saw %s, %v; want %s", from.ns, from.to, name, seen, err, from.seen)
		}
	}
	if name, _, _, err := m.get(m.dir+"/leg1", legA+":80"); err == nil {
		t.Errorf("a task has reached %s beside its port", name)
	}
}

// What the host itself has open goes on when its port is published, even if
// connection tracking does not know of it.
func TestPublishedLeavesTheHostsSocketsAlone(t *testing.T) {
	m := newMesh(t, 1)
	b := m.task(11)
	ln, err := net.Listen("tcp4", "192.0.2.1:30000")
	must(t, err)
	defer ln.Close()
	var here, there net.Conn
	m.in(m.client, func() (err error) {
		there, err = net.Dial("tcp4", "192.0.2.1:30000")
		return err
	})
	defer there.Close()
	here, err = ln.Accept()
	must(t, err)
	defer here.Close()
	m.publish(m.ports(b)...)
	must(t, netlink.ConntrackTableFlush(netlink.ConntrackTable))
	must(t, errors.Join(there.SetDeadline(time.Now().Add(3*time.Second)), here.SetDeadline(time.Now().Add(3*time.Second))))
	for _, c := range [][2]net.Conn{{there, here}, {here, there}} {
		buf := make([]byte, 5)
		if _, err := c[0].Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := c[1].Read(buf); err != nil || string(buf) != "hello" {
			t.Errorf("the host's connection: %q, %v", buf, err)
		}
	}
	if _, name, _, err := m.ask("tcp", "192.0.2.1:30000", 0); err != nil || name != string(b.Task) {
		t.Errorf("a new connection: %s, %v; want the task", name, err)
	}
}

// Who flushes other tables does no harm; who flushes weft's is put right.
func TestPublishedAmongOtherTables(t *testing.T) {
	m := newMesh(t, 1)
	m.task(11)
	m.publish(m.ports(m.backend(11))...)
	conn, err := open()
	must(t, err)
	foreign := conn.AddTable(&nftables.Table{Name: "firewall", Family: nftables.TableFamilyIPv4})
	must(t, conn.Flush())
	conn.FlushTable(foreign)
	conn.DelTable(foreign)
	must(t, conn.Flush())
	m.wantKept("another table has come and gone")
	var got []weft.Repair
	m.hosts[0].e.Repaired = func(r weft.Repair) { got = append(got, r) }
	conn.FlushRuleset()
	must(t, conn.Flush())
	for range 2 {
		m.publish(m.ports(m.backend(11))...)
	}
	if len(got) != 2 || got[0].Kind != kindTable || got[1].Kind != kindTable {
		t.Errorf("repairs %+v, want the table of either family once", got)
	}
	m.wantKept("weft's table is back")
}

// A connection to a backend that has gone ends with its next packet.
func TestPublishedConnectionOfTheDead(t *testing.T) {
	m := newMesh(t, 1)
	a, b := m.task(11), m.task(12)
	m.publish(m.ports(a)...)
	c, _, _, err := m.ask("tcp", "192.0.2.1:30000", 0)
	must(t, err)
	m.publish(m.ports(b)...)
	if err := echo(c); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("more on the connection: %v, want a reset", err)
	}
	m.wantKept("the other backend")
}

// Where connection tracking does not know SCTP its ports are left to the host, and said
// to be.
func TestPublishedWithoutSCTP(t *testing.T) {
	m := newMesh(t, 1)
	b := m.task(11)
	e := m.hosts[0].e
	if note := e.Note(); note != "" {
		netnstest.Missing(t, "userns", fmt.Errorf("%s: %w", note, weft.ErrUnsupported))
	}
	has := func() bool {
		_, ok := elements(t, "/proc/thread-self/ns/net", ipv4.publishedRules(ingress.Table{}), "ports")[portOf(weft.SCTP, 30000)+ipv4.firstAddr(nil)]
		return ok
	}
	m.publish(m.ports(b)...)
	if !has() {
		t.Error("the port of SCTP is not published")
	}
	e.lacksSCTP = true
	m.publish(m.ports(b)...)
	if has() {
		t.Error("the port of SCTP is published without connection tracking of it")
	}
	if note := e.Note(); !strings.Contains(note, "ports of SCTP are not published") {
		t.Errorf("the engine says %q", note)
	}
	if _, name, _, err := m.ask("tcp", "192.0.2.1:30000", 0); err != nil || name != string(b.Task) {
		t.Errorf("the port of TCP: %q, %v", name, err)
	}
}
