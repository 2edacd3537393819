package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// writer performs the operations of one Apply. Used by one goroutine.
type writer struct {
	k    *Kernel
	host *netns.Handle
	nets map[uint32]*hidden
}

func (w *writer) close() {
	for _, h := range w.nets {
		h.close()
	}
}

func (w *writer) do(op vxlan.Op) error {
	if w.k.cfg.fail != nil {
		if err := w.k.cfg.fail(op); err != nil {
			return err
		}
	}
	switch op.Kind {
	case vxlan.OpDelStale, vxlan.OpDelNetwork:
		return w.delNetwork(op.VNI)
	case vxlan.OpAddNetwork:
		err := w.addNetwork(*op.Network)
		if err != nil {
			err = errors.Join(err, w.delNetwork(op.VNI)) // nothing half made stays
		}
		return err
	}
	return w.inside(op)
}

// inside performs an operation that needs the network's namespace.
func (w *writer) inside(op vxlan.Op) error {
	h, err := w.net(op.VNI)
	if err != nil {
		return err
	}
	switch op.Kind {
	case vxlan.OpSetNetwork:
		return w.setNetwork(h, *op.Network)
	case vxlan.OpSetDevice:
		return w.setDevice(h, *op.Network)
	case vxlan.OpSetFDB, vxlan.OpDelFDB, vxlan.OpSetNeigh, vxlan.OpDelNeigh:
		return h.conn.write(h.writes(op))
	case vxlan.OpSetPort:
		return w.setPort(h, op.VNI, *op.Port)
	case vxlan.OpDelPort:
		return w.delPort(h, op.VNI, *op.Port)
	case vxlan.OpSetHostLeg:
		return w.setLeg(h, *op.HostLeg)
	case vxlan.OpDelHostLeg:
		return h.conn.remove(legPeer)
	}
	return fmt.Errorf("operation %s is not known", op.Kind)
}

// net opens the network's namespace once per Apply.
func (w *writer) net(vni uint32) (*hidden, error) {
	if h := w.nets[vni]; h != nil {
		return h, w.lookUp(h, vni)
	}
	h, err := w.k.open(vni)
	if err != nil {
		return nil, err
	}
	w.nets[vni] = h
	return h, w.lookUp(h, vni)
}

func (w *writer) lookUp(h *hidden, vni uint32) error {
	if h.bridge == 0 {
		l, err := h.conn.LinkByName(weft.BridgeName(vni))
		if err != nil {
			return fmt.Errorf("look up bridge %s: %w", weft.BridgeName(vni), err)
		}
		h.bridge = l.Attrs().Index
	}
	for _, name := range []string{weft.VXLANName(vni), weft.UplinkName(vni)} {
		if h.tunnel != 0 {
			break
		}
		l, err := h.conn.find(name)
		if err != nil {
			return err
		}
		if l != nil {
			h.tunnel, h.isUplink = l.Attrs().Index, name == weft.UplinkName(vni)
		}
	}
	return nil
}

func (w *writer) delNetwork(vni uint32) error {
	h := w.nets[vni]
	delete(w.nets, vni)
	if h == nil {
		var err error
		if h, err = w.k.open(vni); err != nil && !errors.Is(err, weft.ErrNotFound) {
			return err
		}
	}
	if h != nil {
		defer h.close()
		if err := h.conn.delGroup(); err != nil {
			return fmt.Errorf("delete the links of network %d: %w", vni, err)
		}
		for _, name := range []string{weft.VXLANName(vni), weft.UplinkName(vni), weft.BridgeName(vni)} {
			if err := h.conn.remove(name); err != nil {
				return err
			}
		}
	}
	return netns.Remove(w.k.path(vni))
}

func (w *writer) addNetwork(n vxlan.Network) error {
	alias, err := networkAlias(w.k.cfg.Node, n)
	if err != nil {
		return err
	}
	if _, err := netns.Create(w.k.cfg.NetNSDir, weft.OverlayNetNS(w.k.cfg.Node, n.VNI)); err != nil {
		return err
	}
	h, err := w.k.open(n.VNI)
	if err != nil {
		return err
	}
	w.nets[n.VNI] = h
	if err := h.ns.Do(hiddenSysctls); err != nil {
		return err
	}
	name := weft.BridgeName(n.VNI)
	snoop := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Group = name, linkGroup
	// A fixed address: without one the bridge takes the lowest of its ports',
	// and the kernel flushes even permanent neighbours when that changes.
	attrs.HardwareAddr = net.HardwareAddr{0x0e, 0, 0, byte(n.VNI >> 16), byte(n.VNI >> 8), byte(n.VNI)}
	if err := h.conn.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snoop}); err != nil {
		return fmt.Errorf("add bridge %s: %w", name, err)
	}
	br, err := h.conn.LinkByName(name)
	if err != nil {
		return fmt.Errorf("look up bridge %s: %w", name, err)
	}
	h.bridge = br.Attrs().Index
	if err := h.conn.LinkSetMTU(br, n.MTU); err != nil {
		return fmt.Errorf("set MTU of %s to %d: %w", name, n.MTU, err)
	}
	if err := h.conn.LinkSetUp(br); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	if err := w.setDevice(h, n); err != nil {
		return err
	}
	// The alias comes last: a network without it is half made.
	if err := h.conn.LinkSetAlias(br, alias); err != nil {
		return fmt.Errorf("set alias of %s: %w", name, err)
	}
	return nil
}

// hiddenSysctls switches off what costs time or speaks by itself in a hidden
// namespace.
func hiddenSysctls() error {
	return setSysctls([]sysctl{
		{"net/bridge/bridge-nf-call-iptables", "0"},
		{"net/bridge/bridge-nf-call-ip6tables", "0"},
		{"net/bridge/bridge-nf-call-arptables", "0"},
		// No link-local addresses: bridge and ports are not hosts.
		{"net/ipv6/conf/default/addr_gen_mode", "1"},
		{"net/ipv6/conf/default/accept_ra", "0"},
	})
}

type sysctl struct{ key, value string }

// setSysctls writes in the calling thread's namespace. Keys that this kernel
// does not have are off already.
func setSysctls(all []sysctl) error {
	for _, s := range all {
		err := os.WriteFile("/proc/sys/"+s.key, []byte(s.value), 0o644)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set sysctl %s=%s: %w", s.key, s.value, err)
		}
	}
	return nil
}

// setDevice makes the device anew that leads to other nodes.
func (w *writer) setDevice(h *hidden, n vxlan.Network) error {
	for _, name := range []string{weft.VXLANName(n.VNI), weft.UplinkName(n.VNI)} {
		if err := h.conn.remove(name); err != nil {
			return err
		}
	}
	h.tunnel, h.isUplink = 0, n.Encrypted
	if n.Encrypted {
		return w.addUplink(h, n)
	}
	return w.addTunnel(h, n)
}

// addTunnel makes the VXLAN device. It is created from the host's
// namespace with the hidden one as target, so that its UDP socket stays in the
// host's; it goes up last, when nothing can be learnt or flooded by it.
func (w *writer) addTunnel(h *hidden, n vxlan.Network) error {
	name := weft.VXLANName(n.VNI)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Group = name, n.MTU, linkGroup
	attrs.Namespace = netlink.NsFd(h.ns.FD())
	vx := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: int(n.VNI), SrcAddr: net.IP(n.VTEP.Unmap().AsSlice()), Port: int(n.Port), NoAge: true,
		// Over IPv6 the eBPF engine leaves the outer checksum out (RFC 6935).
		UDP6ZeroCSumRx: true}
	host, err := dial()
	if err != nil {
		return err
	}
	defer host.close()
	err = host.LinkAdd(vx)
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add VXLAN device %s: another device of this host already uses VNI %d on UDP port %d; remove it or choose another data path port: %w", name, n.VNI, n.Port, weft.ErrConflict)
	}
	if err != nil {
		return fmt.Errorf("add VXLAN device %s: %w", name, err)
	}
	l, err := h.conn.LinkByName(name)
	if err != nil {
		return fmt.Errorf("look up VXLAN device %s: %w", name, err)
	}
	if err := h.conn.LinkSetMasterByIndex(l, h.bridge); err != nil {
		return fmt.Errorf("put %s on the bridge: %w", name, err)
	}
	if err := h.conn.setPortFlags(l.Attrs().Index, tunnelPort()); err != nil {
		return fmt.Errorf("set bridge port flags of %s: %w", name, err)
	}
	err = h.conn.LinkSetUp(l)
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("bring up %s: UDP port %d is taken by %s; stop it or choose another data path port: %w", name, n.Port, udpHolder(n.Port), weft.ErrConflict)
	}
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	h.tunnel = l.Attrs().Index
	return nil
}

func (w *writer) setNetwork(h *hidden, n vxlan.Network) error {
	alias, err := networkAlias(w.k.cfg.Node, n)
	if err != nil {
		return err
	}
	if h.isUplink {
		if err := w.setRouterMTU(n); err != nil {
			return err
		}
	}
	for _, name := range []string{weft.VXLANName(n.VNI), weft.UplinkName(n.VNI), weft.BridgeName(n.VNI)} {
		l, err := h.conn.find(name)
		if err != nil {
			return err
		}
		if l == nil {
			continue // of the other kind, or OpSetDevice follows
		}
		if err := h.conn.LinkSetMTU(l, n.MTU); err != nil {
			return fmt.Errorf("set MTU of %s to %d: %w", name, n.MTU, err)
		}
	}
	br, err := h.conn.LinkByIndex(h.bridge)
	if err != nil {
		return fmt.Errorf("look up bridge %s: %w", weft.BridgeName(n.VNI), err)
	}
	if b, ok := br.(*netlink.Bridge); ok && b.MulticastSnooping != nil && *b.MulticastSnooping {
		attrs := netlink.NewLinkAttrs() // names the bridge and sets nothing else
		attrs.Name = b.Name
		if err := h.conn.BridgeSetMcastSnoop(&netlink.Bridge{LinkAttrs: attrs}, false); err != nil {
			return fmt.Errorf("switch multicast snooping of %s off: %w", b.Name, err)
		}
	}
	if err := h.conn.LinkSetUp(br); err != nil {
		return fmt.Errorf("set %s up: %w", weft.BridgeName(n.VNI), err)
	}
	if err := h.conn.LinkSetAlias(br, alias); err != nil {
		return fmt.Errorf("set alias of %s: %w", weft.BridgeName(n.VNI), err)
	}
	return nil
}

// staticState is "static" of iproute2: never ages, and not an address of the
// bridge itself.
const staticState = netlink.NUD_NOARP | netlink.NUD_REACHABLE

// writes are the entries that an operation on one forwarding entry or one neighbour
// comes down to.
func (d devices) writes(op vxlan.Op) []write {
	neigh := netlink.Neigh{LinkIndex: d.bridge, Family: familyOf(op.Addr.Unmap().AsSlice()), IP: op.Addr.Unmap().AsSlice()}
	entry := netlink.Neigh{LinkIndex: d.tunnel, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, HardwareAddr: op.MAC}
	switch op.Kind {
	case vxlan.OpSetNeigh:
		neigh.State, neigh.HardwareAddr = netlink.NUD_PERMANENT, op.MAC
		return []write{{Neigh: neigh}}
	case vxlan.OpDelNeigh:
		return []write{{neigh, true}}
	case vxlan.OpDelFDB:
		return append([]write{{entry, true}}, d.delSelf(op.MAC)...)
	case vxlan.OpSetFDB:
		entry.State = staticState
		if op.VTEP.IsValid() {
			// One message writes both the bridge's and the device's entry.
			entry.Flags |= netlink.NTF_SELF
			entry.IP = op.VTEP.Unmap().AsSlice()
			return []write{{Neigh: entry}}
		}
		// The bridge answers only for what is behind a port with suppression, so
		// a service address points at the tunnel, which drops what it does not know.
		return append([]write{{Neigh: entry}}, d.delSelf(op.MAC)...)
	}
	return nil
}

// delSelf removes the device's own entry whatever it points at (address 0). An
// uplink has none.
func (d devices) delSelf(mac net.HardwareAddr) []write {
	if d.isUplink || d.tunnel == 0 {
		return nil
	}
	return []write{{netlink.Neigh{
		LinkIndex: d.tunnel, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, HardwareAddr: mac, IP: net.IPv4zero.To4(),
	}, true}}
}

// setLocal points a MAC at a local port.
func (h *hidden) setLocal(link int, mac net.HardwareAddr) error {
	return h.conn.write(append(h.delSelf(mac),
		write{Neigh: netlink.Neigh{LinkIndex: link, Family: unix.AF_BRIDGE, State: staticState, Flags: netlink.NTF_MASTER, HardwareAddr: mac}}))
}
