package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft"
)

// Address plan: sockets on 127.0.0.1 with ports of the kernel's choice; the
// nameservers of the resolver file are 198.51.100.1 and .2, which Dial leads to
// the stubs.
var (
	ns1 = netip.MustParseAddrPort("198.51.100.1:53")
	ns2 = netip.MustParseAddrPort("198.51.100.2:53")
)

// stub is a nameserver. Its handler returns nil to say nothing.
type stub struct {
	asked atomic.Int64
	udp   net.PacketConn
	tcp   net.Listener
}

func newStub(t *testing.T, handle func(q *miekg.Msg, network string) *miekg.Msg) *stub {
	t.Helper()
	s := &stub{}
	var err error
	if s.udp, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	if s.tcp, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	serve := func(network string) miekg.HandlerFunc {
		return func(w miekg.ResponseWriter, q *miekg.Msg) {
			s.asked.Add(1)
			if m := handle(q, network); m != nil {
				w.WriteMsg(m)
			}
		}
	}
	for _, srv := range []*miekg.Server{{PacketConn: s.udp, Handler: serve("udp")}, {Listener: s.tcp, Handler: serve("tcp")}} {
		done := make(chan struct{})
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		go func() { defer close(done); srv.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { srv.Shutdown(); <-done })
	}
	return s
}

// good answers every A question with 192.0.2.7 and a TTL of 60 s.
func good(q *miekg.Msg, _ string) *miekg.Msg {
	m := new(miekg.Msg)
	m.SetReply(q)
	m.Answer = []miekg.RR{&miekg.A{Hdr: header(q.Question[0].Name, miekg.TypeA, 60), A: net.IPv4(192, 0, 2, 7)}}
	return m
}

func silent(*miekg.Msg, string) *miekg.Msg { return nil }

// rig is a served task.
type rig struct {
	t    *testing.T
	s    *Server
	conf string
	udp  string
	tcp  string
	stop func()
}

func newRig(t *testing.T, cfg Config, stubs map[netip.AddrPort]*stub) *rig {
	t.Helper()
	r := &rig{t: t, conf: filepath.Join(t.TempDir(), "resolv.conf")}
	r.write("search example.org\nnameserver 127.0.0.11\nnameserver 198.51.100.1\nnameserver 198.51.100.2\noptions ndots:1\n")
	cfg.ResolvConf = r.conf
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.TryTimeout == 0 {
		cfg.TryTimeout = 100 * time.Millisecond
	}
	cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		s := stubs[netip.MustParseAddrPort(address)]
		if s == nil {
			return nil, fmt.Errorf("no route to %s", address)
		}
		to := s.udp.LocalAddr().String()
		if network == "tcp" {
			to = s.tcp.Addr().String()
		}
		return (&net.Dialer{}).DialContext(ctx, network, to)
	}
	var err error
	if r.s, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	r.s.Update(testRecords())
	r.serve(View{Networks: []weft.ID{blue}})
	return r
}

func (r *rig) write(conf string) {
	r.t.Helper()
	if err := os.WriteFile(r.conf, []byte(conf), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) serve(v View) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		r.t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.t.Fatal(err)
	}
	r.udp, r.tcp = pc.LocalAddr().String(), ln.Addr().String()
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan error, 1)
	go func() { done <- r.s.Serve(ctx, v, pc, ln) }()
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				r.t.Errorf("serve: %v", err)
			}
		})
	}
	r.t.Cleanup(r.stop)
}

func (r *rig) ask(network, name string, change ...func(*miekg.Msg)) *miekg.Msg {
	r.t.Helper()
	m := new(miekg.Msg)
	m.SetQuestion(name, miekg.TypeA)
	for _, c := range change {
		c(m)
	}
	addr := r.udp
	if network == "tcp" {
		addr = r.tcp
	}
	c := &miekg.Client{Net: network, Timeout: 10 * time.Second}
	resp, _, err := c.Exchange(m, addr)
	if err != nil {
		r.t.Fatalf("%s %s: %v", network, name, err)
	}
	return resp
}

func (r *rig) want(network, name, want string) {
	r.t.Helper()
	if got := show(r.ask(network, name), false); got != want {
		r.t.Errorf("%s %s = %q, want %q", network, name, got, want)
	}
}

func TestServe(t *testing.T) {
	up := newStub(t, good)
	r := newRig(t, Config{}, map[netip.AddrPort]*stub{ns1: up})
	for _, network := range []string{"udp", "tcp"} {
		r.want(network, "web.", "NOERROR 10.1.0.2")
		r.want(network, "nope.", "NXDOMAIN")
		r.want(network, "ExAmple.com.", "NOERROR 192.0.2.7")
	}
	if n := up.asked.Load(); n != 1 {
		t.Errorf("upstream was asked %d times, want once: the second is in the cache, the others are ours", n)
	}
	if s := r.s.Stats(); s.CacheHits != 1 || s.Forwarded != 2 || s.Local != 4 {
		t.Errorf("stats %+v", s)
	}
	r.s.Update(Records{})
	r.want("udp", "web.", "NXDOMAIN")
}

func TestUpstreams(t *testing.T) {
	code := func(rcode int) func(*miekg.Msg, string) *miekg.Msg {
		return func(q *miekg.Msg, _ string) *miekg.Msg {
			m := new(miekg.Msg)
			return m.SetRcode(q, rcode)
		}
	}
	wrongID := func(q *miekg.Msg, n string) *miekg.Msg { m := good(q, n); m.Id++; return m }
	wrongName := func(q *miekg.Msg, n string) *miekg.Msg {
		m := good(q, n)
		m.Question[0].Name = "evil.example."
		return m
	}
	cut := func(q *miekg.Msg, n string) *miekg.Msg {
		m := good(q, n)
		if n == "udp" {
			m.Answer, m.Truncated = nil, true
		}
		return m
	}
	cases := []struct {
		name          string
		first, second func(*miekg.Msg, string) *miekg.Msg
		want          string
	}{
		{"first answers", good, silent, "NOERROR 192.0.2.7"},
		{"first is dead", silent, good, "NOERROR 192.0.2.7"},
		{"first fails", code(miekg.RcodeServerFailure), good, "NOERROR 192.0.2.7"},
		{"first refuses", code(miekg.RcodeRefused), good, "NOERROR 192.0.2.7"},
		{"NXDOMAIN is an answer", code(miekg.RcodeNameError), good, "NXDOMAIN"},
		{"both dead", silent, silent, "SERVFAIL"},
		{"dead and refusing", silent, code(miekg.RcodeRefused), "REFUSED"},
		{"forged id", wrongID, silent, "SERVFAIL"},
		{"forged name", wrongName, silent, "SERVFAIL"},
		{"cut off on UDP, whole on TCP", cut, silent, "NOERROR 192.0.2.7"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, Config{}, map[netip.AddrPort]*stub{ns1: newStub(t, c.first), ns2: newStub(t, c.second)})
			r.want("udp", "example.com.", c.want)
			r.want("udp", "web.", "NOERROR 10.1.0.2") // whatever becomes of external names
		})
	}
}

func TestDeadUpstreamIsAskedLast(t *testing.T) {
	dead, alive := newStub(t, silent), newStub(t, good)
	r := newRig(t, Config{}, map[netip.AddrPort]*stub{ns1: dead, ns2: alive})
	for i := range 5 {
		r.want("udp", fmt.Sprintf("n%d.example.com.", i), "NOERROR 192.0.2.7")
	}
	if n := dead.asked.Load(); n != 1 {
		t.Errorf("the dead upstream was asked %d times, want once", n)
	}
}

func TestSharedQuestions(t *testing.T) {
	gate, asked := make(chan struct{}), make(chan struct{}, 8)
	up := newStub(t, func(q *miekg.Msg, n string) *miekg.Msg {
		asked <- struct{}{}
		<-gate
		return good(q, n)
	})
	r := newRig(t, Config{MaxForwards: 1, TryTimeout: 5 * time.Second}, map[netip.AddrPort]*stub{ns1: up})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() { r.want("udp", "example.com.", "NOERROR 192.0.2.7") })
	}
	<-asked
	r.want("udp", "other.example.com.", "SERVFAIL") // the only slot is taken
	r.want("udp", "web.", "NOERROR 10.1.0.2")
	close(gate)
	wg.Wait()
	if n := up.asked.Load(); n != 1 {
		t.Errorf("upstream was asked %d times by 8 at once, want once", n)
	}
}

func TestResolvConf(t *testing.T) {
	in := "# nameserver 1.1.1.1\nnameserver 127.0.0.11\n nameserver  ::1\nnameserver\nnameserver bad\nnameserver 10.0.0.1 x\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\nnameserver 10.0.0.4\n"
	list, _, err := parseResolvConf(strings.NewReader(in), []netip.Addr{netip.MustParseAddr("127.0.0.11")})
	var got []netip.AddrPort
	for _, u := range list {
		got = append(got, u.addr)
	}
	if want := "[[::1]:53 10.0.0.1:53 [fe80::1%eth0]:53]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("%v, %v, want %s", got, err, want)
	}
	r := newRig(t, Config{}, map[netip.AddrPort]*stub{ns1: newStub(t, good)})
	r.write("nameserver 127.0.0.11\n")
	r.want("udp", "example.com.", "SERVFAIL")
	r.write("nameserver 198.51.100.1\nnameserver fe80::1%eth0\n")
	if got, err := Nameservers(r.conf); err != nil || fmt.Sprint(got) != "[198.51.100.1 fe80::1%eth0]" {
		t.Errorf("nameservers %v, %v", got, err)
	}
	if got, err := Nameservers(r.conf + ".none"); err != nil || got != nil {
		t.Errorf("nameservers of no file: %v, %v", got, err)
	}
	r.write("nameserver 127.0.0.11\n")
	u := &r.s.fwd.up
	_, before, err := u.current(time.Now().Add(2*resolvCheck), nameservers{})
	if err == nil {
		t.Error("a file without nameservers gives some")
	}
	r.write("nameserver 198.51.100.1\n# changed\n")
	list, after, err := u.current(time.Now().Add(4*resolvCheck), nameservers{})
	if err != nil || len(list) != 1 || list[0].addr != ns1 || after == before {
		t.Errorf("after the change: %v, generation %d to %d, %v", list, before, after, err)
	}
	if err := os.Remove(r.conf); err != nil {
		t.Fatal(err)
	}
	if list, _, err := u.current(time.Now().Add(6*resolvCheck), nameservers{}); err != nil || len(list) != 1 {
		t.Errorf("a missing file forgets the nameservers: %v, %v", list, err)
	}
}

func TestTruncation(t *testing.T) {
	r := newRig(t, Config{}, nil)
	big := Service{Name: "big"}
	for i := range 200 {
		big.Tasks = append(big.Tasks, Task{Slot: uint64(i + 1), Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 1, byte(i)})}, Ready: true})
	}
	r.s.Update(Records{Networks: map[weft.ID]Network{blue: {Name: "blue", Services: []Service{big}}}})
	edns := func(size uint16) func(*miekg.Msg) { return func(m *miekg.Msg) { m.SetEdns0(size, false) } }
	for _, c := range []struct {
		network string
		size    uint16
		least   int
		cut     bool
	}{{"udp", 0, 25, true}, {"udp", 100, 25, true}, {"udp", 1232, 60, true}, {"udp", 4096, 200, false}, {"tcp", 0, 200, false}} {
		var change []func(*miekg.Msg)
		if c.size > 0 {
			change = append(change, edns(c.size))
		}
		m := r.ask(c.network, "tasks.big.", change...)
		if len(m.Answer) < c.least || m.Truncated != c.cut {
			t.Errorf("%s %d: %d answers, cut %v, want at least %d, cut %v", c.network, c.size, len(m.Answer), m.Truncated, c.least, c.cut)
		}
	}
}

func TestPipelining(t *testing.T) {
	gate := make(chan struct{})
	up := newStub(t, func(q *miekg.Msg, n string) *miekg.Msg { <-gate; return good(q, n) })
	r := newRig(t, Config{TryTimeout: 5 * time.Second}, map[netip.AddrPort]*stub{ns1: up})
	raw, err := net.Dial("tcp", r.tcp)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	conn := &miekg.Conn{Conn: raw}
	for i, name := range []string{"example.com.", "web."} {
		m := new(miekg.Msg)
		m.SetQuestion(name, miekg.TypeA)
		m.Id = uint16(i + 1)
		if err := conn.WriteMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	if m, err := conn.ReadMsg(); err != nil || m.Id != 2 {
		t.Fatalf("the quick answer does not overtake the slow: %v, %v", m, err)
	}
	close(gate)
	if m, err := conn.ReadMsg(); err != nil || m.Id != 1 || show(m, false) != "NOERROR 192.0.2.7" {
		t.Fatalf("slow answer: %v, %v", m, err)
	}
}

// TestForwardLimitOnTCP: a task's limit of external questions holds over all of its
// connections and UDP.
func TestForwardLimitOnTCP(t *testing.T) {
	gate, asked := make(chan struct{}), make(chan struct{}, 2*maxTaskForwards)
	up := newStub(t, func(q *miekg.Msg, n string) *miekg.Msg {
		asked <- struct{}{}
		<-gate
		return good(q, n)
	})
	r := newRig(t, Config{TryTimeout: time.Minute, Timeout: time.Minute}, map[netip.AddrPort]*stub{ns1: up})
	open := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(open) // before the stub's, which waits
	write := func(c *miekg.Conn, id uint16) {
		m := new(miekg.Msg).SetQuestion(fmt.Sprintf("n%d.example.com.", id), miekg.TypeA)
		m.Id = id
		if err := c.WriteMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	var conns []*miekg.Conn
	for len(conns) < maxTaskForwards/maxPipelined+1 {
		c, err := net.Dial("tcp", r.tcp)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		conns = append(conns, &miekg.Conn{Conn: c})
	}
	last := conns[len(conns)-1]
	for i := range maxTaskForwards {
		write(conns[i/maxPipelined], uint16(i))
		<-asked
	}
	for i := range 2 * maxPipelined { // the connection's own limit is not reached
		write(last, uint16(maxTaskForwards+i))
		if m, err := last.ReadMsg(); err != nil || m.Rcode != miekg.RcodeServerFailure {
			t.Fatalf("question %d over the limit: %v, %v, want SERVFAIL", i, m, err)
		}
	}
	r.want("udp", "over.example.com.", "SERVFAIL")
	r.want("tcp", "web.", "NOERROR 10.1.0.2")
	if n := r.s.Stats().Refused; n != 2*maxPipelined+1 {
		t.Errorf("%d questions are counted as refused, want %d", n, 2*maxPipelined+1)
	}
	open()
	for i := range maxTaskForwards {
		if m, err := conns[i/maxPipelined].ReadMsg(); err != nil || show(m, false) != "NOERROR 192.0.2.7" {
			t.Fatalf("question %d: %v, %v", i, m, err)
		}
	}
	r.want("tcp", "after.example.com.", "NOERROR 192.0.2.7")
}

func TestConnectionLimit(t *testing.T) {
	r := newRig(t, Config{}, nil)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	open := func() net.Conn {
		c, err := net.Dial("tcp", r.tcp)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		return c
	}
	for range maxTCPConns {
		c := &miekg.Conn{Conn: open()}
		m := new(miekg.Msg)
		m.SetQuestion("web.", miekg.TypeA)
		if err := c.WriteMsg(m); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadMsg(); err != nil { // so it is counted
			t.Fatal(err)
		}
	}
	extra := open()
	extra.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := extra.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("connection over the limit: %v, want it closed", err)
	}
	r.want("udp", "web.", "NOERROR 10.1.0.2")
}

// badListener fails as often as it is told to; below 0 = always.
type badListener struct {
	net.Listener
	fails int
	err   error
	tried chan struct{}
}

func (l *badListener) Accept() (net.Conn, error) {
	if l.fails != 0 {
		l.fails--
		select {
		case l.tried <- struct{}{}:
		default:
		}
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", l.err)}
	}
	return l.Listener.Accept()
}

// TestFailedAccept: without descriptors for connections UDP goes on, and so do they when
// there are some again.
func TestFailedAccept(t *testing.T) {
	r := newRig(t, Config{}, nil)
	serve := func(l *badListener) (done chan error, stop func()) {
		pc, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if l.Listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		r.udp, r.tcp = pc.LocalAddr().String(), l.Addr().String()
		ctx, stop := context.WithCancel(t.Context())
		t.Cleanup(stop)
		done = make(chan error, 1)
		go func() { done <- r.s.Serve(ctx, View{Networks: []weft.ID{blue}}, pc, l) }()
		return done, stop
	}
	for _, c := range []struct {
		fails int
		err   error
	}{{2, syscall.EMFILE}, {1, syscall.ENOBUFS}, {-1, syscall.ENFILE}} {
		l := &badListener{fails: c.fails, err: c.err, tried: make(chan struct{}, 1)}
		done, stop := serve(l)
		<-l.tried
		r.want("udp", "web.", "NOERROR 10.1.0.2")
		if c.fails > 0 {
			r.want("tcp", "web.", "NOERROR 10.1.0.2")
		}
		stop()
		if err := <-done; err != nil {
			t.Errorf("%v: serve: %v", c.err, err)
		}
	}
	// A listener that is none any more is the caller's to open again.
	done, _ := serve(&badListener{fails: -1, err: syscall.EINVAL})
	if err := <-done; !errors.Is(err, syscall.EINVAL) {
		t.Errorf("serve with a broken listener: %v", err)
	}
}

func TestMalformedIsDropped(t *testing.T) {
	r := newRig(t, Config{}, nil)
	c, err := net.Dial("udp", r.udp)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	response := new(miekg.Msg)
	response.SetQuestion("web.", miekg.TypeA)
	response.Response = true
	echo, err := response.Pack()
	if err != nil {
		t.Fatal(err)
	}
	bad := [][]byte{{}, {1, 2, 3}, make([]byte, 12), echo, append(make([]byte, 4), 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 0x0c)}
	for _, b := range bad {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	r.want("udp", "web.", "NOERROR 10.1.0.2") // behind them in the same queue
	if n := r.s.Stats().Malformed; n != uint64(len(bad)) {
		t.Errorf("%d malformed counted, want %d", n, len(bad))
	}
	s, err := net.Dial("tcp", r.tcp)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Write(append(binary.BigEndian.AppendUint16(nil, 5), "hello"...))
	s.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("malformed on TCP: %v, want the connection closed", err)
	}
}

func TestEndOfServe(t *testing.T) {
	up := newStub(t, silent)
	r := newRig(t, Config{TryTimeout: time.Minute, Timeout: time.Minute}, map[netip.AddrPort]*stub{ns1: up, ns2: up})
	idle, err := net.Dial("tcp", r.tcp)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	c := &miekg.Client{Timeout: 10 * time.Millisecond}
	m := new(miekg.Msg)
	m.SetQuestion("example.com.", miekg.TypeA)
	c.Exchange(m, r.udp) // leaves a forward under way
	start := time.Now()
	r.stop()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("Serve took %v to end with a forward and a connection open", d)
	}
	// A broken socket is an error, and ends both halves.
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := r.s.Serve(t.Context(), View{}, pc, ln); err == nil {
		t.Error("Serve on a closed listener returns nil")
	}
}
