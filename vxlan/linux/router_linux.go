package linux

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// routeProtocol marks our routes in a namespace that is not ours alone
// (rtm_protocol, linux/rtnetlink.h: numbers above 4 are for user space). Our own
// number, of none of the routing daemons in iproute2's rt_protos.
const routeProtocol = 119

// Router keeps the routes at the far ends of ports. It implements vxlan.Router;
// the kernel is its state but for one bit.
type Router struct {
	// isClean: the last ApplyRoutes wanted no route and left none. Then there
	// is nothing to read: new namespaces come without.
	isClean bool
}

var _ vxlan.Router = (*Router)(nil)

// ApplyRoutes implements vxlan.Router.
func (r *Router) ApplyRoutes(ctx context.Context, want vxlan.State) error {
	routes := make(map[uint32][]vxlan.Route, len(want.Networks))
	none := true
	for vni, n := range want.Networks {
		routes[vni] = vxlan.Routes(n)
		none = none && len(routes[vni]) == 0
	}
	if none && r.isClean {
		return nil
	}
	var errs []error
	for vni, n := range want.Networks {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		fail := func(err error) {
			if err != nil {
				errs = append(errs, &vxlan.NetworkError{VNI: vni, Err: fmt.Errorf("set routes of network %d: %w", vni, err)})
			}
		}
		for _, p := range n.Ports {
			err := netns.Do(p.NetNS, func() error { return setRoutes(p.IfName, routes[vni]) })
			if errors.Is(err, weft.ErrNotFound) {
				err = nil // the task is gone; whoever makes its port has said so
			}
			fail(err)
		}
		if n.HostLeg != nil {
			fail(setRoutes(n.HostLeg.Name, routes[vni]))
		}
	}
	r.isClean = none && len(errs) == 0
	return errors.Join(errs...)
}

// setRoutes makes our routes over a link of the calling thread's namespace equal
// to want: what is new first, so that no packet meets a table without either. A
// link that is not there has no routes.
func setRoutes(link string, want []vxlan.Route) error {
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.close()
	l, err := c.find(link)
	if err != nil || l == nil {
		return err
	}
	have, err := c.routesOver(l.Attrs().Index)
	if err != nil {
		return fmt.Errorf("list routes over %s: %w", link, err)
	}
	var wider []netip.Prefix
	for _, w := range want {
		mtu, ok := have[w.Dst]
		delete(have, w.Dst)
		if ok && mtu == w.MTU {
			continue
		}
		if ok && mtu < w.MTU {
			wider = append(wider, w.Dst)
		}
		err := c.RouteReplace(&netlink.Route{
			LinkIndex: l.Attrs().Index, Dst: ipNet(w.Dst), Scope: netlink.SCOPE_LINK, Protocol: routeProtocol, MTU: w.MTU,
		})
		if err != nil {
			return fmt.Errorf("set route to %s over %s with MTU %d: %w", w.Dst, link, w.MTU, err)
		}
	}
	for dst := range have {
		err := c.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(dst), Scope: netlink.SCOPE_LINK, Protocol: routeProtocol})
		if err != nil && !gone(err) {
			return fmt.Errorf("delete route to %s over %s: %w", dst, link, err)
		}
		wider = append(wider, dst)
	}
	return c.forgetPaths(l.Attrs().Index, wider)
}

// routesOver are our routes over a link: destination to MTU.
func (c *conn) routesOver(index int) (map[netip.Prefix]int, error) {
	filter := &netlink.Route{LinkIndex: index, Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN}
	routes, err := complete(func() ([]netlink.Route, error) {
		return c.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, err
	}
	have := make(map[netip.Prefix]int, len(routes))
	for _, r := range routes {
		if p := prefixOf(r.Dst); p.IsValid() {
			have[p] = r.MTU
		}
	}
	return have, nil
}
