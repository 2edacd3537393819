package bpf

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// setFeatures switches features of a link, as ethtool -K does
// (linux/ethtool_netlink.h, ETHTOOL_MSG_FEATURES_SET).
func setFeatures(l netlink.Link, features map[string]bool) error {
	if len(features) == 0 {
		return nil
	}
	family, err := netlink.GenlFamilyGet("ethtool")
	if err != nil {
		return fmt.Errorf("switch features of %s: %w", l.Attrs().Name, err)
	}
	const nested = unix.NLA_F_NESTED
	req := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	req.AddData(&nl.Genlmsg{Command: 12, Version: 1})
	header := nl.NewRtAttr(1|nested, nil)
	header.AddRtAttr(1, nl.Uint32Attr(uint32(l.Attrs().Index)))
	req.AddData(header)
	wanted := nl.NewRtAttr(3|nested, nil)
	bits := wanted.AddRtAttr(3|nested, nil)
	for name, on := range features {
		bit := bits.AddRtAttr(1|nested, nil)
		bit.AddRtAttr(2, nl.ZeroTerminated(name))
		if on {
			bit.AddRtAttr(3, nil)
		}
	}
	req.AddData(wanted)
	if _, err := req.Execute(unix.NETLINK_GENERIC, 0); err != nil {
		return fmt.Errorf("switch features of %s: %w", l.Attrs().Name, err)
	}
	return nil
}
