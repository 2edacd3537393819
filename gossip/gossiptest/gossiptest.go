// Package gossiptest runs the endpoint table of many nodes in virtual time: no
// processor time is counted, and a run with the same seed is the same run. Tests of
// package gossip and benchmarks use it, each Sim from one goroutine.
package gossiptest

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
)

// Latency of a Sim's links, one way.
const Latency = 250 * time.Microsecond

// tick is the time between two calls of Replica.Tick.
const tick = time.Second

// Sim drives replicas over links of Latency that lose datagrams. Streams take
// twice the time, as a round trip goes before, and arrive.
type Sim struct {
	Now   time.Time
	Rand  *rand.Rand
	Nodes []*gossip.Replica
	IDs   []weft.ID // of the nodes
	// Loss is the share of datagrams that do not arrive.
	Loss float64
	// Datagrams and Streams are the bytes that each node has sent, without
	// headers of UDP, TCP and IP.
	Datagrams, Streams []int
	// Stored is told of each node whose view of the table has changed; nil: nobody.
	Stored func(node int)

	places map[weft.ID]int
	events events
	armed  []time.Time // when a wake-up of that node is under way
	seq    int
	err    error // the first thing that must not happen
}

type event struct {
	at  time.Time
	seq int
	do  func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

// New returns n nodes that know each other to be alive and have published
// nothing.
func New(n int, seed uint64) *Sim {
	s := &Sim{
		Now: time.Unix(1e9, 0), Rand: rand.New(rand.NewPCG(seed, 1)), places: map[weft.ID]int{},
		Datagrams: make([]int, n), Streams: make([]int, n), armed: make([]time.Time, n),
	}
	for i := range n {
		id := ID("node", i)
		s.IDs = append(s.IDs, id)
		s.places[id] = i
		s.Nodes = append(s.Nodes, gossip.NewReplica(id, 1, uint64(i), Sworn(id), rand.New(rand.NewPCG(seed, uint64(i)))))
	}
	for i, c := range s.Nodes {
		c.SetLive(s.Now, s.IDs)
		s.after(time.Duration(s.Rand.Int64N(int64(tick))), func() { s.tick(i) })
	}
	return s
}

// Formed is a Sim whose nodes take part in Network and know it of each other.
func Formed(n int, seed uint64) (*Sim, error) {
	s := New(n, seed)
	for i := range s.Nodes {
		s.Publish(i, nil)
	}
	if err := s.Run(5 * time.Second); err != nil {
		return nil, err
	}
	for i, c := range s.Nodes {
		if got := c.Owners(Network()); got != n {
			return nil, fmt.Errorf("node %d knows %d of %d tables after 5 s", i, got, n)
		}
	}
	return s, nil
}

// Publish replaces the endpoints of node i, which takes part in Network, too.
func (s *Sim) Publish(i int, endpoints []weft.Endpoint) {
	s.Nodes[i].Attach(s.Now, []weft.ID{Network()})
	if unfit := s.Nodes[i].Publish(s.Now, endpoints); len(unfit) > 0 {
		s.fail(fmt.Errorf("endpoints cannot be told: %v", unfit))
	}
	s.collect(i)
}

// Spread publishes endpoints of node i on Network, another number than before, and
// returns how long they take to be known on all.
func (s *Sim) Spread(i int, endpoints []weft.Endpoint) (time.Duration, error) {
	left := len(s.Nodes) - 1
	has := make([]bool, len(s.Nodes))
	s.Stored = func(to int) {
		if !has[to] && to != i && s.Nodes[to].Count(Network(), s.IDs[i]) == len(endpoints) {
			has[to] = true
			left--
		}
	}
	defer func() { s.Stored = nil }()
	s.Publish(i, endpoints)
	return s.Await(20*time.Second, func() bool { return left == 0 })
}

// Burst publishes each endpoints of every node at once and returns how long all
// take to be known on all.
func (s *Sim) Burst(each int) (time.Duration, error) {
	for i := range s.Nodes {
		s.Publish(i, Endpoints(i*each, each))
	}
	node, owner := 0, 0 // all pairs before these are known: a node does not forget
	return s.Await(20*time.Second, func() bool {
		for ; node < len(s.Nodes); node, owner = node+1, 0 {
			for ; owner < len(s.IDs); owner++ {
				if s.Nodes[node].Count(Network(), s.IDs[owner]) != each {
					return false
				}
			}
		}
		return true
	})
}

// Form publishes an endpoint of every node of a new Sim at once and returns how
// long all take to be known on all.
func (s *Sim) Form() (time.Duration, error) { return s.Burst(1) }

// AtRest lets time go by in which nobody publishes, and returns the bytes a second
// that a node sends.
func (s *Sim) AtRest(d time.Duration) (float64, error) {
	clear(s.Datagrams)
	clear(s.Streams)
	if err := s.Run(d); err != nil {
		return 0, err
	}
	sum := 0
	for i := range s.Nodes {
		sum += s.Datagrams[i] + s.Streams[i]
	}
	return float64(sum) / float64(len(s.Nodes)) / d.Seconds(), nil
}

// Run lets time go by. It returns the first error of the run.
func (s *Sim) Run(d time.Duration) error {
	end := s.Now.Add(d)
	for s.err == nil && len(s.events) > 0 && !s.events[0].at.After(end) {
		s.step()
	}
	s.Now = end
	return s.err
}

// Await lets time go by until ok holds and returns how long that took.
func (s *Sim) Await(limit time.Duration, ok func() bool) (time.Duration, error) {
	begin := s.Now
	for s.err == nil && !ok() {
		if len(s.events) == 0 || s.events[0].at.Sub(begin) > limit {
			return limit, fmt.Errorf("waited %v in vain", limit)
		}
		s.step()
	}
	return s.Now.Sub(begin), s.err
}

func (s *Sim) step() {
	e := heap.Pop(&s.events).(event)
	s.Now = e.at
	e.do()
}

func (s *Sim) fail(err error) {
	if s.err == nil {
		s.err = err
	}
}

func (s *Sim) after(d time.Duration, do func()) {
	s.seq++
	heap.Push(&s.events, event{s.Now.Add(d), s.seq, do})
}

func (s *Sim) tick(i int) {
	s.Nodes[i].Tick(s.Now)
	s.collect(i)
	s.after(tick, func() { s.tick(i) })
}

// collect sends what a node has to say and arms its timer.
func (s *Sim) collect(i int) {
	c := s.Nodes[i]
	for _, p := range c.Take() {
		for _, id := range p.To {
			s.send(i, id, p)
		}
	}
	if at := c.Deadline(); !at.IsZero() && (s.armed[i].IsZero() || at.Before(s.armed[i])) {
		s.armed[i] = at
		s.after(max(0, at.Sub(s.Now)), func() {
			if s.armed[i].Equal(at) {
				s.armed[i] = time.Time{}
			}
			c.Advance(s.Now)
			s.collect(i)
		})
	}
}

func (s *Sim) send(from int, id weft.ID, p gossip.Parcel) {
	to, ok := s.places[id]
	switch {
	case !ok:
		s.fail(fmt.Errorf("message to nobody: %s", id))
	case p.Stream:
		s.Streams[from] += p.Wire
		s.after(2*Latency, func() { s.arrive(from, to, p) })
	default:
		s.Datagrams[from] += p.Wire
		if s.Rand.Float64() >= s.Loss {
			s.after(Latency, func() { s.arrive(from, to, p) })
		}
	}
}

func (s *Sim) arrive(from, to int, p gossip.Parcel) {
	changed, err := s.Nodes[to].Receive(s.Now, s.IDs[from], p.Message, p.Stream)
	if err != nil {
		s.fail(err)
		return
	}
	if changed && s.Stored != nil {
		s.Stored(to)
	}
	s.collect(to)
}
