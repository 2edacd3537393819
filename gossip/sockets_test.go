package gossip

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

// TestOwnSockets: packets and streams come with who sent them and what was sent, by both
// families through one socket, and nothing runs after Shutdown.
func TestOwnSockets(t *testing.T) {
	for _, bind := range []string{"127.0.0.1:0", "[::]:0"} {
		t.Run(bind, func(t *testing.T) {
			s, err := openSockets(netip.MustParseAddrPort(bind), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			got := make(chan *memberlist.Packet, 8)
			s.receive(func(p *memberlist.Packet) { got <- p })
			other, err := openSockets(netip.MustParseAddrPort("127.0.0.1:0"), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			defer other.Shutdown()
			back := make(chan *memberlist.Packet, 8)
			other.receive(func(p *memberlist.Packet) { back <- p })
			to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), s.port()).String()
			var kept []*memberlist.Packet
			for _, b := range []string{"first", "second, which is longer"} {
				if _, err := other.WriteTo([]byte(b), to); err != nil {
					t.Fatal(err)
				}
				p := <-got
				kept = append(kept, p)
				if from := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), other.port()).String(); string(p.Buf) != b || p.From.String() != from || time.Since(p.Timestamp) > time.Minute {
					t.Errorf("got %q from %s at %s, want %q from %s", p.Buf, p.From, p.Timestamp, b, from)
				}
			}
			if string(kept[0].Buf) != "first" {
				t.Errorf("the first packet is %q after the second one", kept[0].Buf)
			}
			if _, err := s.WriteToAddress([]byte("answer"), memberlist.Address{Addr: kept[0].From.String()}); err != nil {
				t.Error(err)
			} else if p := <-back; string(p.Buf) != "answer" {
				t.Errorf("answered %q", p.Buf)
			}
			conn, err := other.DialTimeout(to, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			in := <-s.StreamCh()
			defer in.Close()
			if _, err := conn.Write([]byte("stream")); err != nil {
				t.Fatal(err)
			}
			var b bytes.Buffer
			if _, err := io.CopyN(&b, in, 6); err != nil || b.String() != "stream" {
				t.Errorf("stream: %q, %v", &b, err)
			}
			for range 2 {
				if err := s.Shutdown(); err != nil {
					t.Errorf("Shutdown: %v", err)
				}
			}
			if _, err := net.DialTimeout("tcp", to, time.Minute); err == nil {
				t.Error("still accepts streams")
			}
		})
	}
}

// TestOwnSocketsTaken: a port that is taken on one of both is no port, and the other is
// given back.
func TestOwnSocketsTaken(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	at := udp.LocalAddr().(*net.UDPAddr).AddrPort()
	if s, err := openSockets(at, log); err == nil {
		s.Shutdown()
		t.Error("a taken UDP port was opened")
	}
	udp.Close()
	s, err := openSockets(at, log)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	if s, err := openSockets(at, log); err == nil {
		s.Shutdown()
		t.Error("a taken TCP port was opened")
	}
}
