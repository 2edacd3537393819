package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Address plan: mesh's, with one host whose gateway bridge is 172.31.240.1/20 and has
// the legs of two tasks, 172.31.240.2 and 172.31.240.3, and their twins.
const legGateway, legFirst, legSecond = "172.31.240.1/20", "172.31.240.2", "172.31.240.3"

// legMesh is a mesh of which the first task behind the gateway bridge has ports in mode
// host: 8080, of TCP and UDP, and of SCTP where the kernel has it.
func legMesh(t *testing.T) (*mesh, ingress.Table) {
	m := newMesh(t, 1)
	if !m.hosts[0].e.CanPublish6() {
		netnstest.Missing(t, "userns", fmt.Errorf("this kernel does not translate IPv6: %w", weft.ErrUnsupported))
	}
	m.gateway(legGateway, legFirst, legSecond)
	addr := netip.MustParseAddr(legFirst)
	leg := netip.PrefixFrom(weft.GatewayTwin(addr), 64)
	table := ingress.Table{Ingress: m.hosts[0].entry, Gateway: ingress.Gateway{
		Bridge: weft.GatewayBridge, Subnet: netip.MustParsePrefix(legGateway).Masked(), Addr6: netip.PrefixFrom(weft.GatewayAddr6(), 64),
		Legs: []ingress.EntryTask{{Task: "h", NetNS: m.dir + "/leg0", Link: weft.GatewayLeg, Addr6: leg}},
	}}
	b := []ingress.Backend{{Task: "h", Addr: addr, Addr6: leg.Addr()}}
	for p, target := range map[weft.Protocol]uint16{weft.TCP: 80, weft.UDP: 7, weft.SCTP: 80} {
		table.Published = append(table.Published, ingress.Published{Service: "h", Protocol: p, Port: 8080, Target: target, Host: true, Backends: b})
	}
	slices.SortFunc(table.Published, func(a, b ingress.Published) int {
		return int(protocolNumber(a.Protocol)) - int(protocolNumber(b.Protocol))
	})
	return m, table
}

// wantHost asks the port in mode host in both families.
func (m *mesh) wantHost(when string) {
	m.t.Helper()
	for client, to := range map[string]string{meshClient: "192.0.2.1:8080", meshClient6: "[2001:db8:0::1]:8080"} {
		for _, network := range m.networks() {
			if _, name, seen, err := m.ask(network, to, 0); err != nil || name != "leg0" || seen.Addr().String() != client {
				m.t.Errorf("%s: %s to %s: %q saw %s, %v; want %s", when, network, to, name, seen, err, client)
			}
		}
	}
}

// A port in mode host is asked at the host's IPv6 addresses, too: the task sees its
// client's address, and the leg leads nowhere but back.
func TestPublishedOnTheHostIPv6(t *testing.T) {
	m, table := legMesh(t)
	h := m.hosts[0]
	must(t, h.e.Apply(t.Context(), table))
	m.wantHost("at first")
	for _, network := range []string{"tcp", "udp"} {
		c, err := net.Dial(network, "[2001:db8:0::1]:8080")
		must(t, err)
		defer c.Close()
		if name, seen, err := greeted(c, network == "udp"); err != nil || name != "leg0" || seen.Addr().String() != "2001:db8::1" {
			t.Errorf("%s from the host: %q saw %s, %v", network, name, seen, err)
		}
	}
	if name, _, _, err := m.get("", "localhost:8080"); err != nil || name != "leg0" {
		t.Errorf("at localhost: %q, %v", name, err)
	}

	// Neither another task, nor a neighbour of the host that routes the range here,
	// comes in beside the port.
	leg := table.Gateway.Legs[0].Addr6
	beside := netip.AddrPortFrom(leg.Addr(), 80).String()
	m.in(m.client, func() error { return addRoute(weft.GatewayPool6().String(), "2001:db8:0::1", 0) })
	if _, name, _, err := m.ask("tcp", beside, 0); err == nil {
		t.Errorf("%s was reached from outside beside its port", name)
	}
	m.in(m.dir+"/leg1", func() error { return addAddr("gw0", weft.GatewayTwin(netip.MustParseAddr(legSecond)).String()+"/64") })
	if name, _, _, err := m.get(m.dir+"/leg1", beside); err == nil {
		t.Errorf("another task has reached %s beside its port", name)
	}
	// By its own address a task gets an answer out and nothing else; without it, it
	// has no way at all.
	m.in(m.client, func() error {
		ln, err := net.Listen("tcp6", "["+meshClient6+"]:4000")
		if err == nil {
			t.Cleanup(func() { ln.Close() })
		}
		return err
	})
	m.in(m.dir+"/leg0", func() error {
		_, err := net.DialTimeout("tcp6", "["+meshClient6+"]:4000", time.Second)
		if !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("a task opens a connection over IPv6: %v, want no way", err)
		}
		d := net.Dialer{Timeout: 500 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: leg.Addr().AsSlice()}}
		if c, err := d.Dial("tcp6", "["+meshClient6+"]:4000"); err == nil {
			c.Close()
			t.Error("from its leg's address a task has opened a connection")
		}
		return nil
	})
}

// A task of both modes answers each datagram from where it was asked.
func TestPublishedInBothModes(t *testing.T) {
	m, table := legMesh(t)
	h := m.hosts[0]
	// The task's namespace gets a port on the ingress network, too.
	ns, addr := m.dir+"/leg0", netip.MustParseAddr("10.0.16.11")
	mac := weft.EndpointMAC("h", addr)
	m.port(ns, "eth0", addr.String(), mac)
	table.Ingress.Tasks = []ingress.EntryTask{{Task: "h", NetNS: ns, Link: "eth0", Addr: netip.PrefixFrom(addr, 24), Addr6: netip.PrefixFrom(twin(addr.String()), 64)}}
	b := []ingress.Backend{{Task: "h", Addr: addr, Addr6: twin(addr.String()), MAC: mac}}
	table.Published = append(table.Published, m.ports(b...)...)
	must(t, h.e.Apply(t.Context(), table))
	for range 2 { // by one way and the other, from one port of the client
		for client, host := range map[string]string{meshClient: "192.0.2.1", meshClient6: "[2001:db8:0::1]"} {
			for _, port := range []string{"8080", "30000"} {
				for _, network := range m.networks() {
					if _, name, seen, err := m.ask(network, host+":"+port, 0); err != nil || name != "leg0" || seen.Addr().String() != client {
						t.Errorf("%s to port %s of %s: %q saw %s, %v; want %s", network, port, host, name, seen, err, client)
					}
				}
			}
		}
	}
}

// What somebody breaks of it is mended and counted once, and Close leaves nothing.
func TestPublishedOnTheHostRepairs(t *testing.T) {
	m, table := legMesh(t)
	h := m.hosts[0]
	must(t, h.e.Apply(t.Context(), table))
	var got []string
	h.e.Repaired = func(r weft.Repair) { got = append(got, r.Kind) }
	leg, ns := table.Gateway.Legs[0], m.dir+"/leg0"
	del := func(link string, p netip.Prefix) func() error { return func() error { return removeAddr6(link, p) } }
	delRules := func() error {
		rules, err := netlink.RuleList(netlink.FAMILY_V6)
		for i := range rules {
			if rules[i].Table == legTable {
				rules[i].Family = netlink.FAMILY_V6
				err = errors.Join(err, netlink.RuleDel(&rules[i]))
			}
		}
		return err
	}
	for _, tc := range []struct {
		name, ns string
		spoil    func() error
		want     []string
	}{
		{"nothing", "", func() error { return nil }, nil},
		{"bridge's address", "", del(weft.GatewayBridge, table.Gateway.Addr6), []string{kindAddress}},
		{"leg's address", ns, del(weft.GatewayLeg, leg.Addr6), []string{kindAddress, kindRoute}},
		{"rules", ns, delRules, []string{kindRule, kindRule, kindRule, kindRule}},
		{"route", ns, func() error {
			return netlink.RouteDel(&netlink.Route{Table: legTable, Dst: &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}})
		}, []string{kindRoute}},
	} {
		got = nil
		if tc.ns == "" {
			must(t, tc.spoil())
		} else {
			m.in(tc.ns, tc.spoil)
		}
		for range 2 {
			must(t, h.e.Apply(t.Context(), table))
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: repairs %v, want %v", tc.name, got, tc.want)
		}
		m.wantHost(tc.name)
	}

	// A leg that goes is the sandbox's fault; the next one is looked after at once.
	got = nil
	m.in(ns, func() error {
		l, err := netlink.LinkByName(weft.GatewayLeg)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetDown(l), netlink.LinkSetName(l, "away"))
	})
	must(t, h.e.Apply(t.Context(), table))
	m.in(ns, func() error {
		l, err := netlink.LinkByName("away")
		if err != nil {
			return err
		}
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		return errors.Join(netlink.LinkSetName(l, weft.GatewayLeg), netlink.LinkSetUp(l),
			netlink.RouteReplace(&netlink.Route{Dst: all, Gw: netip.MustParsePrefix(legGateway).Addr().AsSlice()}))
	})
	must(t, h.e.Apply(t.Context(), table))
	if len(got) > 0 {
		t.Errorf("another leg was taken for repairs: %v", got)
	}
	m.wantHost("the leg is back")

	must(t, h.e.Close(t.Context()))
	for _, at := range []struct{ ns, link string }{{"", weft.GatewayBridge}, {ns, weft.GatewayLeg}} {
		look := func() error {
			l, err := netlink.LinkByName(at.link)
			if err != nil {
				return err
			}
			addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
			for _, a := range addrs {
				if ip, _ := netip.AddrFromSlice(a.IP); weft.GatewayPool6().Contains(ip) {
					return fmt.Errorf("%s is left on %s", ip, at.link)
				}
			}
			routes, failed := netlink.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: legTable}, netlink.RT_FILTER_TABLE)
			if len(routes) > 0 {
				return fmt.Errorf("routes are left: %v", routes)
			}
			rules, again := netlink.RuleList(netlink.FAMILY_V6)
			for _, r := range rules {
				if r.Table == legTable {
					return fmt.Errorf("rule %d is left", r.Priority)
				}
			}
			return errors.Join(err, failed, again)
		}
		if at.ns == "" {
			must(t, look())
		} else {
			must(t, netns.Do(at.ns, look))
		}
	}
}
