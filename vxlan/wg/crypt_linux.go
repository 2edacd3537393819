package wg

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// firstTable is the least routing table that is ours; the kernel's own are
// below it.
const firstTable = uint32(weft.IngressVNI)

// crypt is the open namespace of the WireGuard devices.
type crypt struct {
	ns   *netns.Handle
	conn *netlink.Handle
}

func openCrypt(path string) (*crypt, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	c := &crypt{ns: ns}
	err = ns.Do(func() (err error) {
		c.conn, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open rtnetlink socket: %w", err), ns.Close())
	}
	return c, nil
}

func (c *crypt) close() {
	c.conn.Close()
	c.ns.Close() // nothing was written through it
}

// sysctls make the namespace a router that says nothing by itself. Keys that
// this kernel does not have are off already.
func (c *crypt) sysctls() error {
	return c.ns.Do(func() error {
		for _, s := range []struct{ key, value string }{
			{"net/ipv4/ip_forward", "1"},
			{"net/ipv6/conf/all/forwarding", "1"},
			// Which way an answer goes depends on the network: our rules
			// say where a source may come from.
			{"net/ipv4/conf/all/rp_filter", "0"},
			{"net/ipv4/conf/default/rp_filter", "0"},
			{"net/ipv6/conf/default/addr_gen_mode", "1"}, // no link-local addresses
			{"net/ipv6/conf/default/accept_ra", "0"},
			// A flow that was there before its translation was known, or
			// whose other half went another way, is no fault.
			{"net/netfilter/nf_conntrack_tcp_be_liberal", "1"},
		} {
			err := os.WriteFile("/proc/sys/"+s.key, []byte(s.value), 0o644)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("set sysctl %s=%s: %w", s.key, s.value, err)
			}
		}
		return nil
	})
}

// apply makes links, neighbours, routes and rules equal to want: what leads
// somewhere is added before what leads elsewhere goes.
func (c *crypt) apply(want paths) error {
	links, err := c.links(want)
	if err != nil {
		return err
	}
	return errors.Join(c.neighbours(want, links), c.routes(want, links), c.rules(want))
}

// links sets the devices up and returns the index of each link by name.
func (c *crypt) links(want paths) (map[string]int, error) {
	list, err := c.conn.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links of the crypt namespace: %w", err)
	}
	index := map[string]int{}
	for _, l := range list {
		a := l.Attrs()
		index[a.Name] = a.Index
		isDevice := a.Name == weft.CryptLink(0) || a.Name == weft.CryptLink(1)
		if isDevice && a.MTU != want.mtu {
			if err := c.conn.LinkSetMTU(l, want.mtu); err != nil {
				return nil, fmt.Errorf("set MTU of %s to %d: %w", a.Name, want.mtu, err)
			}
		}
		if (isDevice || a.Name == "lo") && a.Flags&unix.IFF_UP == 0 {
			err := c.conn.LinkSetUp(l)
			if errors.Is(err, unix.EADDRINUSE) {
				err = fmt.Errorf("its UDP port is taken; stop the other program: %w", weft.ErrConflict)
			}
			if err != nil {
				return nil, fmt.Errorf("set %s up: %w", a.Name, err)
			}
		}
	}
	return index, nil
}

func (c *crypt) neighbours(want paths, links map[string]int) error {
	for _, router := range want.links {
		index := links[router]
		if index == 0 {
			continue // the network could not be made; that was reported
		}
		wanted := map[netip.Addr]vxlan.MAC{}
		for _, n := range want.neighs {
			if n.link == router {
				wanted[n.addr] = n.mac
			}
		}
		list, err := c.conn.NeighList(index, unix.AF_UNSPEC)
		if err != nil {
			return fmt.Errorf("list neighbours of %s: %w", router, err)
		}
		for _, n := range list {
			a, _ := netip.AddrFromSlice(n.IP)
			a = a.Unmap()
			if n.State != netlink.NUD_PERMANENT || a.IsMulticast() {
				continue
			}
			mac, ok := wanted[a]
			if ok && bytes.Equal(n.HardwareAddr, mac[:]) {
				delete(wanted, a)
			} else if !ok {
				if err := c.conn.NeighDel(&n); err != nil && !gone(err) {
					return fmt.Errorf("delete neighbour %s of %s: %w", a, router, err)
				}
			}
		}
		for a, mac := range wanted {
			err := c.conn.NeighSet(&netlink.Neigh{LinkIndex: index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac[:]})
			if err != nil {
				return fmt.Errorf("set neighbour %s of %s: %w", a, router, err)
			}
		}
	}
	return nil
}

type routeKey struct {
	table uint32
	dst   netip.Prefix
}

func (c *crypt) routes(want paths, links map[string]int) error {
	wanted := map[routeKey]int{} // to the link's index, 0 = refused
	for _, r := range want.routes {
		index := links[r.link]
		if r.link != "" && index == 0 {
			continue // without its route the default of the table refuses
		}
		wanted[routeKey{r.table, r.dst}] = index
	}
	var stale []netlink.Route
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := c.conn.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return fmt.Errorf("list routes of the crypt namespace: %w", err)
		}
		for _, r := range list {
			k := routeKey{table: uint32(r.Table), dst: everything(family == unix.AF_INET6)}
			if k.table < firstTable {
				continue
			}
			if r.Dst != nil {
				k.dst = prefixOf(r.Dst)
			}
			index := r.LinkIndex
			if r.Type == unix.RTN_UNREACHABLE {
				index = 0
			}
			if w, ok := wanted[k]; !ok {
				stale = append(stale, r)
			} else if w == index {
				delete(wanted, k)
			}
		}
	}
	for k, index := range wanted {
		r := netlink.Route{Table: int(k.table), Dst: ipNet(k.dst), LinkIndex: index, Scope: unix.RT_SCOPE_LINK}
		if index == 0 {
			r.Type, r.Scope = unix.RTN_UNREACHABLE, unix.RT_SCOPE_UNIVERSE
		}
		if err := c.conn.RouteReplace(&r); err != nil {
			return fmt.Errorf("set route to %s in table %d of the crypt namespace: %w", k.dst, k.table, err)
		}
	}
	for _, r := range stale {
		if err := c.conn.RouteDel(&r); err != nil && !gone(err) {
			return fmt.Errorf("delete route to %s in table %d of the crypt namespace: %w", r.Dst, r.Table, err)
		}
	}
	return nil
}

func (c *crypt) rules(want paths) error {
	wanted := map[rule]bool{}
	for _, r := range want.rules {
		wanted[r] = true
	}
	var stale []netlink.Rule
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := c.conn.RuleList(family)
		if err != nil {
			return fmt.Errorf("list routing rules of the crypt namespace: %w", err)
		}
		for _, r := range list {
			if r.Priority != prioOut && r.Priority != prioIn && r.Priority != prioRefused {
				continue // the kernel's own three
			}
			k := rule{priority: r.Priority, link: r.IifName, is6: family == unix.AF_INET6, table: uint32(r.Table)}
			if r.Src != nil {
				k.from = prefixOf(r.Src)
			}
			if wanted[k] {
				delete(wanted, k)
				continue
			}
			r.Family = family
			stale = append(stale, r)
		}
	}
	for k := range wanted {
		r := netlink.NewRule()
		r.Priority, r.IifName, r.Table, r.Family = k.priority, k.link, int(k.table), unix.AF_INET
		if k.is6 {
			r.Family = unix.AF_INET6
		}
		if k.from.IsValid() {
			r.Src = ipNet(k.from)
		}
		if err := c.conn.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add routing rule for %s from %v: %w", k.link, k.from, err)
		}
	}
	for _, r := range stale {
		if err := c.conn.RuleDel(&r); err != nil && !gone(err) {
			return fmt.Errorf("delete routing rule of %s: %w", r.IifName, err)
		}
	}
	return nil
}

func prefixOf(n *net.IPNet) netip.Prefix {
	a, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// gone reports that the object of a removal does not exist any more.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH)
}
