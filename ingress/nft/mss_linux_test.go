package nft

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// segment is the largest one that a connection sends, in bytes.
func segment(t *testing.T, c net.Conn) int {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	must(t, err)
	var info *unix.TCPInfo
	var infoErr error
	err = raw.Control(func(fd uintptr) { info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	must(t, errors.Join(err, infoErr))
	return int(info.Snd_mss)
}

// TestSegmentsFitTheWay: an outside client, whose own link is wide, learns from
// the answer to its first packet how narrow the way to a task is, in both
// directions, and without ICMP.
func TestSegmentsFitTheWay(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	a := f.task(11)
	outside := f.outside()
	must(t, e.Apply(context.Background(), ingress.Table{
		Ingress:   ingress.Entry{Link: weft.IngressLeg, Addr: netip.MustParsePrefix(legText + "/24")},
		Published: []ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 30000, Target: 80, Backends: []ingress.Backend{a}}},
	}))
	t.Cleanup(func() { must(t, e.Close(context.Background())) })
	const headers = 20 + 20 + 12 // IPv4, TCP, its timestamps
	get := func() int {
		t.Helper()
		_, _, c, err := f.get(outside, hostText+":30000")
		must(t, err)
		return segment(t, c)
	}
	if got := get(); got != 1500-headers {
		t.Errorf("segments of %d bytes on a wide way, want %d", got, 1500-headers)
	}
	leg, err := netlink.LinkByName(weft.IngressLeg)
	must(t, err)
	must(t, netlink.RouteAdd(&netlink.Route{
		LinkIndex: leg.Attrs().Index, Dst: &net.IPNet{IP: a.Addr.AsSlice(), Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK, MTU: 1230,
	}))
	if got := get(); got != 1230-headers {
		t.Errorf("segments of %d bytes on a way of 1230, want %d", got, 1230-headers)
	}
}
