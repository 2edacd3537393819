package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What a task sends to the host goes past the bridge: at the host end of its leg it is
// handed to the bridge's own device. All that is lost by it is bridge netfilter
// (net.bridge.bridge-nf-call-iptables, which Docker and Kubernetes switch on, and which
// is the host's own): that translates a request for a port in mode host while it is on
// the bridge, and then has it bridged from leg to leg, which are isolated.
//
//	leg --- host end (the bridge's hardware address) --- [redirect] ---> weft-gw
//	          '--- ARP, and whatever is no IP ---> bridge
//
// The end has the bridge's hardware address, since a packet for another one's is
// nobody's where it is handed to. Filters are of u32 and mirred (Linux 4.10).

// shortcutPriority is that of the filters; our own choice.
const shortcutPriority = 1

// shortcuts is whether this kernel can hand packets over. It is found out by the first
// leg, and safe for use by several goroutines.
type shortcuts struct{ lacks atomic.Bool }

// shortcutProtocols are those that are handed over.
func shortcutProtocols() []uint16 { return []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6} }

// faultOf says what is wrong with the shortcut of a leg to a bridge; "" = nothing.
func (s *shortcuts) faultOf(l, bridge netlink.Link) (string, error) {
	if s.lacks.Load() {
		return "", nil
	}
	if !bytes.Equal(l.Attrs().HardwareAddr, bridge.Attrs().HardwareAddr) {
		return "its hardware address was another", nil
	}
	filters, err := complete(func() ([]netlink.Filter, error) { return netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS) })
	if err != nil {
		return "", fmt.Errorf("list filters of %s: %w", l.Attrs().Name, err)
	}
	has := map[uint16]bool{}
	for _, f := range filters {
		if u, ok := f.(*netlink.U32); ok && u.Priority == shortcutPriority+order16(u.Protocol) && leadsTo(u, bridge.Attrs().Index) {
			has[u.Protocol] = true
		}
	}
	for _, p := range shortcutProtocols() {
		if !has[p] {
			return "its packets went through the bridge", nil
		}
	}
	return "", nil
}

// order16 tells the filters' priorities apart: one is of one protocol.
func order16(protocol uint16) uint16 {
	if protocol == unix.ETH_P_IPV6 {
		return 1
	}
	return 0
}

func leadsTo(u *netlink.U32, index int) bool {
	for _, a := range u.Actions {
		if m, ok := a.(*netlink.MirredAction); ok && m.MirredAction == netlink.TCA_INGRESS_REDIR && m.Ifindex == index {
			return true
		}
	}
	return false
}

// make makes the shortcut of a leg anew. A kernel that cannot is left with the bridge.
func (s *shortcuts) make(l, bridge netlink.Link) error {
	if err := netlink.LinkSetHardwareAddr(l, bridge.Attrs().HardwareAddr); err != nil {
		return fmt.Errorf("set hardware address of %s: %w", l.Attrs().Name, err)
	}
	attrs := netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}
	if err := netlink.QdiscDel(&netlink.Ingress{QdiscAttrs: attrs}); err != nil && !gone(err) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove filters of %s: %w", l.Attrs().Name, err)
	}
	err := netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: attrs})
	for _, p := range shortcutProtocols() {
		if err != nil {
			break
		}
		err = netlink.FilterAdd(&netlink.U32{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.MakeHandle(0xffff, 0), Priority: shortcutPriority + order16(p), Protocol: p},
			Actions: []netlink.Action{&netlink.MirredAction{
				ActionAttrs: netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN}, MirredAction: netlink.TCA_INGRESS_REDIR, Ifindex: bridge.Attrs().Index,
			}},
		})
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
		s.lacks.Store(true)
		return nil
	}
	if err != nil {
		return fmt.Errorf("hand packets of %s to %s: %w", l.Attrs().Name, bridge.Attrs().Name, err)
	}
	return nil
}
