package ipvs

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// setting is a sysctl of the hidden namespace.
type setting struct{ key, value string }

// settings are what the namespace's stack and IPVS must do; device names the
// balancer's, ports the tasks', where their packets come in. Keys of net/ipv4/vs are
// there once IPVS is.
func settings(device string, ports []string, with6 bool) []setting {
	ipv4 := "net/ipv4/conf/" + device + "/"
	s := []setting{
		// Service addresses are local here and must not be answered for: the
		// bridge does, with the services' hardware addresses. Requests that the
		// device makes for clients must not bear one either.
		{"net/ipv4/conf/all/arp_ignore", "8"},
		{ipv4 + "arp_announce", "2"},
		{"net/ipv4/conf/all/rp_filter", "0"}, {ipv4 + "rp_filter", "0"}, {"net/ipv4/conf/default/rp_filter", "0"},
		// Nobody's source is looked up: service addresses are all that is local here, and
		// who sends from one gets no answer by it.
		{"net/ipv4/conf/all/accept_local", "1"},
		// Nor is a socket looked for: there are none.
		{"net/ipv4/ip_early_demux", "0"},
		// A refusal is an answer, not an attack on the client.
		{"net/ipv4/icmp_ratemask", "0"},
		// A backend that is gone lets its flows go at once.
		{"net/ipv4/vs/expire_nodest_conn", "1"},
		// A client's port that is used again is balanced anew, also after a FIN of
		// the client alone (2): by direct return the answers are not seen.
		{"net/ipv4/vs/conn_reuse_mode", "3"},
		// A connection that is not known is reset, not given to somebody.
		{"net/ipv4/vs/sloppy_tcp", "0"},
		{"net/ipv4/vs/conntrack", "0"},
		// Rates that nobody reads cost a walk over all backends every two seconds.
		{"net/ipv4/vs/run_estimation", "0"},
	}
	for _, p := range ports {
		s = append(s, setting{"net/ipv4/conf/" + p + "/rp_filter", "0"})
	}
	if with6 {
		s = append(s,
			setting{"net/ipv6/conf/" + device + "/accept_ra", "0"},
			setting{"net/ipv6/conf/" + device + "/addr_gen_mode", "1"},
			setting{"net/ipv6/icmp/ratelimit", "0"})
	}
	return append(s, setting{"net/ipv6/conf/" + device + "/disable_ipv6", map[bool]string{true: "0", false: "1"}[with6]})
}

// portSettings begins the keys of tasks' ports (weft.PortVethName).
const portSettings = "net/ipv4/conf/wp"

// optional are keys that may be missing: what they switch off is not in this kernel, or
// the port is gone.
func (s setting) optional() bool {
	return strings.HasPrefix(s.key, portSettings) || s.key == "net/ipv4/vs/run_estimation" || s.key == "net/ipv4/vs/conntrack" || strings.HasPrefix(s.key, "net/ipv6/") && s.value == "1" || s.key == "net/ipv6/icmp/ratelimit"
}

// set makes the settings of the calling thread's namespace and returns those that
// were otherwise, with what they were.
func set(all []setting) (was []setting, err error) {
	for _, s := range all {
		b, err := os.ReadFile("/proc/sys/" + s.key)
		if errors.Is(err, fs.ErrNotExist) && s.optional() {
			continue
		}
		if err != nil {
			return was, fmt.Errorf("read sysctl %s: %w", s.key, err)
		}
		have := strings.TrimSpace(string(b))
		if have == s.value {
			continue
		}
		if err := os.WriteFile("/proc/sys/"+s.key, []byte(s.value), 0); err != nil {
			return was, fmt.Errorf("set sysctl %s to %s: %w", s.key, s.value, err)
		}
		was = append(was, setting{s.key, have})
	}
	return was, nil
}

// leg is the balancer's device: a macvlan that takes all that the bridge gives to
// its own hardware address, and sends by the bridge. Beside it the bridge device
// keeps the overlay engine's neighbours, and nothing of theirs is in the way of
// ours: on an encrypted network they lead to the router, ours to the backend.
type leg struct {
	h      *netlink.Handle
	name   string
	bridge netlink.Link
	link   netlink.Link
	// out is the bridge's tunnel, nil without one that can be used: what is IPv4 and
	// for another node is sent there at once, past the bridge.
	out netlink.Link
}

// setOut finds the tunnel of a network. One to the router of an encrypted network is
// left alone.
func (l *leg) setOut(vni uint32) error {
	out, err := l.h.LinkByName(weft.VXLANName(vni))
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look up %s: %w", weft.VXLANName(vni), err)
	}
	if a := out.Attrs(); a.MasterIndex == l.bridge.Attrs().Index && a.Flags&unix.IFF_UP != 0 {
		l.out = out
		return nil
	}
	return clearTunnel(l.h, out)
}

// clearTunnel removes what led past the bridge. The overlay has no routes and no
// neighbours on its tunnel.
func clearTunnel(h *netlink.Handle, tunnel netlink.Link) error {
	name, index := tunnel.Attrs().Name, tunnel.Attrs().Index
	routes, err := h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: index, Protocol: routeProtocol}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return fmt.Errorf("list routes of %s: %w", name, err)
	}
	for _, r := range routes {
		if err2 := h.RouteDel(&r); err2 != nil && !errors.Is(err2, unix.ESRCH) {
			err = errors.Join(err, fmt.Errorf("remove route %s by %s: %w", r.Dst, name, err2))
		}
	}
	neighbours, err2 := h.NeighList(index, netlink.FAMILY_V4)
	if err2 != nil {
		return errors.Join(err, fmt.Errorf("list neighbours of %s: %w", name, err2))
	}
	for _, n := range neighbours {
		if n.State != netlink.NUD_PERMANENT {
			continue
		}
		if err2 := h.NeighDel(&n); err2 != nil && !errors.Is(err2, unix.ENOENT) {
			err = errors.Join(err, fmt.Errorf("remove neighbour %s from %s: %w", n.IP, name, err2))
		}
	}
	return err
}

// devices are those that the network's messages are about.
func (l *leg) devices(near map[netip.Addr]bool) devices {
	d := devices{device: l.link.Attrs().Index, near: near}
	if l.out != nil {
		d.out = l.out.Attrs().Index
	}
	return d
}

func (l *leg) close() { l.h.Close() }

// openLeg makes the device right on a thread in the namespace. fault says what was
// wrong with one that was there, "it was gone" that there was none.
func openLeg(bridge, name string, with6 bool) (l *leg, fault string, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, "", fmt.Errorf("open rtnetlink socket: %w", err)
	}
	l = &leg{h: h, name: name}
	defer func() {
		if err != nil {
			h.Close() // l is what was returned
		}
	}()
	if err := h.SetSocketTimeout(answerLimit); err != nil {
		return nil, "", fmt.Errorf("bound the wait of rtnetlink sockets: %w", err)
	}
	if l.bridge, err = h.LinkByName(bridge); errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, "", fmt.Errorf("bridge %s: %w", bridge, weft.ErrUnavailable)
	} else if err != nil {
		return nil, "", fmt.Errorf("look up bridge %s: %w", bridge, err)
	}
	l.link, err = h.LinkByName(name)
	if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, "", fmt.Errorf("look up %s: %w", name, err)
	}
	if err == nil {
		fault = l.fault()
	} else {
		fault = reasonGone
	}
	if fault != "" {
		if err := l.remake(); err != nil {
			return nil, fault, err
		}
	}
	return l, fault, nil
}

// fault says why the device is not the one we make; "" = it is.
func (l *leg) fault() string {
	m, ok := l.link.(*netlink.Macvlan)
	a := l.link.Attrs()
	switch {
	case !ok || m.Mode != netlink.MACVLAN_MODE_PASSTHRU || a.ParentIndex != l.bridge.Attrs().Index:
		return l.name + " was another link"
	case a.HardwareAddr.String() != l.bridge.Attrs().HardwareAddr.String():
		return l.name + " had another hardware address than the bridge"
	case a.Flags&unix.IFF_UP == 0:
		return l.name + " was down"
	case a.MTU != l.bridge.Attrs().MTU:
		return fmt.Sprintf("%s had MTU %d, the bridge %d", l.name, a.MTU, l.bridge.Attrs().MTU)
	}
	return ""
}

// flagNoPromisc is MACVLAN_FLAG_NOPROMISC (linux/if_link.h): without it the bridge
// would give the device a copy of every frame that it forwards.
const flagNoPromisc = 1

// remake makes the device, or what can be changed on it right.
func (l *leg) remake() error {
	if m, ok := l.link.(*netlink.Macvlan); ok && m.Mode == netlink.MACVLAN_MODE_PASSTHRU && m.ParentIndex == l.bridge.Attrs().Index &&
		m.HardwareAddr.String() == l.bridge.Attrs().HardwareAddr.String() {
		if err := l.h.LinkSetMTU(l.link, l.bridge.Attrs().MTU); err != nil {
			return fmt.Errorf("set MTU of %s: %w", l.name, err)
		}
		return l.up()
	}
	if l.link != nil {
		if err := l.h.LinkDel(l.link); err != nil {
			return fmt.Errorf("delete link %s: %w", l.name, err)
		}
	}
	// The library knows no flags of a macvlan.
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(l.name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_LINK, nl.Uint32Attr(uint32(l.bridge.Attrs().Index))))
	req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(l.bridge.Attrs().MTU))))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("macvlan"))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	data.AddRtAttr(nl.IFLA_MACVLAN_MODE, nl.Uint32Attr(nl.MACVLAN_MODE_PASSTHRU))
	data.AddRtAttr(nl.IFLA_MACVLAN_FLAGS, nl.Uint16Attr(flagNoPromisc))
	req.AddData(info)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("add macvlan %s on %s: %w", l.name, l.bridge.Attrs().Name, err)
	}
	var err error
	if l.link, err = l.h.LinkByName(l.name); err != nil {
		return fmt.Errorf("look up %s: %w", l.name, err)
	}
	return nil
}

func (l *leg) up() error {
	if err := l.h.LinkSetUp(l.link); err != nil {
		return fmt.Errorf("set %s up: %w", l.name, err)
	}
	return nil
}

// linkLocal is the device's one address of IPv6, by which it asks for clients: a
// request must bear one.
func (l *leg) linkLocal() netip.Prefix {
	m := l.bridge.Attrs().HardwareAddr
	a := netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
	return netip.PrefixFrom(a, 64)
}

// ways makes the routes to everybody on the network, and says what was missing of
// them. They have no subnet: whoever is asked for is on the bridge.
func (l *leg) ways(with6 bool) (missing []string, err error) {
	families := []int{netlink.FAMILY_V4}
	if with6 {
		families = append(families, netlink.FAMILY_V6)
		addrs, err := l.h.AddrList(l.link, netlink.FAMILY_V6)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", l.name, err)
		}
		want, found := l.linkLocal(), false
		for _, a := range addrs {
			found = found || a.IP.Equal(want.Addr().AsSlice())
		}
		if !found {
			a := &netlink.Addr{IPNet: &net.IPNet{IP: want.Addr().AsSlice(), Mask: net.CIDRMask(want.Bits(), 128)}, Flags: unix.IFA_F_NODAD}
			if err := l.h.AddrAdd(l.link, a); err != nil && !errors.Is(err, unix.EEXIST) {
				return nil, fmt.Errorf("add address %s to %s: %w", want, l.name, err)
			}
			missing = append(missing, "address "+want.String())
		}
	}
	for _, f := range families {
		all, scope, priority := everybody4, netlink.SCOPE_LINK, waysPriority
		if f == netlink.FAMILY_V6 {
			all, scope, priority = everybody6, netlink.SCOPE_UNIVERSE, 0
		}
		what, err := l.way(netlink.Route{LinkIndex: l.link.Attrs().Index, Dst: all, Scope: scope, Priority: priority, Family: f})
		if missing = append(missing, what...); err != nil {
			return missing, err
		}
		if f == netlink.FAMILY_V4 && l.out != nil {
			what, err := l.way(netlink.Route{LinkIndex: l.out.Attrs().Index, Dst: all, Scope: scope, Family: f})
			if missing = append(missing, what...); err != nil {
				return missing, err
			}
		}
	}
	return missing, nil
}

// everybody is where the ways lead, by family.
var (
	everybody4 = &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	everybody6 = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
)

// waysPriority is the metric of IPv4's way by the balancer's device, behind that by the
// tunnel: a tunnel takes its way along when it is made anew.
const waysPriority = 1

// way makes a route to everybody, and names it if it was missing.
func (l *leg) way(r netlink.Route) (missing []string, err error) {
	r.Table, r.Protocol = unix.RT_TABLE_MAIN, routeProtocol
	found := false
	err = l.h.RouteListFilteredIter(r.Family, &r, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL, func(h netlink.Route) bool {
		found = found || isAll(h.Dst) && (h.Priority == r.Priority || r.Family == netlink.FAMILY_V6)
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("list routes to %s: %w", r.Dst, err)
	}
	if found {
		return nil, nil
	}
	if err := l.h.RouteReplace(&r); err != nil {
		return nil, fmt.Errorf("add route %s by %s: %w", r.Dst, l.name, err)
	}
	return []string{"route " + r.Dst.String()}, nil
}

// isAll reports that a route's destination is everybody.
func isAll(dst *net.IPNet) bool {
	if dst == nil {
		return true
	}
	ones, _ := dst.Mask.Size()
	return ones == 0
}

// read returns what the namespace has of routes and neighbours. A neighbour on a device
// that does not lead there is removed.
func (l *leg) read(with6 bool, near map[netip.Addr]bool) (s state, err error) {
	s = state{local: map[netip.Addr]bool{}, near: map[netip.Addr]bool{}, neigh: map[netip.Addr]mac{}}
	devices := l.devices(near)
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6}[:map[bool]int{false: 1, true: 2}[with6]] {
		err := l.routes(f, unix.RT_TABLE_LOCAL, s.local)
		if err == nil && f == netlink.FAMILY_V4 {
			err = l.routes(f, unix.RT_TABLE_MAIN, s.near)
		}
		if err != nil {
			return s, err
		}
		for _, on := range []netlink.Link{l.link, l.out} {
			if on == nil || on == l.out && f == netlink.FAMILY_V6 {
				continue
			}
			ns, err := l.h.NeighList(on.Attrs().Index, f)
			if err != nil {
				return s, fmt.Errorf("list neighbours of %s: %w", on.Attrs().Name, err)
			}
			for _, n := range ns {
				a, _ := netip.AddrFromSlice(n.IP)
				if a = a.Unmap(); n.State != netlink.NUD_PERMANENT || len(n.HardwareAddr) != 6 || a.IsMulticast() {
					continue
				}
				if devices.to(a) == on.Attrs().Index {
					s.neigh[a] = mac(n.HardwareAddr)
				} else if err := l.h.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
					return s, fmt.Errorf("remove neighbour %s from %s: %w", a, on.Attrs().Name, err)
				}
			}
		}
	}
	return s, nil
}

// routes collects the addresses to which the device has routes of ours in a table.
func (l *leg) routes(family, table int, into map[netip.Addr]bool) error {
	err := l.h.RouteListFilteredIter(family, &netlink.Route{LinkIndex: l.link.Attrs().Index, Table: table, Protocol: routeProtocol},
		netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL, func(r netlink.Route) bool {
			if !isAll(r.Dst) {
				a, _ := netip.AddrFromSlice(r.Dst.IP)
				into[a.Unmap()] = true
			}
			return true
		})
	if err != nil {
		return fmt.Errorf("list routes of %s: %w", l.name, err)
	}
	return nil
}
