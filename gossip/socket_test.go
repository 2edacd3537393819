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
	for range 20 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
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
	t.Fatal("no free port on 127.0.0.1")
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
	nodes := make([]*Gossip, n)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, n)
	for i := range nodes {
		addrs[i] = freePort(t)
		g, err := New(Config{
			Node: nodeID(i + 1), Bind: addrs[i], Advertise: addrs[i], VTEP: testVTEP(i + 1), Key: testKey(),
			Log: slog.New(slog.DiscardHandler), Seeds: func() []netip.AddrPort { return addrs[:1] },
		})
		if err != nil {
			t.Fatal(err)
		}
		nodes[i] = g
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
	beStrange(t, addrs[0])
	nodes[0].Publish(endpoints(3))
	await(t, "a table after the strangers", func() (bool, <-chan struct{}) {
		_, changed := nodes[2].Snapshot()
		return count(nodes[2], 1) == 3, changed
	})
	if after := nodes[0].Stats(); after.Foreign != before.Foreign+1 || after.Unauthentic != before.Unauthentic+1 {
		t.Errorf("strangers are not counted: %+v, before %+v", after, before)
	}

	stop()
	for range nodes {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// beStrange sends what no member sends to the gossip port of node 1.
func beStrange(t *testing.T, addr netip.AddrPort) {
	t.Helper()
	c, err := net.Dial("udp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte{frameMagic, 1, 2, 3})
	c.Write(append([]byte{frameMagic, frameVersion}, slices.Repeat([]byte{'x'}, 200)...))
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
	// A knock behind them on the same socket is answered after them.
	knocker, err := newSealer(testKey(), nodeID(9))
	if err != nil {
		t.Fatal(err)
	}
	c.Write(knocker.seal(knock{}))
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	reply := make([]byte, 2048)
	size, err := c.Read(reply)
	if err != nil {
		t.Fatalf("no answer to a knock: %v", err)
	}
	if from, m, err := newOpener(testKey()).open(reply[:size]); err != nil || from != nodeID(1) || m != (knocked{}) {
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
	g, err := New(Config{Node: nodeID(1), Bind: addr, Advertise: addr, VTEP: testVTEP(1), Key: testKey(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	err = g.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("listen for gossip on %v", addr)) {
		t.Errorf("%v, want an error that names the port", err)
	}
}

func TestValidate(t *testing.T) {
	good := Config{Node: nodeID(1), Bind: testAddr(1), Advertise: testAddr(1), VTEP: testVTEP(1), Key: testKey(), Log: slog.New(slog.DiscardHandler)}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"node id":   func(c *Config) { c.Node = "h1" },
		"key":       func(c *Config) { c.Key = c.Key[:16] },
		"bind":      func(c *Config) { c.Bind = netip.AddrPort{} },
		"advertise": func(c *Config) { c.Advertise = netip.MustParseAddrPort("0.0.0.0:7946") },
		"vtep":      func(c *Config) { c.VTEP = netip.Addr{} },
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
