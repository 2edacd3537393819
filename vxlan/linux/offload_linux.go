package linux

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Numbers of linux/ethtool_netlink.h.
const (
	ethtoolFeaturesGet    = 11 // ETHTOOL_MSG_FEATURES_GET
	ethtoolFeaturesHeader = 1  // ETHTOOL_A_FEATURES_HEADER
	ethtoolFeaturesActive = 4  // ETHTOOL_A_FEATURES_ACTIVE
	ethtoolHeaderIndex    = 1  // ETHTOOL_A_HEADER_DEV_INDEX
	ethtoolBitsetBits     = 3  // ETHTOOL_A_BITSET_BITS
	ethtoolBitName        = 2  // ETHTOOL_A_BITSET_BIT_NAME

	// tunnelSegmentation is the kernel's name of NETIF_F_GSO_UDP_TUNNEL.
	tunnelSegmentation = "tx-udp_tnl-segmentation"
)

// CutsTunnels reports whether the link that has a tunnel address cuts large packets
// of VXLAN by itself. Where it cannot, the kernel does, at the price of most of
// what large packets save. It speaks of the calling thread's namespace. A kernel
// that does not tell is weft.ErrUnsupported, a missing link weft.ErrNotFound.
func CutsTunnels(vtep netip.Addr) (bool, error) {
	index := 0
	err := eachAddr(func(l netlink.Link, p netip.Prefix) {
		if p.Addr() == vtep.Unmap() {
			index = l.Attrs().Index
		}
	})
	if err != nil {
		return false, err
	}
	if index == 0 {
		return false, fmt.Errorf("find the link of %s: no link of this host has that address: %w", vtep, weft.ErrNotFound)
	}
	family, err := netlink.GenlFamilyGet("ethtool")
	if err != nil {
		return false, fmt.Errorf("read features of the link of %s: %w: %w", vtep, weft.ErrUnsupported, err)
	}
	req := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	req.AddData(&nl.Genlmsg{Command: ethtoolFeaturesGet, Version: 1})
	header := nl.NewRtAttr(ethtoolFeaturesHeader|unix.NLA_F_NESTED, nil)
	header.AddRtAttr(ethtoolHeaderIndex, nl.Uint32Attr(uint32(index)))
	req.AddData(header)
	msgs, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = errors.Join(weft.ErrUnsupported, err)
	}
	if err != nil {
		return false, fmt.Errorf("read features of the link of %s: %w", vtep, err)
	}
	for _, m := range msgs {
		is, err := hasFeature(m, tunnelSegmentation)
		if is || err != nil {
			return is, err
		}
	}
	return false, nil
}

// hasFeature looks for a feature among those that an answer says are active.
func hasFeature(msg []byte, name string) (bool, error) {
	if len(msg) < nl.SizeofGenlmsg {
		return false, fmt.Errorf("read features of a link: an answer of %d bytes", len(msg))
	}
	// A path of nested attributes: the active ones, their bits, each bit, its name.
	level := [][]byte{msg[nl.SizeofGenlmsg:]}
	for _, kind := range []uint16{ethtoolFeaturesActive, ethtoolBitsetBits, 0, ethtoolBitName} {
		var next [][]byte
		for _, b := range level {
			attrs, err := nl.ParseRouteAttr(b)
			if err != nil {
				return false, fmt.Errorf("read features of a link: %w", err)
			}
			for _, a := range attrs {
				if kind == 0 || a.Attr.Type&nl.NLA_TYPE_MASK == kind {
					next = append(next, a.Value)
				}
			}
		}
		level = next
	}
	for _, b := range level {
		if unix.ByteSliceToString(b) == name {
			return true, nil
		}
	}
	return false, nil
}
