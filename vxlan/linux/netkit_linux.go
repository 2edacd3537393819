package linux

import (
	"encoding/binary"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Attributes that the netlink module does not know (linux/if_link.h, Linux 6.14).
const iflaNetkitHeadroom = 8

// tunnelRoom is what a packet of the far end leaves in front of it, in bytes, for
// the headers that an overlay puts there: Ethernet inside, VXLAN, UDP, IPv6. A
// kernel that does not know it leaves none, and copies what lacks it.
const tunnelRoom = 14 + 8 + 8 + 40

// addNetkit makes a pair whose far end drops what it sends until a program is
// there. It is spelled out, as the netlink module can ask for no room.
func (c *conn) addNetkit(v veth) error {
	req := c.request(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(v.end.mtu))))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(linkGroup)))
	data := netkitData(req)
	data.AddRtAttr(nl.IFLA_NETKIT_MODE, nl.Uint32Attr(uint32(netlink.NETKIT_MODE_L2)))
	data.AddRtAttr(nl.IFLA_NETKIT_POLICY, nl.Uint32Attr(uint32(netlink.NETKIT_POLICY_FORWARD)))
	data.AddRtAttr(nl.IFLA_NETKIT_PEER_POLICY, nl.Uint32Attr(uint32(netlink.NETKIT_POLICY_BLACKHOLE)))
	data.AddRtAttr(iflaNetkitHeadroom, binary.NativeEndian.AppendUint16(nil, tunnelRoom))
	far := data.AddRtAttr(nl.IFLA_NETKIT_PEER_INFO, nil)
	far.AddChild(nl.NewIfInfomsg(unix.AF_UNSPEC))
	far.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.end.name))
	far.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(v.end.mtu)))
	far.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(v.ns.FD())))
	if v.end.mac != nil {
		far.AddRtAttr(unix.IFLA_ADDRESS, v.end.mac)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func netkitData(req *nl.NetlinkRequest) *nl.RtAttr {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("netkit"))
	req.AddData(info)
	return info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
}

// IsNetkit reports whether a link is an end of a netkit pair.
func IsNetkit(l netlink.Link) bool { return l.Type() == string(PairNetkit) }

// isUsable reports whether a near end can be made as it should be.
func isUsable(near netlink.Link) bool {
	n, ok := near.(*netlink.Netkit)
	return !ok || n.IsPrimary() && n.Mode == netlink.NETKIT_MODE_L2
}

// PairFault says what is wrong with the near end of a Pair that other links have
// not; "" = nothing.
func PairFault(near netlink.Link) string {
	n, ok := near.(*netlink.Netkit)
	switch {
	case !ok:
		return ""
	case !isUsable(near):
		return n.Name + " was another end, or of another mode"
	case n.PeerPolicy != netlink.NETKIT_POLICY_BLACKHOLE:
		return n.Name + " let through what its program has not seen"
	case n.Policy != netlink.NETKIT_POLICY_FORWARD:
		return n.Name + " dropped what is for the task"
	}
	return ""
}

// setPolicies repairs what a netkit pair does without a program. The mode cannot be
// changed, and must not be named.
func (c *conn) setPolicies(near netlink.Link) error {
	if PairFault(near) == "" {
		return nil
	}
	req := c.request(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(near.Attrs().Index)
	req.AddData(msg)
	data := netkitData(req)
	data.AddRtAttr(nl.IFLA_NETKIT_POLICY, nl.Uint32Attr(uint32(netlink.NETKIT_POLICY_FORWARD)))
	data.AddRtAttr(nl.IFLA_NETKIT_PEER_POLICY, nl.Uint32Attr(uint32(netlink.NETKIT_POLICY_BLACKHOLE)))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("set the policies of %s: %w", near.Attrs().Name, err)
	}
	return nil
}
