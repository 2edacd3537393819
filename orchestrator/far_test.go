package orchestrator

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft"
)

// lateTransport is raft's in-memory one with messages that take time. Those of one
// pipeline arrive in order, as on one connection; its closing is not held up.
type lateTransport struct {
	*raft.InmemTransport
	way func() time.Duration
}

func (l *lateTransport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	time.Sleep(l.way())
	err := l.InmemTransport.AppendEntries(id, target, args, resp)
	time.Sleep(l.way())
	return err
}

func (l *lateTransport) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	time.Sleep(l.way())
	err := l.InmemTransport.RequestVote(id, target, args, resp)
	time.Sleep(l.way())
	return err
}

func (l *lateTransport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	time.Sleep(l.way())
	err := l.InmemTransport.RequestPreVote(id, target, args, resp)
	time.Sleep(l.way())
	return err
}

func (l *lateTransport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	p := &latePipeline{
		l: l, id: id, target: target, sent: make(chan *lateAppend, 128), answered: make(chan *lateAppend, 128),
		done: make(chan raft.AppendFuture, 128), closed: make(chan struct{}),
	}
	p.wg.Go(p.deliver)
	p.wg.Go(p.answer)
	return p, nil
}

type latePipeline struct {
	l              *lateTransport
	id             raft.ServerID
	target         raft.ServerAddress
	sent, answered chan *lateAppend // in order; never closed
	done           chan raft.AppendFuture
	closed         chan struct{}
	once           sync.Once
	wg             sync.WaitGroup
}

// lateAppend is one request of a pipeline.
type lateAppend struct {
	args  *raft.AppendEntriesRequest
	resp  *raft.AppendEntriesResponse
	start time.Time
	due   time.Time // where it is under way to
	err   error     // written before ready is closed
	ready chan struct{}
}

func (a *lateAppend) Error() error                          { <-a.ready; return a.err }
func (a *lateAppend) Start() time.Time                      { return a.start }
func (a *lateAppend) Request() *raft.AppendEntriesRequest   { return a.args }
func (a *lateAppend) Response() *raft.AppendEntriesResponse { return a.resp }

func (p *latePipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	now := time.Now()
	a := &lateAppend{args: args, resp: resp, start: now, due: now.Add(p.l.way()), ready: make(chan struct{})}
	select {
	case p.sent <- a:
		return a, nil
	case <-p.closed:
		return nil, raft.ErrPipelineShutdown
	}
}

func (p *latePipeline) Consumer() <-chan raft.AppendFuture { return p.done }

func (p *latePipeline) Close() error {
	p.once.Do(func() { close(p.closed) })
	p.wg.Wait()
	return nil
}

// deliver takes requests to the follower.
func (p *latePipeline) deliver() {
	for {
		select {
		case <-p.closed:
			return
		case a := <-p.sent:
			time.Sleep(time.Until(a.due))
			a.err = p.l.InmemTransport.AppendEntries(p.id, p.target, a.args, a.resp)
			a.due = time.Now().Add(p.l.way())
			select {
			case p.answered <- a:
			case <-p.closed:
				return
			}
		}
	}
}

// answer takes answers back.
func (p *latePipeline) answer() {
	for {
		select {
		case <-p.closed:
			return
		case a := <-p.answered:
			time.Sleep(time.Until(a.due))
			close(a.ready)
			select {
			case p.done <- a:
			case <-p.closed:
				return
			}
		}
	}
}

// lossyWay is a way of 100 ms of a connection that loses 5 %: what is lost is sent again after
// 0.4 s (two round trips, as TCP waits), then twice as much later.
func lossyWay() time.Duration {
	d := 100 * time.Millisecond
	for wait := 400 * time.Millisecond; rand.Float64() < 0.05; wait *= 2 {
		d += wait
	}
	return d
}

// TestPatience: near managers wait as long as they are told to, far ones longer, and none
// for ever.
func TestPatience(t *testing.T) {
	for round, want := range map[time.Duration]time.Duration{
		0: 500 * time.Millisecond, 90 * time.Millisecond: 500 * time.Millisecond, 200 * time.Millisecond: time.Second, 5 * time.Second: maxHeartbeat,
	} {
		if got := patience(500*time.Millisecond, round); got != want {
			t.Errorf("round trips of %v: %v, want %v", round, got, want)
		}
	}
}

// TestLeash: what is wanted is had at once, and never less than a fifth below it; of a
// lossy link's noise, a new distance each second, few changes come; managers that are
// near again are waited for as shortly as at first.
func TestLeash(t *testing.T) {
	const base = 500 * time.Millisecond
	l, now, changes := leash{is: base}, time.Now(), 0
	follow := func(want time.Duration) {
		if now = now.Add(distanceEvery); l.follow(want, now) {
			changes++
		}
		if l.is < want-want/5 {
			t.Fatalf("%v where %v is wanted", l.is, want)
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 600 {
		follow(1200*time.Millisecond + time.Duration(rnd.IntN(1000))*time.Millisecond)
	}
	if changes > 10 {
		t.Errorf("%d changes in ten minutes of one distance with noise, want few", changes)
	}
	for range 2 * int(nearerFor/distanceEvery) {
		follow(base)
	}
	if l.is != base {
		t.Errorf("near again for two minutes: %v, want %v", l.is, base)
	}
}

// TestFarManagers: three managers with such ways between them keep their leader for ten
// minutes; no node is taken for down and no task moves. With timeouts that do not follow the
// distance they lost it 31 to 50 times, and there was none for a tenth of the time.
func TestFarManagers(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		var far atomic.Bool // once the cluster is whole
		r.way = func() time.Duration {
			if !far.Load() {
				return 0
			}
			return lossyWay()
		}
		r.boot(3)
		var workers []*agent
		for i := 1; i <= 5; i++ {
			w := r.worker(i)
			defer w.crash()
			workers = append(workers, w)
		}
		svc, err := r.leader().CreateService(r.ctx, webSpec("web", 5))
		r.must(err)
		before := map[weft.ID]weft.ID{}
		for _, k := range r.waitRunning(svc.ID, 5, workers...) {
			before[k.ID] = k.Node
		}
		far.Store(true)
		const look, length = 100 * time.Millisecond, 10 * time.Minute
		lost, without, led := 0, time.Duration(0), true
		for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(look) {
			leads := slices.IndexFunc(r.managers, func(m *member) bool { _, err := m.leading(); return err == nil })
			if leads < 0 {
				without += look
				if led {
					lost++
				}
			}
			if led = leads >= 0; !led {
				continue
			}
			term, err := r.managers[leads].leading()
			if err != nil {
				continue
			}
			for _, n := range term.store.View().Nodes() {
				isWorker := slices.ContainsFunc(workers, func(w *agent) bool { return w.id == n.ID }) // managers have no agent here
				if isWorker && n.Status.State != weft.NodeReady {
					t.Fatalf("node %s is %s: %s", n.Description.Hostname, n.Status.State, n.Status.Message)
				}
			}
		}
		after := map[weft.ID]weft.ID{}
		for _, k := range r.waitRunning(svc.ID, 5, workers...) {
			after[k.ID] = k.Node
		}
		if !maps.Equal(before, after) {
			t.Errorf("tasks were %v, are %v", before, after)
		}
		t.Logf("3 managers 100 ms apart at 5 %% loss: the leader was lost %d times in %v, and there was none for %v", lost, length, without)
		if lost > 5 {
			t.Error("want at most 5: they have to measure first")
		}
	})
}
