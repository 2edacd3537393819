package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cutPriority is the priority of the rules that cut hosts apart: before the
// kernel's own (0 local comes first, 32766 main), so that traffic to the
// switch itself stays and everything forwarded is tried.
const cutPriority = 100

// makeSwitch makes the router in the middle. It forwards between the hosts'
// ports and drops what it has no host for without a word: a dead machine says
// nothing.
func (p plan) makeSwitch() error {
	file := p.netnsFile(switchName)
	if err := makeNetNS(file); err != nil {
		return err
	}
	err := withLinks(file, func(h *netlink.Handle) error {
		for _, s := range [][2]string{
			{"net/ipv6/conf/all/forwarding", "1"},
			{"net/ipv4/ip_forward", "1"},
			{"net/ipv4/conf/all/rp_filter", "0"},
			{"net/ipv4/conf/default/rp_filter", "0"},
			{"net/ipv4/conf/all/send_redirects", "0"},
			{"net/ipv4/conf/default/send_redirects", "0"},
		} {
			if err := setSysctl(s[0], s[1]); err != nil {
				return err
			}
		}
		lo, err := h.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if err := h.AddrReplace(lo, address(p.gateway(), 32)); err != nil {
			return fmt.Errorf("add address %s to the switch: %w", p.gateway(), err)
		}
		for _, s := range []netip.Prefix{p.subnet, p.subnet6} {
			dead := &netlink.Route{Dst: prefix(s), Type: unix.RTN_BLACKHOLE}
			if err := h.RouteReplace(dead); err != nil {
				return fmt.Errorf("add blackhole route %s to the switch: %w", s, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("make the switch: %w", err)
	}
	return nil
}

// wire is one link from the switch to a namespace.
type wire struct {
	file  string // of the namespace at the far end
	port  string // name of the switch's end
	mac   net.HardwareAddr
	addr  netip.Prefix // of the far end; invalid = no IPv4
	addr6 netip.Prefix
	gate  netip.Addr   // IPv4 default route of the far end
	local netip.Prefix // address of the switch's end; invalid = none
	mtu   int
}

func (p plan) hostWire(h Host, r record) wire {
	w := wire{
		file: h.Paths.NetNS, port: portName(h.Index), mac: h.MAC, mtu: or(r.HostMTU[h.Name], r.MTU),
		addr: netip.PrefixFrom(h.Addr, p.subnet.Bits()), gate: p.gateway(), addr6: netip.PrefixFrom(h.Addr6, p.subnet6.Bits()),
	}
	if r.only6() {
		w.addr = netip.Prefix{}
	}
	return w
}

func (p plan) clientWire(mtu int) wire {
	b := p.subnet.Addr().As4()
	return wire{
		file: p.netnsFile(clientName), port: clientPort, mac: net.HardwareAddr{0x02, 'w', 'l', b[2], 1, 7},
		addr: netip.PrefixFrom(ClientAddr, clientSubnet.Bits()), gate: clientGate,
		local: netip.PrefixFrom(clientGate, clientSubnet.Bits()), addr6: netip.PrefixFrom(ClientAddr6, 64), mtu: mtu,
	}
}

// connect makes the namespace and its link to the switch. Both are kept when
// they are there; half a link cannot exist (a veth has two ends or none).
func (p plan) connect(w wire) error {
	if err := makeNetNS(w.file); err != nil {
		return err
	}
	if err := p.plug(w); err != nil {
		return fmt.Errorf("connect %s: %w", w.port, err)
	}
	return withLinks(w.file, func(h *netlink.Handle) error { return w.setUpFarEnd(h) })
}

// plug makes the veth, in one message with the far end already inside its
// namespace, and the switch's route to it.
func (p plan) plug(w wire) error {
	far, err := unix.Open(w.file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", w.file, err)
	}
	defer unix.Close(far)
	return withLinks(p.netnsFile(switchName), func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.Flags = w.port, w.mtu, net.FlagUp
		veth := &netlink.Veth{
			LinkAttrs: attrs, PeerName: hostLink, PeerHardwareAddr: w.mac,
			PeerNamespace: netlink.NsFd(far), PeerMTU: uint32(w.mtu),
		}
		if err := h.LinkAdd(veth); err != nil && !errors.Is(err, syscall.EEXIST) {
			return fmt.Errorf("add link: %w", err)
		}
		link, err := h.LinkByName(w.port)
		if err != nil {
			return fmt.Errorf("find link: %w", err)
		}
		if err := w.plug6(h, link); err != nil {
			return err
		}
		if w.local.IsValid() {
			if err := h.AddrReplace(link, address(w.local.Addr(), w.local.Bits())); err != nil {
				return fmt.Errorf("add address %s: %w", w.local, err)
			}
			return nil
		}
		if !w.addr.IsValid() {
			return nil
		}
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: prefix(netip.PrefixFrom(w.addr.Addr(), 32)), Scope: netlink.SCOPE_LINK}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("add route to %s: %w", w.addr.Addr(), err)
		}
		return nil
	})
}

// plug6 is the switch's end over IPv6: a gateway address that all links share,
// and the route to the one address behind this link.
func (w wire) plug6(h *netlink.Handle, link netlink.Link) error {
	gate := address(linkGate, 64)
	gate.Flags = unix.IFA_F_NODAD
	if err := h.AddrReplace(link, gate); err != nil {
		return fmt.Errorf("add address %s: %w", linkGate, err)
	}
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: prefix(netip.PrefixFrom(w.addr6.Addr(), 128))}
	if err := h.RouteReplace(r); err != nil {
		return fmt.Errorf("add route to %s: %w", w.addr6.Addr(), err)
	}
	return nil
}

// setUpFarEnd6 gives the far end its IPv6 address and sends everything by the
// switch, as setUpFarEnd does.
func (w wire) setUpFarEnd6(h *netlink.Handle, link netlink.Link) error {
	a := address(w.addr6.Addr(), w.addr6.Bits())
	a.Flags = unix.IFA_F_NOPREFIXROUTE | unix.IFA_F_NODAD
	if err := h.AddrReplace(link, a); err != nil {
		return fmt.Errorf("add address %s: %w", w.addr6, err)
	}
	for _, dst := range []netip.Prefix{w.addr6.Masked(), netip.PrefixFrom(netip.IPv6Unspecified(), 0)} {
		r := netlink.Route{LinkIndex: link.Attrs().Index, Dst: prefix(dst), Gw: net.IP(linkGate.AsSlice())}
		if err := h.RouteReplace(&r); err != nil {
			return fmt.Errorf("add route %s: %w", r, err)
		}
	}
	return nil
}

func (w wire) setUpFarEnd(h *netlink.Handle) error {
	link, err := h.LinkByName(hostLink)
	if err != nil {
		return fmt.Errorf("find %s behind %s: %w", hostLink, w.port, err)
	}
	if !w.addr.IsValid() {
		if err := h.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up behind %s: %w", hostLink, w.port, err)
		}
		return w.setUpFarEnd6(h, link)
	}
	a := address(w.addr.Addr(), w.addr.Bits())
	a.Flags = unix.IFA_F_NOPREFIXROUTE
	if err := h.AddrReplace(link, a); err != nil {
		return fmt.Errorf("add address %s: %w", w.addr, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up behind %s: %w", hostLink, w.port, err)
	}
	// Everything goes by the switch, neighbours too: a host never asks for
	// another's hardware address, so a dead or cut-off one is silent instead
	// of an immediate "no route to host", and it is back the moment it is.
	for _, r := range []netlink.Route{
		{Dst: prefix(netip.PrefixFrom(w.gate, 32)), Scope: netlink.SCOPE_LINK},
		{Dst: prefix(w.addr.Masked()), Gw: net.IP(w.gate.AsSlice())},
		{Gw: net.IP(w.gate.AsSlice())},
	} {
		r.LinkIndex = link.Attrs().Index
		if err := h.RouteReplace(&r); err != nil {
			return fmt.Errorf("add route %s: %w", r, err)
		}
	}
	return w.setUpFarEnd6(h, link)
}

// unplug deletes a host's link; the far end goes with it.
func (p plan) unplug(port string) error {
	file := p.netnsFile(switchName)
	if !isNetNS(file) {
		return nil
	}
	return withLinks(file, func(h *netlink.Handle) error {
		link, err := h.LinkByName(port)
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find link %s: %w", port, err)
		}
		if err := h.LinkDel(link); err != nil && !errors.Is(err, syscall.ENODEV) {
			return fmt.Errorf("delete link %s: %w", port, err)
		}
		return nil
	})
}

// setMTU changes both ends of a host's link. The switch answers what is too
// large with ICMP (RFC 792 type 3 code 4), as a router between two networks.
func (p plan) setMTU(h Host, mtu int) error {
	for _, end := range [][2]string{{p.netnsFile(switchName), portName(h.Index)}, {h.Paths.NetNS, hostLink}} {
		err := withLinks(end[0], func(nl *netlink.Handle) error {
			link, err := nl.LinkByName(end[1])
			if err != nil {
				return fmt.Errorf("find link %s of %s: %w", end[1], h.Name, err)
			}
			if err := nl.LinkSetMTU(link, mtu); err != nil {
				return fmt.Errorf("set mtu of %s of %s to %d: %w", end[1], h.Name, mtu, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// cut drops everything that from sends to to, silently, in the switch.
func (p plan) cut(from, to Host) error {
	return withLinks(p.netnsFile(switchName), func(h *netlink.Handle) error {
		for family, a := range map[int]netip.Addr{netlink.FAMILY_V4: p.host(to.Index).Addr, netlink.FAMILY_V6: to.Addr6} {
			r := netlink.NewRule()
			r.Family, r.Priority, r.Type = family, cutPriority, unix.FR_ACT_BLACKHOLE
			r.IifName, r.Dst = portName(from.Index), prefix(netip.PrefixFrom(a, a.BitLen()))
			if err := h.RuleAdd(r); err != nil && !errors.Is(err, syscall.EEXIST) {
				return fmt.Errorf("cut %s from %s: %w", from.Name, to.Name, err)
			}
		}
		return nil
	})
}

// heal removes every cut.
func (p plan) heal() error {
	return withLinks(p.netnsFile(switchName), func(h *netlink.Handle) error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := h.RuleList(family)
			if err != nil {
				return fmt.Errorf("list rules of the switch: %w", err)
			}
			for i := range rules {
				if rules[i].Priority != cutPriority {
					continue
				}
				rules[i].Type = unix.FR_ACT_BLACKHOLE
				if err := h.RuleDel(&rules[i]); err != nil && !errors.Is(err, syscall.ENOENT) {
					return fmt.Errorf("remove cut %s: %w", rules[i], err)
				}
			}
		}
		return nil
	})
}

func address(a netip.Addr, bits int) *netlink.Addr {
	return &netlink.Addr{IPNet: &net.IPNet{IP: net.IP(a.AsSlice()), Mask: net.CIDRMask(bits, a.BitLen())}}
}

func prefix(p netip.Prefix) *net.IPNet { return address(p.Addr(), p.Bits()).IPNet }
