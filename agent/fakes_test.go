package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/runtime/runtimetest"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/orchestrator/wire"
	"github.com/weftnet/weft/vxlan"
)

// journal is what happened outside of the agent, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if line := fmt.Sprintf(format, args...); len(j.lines) == 0 || j.lines[len(j.lines)-1] != line {
		j.lines = append(j.lines, line)
	}
}

func (j *journal) clear() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = nil
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.lines, "\n")
}

// inOrder checks that lines which contain the words follow one another.
func (j *journal) inOrder(t *testing.T, words ...string) {
	t.Helper()
	rest := strings.Split(j.String(), "\n")
	for _, w := range words {
		i := slices.IndexFunc(rest, func(s string) bool { return strings.Contains(s, w) })
		if i < 0 {
			t.Fatalf("%q is missing, or not in the order %q, in:\n%s", w, words, j)
		}
		rest = rest[i+1:]
	}
}

type loggedRuntime struct {
	*runtimetest.Memory
	journal *journal
	lists   *atomic.Int32
	mute    *muting
}

// muting has List not return: of one that is armed, from the next start on.
type muting struct{ armed, on atomic.Bool }

func (l *loggedRuntime) List(ctx context.Context) ([]runtime.Status, error) {
	l.lists.Add(1)
	if l.mute.on.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return l.Memory.List(ctx)
}

func (l *loggedRuntime) Start(ctx context.Context, task weft.ID) (int, error) {
	l.journal.add("start %s", task.Short()[:2])
	if l.mute.armed.Load() {
		l.mute.on.Store(true)
	}
	return l.Memory.Start(ctx, task)
}

func (l *loggedRuntime) Stop(ctx context.Context, task weft.ID, grace time.Duration) (runtime.Exit, error) {
	l.journal.add("stop %s within %s", task.Short()[:2], grace)
	return l.Memory.Stop(ctx, task, grace)
}

func (l *loggedRuntime) Remove(ctx context.Context, task weft.ID) error {
	l.journal.add("remove %s", task.Short()[:2])
	return l.Memory.Remove(ctx, task)
}

// fakeBoxes is sandbox.Maker as a map.
type fakeBoxes struct {
	journal *journal

	mu      sync.Mutex // guards: all below
	all     map[weft.ID]sandbox.Sandbox
	made    map[weft.ID]sandbox.Spec
	kept    []sandbox.Spec // of the last Keep
	keeps   int
	keepErr error
}

func (b *fakeBoxes) Keep(_ context.Context, specs []sandbox.Spec) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.kept, b.keeps = specs, b.keeps+1
	return b.keepErr
}

func (b *fakeBoxes) Make(ctx context.Context, s sandbox.Spec) (sandbox.Sandbox, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.made == nil {
		b.made = map[weft.ID]sandbox.Spec{}
	}
	b.made[s.Task] = s
	box := sandbox.Sandbox{Task: s.Task, NetNS: "/ns/" + string(s.Task)}
	if s.Gateway {
		box.GatewayAddr = netip.MustParsePrefix("172.31.0.9/16")
	}
	if box.Search, box.IsSearchKnown = s.Search, true; b.all[s.Task].IsSearchKnown {
		box.Search = b.all[s.Task].Search
	}
	b.all[s.Task] = box
	return b.all[s.Task], ctx.Err()
}

func (b *fakeBoxes) Destroy(ctx context.Context, task weft.ID) error {
	b.journal.add("destroy %s", task.Short()[:2])
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.all, task)
	return ctx.Err()
}

func (b *fakeBoxes) List(ctx context.Context) ([]sandbox.Sandbox, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []sandbox.Sandbox
	for _, s := range b.all {
		out = append(out, s)
	}
	return out, ctx.Err()
}

func (b *fakeBoxes) Gateway(context.Context) (string, netip.Prefix, error) {
	return weft.GatewayBridge, netip.MustParsePrefix("172.31.0.0/16"), nil
}

func (b *fakeBoxes) Close(context.Context) error { return nil }

// fakeKernel is vxlan.Kernel as a value. fail holds errors by VNI; under 0, one
// that names no network.
type fakeKernel struct {
	journal *journal

	mu     sync.Mutex
	state  vxlan.State
	fail   map[uint32]error
	hang   chan struct{} // while it is set and open, Apply waits for it
	writes int           // calls of Apply
}

func (k *fakeKernel) setHang(c chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hang = c
}

// brokenNetwork is how an overlay engine says which network failed.
type brokenNetwork struct {
	vni uint32
	err error
}

func (b *brokenNetwork) Error() string         { return fmt.Sprintf("network %d: %v", b.vni, b.err) }
func (b *brokenNetwork) Unwrap() error         { return b.err }
func (b *brokenNetwork) FailedNetwork() uint32 { return b.vni }

func (k *fakeKernel) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.writes
}

func (k *fakeKernel) setFail(vni uint32, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail[vni] = err
}

func (k *fakeKernel) Read(context.Context) (vxlan.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state, nil
}

func (k *fakeKernel) Apply(ctx context.Context, want vxlan.State) error {
	k.mu.Lock()
	hang := k.hang
	k.writes++
	k.mu.Unlock()
	if hang != nil {
		<-hang
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	if k.fail[0] != nil {
		errs = append(errs, k.fail[0])
	}
	var words []string
	for vni, n := range want.Networks {
		if err := k.fail[vni]; err != nil {
			errs = append(errs, fmt.Errorf("apply: %w", &brokenNetwork{vni, err}))
		}
		for _, p := range n.Ports {
			words = append(words, fmt.Sprintf("port:%s", p.Task.Short()[:2]))
		}
		for _, p := range n.Peers {
			words = append(words, fmt.Sprintf("peer:%s", p.Addr))
		}
	}
	k.state = want
	slices.Sort(words)
	k.journal.add("overlay %s", strings.Join(words, " "))
	if len(errs) > 0 {
		return fmt.Errorf("overlay: %w", joined(errs))
	}
	return ctx.Err()
}

type joined []error

func (j joined) Error() string   { return fmt.Sprint([]error(j)) }
func (j joined) Unwrap() []error { return j }

func (k *fakeKernel) networks() []uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Sorted(maps.Keys(k.state.Networks))
}

func (k *fakeKernel) peers() []netip.Addr {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []netip.Addr
	for _, n := range k.state.Networks {
		for _, p := range n.Peers {
			out = append(out, p.Addr)
		}
	}
	return out
}

// fakeBalancer is ingress.Engine as a value.
type fakeBalancer struct {
	journal *journal

	mu    sync.Mutex
	table ingress.Table
	lacks string // why it answers no port of SCTP; "" = it does
}

func (b *fakeBalancer) Unanswered(t ingress.Table) (out []ingress.Unanswered) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range t.Published {
		if p.Protocol == weft.SCTP && b.lacks != "" {
			out = append(out, ingress.Unanswered{Published: p, Addrs: p.IPs, Reason: b.lacks})
		}
	}
	return out
}

func (b *fakeBalancer) Name() string                { return "fake" }
func (b *fakeBalancer) Probe(context.Context) error { return nil }
func (b *fakeBalancer) Close(context.Context) error { return nil }
func (b *fakeBalancer) Stats(context.Context) (ingress.Stats, error) {
	return ingress.Stats{}, nil
}

func (b *fakeBalancer) Apply(ctx context.Context, t ingress.Table) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.table = t
	b.journal.add("balancer %s", strings.Join(b.backendsLocked(), " "))
	return ctx.Err()
}

func (b *fakeBalancer) backendsLocked() []string {
	var words []string
	for _, n := range b.table.Networks {
		for _, s := range n.Services {
			for _, k := range s.Backends {
				w := "take:"
				if k.Draining {
					w = "drain:"
				}
				words = append(words, w+k.Task.Short()[:2])
			}
		}
	}
	return words
}

// fakeLeader keeps what was reported.
type fakeLeader struct {
	sessions chan *fakeSession // never closed; those that were opened

	mu      sync.Mutex
	state   map[weft.ID]weft.TaskStatus
	history []wire.TaskReport
	last    wire.Report
	reports int
	hello   wire.SessionRequest                            // the last
	refuse  error                                          // of OpenSession
	report  func(ctx context.Context, r wire.Report) error // nil: takes it
}

type fakeSession struct {
	ctx  context.Context
	send chan wire.Assignments // never closed
	end  chan error
}

func (l *fakeLeader) OpenSession(ctx context.Context, r wire.SessionRequest) (wire.Session, error) {
	l.mu.Lock()
	err := l.refuse
	l.mu.Unlock()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.hello = r
	l.mu.Unlock()
	s := &fakeSession{ctx: ctx, send: make(chan wire.Assignments, 16), end: make(chan error, 1)}
	l.sessions <- s
	return s, ctx.Err()
}

func (s *fakeSession) Recv() (wire.Assignments, error) {
	select {
	case a := <-s.send:
		return a, nil
	case err := <-s.end:
		return wire.Assignments{}, err
	case <-s.ctx.Done():
		return wire.Assignments{}, s.ctx.Err()
	}
}

func (l *fakeLeader) Report(ctx context.Context, node weft.ID, r wire.Report) error {
	l.mu.Lock()
	f := l.report
	l.mu.Unlock()
	if f != nil {
		if err := f(ctx, r); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reports++
	l.last = r
	for _, t := range r.Tasks {
		l.state[t.Task] = t.Status
		l.history = append(l.history, t)
	}
	return ctx.Err()
}

func (l *fakeLeader) onReport(f func(ctx context.Context, r wire.Report) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.report = f
}

func (l *fakeLeader) status(task weft.ID) weft.TaskStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state[task]
}

// states are the reported states of a task in order.
func (l *fakeLeader) states(task weft.ID) []weft.TaskState {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []weft.TaskState
	for _, h := range l.history {
		if h.Task == task {
			out = append(out, h.Status.State)
		}
	}
	return out
}

// fakeSockets opens sockets on which nobody speaks, but for one datagram at once
// when query is set.
type fakeSockets struct {
	query   []byte
	answers chan []byte // closed by nobody

	mu     sync.Mutex
	open   int
	total  int
	broken error
}

func (f *fakeSockets) listen(ctx context.Context, nsPath string) (net.PacketConn, net.Listener, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken != nil {
		return nil, nil, f.broken
	}
	f.open++
	f.total++
	s := &silent{f: f, closed: make(chan struct{})}
	return packetSide{s}, streamSide{s}, ctx.Err()
}

func (f *fakeSockets) opened() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open
}

func (f *fakeSockets) setBroken(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = err
}

type silent struct {
	f      *fakeSockets
	asked  atomic.Bool
	once   sync.Once
	closed chan struct{}
}

func (s *silent) Close() error {
	s.once.Do(func() {
		close(s.closed)
		s.f.mu.Lock()
		s.f.open--
		s.f.mu.Unlock()
	})
	return nil
}

type packetSide struct{ *silent }

func (p packetSide) ReadFrom(b []byte) (int, net.Addr, error) {
	if p.f.query != nil && !p.asked.Swap(true) {
		return copy(b, p.f.query), &net.UDPAddr{}, nil
	}
	<-p.closed
	return 0, nil, net.ErrClosed
}

func (p packetSide) WriteTo(b []byte, _ net.Addr) (int, error) {
	p.f.answers <- slices.Clone(b)
	return len(b), nil
}

func (p packetSide) LocalAddr() net.Addr              { return &net.UDPAddr{} }
func (p packetSide) SetDeadline(time.Time) error      { return nil }
func (p packetSide) SetReadDeadline(time.Time) error  { return nil }
func (p packetSide) SetWriteDeadline(time.Time) error { return nil }

type streamSide struct{ *silent }

func (s streamSide) Accept() (net.Conn, error) {
	<-s.closed
	return nil, net.ErrClosed
}
func (s streamSide) Addr() net.Addr { return &net.TCPAddr{} }

// fakePaths is told what it knows.
type fakePaths struct {
	link atomic.Int32 // 0 = cannot be read

	mu      sync.Mutex // guards: all below
	watched []netip.Addr
	mtus    map[netip.Addr]int
	changed chan struct{} // closed by set
}

func newFakePaths() *fakePaths { return &fakePaths{changed: make(chan struct{})} }

func (p *fakePaths) MTU() (int, error) {
	if mtu := p.link.Load(); mtu > 0 {
		return int(mtu), nil
	}
	return 0, errors.New("the link of the underlay is gone")
}

func (p *fakePaths) Watch(vteps []netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watched = vteps
}

func (p *fakePaths) MTUs() (map[netip.Addr]int, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mtus, p.changed
}

func (p *fakePaths) set(mtus map[netip.Addr]int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mtus = mtus
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *fakePaths) asked() []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.watched
}

// backends are those of the last table, as the journal writes them.
func (b *fakeBalancer) backends() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.backendsLocked()
}
