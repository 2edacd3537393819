package wire

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSocketsResendSoon: both ends of a connection between nodes wait for a second
// at most before they send again; an older kernel refuses to be told, and nothing else.
func TestSocketsResendSoon(t *testing.T) {
	ln, err := Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := dialer(0).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for name, end := range map[string]net.Conn{"dialled": c, "accepted": s} {
		raw, err := end.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var got int
		if cerr := raw.Control(func(fd uintptr) { got, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, tcpRTOMaxMS) }); cerr != nil {
			t.Fatal(cerr)
		}
		if err == unix.ENOPROTOOPT {
			t.Logf("%s: this kernel has no TCP_RTO_MAX_MS", name)
			continue
		}
		if err != nil || got != 1000 {
			t.Errorf("%s: TCP_RTO_MAX_MS is %d, %v; want 1000", name, got, err)
		}
	}
}
