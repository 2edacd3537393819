package gossip

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// TestGuestSharesThePort: what begins with the guest's byte is the guest's, whole,
// and its answer comes from the port; the rest is gossip's as before.
func TestGuestSharesThePort(t *testing.T) {
	addr := freePort(t)
	const magic = 0xF8
	seen := make(chan netip.AddrPort, 1)
	g, err := New(Config{
		Node: nodeID(1), Bind: addr, Advertise: addr, VTEP: testVTEP(1), Keys: testKeys(), Identity: newAuthority(t).of(nodeID(1)), Log: slog.New(slog.DiscardHandler),
		Guest: Guest{Magic: magic, Receive: func(from netip.AddrPort, b []byte) []byte {
			if len(b) != 9000 || b[0] != magic {
				return nil
			}
			select {
			case seen <- from:
			default:
			}
			return bytes.Clone(b[:32])
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	c, err := net.Dial("udp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	packet := make([]byte, 9000)
	packet[0] = magic
	answer := make([]byte, 100)
	for n := 0; n != 32; { // the node may not listen yet
		c.Write([]byte{magic, 1}) // is the guest's, who says nothing
		c.Write(packet)           // a failure is seen by the lack of an answer
		c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, _ = c.Read(answer)
		if t.Context().Err() != nil {
			t.Fatal("no answer")
		}
	}
	if from := <-seen; from != c.LocalAddr().(*net.UDPAddr).AddrPort() {
		t.Errorf("the guest was told that it came from %v, want %v", from, c.LocalAddr())
	}
	before := g.Stats().Foreign
	beStrange(t, addr, "")
	for g.Stats().Foreign == before {
		if t.Context().Err() != nil {
			t.Fatal("a stranger's frame was not taken for gossip's")
		}
		beStrange(t, addr, "")
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestGuestMayNotTakeGossipsBytes(t *testing.T) {
	identity := newAuthority(t).of(nodeID(1))
	receive := func(netip.AddrPort, []byte) []byte { return nil }
	for magic, good := range map[byte]bool{0: false, 1: false, 13: false, 0x16: false, memberlistHasLabel: false, frameMagic: false, 0xF8: true} {
		_, err := New(Config{
			Node: nodeID(1), Bind: netip.MustParseAddrPort("127.0.0.1:1"), Advertise: netip.MustParseAddrPort("127.0.0.1:1"),
			VTEP: testVTEP(1), Keys: testKeys(), Identity: identity, Log: slog.New(slog.DiscardHandler), Guest: Guest{magic, receive},
		})
		if good != (err == nil) || !good && !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("guest with %#x: %v", magic, err)
		}
	}
}
