package nft

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestMeshSCTP: however a server listens, and whatever way out its task has, an
// association comes to it with its client's address and stays.
func TestMeshSCTP(t *testing.T) {
	if err := ingresstest.HasSCTP(); err != nil {
		netnstest.Missing(t, "sctp", err)
	}
	m := newMesh(t, 2)
	b := m.task(11) // on port 80, on all addresses of both families
	for port, at := range map[uint16]string{81: "0.0.0.0", 82: b.Addr.String(), 83: b.Addr6.String()} {
		m.serveSCTP(m.tasks[0].NetNS, netip.AddrPortFrom(netip.MustParseAddr(at), port))
	}
	ports := m.ports(b)
	for _, target := range []uint16{81, 82, 83} {
		ports = append(ports, ingress.Published{Service: "web", Protocol: weft.SCTP, Port: 30000 + target, Target: target, Backends: []ingress.Backend{b}})
	}
	m.publish(ports...)
	ask := func(when string) {
		for i, h := range m.hosts {
			for client, port := range map[string][]int{meshClient: {30000, 30081, 30082}, meshClient6: {30000, 30083}} {
				for _, p := range port {
					to := strings.Replace(h.addresses()[client], "30000", strconv.Itoa(p), 1)
					c, _, seen, err := m.ask("sctp", to, 0)
					if err == nil {
						err = echo(c)
					}
					if err != nil || seen.Addr().String() != client {
						t.Errorf("%s: by host %d to %s: saw %s, %v; want %s", when, i, to, seen, err, client)
					}
				}
			}
		}
	}
	ask("no way out")
	m.in(m.tasks[0].NetNS, moveLocal)
	m.in(m.tasks[0].NetNS, func() error {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "gw0", Flags: net.FlagUp}}); err != nil {
			return err
		}
		return errors.Join(addAddr("gw0", "172.31.240.2/20"), addRoute("0.0.0.0/0", "172.31.240.1", 0))
	})
	ask("a way out elsewhere")
}

// serveSCTP listens in a namespace and answers with the port.
func (m *mesh) serveSCTP(ns string, at netip.AddrPort) {
	var ln net.Listener
	m.in(ns, func() (err error) {
		ln, err = ingresstest.ListenSCTP(at)
		return err
	})
	m.acceptAll(ln, strconv.Itoa(int(at.Port())))
}
