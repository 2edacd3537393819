package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// freePort asks the kernel for a port of 127.0.0.1 that is free on TCP and UDP.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	return freePortOf(t, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
}

// freePortOf is freePort for another address of the host.
func freePortOf(t *testing.T, ip netip.Addr) netip.AddrPort {
	t.Helper()
	for range 20 {
		l, err := net.Listen("tcp", netip.AddrPortFrom(ip, 0).String())
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().(*net.TCPAddr).AddrPort()
		u, err := net.ListenPacket("udp", addr.String())
		l.Close()
		if err == nil {
			u.Close()
			return addr
		}
	}
	t.Fatalf("no free port on %s", ip)
	return netip.AddrPort{}
}

// await blocks until ok holds, woken by the change channel that next returns.
func await(t *testing.T, what string, next func() (ok bool, changed <-chan struct{})) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		ok, changed := next()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-limit:
			t.Fatalf("waited 20s for %s", what)
		}
	}
}

func TestSockets(t *testing.T) {
	const n = 3
	addrs := make([]netip.AddrPort, n)
	nodes, authority := make([]*Gossip, n), newAuthority(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, n)
	for i := range nodes {
		addrs[i] = freePort(t)
		g, err := New(Config{
			Node: nodeID(i + 1), Bind: addrs[i], Advertise: addrs[i], VTEP: testVTEP(i + 1), Keys: testKeys(),
			Log: slog.New(slog.DiscardHandler), Identity: authority.of(nodeID(i + 1)), Seeds: func() []netip.AddrPort { return addrs[:1] },
		})
		if err != nil {
			t.Fatal(err)
		}
		nodes[i] = g
		g.Attach(testNets())
		g.Publish(nil)
		go func() { done <- g.Run(ctx) }()
	}
	start := time.Now()
	for _, g := range nodes {
		await(t, "three members", func() (bool, <-chan struct{}) {
			m, changed := g.Members()
			return len(m) == n, changed
		})
	}
	t.Logf("three nodes on loopback have met after %v", time.Since(start))

	var took []time.Duration
	for i := range 30 {
		size := 1 + i%15 // small enough for a datagram
		start := time.Now()
		nodes[0].Publish(endpoints(size))
		for _, g := range nodes[1:] {
			await(t, "a published table", func() (bool, <-chan struct{}) {
				_, changed := g.Snapshot()
				return count(g, 1) == size, changed
			})
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	t.Logf("a publish is on all after %v median, %v worst of %d", took[len(took)/2], took[len(took)-1], len(took))

	nodes[1].Publish(endpoints(2000))
	await(t, "a streamed table", func() (bool, <-chan struct{}) {
		_, changed := nodes[2].Snapshot()
		return count(nodes[2], 2) == 2000, changed
	})
	if s := nodes[2].Stats(); s.Foreign+s.Unauthentic+s.Malformed != 0 {
		t.Errorf("good frames were dropped: %+v", s)
	}

	before := nodes[0].Stats()
	beStrange(t, addrs[0], nodeID(2))
	nodes[0].Publish(endpoints(3))
	await(t, "a table after the strangers", func() (bool, <-chan struct{}) {
		_, changed := nodes[2].Snapshot()
		return count(nodes[2], 1) == 3, changed
	})
	after := nodes[0].Stats()
	if after.Foreign != before.Foreign+2 || after.Unknown != before.Unknown+1 || after.Unauthentic != before.Unauthentic+1 || after.Replayed != before.Replayed+1 || after.Oversized != before.Oversized+1 {
		t.Errorf("strangers are not counted: %+v, before %+v", after, before)
	}

	stop()
	for range nodes {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// beStrange sends what no member sends to the gossip port of node 1. With the
// name of a member it returns when all of that was read.
func beStrange(t *testing.T, addr netip.AddrPort, member weft.ID) {
	t.Helper()
	c, err := net.Dial("udp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	garbage := func(sender weft.ID, n int) []byte {
		h := hashSender(sender)
		return append(append([]byte{frameMagic, frameVersion}, h[:]...), slices.Repeat([]byte{'x'}, n)...)
	}
	c.Write([]byte{frameMagic, frameVersion, 2, 3})
	c.Write(garbage(nodeID(9), 200))
	if member != "" {
		c.Write(garbage(member, 200))
		c.Write(garbage(member, datagramBytes))
	}
	s, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Write([]byte{frameMagic, 0xff, 0xff, 0xff, 0xff}) // a frame of 4 GiB
	s.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a frame over the limit: %v, want the stream closed", err)
	}
	if member == "" {
		return
	}
	// A knock behind them on the same socket is answered after them.
	knocker, err := newSealer(testKey(), member)
	if err != nil {
		t.Fatal(err)
	}
	first := knocker.seal(knock{})
	c.Write(first)
	c.Write(first)
	c.Write(knocker.seal(knock{}))
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	reply := make([]byte, 2048)
	var size int
	for range 2 { // the repeated one has none
		if size, err = c.Read(reply); err != nil {
			t.Fatalf("no answer to a knock: %v", err)
		}
	}
	if from, m, err := knowing(t, testKey(), nodeID(1)).open(reply[:size]); err != nil || from != nodeID(1) || m != (knocked{}) {
		t.Errorf("answer to a knock: %s, %v, %v", from, m, err)
	}
}

func TestPortTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	g, err := New(Config{Node: nodeID(1), Bind: addr, Advertise: addr, VTEP: testVTEP(1), Keys: testKeys(), Identity: newAuthority(t).of(nodeID(1)), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	err = g.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("listen for gossip on %v", addr)) {
		t.Errorf("%v, want an error that names the port", err)
	}
}

func TestValidate(t *testing.T) {
	good := Config{Node: nodeID(1), Bind: testAddr(1), Advertise: testAddr(1), VTEP: testVTEP(1), Keys: testKeys(), Identity: newAuthority(t).of(nodeID(1)), Log: slog.New(slog.DiscardHandler)}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"node id":   func(c *Config) { c.Node = "h1" },
		"key":       func(c *Config) { c.Keys.Sends.Key = c.Keys.Sends.Key[:16] },
		"bind":      func(c *Config) { c.Bind = netip.AddrPort{} },
		"advertise": func(c *Config) { c.Advertise = netip.MustParseAddrPort("0.0.0.0:7946") },
		"vtep":      func(c *Config) { c.VTEP = netip.Addr{} },
		"identity":  func(c *Config) { c.Identity = nil },
		"log":       func(c *Config) { c.Log = nil },
		"epoch":     func(c *Config) { c.Epoch = 1 << 48 },
	} {
		c := good
		change(&c)
		if _, err := New(c); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("wrong %s: %v, want ErrInvalid", name, err)
		}
	}
}
