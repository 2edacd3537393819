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

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Address plan: mesh's, with one host, which is 192.0.2.9 and 2001:db8:0::9 as well.
// Ports from 10000 on are two tasks'.
const (
	otherHost  = "192.0.2.9"
	otherHost6 = "2001:db8:0::9"
)

// addrsMesh is a mesh of one host with two addresses of each family, and two tasks.
func addrsMesh(t *testing.T) (m *mesh, a, b ingress.Backend) {
	m = newMesh(t, 1)
	a, b = m.task(11), m.task(12)
	// Each refusal is waited for.
	must(t, errors.Join(writeSysctl("net/ipv4/icmp_ratelimit", "0"), writeSysctl("net/ipv6/icmp/ratelimit", "0")))
	m.otherAddrs()
	return m, a, b
}

// otherAddrs gives the host the other addresses.
func (m *mesh) otherAddrs() {
	lo := func(change func(netlink.Link, *netlink.Addr) error) error {
		l, err := netlink.LinkByName("lo")
		for _, s := range []string{otherHost + "/32", otherHost6 + "/128"} {
			a, bad := netlink.ParseAddr(s)
			if err = errors.Join(err, bad); err == nil {
				err = change(l, a)
			}
		}
		return err
	}
	must(m.t, lo(netlink.AddrAdd))
	m.t.Cleanup(func() { must(m.t, lo(netlink.AddrDel)) })
	m.in(m.client, func() error {
		return errors.Join(addRoute(otherHost+"/32", "192.0.2.1", 0), addRoute(otherHost6+"/128", "2001:db8:0::1", 0))
	})
}

func parsed(addrs ...string) (out []netip.Addr) {
	for _, a := range addrs {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

var ourClients = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:7::/64")}

// wantAt asks at addresses of both families; seen "" = refused.
func (m *mesh) wantAt(when string, port int, name, seen, seen6 string, addrs ...string) {
	m.t.Helper()
	for _, addr := range addrs {
		want := seen
		if netip.MustParseAddr(addr).Is6() {
			want = seen6
		}
		to := net.JoinHostPort(addr, fmt.Sprint(port))
		if seen == "" {
			m.wantRefused(when, to)
			continue
		}
		for _, network := range []string{"tcp", "udp"} {
			if _, who, as, err := m.ask(network, to, 0); err != nil || who != name || as.Addr().String() != want {
				m.t.Errorf("%s: %s to %s: %q saw %s, %v; want %s and %s", when, network, to, who, as, err, name, want)
			}
		}
	}
}

// TestOnePortAtTwoAddresses: a port at one address is another service's than at
// another, with other clients, whose addresses are kept here and hidden there. A change
// of one is one transaction of each family and does the other one nothing.
func TestOnePortAtTwoAddresses(t *testing.T) {
	m, a, b := addrsMesh(t)
	here, there := []string{"192.0.2.1", "2001:db8:0::1"}, []string{otherHost, otherHost6}
	var ports []ingress.Published
	rule := func(p weft.Protocol, target uint16, b ingress.Backend, hide bool, allow []netip.Prefix, addrs ...string) {
		ports = append(ports, ingress.Published{Protocol: p, Port: 30000, Target: target, Backends: []ingress.Backend{b}, IPs: parsed(addrs...), HideClient: hide, Allow: allow})
	}
	rule(weft.TCP, 80, a, false, ourClients, here...)
	rule(weft.UDP, 7, a, false, ourClients, here...)
	rule(weft.TCP, 80, b, true, nil, there...)
	rule(weft.UDP, 7, b, true, nil, there...)
	rule(weft.TCP, 80, a, false, nil, "127.0.0.1")
	m.publish(ports...)
	first := func(when string) { m.wantAt(when, 30000, string(a.Task), meshClient, meshClient6, here...) }
	other := func(when string) { m.wantAt(when, 30000, string(b.Task), legText, leg6Text, there...) }
	first("at first")
	other("at first")
	if name, _, _, err := m.get("", "127.0.0.1:30000"); err != nil || name != string(a.Task) {
		t.Errorf("from the host's loopback: %q, %v", name, err)
	}

	open := map[string]net.Conn{}
	for _, addr := range there {
		for _, network := range []string{"tcp", "udp"} {
			c, _, _, err := m.ask(network, net.JoinHostPort(addr, "30000"), 0)
			must(t, err)
			open[network+" "+addr] = c
		}
	}
	change := func(what string, f func(*ingress.Published)) {
		t.Helper()
		next := append([]ingress.Published(nil), ports...)
		f(&next[0])
		f(&next[1])
		before, err := generation()
		must(t, err)
		m.publish(next...)
		now, err := generation()
		must(t, err)
		if now-before != 2 {
			t.Errorf("%s: %d transactions, want one of each family", what, now-before)
		}
		for what, c := range open {
			if network, _, _ := strings.Cut(what, " "); network == "tcp" {
				err = echo(c)
			} else {
				_, _, err = greeted(c, true)
			}
			if err != nil {
				t.Errorf("%s: what was open goes on no more: %s: %v", what, what, err)
			}
		}
		other(what)
	}
	change("other clients", func(p *ingress.Published) { p.Allow = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")} })
	m.wantAt("other clients", 30000, "", "", "", here...)
	change("hidden", func(p *ingress.Published) { p.HideClient, p.Allow = true, nil })
	m.wantAt("hidden", 30000, string(a.Task), legText, leg6Text, here...)
	change("another address", func(p *ingress.Published) { p.IPs = parsed("192.0.2.1") })
	m.wantAt("another address", 30000, "", "", "", "2001:db8:0::1")
	m.publish(ports[2:]...)
	m.wantAt("gone", 30000, "", "", "", here...)
	other("gone")
}

// serveAt answers at ports of a task with its name and the port, and as whom it sees
// the client.
func (m *mesh) serveAt(task int, ports ...int) {
	for _, port := range ports {
		name := fmt.Sprintf("%s:%d", m.tasks[task].Task, port)
		var ln net.Listener
		var pc net.PacketConn
		m.in(m.tasks[task].NetNS, func() (err error) {
			if ln, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
				return err
			}
			pc, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
			return err
		})
		m.acceptAll(ln, name)
		var wg sync.WaitGroup
		wg.Go(func() {
			buf := make([]byte, 100)
			for {
				_, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				fmt.Fprintf(writerTo{pc, from}, "%s %s\n", name, from)
			}
		})
		m.t.Cleanup(func() { pc.Close(); wg.Wait() })
	}
}

// TestRangesThatOverlapAtTwoAddresses: each address has its own, whether the ports are the
// same in the containers or others.
func TestRangesThatOverlapAtTwoAddresses(t *testing.T) {
	m, a, b := addrsMesh(t)
	m.serveAt(0, 10000, 10007, 10010, 20000, 20007, 20010)
	m.serveAt(1, 10005, 10007, 10015, 40005, 40007, 40015)
	here, there := []string{"192.0.2.1", "2001:db8:0::1"}, []string{otherHost, otherHost6}
	for _, tc := range []struct{ target, other int }{{10000, 10005}, {10000, 40005}, {20000, 10005}, {20000, 40005}} {
		var ports []ingress.Published
		for _, p := range []weft.Protocol{weft.TCP, weft.UDP} {
			ports = append(ports,
				ingress.Published{Protocol: p, Port: 10000, Count: 11, Target: uint16(tc.target), Backends: []ingress.Backend{a}, IPs: parsed(here...), Allow: ourClients},
				ingress.Published{Protocol: p, Port: 10005, Count: 11, Target: uint16(tc.other), Backends: []ingress.Backend{b}, IPs: parsed(there...), HideClient: true},
				ingress.Published{Protocol: p, Port: 10007, Target: 10007, Backends: []ingress.Backend{a}, IPs: parsed("127.0.0.1")},
			)
		}
		m.publish(ports...)
		what := fmt.Sprintf("to %d and %d", tc.target, tc.other)
		for _, n := range []int{0, 7, 10} {
			m.wantAt(what, 10000+n, fmt.Sprintf("%s:%d", a.Task, tc.target+n), meshClient, meshClient6, here...)
		}
		for _, n := range []int{0, 2, 10} {
			m.wantAt(what, 10005+n, fmt.Sprintf("%s:%d", b.Task, tc.other+n), legText, leg6Text, there...)
		}
		for _, port := range []int{10011, 10015} {
			m.wantAt(what, port, "", "", "", here...)
		}
		for _, port := range []int{10000, 10004, 10016} {
			m.wantAt(what, port, "", "", "", there...)
		}
	}
}

// A port of a task of this host, on one address, beside the mesh's on another.
func TestBothModesAtTwoAddresses(t *testing.T) {
	m, table := legMesh(t)
	h := m.hosts[0]
	b := m.task(11)
	h.entry.Tasks = m.tasks
	table.Ingress = h.entry
	for i := range table.Published {
		table.Published[i].IPs = parsed("192.0.2.1", "2001:db8:0::1")
		p := table.Published[i]
		if p.Protocol == weft.SCTP {
			continue
		}
		target := uint16(80)
		if p.Protocol == weft.UDP {
			target = 7
		}
		table.Published = append(table.Published, ingress.Published{Protocol: p.Protocol, Port: p.Port, Target: target, Backends: []ingress.Backend{b}, IPs: parsed(otherHost, otherHost6)})
	}
	must(t, h.e.Apply(t.Context(), table))
	m.otherAddrs()
	m.wantAt("mode host", 8080, "leg0", meshClient, meshClient6, "192.0.2.1", "2001:db8:0::1")
	m.wantAt("the mesh", 8080, string(b.Task), meshClient, meshClient6, otherHost, otherHost6)
}

// TestNarrowedPortEndsFlows: what a client has running ends when it might not begin it any
// more, and what others have goes on.
func TestNarrowedPortEndsFlows(t *testing.T) {
	m, a, b := addrsMesh(t)
	foreign := []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:8::/64")}
	base := []ingress.Published{
		{Protocol: weft.TCP, Port: 30000, Target: 80, Backends: []ingress.Backend{a}},
		{Protocol: weft.UDP, Port: 30000, Target: 7, Backends: []ingress.Backend{a}},
		{Protocol: weft.TCP, Port: 30001, Target: 80, Backends: []ingress.Backend{a, b}}, // leads where the other does
		{Protocol: weft.UDP, Port: 30001, Target: 7, Backends: []ingress.Backend{a, b}},
	}
	here := []string{"192.0.2.1:30000", "[2001:db8:0::1]:30000"}
	for _, tc := range []struct {
		name   string
		change func(*ingress.Published)
		ends   bool // else the client is seen otherwise, by datagrams at once
	}{
		{"not allowed any more", func(p *ingress.Published) { p.Allow = foreign }, true},
		{"at another address", func(p *ingress.Published) { p.IPs = parsed(otherHost, otherHost6) }, true},
		{"unpublished", func(p *ingress.Published) { p.Port = 30002 }, true},
		{"hidden", func(p *ingress.Published) { p.HideClient = true }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := &mesh{fabric: &fabric{t: t, dir: m.dir, br: m.br, tasks: m.tasks}, client: m.client, hosts: m.hosts}
			m.publish(base...)
			type running struct {
				what string
				udp  bool
				c    net.Conn
			}
			open := func(network, to string) running {
				c, _, _, err := m.ask(network, to, 0)
				must(t, err)
				return running{network + " to " + to, network == "udp", c}
			}
			again := func(r running) (seen netip.Addr, err error) {
				if !r.udp {
					return netip.Addr{}, echo(r.c)
				}
				_, as, err := greeted(r.c, true)
				return as.Addr(), err
			}
			var mine, others []running
			for _, to := range here {
				for _, network := range []string{"tcp", "udp"} {
					mine = append(mine, open(network, to))
					others = append(others, open(network, strings.TrimSuffix(to, "30000")+"30001"))
				}
			}
			next := append([]ingress.Published(nil), base...)
			tc.change(&next[0])
			tc.change(&next[1])
			m.publish(next...)
			for _, r := range mine {
				seen, err := again(r)
				switch {
				case tc.ends && !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE):
					t.Errorf("%s: %v, want an end", r.what, err)
				case !tc.ends && (err != nil || r.udp && seen != netip.MustParseAddr(legText) && seen != netip.MustParseAddr(leg6Text)):
					t.Errorf("%s: seen as %s, %v, want the host's own address", r.what, seen, err)
				}
			}
			for _, r := range others {
				if _, err := again(r); err != nil {
					t.Errorf("%s, which nobody has changed: %v", r.what, err)
				}
			}
		})
	}
}
