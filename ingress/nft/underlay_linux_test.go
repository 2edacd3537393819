package nft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestStrangersAreKeptOut: what comes to the overlay's port from an address that
// is no member's is not received, and what comes from a member's is.
func TestStrangersAreKeptOut(t *testing.T) {
	must(t, setUp("lo"))
	for _, base := range []netip.Addr{netip.MustParseAddr("127.0.0.0"), netip.MustParseAddr("fd00:99::")} {
		t.Run(base.String(), func(t *testing.T) { testStrangers(t, base) })
	}
}

// testStrangers uses the addresses 1 to 3 behind base.
func testStrangers(t *testing.T, base netip.Addr) {
	number := func(n byte) netip.Addr {
		b := base.AsSlice()
		b[len(b)-1] = n
		a, _ := netip.AddrFromSlice(b)
		if a.Is6() {
			if err := addAddr("lo", a.String()+"/128"); err != nil && !errors.Is(err, unix.EEXIST) {
				t.Fatal(err)
			}
		}
		return a
	}
	heard, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(number(1), 0)))
	must(t, err)
	defer heard.Close()
	port := heard.LocalAddr().(*net.UDPAddr).Port
	other, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(number(1), 0)))
	must(t, err)
	defer other.Close()
	e := New(t.TempDir())
	must(t, e.Probe(t.Context()))
	if base.Is6() && !e.CanPublish6() {
		netnstest.Missing(t, "userns", fmt.Errorf("this kernel has no IPv6 tables: %w", weft.ErrUnsupported))
	}
	must(t, e.Apply(t.Context(), ingress.Table{Underlay: ingress.Underlay{
		Port: uint16(port), Self: number(1), Members: []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("fd00:99::2")},
	}}))
	t.Cleanup(func() { must(t, e.Close(context.Background())) })
	send := func(from byte, to net.Addr) {
		c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(number(from), 0)), to.(*net.UDPAddr))
		must(t, err)
		defer c.Close()
		_, err = c.Write([]byte{from})
		must(t, err)
	}
	for _, from := range []byte{3, 1, 2} {
		send(from, heard.LocalAddr())
	}
	send(3, other.LocalAddr()) // any other port is the host's own business
	for _, x := range []struct {
		c    *net.UDPConn
		want byte
	}{{heard, 2}, {other, 3}} {
		buf := make([]byte, 10)
		must(t, x.c.SetReadDeadline(time.Now().Add(5*time.Second)))
		if n, _, err := x.c.ReadFromUDP(buf); err != nil || n != 1 || buf[0] != x.want {
			t.Errorf("heard %v from the wrong one first, %v; want %d", buf[:n], err, x.want)
		}
	}
	family := netlink.InetFamily(unix.AF_INET)
	if base.Is6() {
		family = unix.AF_INET6
	}
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
	must(t, err)
	// On a loopback the sender's side comes first, and only this node's own
	// tunnels are left out.
	tracked := map[netip.AddrPort]bool{}
	for _, f := range flows {
		if from, ok := netip.AddrFromSlice(f.Forward.SrcIP); ok {
			tracked[netip.AddrPortFrom(from.Unmap(), f.Forward.DstPort)] = true
		}
	}
	at := func(from byte, to net.Addr) bool {
		return tracked[netip.AddrPortFrom(number(from), uint16(to.(*net.UDPAddr).Port))]
	}
	if at(1, heard.LocalAddr()) || !at(3, heard.LocalAddr()) || !at(3, other.LocalAddr()) {
		t.Errorf("tracked: %v; want those of others alone", tracked)
	}
}
