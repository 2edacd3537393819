package nft

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/weftnet/weft/ingress"
)

// TestStrangersAreKeptOut: what comes to the overlay's port from an address that
// is no member's is not received, and what comes from a member's is.
func TestStrangersAreKeptOut(t *testing.T) {
	must(t, setUp("lo"))
	heard, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	defer heard.Close()
	to := heard.LocalAddr().(*net.UDPAddr)
	other, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	defer other.Close()
	e := New(t.TempDir())
	must(t, e.Probe(t.Context()))
	must(t, e.Apply(t.Context(), ingress.Table{Underlay: ingress.Underlay{
		Port: uint16(to.Port), Members: []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("fd00::2")},
	}}))
	t.Cleanup(func() { must(t, e.Close(context.Background())) })
	send := func(from byte, to net.Addr) {
		c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, from)}, to.(*net.UDPAddr))
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
}
