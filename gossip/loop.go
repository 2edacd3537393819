package gossip

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"

	"github.com/weftnet/weft"
)

// loop is a running Gossip. Its fields belong to the goroutine of run.
type loop struct {
	g    *Gossip
	serf *serf.Serf
	mux  *mux
	ring weft.GossipRing // that seal and open follow
	seal *sealer
	open *opener
	// members has room for one: look at serf's members again.
	members chan struct{}
	watch   *watch
	addrs   map[weft.ID]memberlist.Address // of all members, dead ones too
	alive   []Member                       // by membership, self included, in order
	failed  failures
	dead    []weft.ID // failed members that are out of sight

	wg         sync.WaitGroup // drain and joins
	joining    atomic.Bool    // one join at a time
	views      comparison
	met        time.Time // when the first other member came to sight; zero = there is none
	seeds      seeding
	apart      weft.ID   // was out of reach and has not been exchanged with since; "" = nobody
	nextMakeUp time.Time // the earliest moment of the next exchange, but for a newcomer's
	drops      drops
}

// comparison is how this node's view of who is alive goes with that of others.
type comparison struct {
	differs  int       // digests in a row with other live members
	answered time.Time // the last of them, with our own digest
}

// seeding is how the search for seeds that are no members goes on.
type seeding struct {
	wait    time.Duration // after the last join
	next    time.Time     // the earliest moment of the next
	missing int           // when last looked at
	// nextWord to operators of a seed with another key is not before this. It belongs to
	// the join under way.
	nextWord time.Time
}

// drain turns events into "look again" until serf has shut down.
func (l *loop) drain(events <-chan serf.Event) {
	for {
		select {
		case <-events:
			select {
			case l.members <- struct{}{}:
			default:
			}
		case <-l.serf.ShutdownCh():
			return
		}
	}
}

func (l *loop) run(ctx context.Context) error {
	tick := time.NewTicker(tickInterval)
	defer tick.Stop()
	seeds := time.NewTimer(seedMin)
	defer seeds.Stop()
	due := time.NewTimer(0)
	defer due.Stop()
	listen := time.NewTimer(0)
	defer listen.Stop()
	again := time.NewTimer(lookPause)
	defer again.Stop()
	l.lookAtMembers()
	looked := time.Now()
	l.trySeeds(looked)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.serf.ShutdownCh():
			return errors.New("membership has stopped by itself")
		case <-l.g.kick:
			l.takeKeys()
		case <-due.C:
			l.withCore((*core).advance)
		case <-listen.C:
			l.listen()
		case f := <-l.mux.frames:
			l.receive(f)
			// What is there is taken together: its outcome is shown and told once.
			for range min(len(l.mux.frames), maxTogether) {
				l.receive(<-l.mux.frames)
			}
		case <-l.members:
			if wait := lookPause - time.Since(looked); wait > 0 {
				again.Reset(wait)
				break
			}
			l.lookAtMembers()
			looked = time.Now()
		case <-again.C:
			l.lookAtMembers()
			looked = time.Now()
		case <-seeds.C:
			l.trySeeds(time.Now())
			seeds.Reset(l.seedPause())
		case <-tick.C:
			l.withCore((*core).tick)
			if len(l.failed) > len(l.dead) {
				l.lookAtMembers()
			}
			l.knock()
			l.makeUp()
			if d := l.drops.look(time.Now(), l.g.Stats()); d != nil {
				l.g.cfg.Log.Warn("frames of gossip were dropped", d...)
			}
		}
		l.follow(listen)
		l.sendAll(due)
	}
}

const (
	// maxTogether bounds how many frames are taken before what follows from them is sent.
	maxTogether = 32
	// lookPause is the least time between two looks at the members: of many that come at
	// once each event would cost a look at all.
	lookPause = 20 * time.Millisecond
)

// listen gives the watch its time, after all that has come: a member's answer may
// lie there.
func (l *loop) listen() {
	for range len(l.mux.frames) {
		l.receive(<-l.mux.frames)
	}
	l.watch.advance(time.Now())
}

// follow does what the watch says, and sets the timer for its next moment.
func (l *loop) follow(listen *time.Timer) {
	if l.watch.changed {
		l.watch.changed = false
		l.g.stats.doubts.Store(l.watch.counts.doubts)
		l.g.stats.silences.Store(l.watch.counts.silences)
		l.show()
	}
	for _, e := range l.watch.take() {
		l.send(e)
	}
	if l.watch.due.IsZero() {
		listen.Stop()
	} else {
		listen.Reset(time.Until(l.watch.due))
	}
}

// withCore runs fn on the core. What it changes is shown by sendAll.
func (l *loop) withCore(fn func(*core, time.Time)) {
	l.g.mu.Lock()
	defer l.g.mu.Unlock()
	fn(l.g.core, time.Now())
}

// sendAll shows what the core has taken, sends what it has to say and sets the timer for
// when it has something to do next.
func (l *loop) sendAll(due *time.Timer) {
	l.g.mu.Lock()
	l.g.refreshLocked()
	out, next := l.g.core.take(), l.g.core.deadline()
	l.g.mu.Unlock()
	for _, e := range out {
		l.send(e)
	}
	if next.IsZero() {
		due.Stop()
	} else {
		due.Reset(time.Until(next))
	}
}

func (l *loop) self() Member {
	return Member{ID: l.g.cfg.Node, Addr: l.g.cfg.Advertise.Addr().Unmap(), VTEP: l.g.cfg.VTEP}
}

// lookAtMembers reads serf's members, and shows them.
func (l *loop) lookAtMembers() {
	l.alive = append(l.alive[:0], l.self())
	clear(l.addrs)
	l.dead = l.dead[:0]
	old := map[weft.ID]bool{}
	now := time.Now()
	for _, m := range l.serf.Members() {
		id := weft.ID(m.Name)
		ip, ok := netip.AddrFromSlice(m.Addr)
		if !ok || !id.Valid() || id == l.g.cfg.Node {
			continue
		}
		addr := netip.AddrPortFrom(ip.Unmap(), m.Port)
		l.addrs[id] = memberlist.Address{Addr: addr.String(), Name: m.Name}
		if m.Status != serf.StatusFailed {
			l.failed.settle(id)
		}
		if m.Tags[tagNumbers] == "" {
			old[id] = true
		}
		switch {
		case m.Status == serf.StatusFailed && !l.failed.stays(now, id, l.watch.knows(id), l.watch.isSilent(id)):
			l.dead = append(l.dead, id)
		case m.Status == serf.StatusFailed || m.Status == serf.StatusAlive:
			vtep, err := netip.ParseAddr(m.Tags[tagVTEP])
			if err != nil {
				l.g.cfg.Log.Warn("member is left out: it tells no tunnel address", weft.KeyPeer, id, weft.KeyErr, err)
				continue
			}
			l.alive = append(l.alive, Member{ID: id, Addr: addr.Addr(), VTEP: vtep})
		}
	}
	slices.SortFunc(l.alive, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	var others []weft.ID
	for _, m := range l.alive {
		if m.ID != l.g.cfg.Node {
			others = append(others, m.ID)
		}
	}
	l.watch.setMembers(now, others)
	l.watch.setOld(func(id weft.ID) bool { return old[id] })
	for id := range l.failed {
		if _, ok := l.addrs[id]; !ok {
			l.failed.settle(id)
		}
	}
	if err := l.open.know(slices.Collect(maps.Keys(l.addrs))); err != nil {
		l.g.cfg.Log.Error("frames of members cannot be read", weft.KeyErr, err)
	}
	l.show()
}

// show gives the core the members that the watch does not miss. What the watch says
// changes often where a machine is loaded, and nothing but this.
func (l *loop) show() {
	live := make([]Member, 0, len(l.alive))
	for _, m := range l.alive {
		if m.ID != l.g.cfg.Node {
			if l.watch.isSilent(m.ID) {
				continue
			}
			m.Doubted = l.watch.isDoubted(m.ID)
		}
		live = append(live, m)
	}
	switch {
	case len(live) == 1:
		l.met = time.Time{}
	case l.met.IsZero():
		l.met = time.Now()
	}
	l.tell(live)
	l.g.setMembers(time.Now(), live)
}

// tell logs who came and who went. Both lists are in order.
func (l *loop) tell(live []Member) {
	before, _ := l.g.Members()
	for len(before) > 0 || len(live) > 0 {
		switch {
		case len(before) > 0 && len(live) > 0 && before[0].ID == live[0].ID:
			before, live = before[1:], live[1:]
		case len(before) == 0 || len(live) > 0 && live[0].ID < before[0].ID:
			l.g.cfg.Log.Info("member is alive", weft.KeyPeer, live[0].ID, "addr", live[0].Addr)
			live = live[1:]
		default:
			id, why := before[0].ID, "left"
			switch {
			case slices.Contains(l.dead, id):
				why = "failed"
			case l.watch.isSilent(id):
				why = "silent"
			}
			l.g.cfg.Log.Info("member is gone", weft.KeyPeer, id, "why", why)
			before = before[1:]
		}
	}
}

// receive takes a frame from the network.
func (l *loop) receive(f inFrame) {
	st := &l.g.stats
	from, m, err := f.peer, message(nil), error(nil)
	switch {
	case f.peer != "":
		m, err = decode(f.b)
	case len(f.b) > datagramBytes:
		st.oversized.Add(1)
		return
	default:
		l.takeKeys()
		from, m, err = l.open.open(f.b)
	}
	switch {
	case errors.Is(err, errUnknown):
		st.unknown.Add(1)
		return
	case errors.Is(err, errReplayed):
		st.replayed.Add(1)
		return
	case errors.Is(err, errShort), errors.Is(err, errForeign):
		st.foreign.Add(1)
		return
	case errors.Is(err, errUnauthentic):
		st.unauthentic.Add(1)
		return
	case err != nil:
		st.malformed.Add(1)
		l.g.cfg.Log.Debug("frame is dropped", weft.KeyErr, err)
		return
	}
	st.received.Add(1)
	if f.peer == "" {
		l.hear(from)
	}
	switch m := m.(type) {
	case knock:
		if f.from != "" {
			l.sendFrame(memberlist.Address{Addr: f.from, Name: string(from)}, l.frame(knocked(m)))
		}
		l.meet(from, f.from)
		return
	case knocked:
		l.watch.answer(time.Now(), from, m.number)
		l.meet(from, f.from)
		return
	case doubt, vouch:
		l.watch.receive(time.Now(), from, m)
		return
	case cold:
		l.meet(from, f.from) // it thinks us alive
		l.compareLive(from, m)
	}
	l.withCore(func(c *core, now time.Time) { c.receive(now, from, m, f.peer != "") })
}

// hear takes a sign of life. Who was silent is in sight again before its frame is
// looked at; who was doubted is so with what else has come.
func (l *loop) hear(from weft.ID) {
	wasSilent, wasDoubted := l.watch.isSilent(from), l.watch.isDoubted(from)
	l.watch.hear(time.Now(), from)
	if wasSilent {
		l.show()
	}
	if wasSilent || wasDoubted {
		l.apart = from
		l.makeUp()
	}
}

// makeUp exchanges everything with a member that is heard again. Else what membership
// began to suspect in the silence, and was not told otherwise, would come true seconds
// after the silence: each side suspects the other still, has spread that, and spreads it no
// more. One exchange is enough for all that the two know, so there is one a second, and
// among many, to whom it is longer, ten a second of all nodes.
func (l *loop) makeUp() {
	now := time.Now()
	if l.apart == "" || now.Before(l.nextMakeUp) {
		return
	}
	a, ok := l.addrs[l.apart]
	if ok && !l.join([]string{a.Addr}) {
		return // later: one is under way
	}
	l.apart = ""
	l.hasExchanged(now)
}

// hasExchanged puts the next exchange off: ten a second of all nodes, one of each.
func (l *loop) hasExchanged(now time.Time) {
	l.nextMakeUp = now.Add(max(tickInterval, time.Duration(len(l.addrs))*tickInterval/10))
}

// compareLive joins a member that twice in a row thought others alive than we
// do: a full exchange tells both, long before memberlist's own turn. A newcomer does so
// at once: others may have come with it, of whom its seed did not know yet. Others keep
// makeUp's pace: where many are late, views differ all the time, and no exchange ends that.
func (l *loop) compareLive(from weft.ID, d cold) {
	l.g.mu.Lock()
	mine := l.g.core.digest(from)
	l.g.mu.Unlock()
	if d.live == mine.live {
		l.views.differs = 0
		return
	}
	// The other may be the one that misses somebody, whose digests it drops.
	now := time.Now()
	if now.Sub(l.views.answered) >= tickInterval/2 {
		l.views.answered = now
		l.send(envelope{to: []weft.ID{from}, m: mine})
	}
	isNew := now.Sub(l.met) < newcomerFor
	if l.views.differs++; isNew || l.views.differs >= 2 && !now.Before(l.nextMakeUp) {
		if a, ok := l.addrs[from]; ok && l.join([]string{a.Addr}) {
			l.views.differs = 0
			l.hasExchanged(now)
		}
	}
}

// meet joins a node that gave a sign of life and that membership does not think alive.
func (l *loop) meet(id weft.ID, from string) {
	members, _ := l.g.Members()
	if !l.failed.has(id) && slices.ContainsFunc(members, func(m Member) bool { return m.ID == id }) {
		return
	}
	// Where it speaks from goes before where it was: its address may be new.
	if a, ok := l.addrs[id]; ok && from == "" {
		from = a.Addr
	}
	if from != "" {
		l.join([]string{from})
	}
}

// knock asks one failed member for a sign of life.
func (l *loop) knock() {
	if len(l.failed) > 0 {
		ids := slices.Collect(maps.Keys(l.failed))
		id := ids[rand.IntN(len(ids))]
		l.sendFrame(l.addrs[id], l.frame(knock{}))
	}
}

// trySeeds joins seeds that are no members, if it is time to. One that is only silent is
// one: all would join it at once for being late, and make it later.
func (l *loop) trySeeds(now time.Time) {
	if now.Before(l.seeds.next) {
		return
	}
	known := map[string]bool{l.g.cfg.Advertise.String(): true}
	for _, m := range l.alive {
		known[l.addrs[m.ID].Addr] = true
	}
	var missing []string
	for _, s := range l.g.cfg.Seeds() {
		if a := netip.AddrPortFrom(s.Addr().Unmap(), s.Port()).String(); !known[a] {
			missing = append(missing, a)
		}
	}
	alone := len(l.alive) == 1
	if len(missing) == 0 || len(missing) > l.seeds.missing {
		l.seeds.wait = seedMin
	}
	l.seeds.missing = len(missing)
	if len(missing) == 0 {
		return
	}
	rand.Shuffle(len(missing), func(i, j int) { missing[i], missing[j] = missing[j], missing[i] })
	if !l.join(missing[:min(len(missing), 3)]) {
		return
	}
	limit := seedMax
	if alone {
		limit = seedAlone
	}
	l.seeds.wait = min(l.seeds.wait*2, limit)
	l.seeds.next = now.Add(l.seeds.wait)
}

// seedPause is the time until seeds are looked at again.
func (l *loop) seedPause() time.Duration {
	if l.seeds.missing > 0 {
		return seedMin
	}
	return tickInterval
}

// join starts joining addrs unless a join is under way. Its outcome shows in
// the members; whoever wanted it will want it again.
func (l *loop) join(addrs []string) bool {
	if !l.joining.CompareAndSwap(false, true) {
		return false
	}
	l.g.stats.joins.Add(1)
	l.wg.Go(func() {
		defer l.joining.Store(false)
		_, err := l.serf.Join(addrs, true)
		switch {
		case err == nil:
		case isForeignKey(err) && !time.Now().Before(l.seeds.nextWord):
			l.seeds.nextWord = time.Now().Add(dropsEvery)
			l.g.cfg.Log.Warn("cannot join: the other node has another gossip key, as those of another cluster have", weft.KeyPeer, addrs, weft.KeyErr, err)
		default:
			l.g.cfg.Log.Debug("cannot join yet", weft.KeyPeer, addrs, weft.KeyErr, err)
		}
	})
	return true
}

// isForeignKey reports whether a join failed as the answer was encrypted with a key that is
// none of ours. memberlist (security.go) has no error of its own for it.
func isForeignKey(err error) bool {
	return strings.Contains(err.Error(), "no installed keys could decrypt")
}

// send encodes a message once and sends it to its receivers: sealed, or by their
// sessions.
func (l *loop) send(e envelope) {
	plain := encode(nil, e.m)
	var frame []byte
	if !e.stream && len(plain)+frameOverhead <= datagramBytes {
		l.takeKeys()
		frame = l.seal.sealBytes(plain)
	}
	for _, id := range e.to {
		a, ok := l.addrs[id]
		switch {
		case !ok:
		case frame != nil:
			l.sendFrame(a, frame)
		default:
			l.g.stats.sent.Add(1)
			l.g.stats.streamed.Add(1)
			l.mux.sessions.send(a, id, plain)
		}
	}
}

// frame is a message sealed.
func (l *loop) frame(m message) []byte {
	l.takeKeys()
	return l.seal.seal(m)
}

func (l *loop) sendFrame(to memberlist.Address, frame []byte) {
	l.g.stats.sent.Add(1)
	if _, err := l.mux.WriteToAddress(frame, to); err != nil {
		// As good as lost on the way; a digest makes it good.
		l.g.cfg.Log.Debug("cannot send a frame", weft.KeyPeer, to.Name, weft.KeyErr, fmt.Errorf("write to %s: %w", to.Addr, err))
	}
}
