package ingresstest

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// Speakers is what an engine on a bridge owes beyond services: nobody takes a task's word
// for another's address, whether it tells or asks; its word for its own is heard. make
// makes the engine of the first host.
func Speakers(t *testing.T, parts Parts, make func(*Rig) (ingress.Engine, error)) {
	r := NewRig(t, parts)
	speaker, near, other, far := r.Task(0, 0, 11), r.Task(0, 0, 12), r.Task(0, 0, 13), r.Task(1, 0, 14)
	r.Apply()
	e, err := make(r)
	must(t, err)
	must(t, e.Apply(t.Context(), ingress.Table{Networks: []ingress.Network{r.Network(0)}}))
	for _, who := range []Task{near, far} {
		for _, a := range []struct{ own, others, dst netip.Addr }{{speaker.Addr, other.Addr, who.Addr}, {speaker.Addr6, other.Addr6, who.Addr6}} {
			for name, says := range map[string]func(testing.TB, net.HardwareAddr, net.HardwareAddr, netip.Addr, netip.Addr) []byte{"tells": claim, "asks": question} {
				if got := believes(t, who, speaker, knows(a.others, other.MAC), says(t, speaker.MAC, who.MAC, a.others, a.dst)); !bytes.Equal(got, other.MAC) {
					t.Errorf("%s is believed to have %s, as a task that has not %s", got, a.others, name)
				}
			}
			stale := net.HardwareAddr{2, 0, 0, 0, 0, 0x77}
			if got := believes(t, who, speaker, knows(a.own, stale), claim(t, speaker.MAC, who.MAC, a.own, a.dst)); !bytes.Equal(got, speaker.MAC) {
				t.Errorf("%s is believed to have %s, which its owner denies", got, a.own)
			}
		}
	}
}

// claim is a frame that tells a task, unasked, that an address has a hardware address:
// a gratuitous answer of ARP (RFC 5944 section 4.6), or an overriding advertisement.
func claim(t testing.TB, from, to net.HardwareAddr, of netip.Addr, dst netip.Addr) []byte {
	t.Helper()
	eth := append(append([]byte{}, to...), from...)
	if of.Is4() {
		arp := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, from...)
		arp = append(append(append(arp, of.AsSlice()...), from...), of.AsSlice()...)
		return append(append(eth, 0x08, 0x06), arp...)
	}
	body := append([]byte{0x20, 0, 0, 0}, of.AsSlice()...)       // O (RFC 4861 section 4.4)
	body = append(append(body, 2, 1), from...)                   // target link-layer address
	pseudo := icmp.IPv6PseudoHeader(of.AsSlice(), dst.AsSlice()) // the sender says what it likes
	m, err := (&icmp.Message{Type: ipv6.ICMPTypeNeighborAdvertisement, Body: &icmp.RawBody{Data: body}}).Marshal(pseudo)
	must(t, err)
	ip := append([]byte{0x60, 0, 0, 0, 0, byte(len(m)), unix.IPPROTO_ICMPV6, 255}, of.AsSlice()...)
	return append(append(append(append(eth, 0x86, 0xdd), ip...), dst.AsSlice()...), m...)
}

// question is a solicitation that names its sender's hardware address; ARP's is as well.
func question(t testing.TB, from, to net.HardwareAddr, of netip.Addr, dst netip.Addr) []byte {
	t.Helper()
	eth := append(append([]byte{}, to...), from...)
	if of.Is4() {
		arp := append([]byte{0, 1, 8, 0, 6, 4, 0, 1}, from...)
		arp = append(append(append(arp, of.AsSlice()...), make([]byte, 6)...), dst.AsSlice()...)
		return append(append(eth, 0x08, 0x06), arp...)
	}
	body := append(append(append([]byte{0, 0, 0, 0}, dst.AsSlice()...), 1, 1), from...)
	m, err := (&icmp.Message{Type: ipv6.ICMPTypeNeighborSolicitation, Body: &icmp.RawBody{Data: body}}).Marshal(icmp.IPv6PseudoHeader(of.AsSlice(), dst.AsSlice()))
	must(t, err)
	ip := append([]byte{0x60, 0, 0, 0, 0, byte(len(m)), unix.IPPROTO_ICMPV6, 255}, of.AsSlice()...)
	return append(append(append(append(eth, 0x86, 0xdd), ip...), dst.AsSlice()...), m...)
}

// sendFrame puts a frame on a task's link as it is.
func sendFrame(ns string, frame []byte) error {
	return netns.Do(ns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index})
	})
}

func knows(a netip.Addr, mac net.HardwareAddr) ingress.Speaker {
	return ingress.Speaker{MAC: mac, Addrs: []netip.Addr{a}}
}

// believes sets what a task knows of an address, has another one speak, and returns what
// it knows then.
func believes(t testing.TB, who, speaker Task, of ingress.Speaker, frame []byte) net.HardwareAddr {
	t.Helper()
	var now net.HardwareAddr
	must(t, netns.Do(who.NetNS, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		// An entry is not held for a second against a question (arp_process in Linux).
		if err := os.WriteFile("/proc/sys/net/ipv4/neigh/eth0/locktime", []byte("0"), 0o644); err != nil {
			return err
		}
		if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: of.Addrs[0].AsSlice(), HardwareAddr: of.MAC, State: netlink.NUD_REACHABLE}); err != nil {
			return err
		}
		// A datagram behind the frame comes when that has been seen.
		pc, err := net.ListenPacket("udp", netip.AddrPortFrom(who.Addr, 0).String())
		if err != nil {
			return err
		}
		defer pc.Close()
		if err := sendFrame(speaker.NetNS, frame); err != nil {
			return err
		}
		if err := netns.Do(speaker.NetNS, func() error {
			c, err := net.Dial("udp", pc.LocalAddr().String())
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("end"))
			return err
		}); err != nil {
			return err
		}
		if err := pc.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		if _, _, err := pc.ReadFrom(make([]byte, 16)); err != nil {
			return err
		}
		all, err := netlink.NeighList(l.Attrs().Index, 0)
		for _, n := range all {
			if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap() == of.Addrs[0] {
				now = n.HardwareAddr
			}
		}
		return err
	}))
	return now
}
