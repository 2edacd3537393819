package linux

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// addUplink makes the veth by which frames for other nodes leave the bridge of
// an encrypted network. Its other end is the router in the namespace of the
// WireGuard devices; what happens there is vxlan/wg's.
func (w *writer) addUplink(h *hidden, n vxlan.Network) error {
	name, router := weft.UplinkName(n.VNI), weft.RouterName(n.VNI)
	ns, far, err := openCrypt(w.k.cryptPath())
	if err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	defer ns.Close()
	defer far.close()
	// The rest of a crash between two namespaces of this network.
	if err := far.remove(router); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Group = name, n.MTU, linkGroup
	err = h.conn.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: router, PeerHardwareAddr: weft.RouterMAC(n.VNI), PeerMTU: uint32(n.MTU),
		PeerNamespace: netlink.NsFd(ns.FD()),
	})
	if err != nil {
		return fmt.Errorf("add veth %s with peer %s: %w", name, router, err)
	}
	near, err := h.conn.LinkByName(name)
	if err != nil {
		return fmt.Errorf("look up veth %s: %w", name, err)
	}
	if err := h.conn.LinkSetMasterByIndex(near, h.bridge); err != nil {
		return fmt.Errorf("put %s on the bridge: %w", name, err)
	}
	if err := h.conn.setPortFlags(near.Attrs().Index, tunnelPort()); err != nil {
		return fmt.Errorf("set bridge port flags of %s: %w", name, err)
	}
	peer, err := far.LinkByName(router)
	if err != nil {
		return fmt.Errorf("look up veth peer %s: %w", router, err)
	}
	if err := far.LinkSetUp(peer); err != nil {
		return fmt.Errorf("set %s up: %w", router, err)
	}
	if err := h.conn.LinkSetUp(near); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	h.tunnel = near.Attrs().Index
	return nil
}

func (w *writer) setRouterMTU(n vxlan.Network) error {
	router := weft.RouterName(n.VNI)
	ns, far, err := openCrypt(w.k.cryptPath())
	if err != nil {
		return fmt.Errorf("set MTU of %s: %w", router, err)
	}
	defer ns.Close()
	defer far.close()
	l, err := far.find(router)
	if err != nil || l == nil {
		return err // OpSetDevice follows
	}
	if err := far.LinkSetMTU(l, n.MTU); err != nil {
		return fmt.Errorf("set MTU of %s to %d: %w", router, n.MTU, err)
	}
	return nil
}

func openCrypt(path string) (*netns.Handle, *conn, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, nil, err
	}
	c, err := dialAt(ns)
	if err != nil {
		return nil, nil, errors.Join(err, ns.Close())
	}
	return ns, c, nil
}

// readUplink fills in what the uplink says of the network.
func (k *Kernel) readUplink(n *vxlan.Network, up *netlink.Veth, br *netlink.Bridge, flags portFlags) {
	n.Encrypted = true
	switch {
	case up.Flags&unix.IFF_UP == 0:
		n.DeviceFault = up.Name + " was down"
	case up.MasterIndex != br.Index:
		n.DeviceFault = up.Name + " was not on the bridge"
	case !flags.are(tunnelPort()):
		n.DeviceFault = fmt.Sprintf("the bridge port flags of %s were %+v", up.Name, flags)
	default:
		n.DeviceFault = k.routerFault(n.VNI, up)
	}
	if n.DeviceFault == "" {
		n.VTEP = netip.IPv4Unspecified() // see vxlan.Diff
	}
	if up.MTU != br.MTU {
		n.MTU, n.Fault = 0, fmt.Sprintf("%s had MTU %d, %s %d", up.Name, up.MTU, br.Name, br.MTU)
	}
}

// routerFault is RouterFault; a router that cannot be read is remade.
func (k *Kernel) routerFault(vni uint32, up *netlink.Veth) string {
	fault, err := RouterFault(k.cryptPath(), vni, up)
	if err != nil {
		k.cfg.Log.Warn("uplink cannot be read; it will be remade", weft.KeyVNI, vni, weft.KeyErr, err)
		return err.Error()
	}
	return fault
}

// RouterFault says what is wrong with the other end of an uplink, in the
// namespace of the WireGuard devices at path; "" = it is there, up, and has the
// MAC and the MTU that it should have. It serves every engine.
func RouterFault(path string, vni uint32, up *netlink.Veth) (string, error) {
	router := weft.RouterName(vni)
	ns, far, err := openCrypt(path)
	if errors.Is(err, weft.ErrNotFound) {
		return "the namespace of " + router + " was gone", nil
	}
	if err != nil {
		return "", err
	}
	defer ns.Close()
	defer far.close()
	l, err := far.find(router)
	switch {
	case err != nil:
		return "", err
	case l == nil || l.Attrs().ParentIndex != up.Index || up.ParentIndex != l.Attrs().Index:
		return router + " was gone", nil
	case l.Attrs().Flags&unix.IFF_UP == 0:
		return router + " was down", nil
	case l.Attrs().MTU != up.MTU:
		return fmt.Sprintf("%s had MTU %d, %s %d", router, l.Attrs().MTU, up.Name, up.MTU), nil
	case !bytes.Equal(l.Attrs().HardwareAddr, weft.RouterMAC(vni)):
		return fmt.Sprintf("%s had hardware address %s", router, l.Attrs().HardwareAddr), nil
	}
	return "", nil
}
