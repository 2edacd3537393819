package ipvs

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// tunnel makes the overlay's device that leads to other nodes.
func (h *hall) tunnel() {
	h.t.Helper()
	h.in(func() error {
		br, err := netlink.LinkByName("br")
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.MasterIndex = weft.VXLANName(hallVNI), br.Attrs().MTU, br.Attrs().Index
		vx := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: hallVNI, Port: 4789}
		if err := netlink.LinkAdd(vx); err != nil {
			return err
		}
		return netlink.LinkSetUp(vx)
	})
}

// neighboursOn are the permanent neighbours of IPv4 on a link, and the metrics of the routes to
// everybody by it.
func (h *hall) neighboursOn(name string) (neighbours string, ways []int) {
	h.t.Helper()
	h.in(func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		ns, err := netlink.NeighList(l.Attrs().Index, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		var out []string
		for _, n := range ns {
			if n.State == netlink.NUD_PERMANENT {
				out = append(out, n.IP.String())
			}
		}
		slices.Sort(out)
		neighbours = strings.Join(out, " ")
		return netlink.RouteListFilteredIter(netlink.FAMILY_V4, &netlink.Route{LinkIndex: l.Attrs().Index, Table: unix.RT_TABLE_MAIN},
			netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
				if isAll(r.Dst) {
					ways = append(ways, r.Priority)
				}
				return true
			})
	})
	return neighbours, ways
}

// TestTunnel: what is for another node goes by the tunnel while there is one, what is for a
// task here by the bridge, and none of the moves is a repair.
func TestTunnel(t *testing.T) {
	h := newHall(t)
	balancer, tunnel := weft.BalancerName(hallVNI), weft.VXLANName(hallVNI)
	services := []ingress.Service{service(addr4(200), backend(1, false), backend(2, false)), service(addr6(200), backend(1, false))}
	near := func(n byte) {
		h.speakers = []ingress.Speaker{{MAC: backend(n, false).MAC, Addrs: []netip.Addr{addr4(n), addr6(n)}}}
	}
	check := func(step, byBalancer, byTunnel string) {
		t.Helper()
		h.apply(services...)
		h.apply(services...)
		h.wants(services...)
		if got, ways := h.neighboursOn(balancer); got != byBalancer || !slices.Equal(ways, []int{waysPriority}) {
			t.Errorf("%s: %s leads to %q and has ways %v", step, balancer, got, ways)
		}
		if byTunnel == "none" {
			return
		}
		want := []int{0}
		if byTunnel == "" {
			want = nil
		}
		if got, ways := h.neighboursOn(tunnel); got != byTunnel || !slices.Equal(ways, want) {
			t.Errorf("%s: %s leads to %q and has ways %v", step, tunnel, got, ways)
		}
	}
	one, two := addr4(1).String(), addr4(2).String()
	near(1)
	check("no tunnel", one+" "+two, "none")
	h.tunnel()
	check("a tunnel", one, two)
	near(2)
	check("the other is near", two, one)
	link := func() (l netlink.Link) {
		h.in(func() (err error) { l, err = netlink.LinkByName(tunnel); return err })
		return l
	}
	h.in(func() error { return netlink.LinkSetNoMaster(link()) })
	check("the tunnel is no port", one+" "+two, "")
	h.in(func() error { return netlink.LinkDel(link()) })
	check("the tunnel goes", one+" "+two, "none")
	h.tunnel()
	check("and comes back", two, one)
	if len(h.repaired) > 0 {
		t.Errorf("repaired %v", h.repaired)
	}
	for _, c := range []struct {
		name  string
		spoil func() error
		want  string
	}{
		{"way gone", func() error {
			return netlink.RouteDel(&netlink.Route{LinkIndex: link().Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: everybody4})
		}, "balancer wrong"},
		{"neighbour gone", func() error {
			return netlink.NeighDel(&netlink.Neigh{LinkIndex: link().Attrs().Index, IP: addr4(1).AsSlice()})
		}, "backend missing"},
		{"task's route gone", func() error {
			l, err := netlink.LinkByName(balancer)
			if err != nil {
				return err
			}
			return netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: addr4(2).AsSlice(), Mask: net.CIDRMask(32, 32)}})
		}, "task route missing"},
	} {
		h.repaired = nil
		h.in(c.spoil)
		check(c.name, two, one)
		if got := strings.Join(h.repaired, ","); got != c.want {
			t.Errorf("%s: repaired %q, want %q", c.name, got, c.want)
		}
	}
	// A daemon that was killed remembers nothing.
	e, err := New(h.e.cfg)
	must(t, err)
	must(t, e.Close(context.Background()))
	if got, ways := h.neighboursOn(tunnel); got != "" || len(ways) > 0 {
		t.Errorf("left on %s: %q, ways %v", tunnel, got, ways)
	}
}

// TestPorts: where packets come in no reverse path is looked for, from a port's first pass on, which
// is no repair. One that has gone meanwhile is no fault.
func TestPorts(t *testing.T) {
	h := newHall(t)
	const port = "wp1"
	one := service(addr4(200), backend(1, false))
	filter := func(device string) string { return "/proc/sys/net/ipv4/conf/" + device + "/rp_filter" }
	wrong := func() error { return os.WriteFile(filter(port), []byte("1"), 0) }
	check := func(want ...string) {
		t.Helper()
		h.repaired = nil
		h.apply(one)
		h.in(func() error {
			for _, d := range []string{port, "default"} {
				if b, err := os.ReadFile(filter(d)); err != nil || strings.TrimSpace(string(b)) != "0" {
					t.Errorf("%s: %q, %v", d, b, err)
				}
			}
			return nil
		})
		if !slices.Equal(h.repaired, want) {
			t.Errorf("repaired %v, want %v", h.repaired, want)
		}
	}
	h.apply(one)
	h.in(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = port
		return errors.Join(netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}), wrong())
	})
	h.ports = []string{port, "wp2"}
	check()
	h.in(wrong)
	check("sysctl wrong")
	check()
}
