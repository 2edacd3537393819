package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/netns"
)

// neighbour sends a datagram to an address, waits until isAsked, and returns what
// the namespace has resolved the address to; "" for nobody.
func neighbour(t *testing.T, path string, a netip.Addr, isAsked func(hardware string) bool) string {
	t.Helper()
	got := ""
	must(t, netns.Do(path, func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(a, 9).String())
		if err != nil {
			return err
		}
		defer c.Close()
		c.Write([]byte("x")) // an answer that nobody is there is none of ours
		eventually(func() bool {
			ns, err := netlink.NeighList(0, map[bool]int{true: unix.AF_INET, false: unix.AF_INET6}[a.Is4()])
			for _, n := range ns {
				if err == nil && n.IP.Equal(a.AsSlice()) {
					got = n.HardwareAddr.String()
				}
			}
			return isAsked(got)
		})
		return nil
	}))
	return got
}

// TestAddressesAreAnswered: for peers, services and local tasks, in both
// families, and for no one else. What is sent to a service without a balancer,
// or to nobody, is dropped, counted and stays.
func TestAddressesAreAnswered(t *testing.T) { eachWay(t, testAddressesAreAnswered) }

func testAddressesAreAnswered(t *testing.T, way string) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("ipv6=%v", v6), func(t *testing.T) {
			m := newMesh(t, plan{way: way, hosts: 2}, v6)
			h := m.hosts[0]
			vip, nobody := netip.MustParseAddr("10.100.0.200"), netip.MustParseAddr("10.100.0.201")
			if v6 {
				vip, nobody = netip.MustParseAddr("fd77::200"), netip.MustParseAddr("fd77::201")
			}
			n := m.want[h].Networks[testVNI]
			n.VIPs = []vxlan.VIP{{Addr: vip, MAC: weft.VIPMAC(weft.NewID(), vip)}}
			must(t, h.apply(state(n)))
			expectEqual(t, h, state(n))
			me, local, peer := m.ports[h][0], m.ports[h][1], n.Peers[0]
			for _, c := range []struct {
				addr netip.Addr
				want string
			}{{vip, n.VIPs[0].MAC.String()}, {local.Addr.Addr(), local.MAC.String()}, {peer.Addr, peer.MAC.String()}, {nobody, ""}} {
				before := h.drops()["unknown address"]
				isAsked := func(got string) bool { return got != "" }
				if c.want == "" {
					isAsked = func(string) bool { return h.drops()["unknown address"] > before }
				}
				if got := neighbour(t, me.NetNS, c.addr, isAsked); got != c.want {
					t.Errorf("%s resolved to %q, want %q", c.addr, got, c.want)
				}
			}
			d := h.drops()
			if d["no balancer"] == 0 || d["unknown address"] == 0 {
				t.Errorf("drops are not counted: %v", d)
			}
		})
	}
}

// rawSend sends one frame from a link of a namespace.
func rawSend(t *testing.T, path, name string, frame []byte) {
	t.Helper()
	rawSendAs(t, path, name, frame, 0)
}

// rawSendAs tells the kernel another protocol than the frame's own; 0 is that.
func rawSendAs(t *testing.T, path, name string, frame []byte, protocol uint16) {
	t.Helper()
	must(t, netns.Do(path, func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		err = unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index, Protocol: protocol<<8 | protocol>>8})
		if err == unix.ENOBUFS && linux.IsNetkit(l) {
			return nil // dropped: the sender is told at once
		}
		return err
	}))
}

// TestForgedProtocol: a frame that is IP by its header and ARP by the word of the
// socket that sends it does not come to another task as ARP, by which it could
// take over an address there.
func TestForgedProtocol(t *testing.T) { eachWay(t, testForgedProtocol) }

func testForgedProtocol(t *testing.T, way string) {
	m := newMesh(t, plan{way: way, hosts: 1}, false)
	h := m.hosts[0]
	me, victim := m.ports[h][0], m.ports[h][1]
	var heard net.PacketConn
	fd := -1
	must(t, netns.Do(victim.NetNS, func() (err error) {
		if heard, err = net.ListenPacket("udp4", netip.AddrPortFrom(victim.Addr.Addr(), 7003).String()); err != nil {
			return err
		}
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK, unix.ETH_P_ARP<<8)
		return err
	}))
	defer heard.Close()
	defer unix.Close(fd)
	for range 2 { // the second one is remembered
		rawSendAs(t, me.NetNS, "eth0", ipv4Frame(vxlan.MACOf(me.MAC), vxlan.MACOf(victim.MAC), 60), unix.ETH_P_ARP)
		rawSend(t, me.NetNS, "eth0", udpFrame(me, victim, 7003, "after it", 20))
		heard.SetReadDeadline(time.Now().Add(limit))
		if _, _, err := heard.ReadFrom(make([]byte, 100)); err != nil {
			t.Fatalf("what is honest: %v; %v", err, h.drops())
		}
	}
	if n, _, err := unix.Recvfrom(fd, make([]byte, 100), 0); err != unix.EAGAIN {
		t.Errorf("%d bytes came as ARP, %v", n, err)
	}
	if n := h.drops()["other protocol"]; way == PortsNetkit && n != 2 {
		t.Errorf("%d are counted, want 2: %v", n, h.drops())
	}
}

// TestWhatIsNotCarried: each kind of unwanted packet is dropped under its own
// reason.
func TestWhatIsNotCarried(t *testing.T) { eachWay(t, testWhatIsNotCarried) }

func testWhatIsNotCarried(t *testing.T, way string) {
	m := newMesh(t, plan{way: way, hosts: 2}, false)
	h := m.hosts[0]
	me, peer := m.ports[h][0], m.want[h].Networks[testVNI].Peers[0]
	good := ipv4Frame(vxlan.MACOf(me.MAC), vxlan.MACOf(peer.MAC), 60)
	edit := func(at int, b ...byte) []byte {
		f := append([]byte(nil), good...)
		copy(f[at:], b)
		return f
	}
	for _, c := range []struct {
		reason string
		frame  []byte
	}{
		{"spoofed source", edit(6, 2, 8, 8, 8, 8, 8)},
		{"unknown destination", edit(0, 2, 8, 8, 8, 8, 8)},
		{"multicast", edit(0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)},
		{"other protocol", edit(12, 0x88, 0xcc)},
		{"malformed", edit(12, 0x08, 0x06)[:20]},
	} {
		before := h.drops()[c.reason]
		rawSend(t, me.NetNS, "eth0", c.frame)
		if !eventually(func() bool { return h.drops()[c.reason] > before }) {
			t.Errorf("%s is not counted: %v", c.reason, h.drops())
		}
	}
}

func eventually(f func() bool) bool {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); {
		if f() {
			return true
		}
	}
	return false
}

// encapsulated is a VXLAN packet for UDP.
func encapsulated(vni uint32, frame []byte) []byte {
	b := make([]byte, 8, 8+len(frame))
	b[0] = 8
	binary.BigEndian.PutUint32(b[4:], vni<<8)
	return append(b, frame...)
}

// TestStrangersAreNotHeard: a packet from an address at which its sender does
// not live is not delivered, whole or in fragments, while the same one from
// the right address is.
func TestStrangersAreNotHeard(t *testing.T) { eachWay(t, testStrangersAreNotHeard) }

func testStrangersAreNotHeard(t *testing.T, way string) {
	m := newMesh(t, plan{way: way, hosts: 3}, false)
	h, member, stranger := m.hosts[0], m.hosts[1], m.hosts[2]
	to, from := m.ports[h][0], m.ports[member][0]
	var s net.PacketConn
	must(t, netns.Do(to.NetNS, func() (err error) { s, err = net.ListenPacket("udp4", to.Addr.Addr().String()+":7003"); return err }))
	defer s.Close()
	send := func(host *testHost, text string, size int) {
		t.Helper()
		frame := udpFrame(from, to, 7003, text, size)
		must(t, netns.Do(host.path, func() error {
			c, err := net.Dial("udp", netip.AddrPortFrom(h.vtep(), testPort).String())
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write(encapsulated(testVNI, frame))
			return err
		}))
	}
	for _, size := range []int{100, 4000} { // the larger one comes in fragments
		before := h.drops()["received from unknown"]
		send(stranger, "stranger", size)
		if !eventually(func() bool { return h.drops()["received from unknown"] > before }) {
			t.Errorf("%d bytes of a stranger are not counted: %v", size, h.drops())
		}
		send(member, "member", size)
		s.SetReadDeadline(time.Now().Add(limit))
		buf := make([]byte, 65536)
		got, _, err := s.ReadFrom(buf)
		if err != nil || !strings.HasPrefix(string(buf[:got]), "member") {
			t.Errorf("%d bytes: heard %q, %v; %v", size, buf[:min(got, 20)], err, h.drops())
		}
	}
	before := h.drops()["received for unknown"]
	gone := to
	gone.MAC = net.HardwareAddr{2, 7, 7, 7, 7, 7}
	frame := udpFrame(from, gone, 7003, "x", 100)
	must(t, netns.Do(member.path, func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(h.vtep(), testPort).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(encapsulated(testVNI, frame))
		return err
	}))
	if !eventually(func() bool { return h.drops()["received for unknown"] > before }) {
		t.Errorf("what is for nobody is not counted: %v", h.drops())
	}
}

// udpFrame is a datagram of a port, with a checksum of zero (none).
func udpFrame(from, to vxlan.Port, port uint16, text string, size int) []byte {
	f := ipv4Frame(vxlan.MACOf(from.MAC), vxlan.MACOf(to.MAC), 28+size)
	ip := f[14:]
	binary.BigEndian.PutUint16(ip[2:], uint16(28+size))
	copy(ip[12:], from.Addr.Addr().AsSlice())
	copy(ip[16:], to.Addr.Addr().AsSlice())
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	binary.BigEndian.PutUint16(ip[20:], 9)
	binary.BigEndian.PutUint16(ip[22:], port)
	binary.BigEndian.PutUint16(ip[24:], uint16(8+size))
	copy(ip[28:], text)
	return f
}

// TestTooBigIsAnswered: what is larger than the way there is refused with the
// size that fits, to TCP and to datagrams alike, and a packet that may be cut
// is cut.
func TestTooBigIsAnswered(t *testing.T) { eachWay(t, testTooBigIsAnswered) }

func testTooBigIsAnswered(t *testing.T, way string) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("ipv6=%v", v6), func(t *testing.T) {
			m := newMesh(t, plan{way: way, hosts: 2}, v6)
			h, other := m.hosts[0], m.hosts[1]
			from, to := m.ports[h][0], m.ports[other][0]
			// A narrow path to one peer, of which no route tells: 1300 where the port has 1450.
			must(t, h.apply(m.narrow(h, to, 1300)))
			expectEqual(t, h, m.want[h])
			if err := overTCP(from, to); err != nil {
				t.Errorf("TCP: %v; %v", err, h.drops())
			}
			if n := h.drops()["too big"]; n == 0 {
				t.Error("TCP was never told")
			}
			must(t, netns.Do(from.NetNS, func() error { return flushRoutes(to.Addr.Addr()) }))
			if mtu := pathMTU(t, from, to); mtu != 1300 {
				t.Errorf("the path is said to carry %d bytes", mtu)
			}
			if v6 { // no link of IPv6 carries less than 1280
				to := m.ports[other][1]
				must(t, h.apply(m.narrow(h, to, 1200)))
				before := h.drops()["too big"]
				if mtu := pathMTU(t, from, to); mtu != 1280 || h.drops()["too big"] == before {
					t.Errorf("the path is said to carry %d bytes; %v", mtu, h.drops())
				}
				must(t, overUDP(from, to))
			} else {
				must(t, netns.Do(from.NetNS, func() error {
					return errors.Join(writeSysctl("/proc/sys/net/ipv4/ip_no_pmtu_disc", "1"), flushRoutes(to.Addr.Addr()))
				}))
				must(t, overUDP(from, to)) // without DF now
			}
		})
	}
}

// narrow is what the host wants when the way to a task has mtu bytes.
func (m mesh) narrow(h *testHost, to vxlan.Port, mtu int) vxlan.State {
	n := m.want[h].Networks[testVNI]
	n.Peers = slices.Clone(n.Peers)
	for i, p := range n.Peers {
		if bytes.Equal(p.MAC, to.MAC) {
			n.Peers[i].MTU = mtu
		}
	}
	m.want[h] = state(n)
	return m.want[h]
}

// pathMTU is what a socket that never lets its packets be cut is told of the way,
// when it has sent 1390 bytes.
func pathMTU(t *testing.T, from, to vxlan.Port) (mtu int) {
	t.Helper()
	must(t, netns.Do(from.NetNS, func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(to.Addr.Addr(), 9).String())
		if err != nil {
			return err
		}
		defer c.Close()
		rc, err := c.(*net.UDPConn).SyscallConn()
		if err != nil {
			return err
		}
		level, option, ask := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_MTU
		if to.Addr.Addr().Is6() {
			level, option, ask = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_MTU
		}
		err = rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, unix.IP_PMTUDISC_DO) })
		if err != nil {
			return err
		}
		eventually(func() bool {
			c.Write(make([]byte, 1390)) // refused once the path is known
			rc.Control(func(fd uintptr) { mtu, err = unix.GetsockoptInt(int(fd), level, ask) })
			return err == nil && mtu < 1390
		})
		return err
	}))
	return mtu
}

// TestWaysKeepTheirWidth: a narrower way stays as narrow when the network's MTU
// changes, and goes with it where it is not the narrower one any more.
func TestWaysKeepTheirWidth(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	h, other := m.hosts[0], m.hosts[1]
	a, b := m.ports[other][0], m.ports[other][1]
	has := func(p vxlan.Port) int {
		return int(h.dests()[macKey{VNI: testVNI, MAC: vxlan.MACOf(p.MAC)}].MTU)
	}
	for _, c := range []struct{ network, way, a, b int }{
		{1450, 1300, 1300, 1450}, {1400, 1300, 1300, 1400}, {1290, 1300, 1290, 1290}, {1450, 1300, 1300, 1450},
		{1450, 1450, 1450, 1450}, {1450, 0, 1450, 1450}, {1400, 1450, 1400, 1400}, {1440, 1400, 1400, 1440}, {1400, 0, 1400, 1400},
	} {
		n := m.narrow(h, a, c.way).Networks[testVNI]
		n.MTU = c.network
		must(t, h.apply(state(n)))
		expectEqual(t, h, state(n))
		if has(a) != c.a || has(b) != c.b {
			t.Errorf("network %d, way %d: entries of %d and %d, want %d and %d", c.network, c.way, has(a), has(b), c.a, c.b)
		}
	}
}

// flushRoutes forgets what the calling thread's namespace learnt of paths.
func flushRoutes(to netip.Addr) error {
	file := "/proc/sys/net/ipv4/route/flush"
	if to.Is6() {
		file = "/proc/sys/net/ipv6/route/flush"
	}
	return writeSysctl(file, "1")
}
