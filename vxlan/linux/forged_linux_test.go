package linux

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// forgedPort is where datagrams of these tests go.
const forgedPort = 7001

// datagram is a UDP packet in a frame, of either family, without UDP's sum where that may
// be missing (RFC 768); over IPv6 it has one.
func datagram(src, dst net.HardwareAddr, from, to netip.Addr, text string) []byte {
	udp := append([]byte{forgedPort >> 8, forgedPort & 0xff, forgedPort >> 8, forgedPort & 0xff, 0, byte(8 + len(text)), 0, 0}, text...)
	b := append(append([]byte{}, dst...), src...)
	if from.Is4() {
		ip := []byte{0x45, 0, 0, byte(20 + len(udp)), 0, 1, 0x40, 0, 64, unix.IPPROTO_UDP, 0, 0}
		ip = append(append(ip, from.AsSlice()...), to.AsSlice()...)
		sum := fold(ip)
		ip[10], ip[11] = byte(sum>>8), byte(sum)
		return append(append(append(b, 0x08, 0x00), ip...), udp...)
	}
	ip := append([]byte{0x60, 0, 0, 0, 0, byte(len(udp)), unix.IPPROTO_UDP, 64}, append(from.AsSlice(), to.AsSlice()...)...)
	pseudo := append(append(append([]byte{}, ip[8:]...), 0, 0, 0, byte(len(udp)), 0, 0, 0, unix.IPPROTO_UDP), udp...)
	sum := fold(pseudo)
	udp[6], udp[7] = byte(sum>>8), byte(sum)
	return append(append(append(b, 0x86, 0xdd), ip...), udp...)
}

// fold is the sum of RFC 1071.
func fold(b []byte) uint16 {
	if len(b)%2 != 0 {
		b = append(append([]byte{}, b...), 0)
	}
	sum := uint32(0)
	for ; len(b) > 0; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// send puts frames on a task's link as they are, as whoever may open packet sockets does.
func send(t *testing.T, p vxlan.Port, frames ...[]byte) {
	t.Helper()
	must(t, netns.Do(p.NetNS, func() error {
		l, err := netlink.LinkByName(p.IfName)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, f := range frames {
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index}); err != nil {
				return err
			}
		}
		return nil
	}))
}

// hears returns what comes to an address of a task until the text "end" does.
func hears(t *testing.T, p vxlan.Port, at netip.Addr, during func()) (texts []string) {
	t.Helper()
	var c *net.UDPConn
	must(t, netns.Do(p.NetNS, func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, forgedPort)))
		return err
	}))
	defer c.Close()
	during()
	must(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
	for buf := make([]byte, 1500); ; {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatalf("after %q: %v", texts, err)
		}
		if bytes.Equal(buf[:n], []byte("end")) {
			return texts
		}
		texts = append(texts, fmt.Sprintf("%s %s", from.Addr().Unmap(), buf[:n]))
	}
}

// awaits sends honest frames until one comes: a port that has just been made forwards
// nothing yet on a busy machine.
func awaits(t *testing.T, from, to vxlan.Port) {
	t.Helper()
	var c *net.UDPConn
	must(t, netns.Do(to.NetNS, func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.Addr.Addr(), forgedPort)))
		return err
	}))
	defer c.Close()
	for range 100 {
		send(t, from, datagram(from.MAC, to.MAC, from.Addr.Addr(), to.Addr.Addr(), "ready"))
		must(t, c.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
		if n, _, err := c.ReadFromUDPAddrPort(make([]byte, 64)); err == nil && n > 0 {
			return
		}
	}
	t.Fatalf("nothing of %s comes to %s", from.Addr, to.Addr)
}

// TestForgedHardwareAddress: a frame that bears another hardware address than that of the
// task that sends it goes nowhere, neither to tasks of this node nor of others: in the
// name of an entry node it would bring a client's address that nobody has checked.
func TestForgedHardwareAddress(t *testing.T) {
	hosts := rig(t, 2)
	id := weft.NewID()
	liar, near, far := hosts[0].task(1, false), hosts[0].task(2, false), hosts[1].task(1, false)
	for i, p := range []*vxlan.Port{&liar, &near, &far} {
		p.Addr6 = netip.MustParsePrefix(fmt.Sprintf("fd77::%d/64", 1+i))
	}
	ports := map[*host][]vxlan.Port{hosts[0]: {liar, near}, hosts[1]: {far}}
	leg := &vxlan.HostLeg{Name: weft.IngressLeg, Addr: netip.MustParsePrefix("10.100.0.250/24"), MAC: weft.NodeMAC(hosts[0].node, netip.MustParseAddr("10.100.0.250"))}
	want := map[*host]vxlan.State{}
	for _, h := range hosts {
		n := network(h, id, ports)
		if h == hosts[0] {
			n.HostLeg = leg
		} else {
			n.Peers = append(n.Peers, vxlan.Peer{Addr: leg.Addr.Addr(), MAC: leg.MAC, VTEP: hosts[0].vtep()})
		}
		want[h] = state(n)
		must(t, h.apply(want[h]))
	}
	stranger := net.HardwareAddr{2, 0, 0, 0, 0, 0x77}
	names := map[string]net.HardwareAddr{"the entry node": leg.MAC, "a task here": near.MAC, "a task elsewhere": far.MAC, "nobody": stranger}
	check := func(when string) {
		t.Helper()
		for _, to := range []vxlan.Port{near, far} {
			for _, family := range []struct{ own, client, dst netip.Addr }{
				{liar.Addr.Addr(), netip.MustParseAddr("198.51.100.7"), to.Addr.Addr()},
				{liar.Addr6.Addr(), netip.MustParseAddr("2001:db8::7"), to.Addr6.Addr()},
			} {
				got := hears(t, to, family.dst, func() {
					var frames [][]byte
					for name, mac := range names {
						frames = append(frames, datagram(mac, to.MAC, family.own, family.dst, name), datagram(mac, to.MAC, family.client, family.dst, name))
					}
					send(t, liar, append(frames, datagram(liar.MAC, to.MAC, family.own, family.dst, "end"))...)
				})
				if len(got) > 0 {
					t.Errorf("%s: %s heard %q", when, family.dst, got)
				}
			}
		}
	}
	awaits(t, liar, near)
	awaits(t, liar, far)
	check("at first")

	// Somebody opens the port: that is a fault like any other.
	h := hosts[0]
	h.taken()
	must(t, withNS(h.k.path(testVNI), func(c *conn) error {
		l, err := c.LinkByName(weft.PortVethName(liar.Task, id))
		if err != nil {
			return err
		}
		open := localPort()
		open.lock = unlocked
		return c.setPortFlags(l.Attrs().Index, open)
	}))
	must(t, h.apply(want[h]))
	if r := h.taken(); len(r) != 1 {
		t.Errorf("an open port: repairs %v", r)
	}
	check("after a repair")

	// A daemon that starts anew finds nothing to do.
	k, err := New(h.k.cfg)
	must(t, err)
	h.k = k
	must(t, h.apply(want[h]))
	if r := h.taken(); len(r) > 0 {
		t.Errorf("a new daemon repaired %v", r)
	}
	check("under a new daemon")
}

// TestNoLock: where the kernel has no lock, a port without one is as it should be, and
// `info` says so.
func TestNoLock(t *testing.T) {
	f := localPort()
	f.lock = lockless
	if !f.are(localPort()) {
		t.Error("a lock is missed that the kernel does not have")
	}
	f.lock = unlocked
	if f.are(localPort()) {
		t.Error("an open port is as it should be")
	}
	if f = tunnelPort(); !f.are(tunnelPort()) || f.are(localPort()) {
		t.Error("a tunnel's port is as it should not be")
	}
	k := &Kernel{}
	k.lockless.Store(true)
	if !strings.Contains(k.Note(), "cannot lock ports") {
		t.Errorf("the note is %q and does not say that ports are open", k.Note())
	}
}
