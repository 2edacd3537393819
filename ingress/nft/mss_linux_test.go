package nft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

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
		Ingress:   f.entry(),
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

// TestAnswersFitTheWayBack: the way from a task to an entry node becomes
// narrower under open connections, and nobody says so on the way: what is too
// large for it is lost.
func TestAnswersFitTheWayBack(t *testing.T) {
	m := newMesh(t, 1)
	b := m.task(11)
	m.publish(m.ports(b)...)
	h := m.hosts[0]
	conns := map[string]net.Conn{}
	for client, to := range h.addresses() {
		c, _, _, err := m.ask("tcp", to, 0)
		must(t, err)
		must(t, returned(c))
		conns[client] = c
	}
	const narrow = 1300
	leg, err := netlink.LinkByName(weft.IngressLeg)
	must(t, err)
	must(t, netlink.LinkSetMTU(leg, narrow)) // it takes in no more either
	h.entry.MTU = narrow
	m.publish(m.ports(b)...)
	for client, c := range conns {
		if err := returned(c); err != nil {
			t.Errorf("%s: an answer that is larger than the way back: %v", client, err)
		}
	}
}

// returned sends what fits one packet of an ordinary link, and wants it back, in
// however many.
func returned(c net.Conn) error {
	data := make([]byte, 1400)
	_, err := c.Write(data)
	if err = errors.Join(err, c.SetDeadline(time.Now().Add(3*time.Second))); err != nil {
		return err
	}
	n, err := io.ReadFull(c, data)
	if err != nil {
		err = fmt.Errorf("%d of %d bytes came back: %w", n, len(data), err)
	}
	return err
}
