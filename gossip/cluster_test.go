package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft"
)

// Address plan: node n is 10.99.0.n:7946, its VTEP 10.99.1.n.

// nearby is the latency of links, one way, unless a test sets another.
const nearby = 250 * time.Microsecond

// fabric is an in-memory network with one-way latency. What goes to a dead or
// cut-off node is dropped, as on a wire: nobody is told.
type fabric struct {
	mu    sync.Mutex // guards: all below
	ports map[string]*fabricPort
	cut   func(from, to string) bool
	// frames are the only thing that gets through, between whom.
	frames  func(from, to string) bool
	loss    float64
	latency time.Duration
}

type fabricPort struct {
	f       *fabric
	addr    string
	packets chan *memberlist.Packet
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
}

func newFabric() *fabric { return &fabric{ports: map[string]*fabricPort{}, latency: nearby} }

// far is the latency now.
func (f *fabric) far() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.latency
}

func (f *fabric) port(addr netip.AddrPort) *fabricPort {
	p := &fabricPort{
		f: f, addr: addr.String(), done: make(chan struct{}),
		packets: make(chan *memberlist.Packet, 1024), streams: make(chan net.Conn, 4096),
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ports[p.addr] = p
	return p
}

func (f *fabric) setCut(cut func(from, to string) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cut = cut
}

// onlyFrames lets no packets of membership through, and no streams.
func (f *fabric) onlyFrames(between func(from, to string) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frames = between
}

// way returns the port at to, nil if it does not get there.
func (f *fabric) way(from, to string, isFrame bool) *fabricPort {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.ports[to]
	if f.ports[from] == nil || p == nil || (f.cut != nil && f.cut(from, to)) || (!isFrame && f.frames != nil && f.frames(from, to)) {
		return nil
	}
	return p
}

// kill takes a node's port away without a word to anybody.
func (f *fabric) kill(addr string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.ports, addr)
}

func (p *fabricPort) FinalAdvertiseAddr(ip string, port int) (net.IP, int, error) {
	return net.ParseIP(ip), port, nil
}

func (p *fabricPort) WriteTo(b []byte, addr string) (time.Time, error) {
	return p.WriteToAddress(b, memberlist.Address{Addr: addr})
}

func (p *fabricPort) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	now := time.Now()
	p.f.mu.Lock()
	lost := rand.Float64() < p.f.loss
	p.f.mu.Unlock()
	if lost {
		return now, nil
	}
	packet := &memberlist.Packet{Buf: append([]byte(nil), b...), From: net.UDPAddrFromAddrPort(netip.MustParseAddrPort(p.addr))}
	time.AfterFunc(p.f.far(), func() {
		if to := p.f.way(p.addr, a.Addr, packet.Buf[0] == frameMagic); to != nil {
			packet.Timestamp = time.Now()
			select {
			case to.packets <- packet:
			default:
			}
		}
	})
	return now, nil
}

func (p *fabricPort) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return p.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

func (p *fabricPort) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	to := p.f.way(p.addr, a.Addr, false)
	if to == nil {
		select {
		case <-time.After(timeout):
		case <-p.done:
		}
		return nil, fmt.Errorf("dial %s: timeout", a.Addr)
	}
	time.Sleep(2 * p.f.far())
	near, far := net.Pipe()
	select {
	case to.streams <- far:
		return near, nil
	default:
		return nil, errors.New("backlog is full")
	}
}

func (p *fabricPort) PacketCh() <-chan *memberlist.Packet { return p.packets }
func (p *fabricPort) StreamCh() <-chan net.Conn           { return p.streams }

func (p *fabricPort) Shutdown() error {
	p.once.Do(func() {
		p.f.mu.Lock()
		if p.f.ports[p.addr] == p {
			delete(p.f.ports, p.addr)
		}
		p.f.mu.Unlock()
		close(p.done)
	})
	return nil
}

func testAddr(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 99, 0, byte(n)}), weft.GossipPort)
}

func testVTEP(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, 1, byte(n)}) }

func testKey() []byte { return []byte("0123456789abcdef0123456789abcdef") }

func testKeys() weft.GossipRing { return weft.GossipRing{Sends: weft.GossipKey{Key: testKey()}} }

// cluster is a number of running nodes; the first is everybody's seed.
type cluster struct {
	t     *testing.T
	f     *fabric
	ca    *authority
	log   *slog.Logger
	nodes map[int]*running
}

type running struct {
	*Gossip
	stop context.CancelFunc
	done chan error
}

func newCluster(t *testing.T, n int) *cluster {
	return newLoggedCluster(t, n, slog.New(slog.DiscardHandler))
}

func newLoggedCluster(t *testing.T, n int, log *slog.Logger) *cluster {
	c := &cluster{t: t, f: newFabric(), ca: newAuthority(t), log: log, nodes: map[int]*running{}}
	for i := 1; i <= n; i++ {
		c.start(i)
	}
	c.await(5*time.Second, "the cluster to form", func() bool { return c.allSee(n) })
	return c
}

func (c *cluster) start(n int) *running {
	g, err := New(Config{
		Node: nodeID(n), Advertise: testAddr(n), VTEP: testVTEP(n), Keys: testKeys(),
		Log: c.log, Transport: c.f.port(testAddr(n)), Identity: c.ca.of(nodeID(n)),
		Seeds: func() []netip.AddrPort { return []netip.AddrPort{testAddr(1), testAddr(2)} },
	})
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(c.t.Context())
	r := &running{Gossip: g, stop: stop, done: make(chan error, 1)}
	go func() { r.done <- g.Run(ctx) }()
	c.nodes[n] = r
	g.Attach(testNets())
	return r
}

// close ends all nodes and lets memberlist's timers run out, so that the bubble
// finds no goroutine left behind.
func (c *cluster) close() {
	for n, r := range c.nodes {
		r.stop()
		if err := <-r.done; err != nil {
			c.t.Errorf("node %d: %v", n, err)
		}
	}
	time.Sleep(5 * time.Minute)
}

// crash cuts a node off for good and ends it.
func (c *cluster) crash(n int) {
	c.f.kill(testAddr(n).String())
	r := c.nodes[n]
	delete(c.nodes, n)
	r.stop()
	<-r.done
}

func (c *cluster) await(limit time.Duration, what string, ok func() bool) time.Duration {
	c.t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			c.t.Fatalf("waited %v for %s: %s", limit, what, c.describe())
		}
		time.Sleep(time.Millisecond)
	}
	return time.Since(start)
}

// logLines keeps what is logged.
type logLines struct {
	mu  sync.Mutex
	all []string
}

func (l *logLines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, string(b))
	return len(b), nil
}

// count is how many lines have text.
func (l *logLines) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.all {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

func (c *cluster) describe() (s string) {
	for n, r := range c.nodes {
		members, _ := r.Members()
		endpoints, _ := r.Snapshot()
		s += fmt.Sprintf("\nnode %d sees %d members, %d endpoints, %+v", n, len(members), len(endpoints), r.Stats())
	}
	return s
}

func (c *cluster) allSee(members int) bool {
	for _, r := range c.nodes {
		if m, _ := r.Members(); len(m) != members {
			return false
		}
	}
	return true
}

// seenBy is how many others have node n in sight.
func (c *cluster) seenBy(n int) (seen int) {
	for i, r := range c.nodes {
		m, _ := r.Members()
		if i != n && slices.ContainsFunc(m, func(m Member) bool { return m.ID == nodeID(n) }) {
			seen++
		}
	}
	return seen
}

// allHave reports whether every node sees exactly this many endpoints of owner.
func (c *cluster) allHave(owner, endpoints int) bool {
	for _, r := range c.nodes {
		if count(r.Gossip, owner) != endpoints {
			return false
		}
	}
	return true
}

// allHaveAll reports whether every node sees exactly n endpoints of each node n.
func (c *cluster) allHaveAll() bool {
	for _, r := range c.nodes {
		all, _ := r.Snapshot()
		have := map[weft.ID]int{}
		for _, e := range all {
			have[e.Owner]++
		}
		for n := range c.nodes {
			if have[nodeID(n)] != n {
				return false
			}
		}
	}
	return true
}

func count(g *Gossip, owner int) (n int) {
	all, _ := g.Snapshot()
	for _, e := range all {
		if e.Owner == nodeID(owner) && e.VTEP == testVTEP(owner) {
			n++
		}
	}
	return n
}

// testNets are those of endpoints.
func testNets() []weft.ID { return []weft.ID{netID(0), netID(1), netID(2)} }

func endpoints(n int) (out []weft.Endpoint) {
	for i := range n {
		out = append(out, endpoint(i))
	}
	return out
}

func TestClusterLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 5)
		defer c.close()
		for n, r := range c.nodes {
			r.Publish(endpoints(n))
		}
		c.await(time.Second, "all tables", func() bool {
			for n := range c.nodes {
				if !c.allHave(n, n) {
					return false
				}
			}
			return true
		})
		_, changed := c.nodes[1].Snapshot()
		c.nodes[2].Publish(endpoints(9))
		d := c.await(time.Second, "a publish", func() bool { return c.allHave(2, 9) })
		t.Logf("a publish is on 5 nodes after %v", d)
		select {
		case <-changed:
		default:
			t.Error("the change channel is still open")
		}

		c.crash(5)
		d = c.await(6*time.Second, "the dead node's entries to vanish", func() bool { return c.allHave(5, 0) && c.allSee(4) })
		t.Logf("a dead node of 5 is out of sight after %v", d)
		c.start(5).Publish(endpoints(1))
		d = c.await(5*time.Second, "the new life to replace the old", func() bool { return c.allHave(5, 1) && c.allSee(5) })
		t.Logf("a restarted node is back after %v", d)

		c.crash(4)
		c.start(4).Publish(endpoints(2)) // before anybody noticed
		c.await(5*time.Second, "a quick restart", func() bool { return c.allHave(4, 2) && c.allSee(5) })

		c.await(5*time.Second, "the restarted node to catch up", func() bool { return c.allHave(2, 9) })
		stopped := c.nodes[2]
		delete(c.nodes, 2)
		stopped.stop()
		if err := <-stopped.done; err != nil {
			t.Error(err)
		}
		time.Sleep(probeInterval)
		if !c.allHave(2, 9) || !c.allSee(5) {
			t.Errorf("a daemon that stopped took its endpoints with it: %s", c.describe())
		}
		c.start(2).Publish(endpoints(4))
		c.await(5*time.Second, "the stopped node to return", func() bool { return c.allHave(2, 4) && c.allSee(5) })

		left := c.nodes[3]
		delete(c.nodes, 3)
		left.Leave()
		left.stop()
		d = c.await(2*time.Second, "the leaver's entries to vanish", func() bool { return c.allHave(3, 0) && c.allSee(4) })
		t.Logf("a leaver is out of sight after %v", d)
		if err := <-left.done; err != nil {
			t.Error(err)
		}
		c.start(3).Publish(endpoints(3))
		c.await(5*time.Second, "the leaver to return", func() bool { return c.allHave(3, 3) && c.allSee(5) })
	})
}

func TestPartitionHeals(t *testing.T) {
	for _, length := range []time.Duration{5 * time.Second, 30 * time.Second, 60 * time.Second} {
		t.Run(length.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t, 5)
				defer c.close()
				for n, r := range c.nodes {
					r.Publish(endpoints(n))
				}
				left := map[string]bool{testAddr(1).String(): true, testAddr(2).String(): true}
				c.f.setCut(func(from, to string) bool { return left[from] != left[to] })
				time.Sleep(length)
				if n := count(c.nodes[1].Gossip, 4); n != 0 {
					t.Errorf("node 1 sees %d endpoints across the partition", n)
				}
				c.nodes[1].Publish(endpoints(8)) // news of both sides must cross
				c.nodes[5].Publish(endpoints(9))
				time.Sleep(time.Second)
				c.f.setCut(nil)
				d := c.await(healLimit, "the partition to heal", func() bool {
					return c.allSee(5) && c.allHave(1, 8) && c.allHave(5, 9) && c.allHave(2, 2) && c.allHave(4, 4)
				})
				t.Logf("healed after %v", d)
			})
		})
	}
}

// healLimit is how soon all is whole after a partition, as is asked of it.
const healLimit = 3 * time.Second

func TestLossAndBigTables(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 5)
		defer c.close()
		c.f.mu.Lock()
		c.f.loss = 0.1
		c.f.mu.Unlock()
		var worst time.Duration
		for i := range 40 {
			n, size := 1+i%5, 1+(i*7)%20
			c.nodes[n].Publish(endpoints(size))
			worst = max(worst, c.await(20*time.Second, "a small table", func() bool { return c.allHave(n, size) }))
		}
		t.Logf("40 small tables at 10 %% loss: slowest on 5 nodes after %v", worst)
		c.nodes[1].Publish(endpoints(5000))
		d := c.await(20*time.Second, "a big table", func() bool { return c.allHave(1, 5000) })
		t.Logf("a table of 5,000 is on 5 nodes after %v", d)
		if c.nodes[1].Stats().FramesStreamed == 0 {
			t.Error("a table above the datagram size was not streamed")
		}
		if !c.allSee(5) {
			t.Errorf("false alarm: %s", c.describe())
		}
	})
}

func TestForeignKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 2)
		defer c.close()
		var log logLines
		g, err := New(Config{
			Node: nodeID(9), Advertise: testAddr(9), VTEP: testVTEP(9), Keys: ringOf(9),
			Log: slog.New(slog.NewTextHandler(&log, nil)), Transport: c.f.port(testAddr(9)), Identity: c.ca.of(nodeID(9)),
			Seeds: func() []netip.AddrPort { return []netip.AddrPort{testAddr(1)} },
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		time.Sleep(10 * time.Second)
		if m, _ := g.Members(); len(m) != 1 || !c.allSee(2) {
			t.Errorf("a node with another key is a member: %s", c.describe())
		}
		// The reason is told, and not with every attempt.
		if n := log.count("another gossip key"); n != 1 {
			t.Errorf("it is told %d times in ten seconds that the key is another one, want once", n)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
