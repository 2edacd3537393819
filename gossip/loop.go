package gossip

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
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
	seal *sealer
	open *opener
	out  *streamer
	rand *rand.Rand
	// members has room for one: look at serf's members again.
	members chan struct{}
	addrs   map[weft.ID]memberlist.Address // of all members, dead ones too
	dead    []weft.ID                      // failed members

	wg         sync.WaitGroup // drain and joins
	joining    atomic.Bool    // one join at a time
	differs    int            // digests in a row with other live members
	seedWait   time.Duration
	nextSeed   time.Time
	wasMissing int
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
	seeds := time.NewTicker(seedMin)
	defer seeds.Stop()
	announce := time.NewTimer(announceAfter)
	defer announce.Stop()
	l.lookAtMembers()
	l.trySeeds(time.Now())
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.serf.ShutdownCh():
			return errors.New("membership has stopped by itself")
		case <-l.g.kick:
			l.send(l.g.withCore((*core).flush))
			announce.Reset(announceAfter)
		case <-announce.C:
			l.send(l.g.withCore((*core).announce))
		case f := <-l.mux.frames:
			l.receive(f)
		case <-l.members:
			l.lookAtMembers()
		case <-seeds.C:
			l.trySeeds(time.Now())
		case now := <-tick.C:
			l.send(l.g.withCore(func(c *core) []envelope { return c.tick(now, l.rand) }))
			l.knock()
		}
	}
}

func (l *loop) self() Member {
	return Member{ID: l.g.cfg.Node, Addr: l.g.cfg.Advertise.Addr().Unmap(), VTEP: l.g.cfg.VTEP}
}

// lookAtMembers reads serf's members and gives them to the core.
func (l *loop) lookAtMembers() {
	live := []Member{l.self()}
	clear(l.addrs)
	l.dead = l.dead[:0]
	for _, m := range l.serf.Members() {
		id := weft.ID(m.Name)
		ip, ok := netip.AddrFromSlice(m.Addr)
		if !ok || !id.Valid() || id == l.g.cfg.Node {
			continue
		}
		addr := netip.AddrPortFrom(ip.Unmap(), m.Port)
		l.addrs[id] = memberlist.Address{Addr: addr.String(), Name: m.Name}
		switch m.Status {
		case serf.StatusFailed:
			l.dead = append(l.dead, id)
		case serf.StatusAlive:
			vtep, err := netip.ParseAddr(m.Tags[tagVTEP])
			if err != nil {
				l.g.cfg.Log.Warn("member is left out: it tells no tunnel address", weft.KeyPeer, id, weft.KeyErr, err)
				continue
			}
			live = append(live, Member{ID: id, Addr: addr.Addr(), VTEP: vtep})
		}
	}
	slices.SortFunc(live, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	l.tell(live)
	l.send(l.g.setMembers(time.Now(), live))
}

// tell logs who came and who went.
func (l *loop) tell(live []Member) {
	before, _ := l.g.Members()
	has := func(ms []Member, id weft.ID) bool {
		return slices.ContainsFunc(ms, func(m Member) bool { return m.ID == id })
	}
	for _, m := range live {
		if !has(before, m.ID) {
			l.g.cfg.Log.Info("member is alive", weft.KeyPeer, m.ID, "addr", m.Addr)
		}
	}
	for _, m := range before {
		if !has(live, m.ID) {
			why := "left"
			if slices.Contains(l.dead, m.ID) {
				why = "failed"
			}
			l.g.cfg.Log.Info("member is gone", weft.KeyPeer, m.ID, "why", why)
		}
	}
}

// receive takes a frame from the network.
func (l *loop) receive(f inFrame) {
	st := &l.g.stats
	from, m, err := l.open.open(f.b)
	switch {
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
	switch m := m.(type) {
	case knock:
		if f.from != "" {
			l.sendFrame(memberlist.Address{Addr: f.from, Name: string(from)}, l.seal.seal(knocked{}))
		}
		l.meet(from, f.from)
		return
	case knocked:
		l.meet(from, f.from)
		return
	case digest:
		l.compareLive(from, m)
	}
	l.send(l.g.withCore(func(c *core) []envelope {
		out := c.receive(time.Now(), from, m)
		return append(out, c.flush()...)
	}))
}

// compareLive joins a member that twice in a row thought others alive than we
// do: a full exchange tells both, long before memberlist's own turn.
func (l *loop) compareLive(from weft.ID, d digest) {
	l.g.mu.Lock()
	same := d.live == l.g.core.hashLive()
	l.g.mu.Unlock()
	if same {
		l.differs = 0
		return
	}
	if l.differs++; l.differs >= 2 {
		if a, ok := l.addrs[from]; ok && l.join([]string{a.Addr}) {
			l.differs = 0
		}
	}
}

// meet joins a node that gave a sign of life but is not thought alive.
func (l *loop) meet(id weft.ID, from string) {
	members, _ := l.g.Members()
	if slices.ContainsFunc(members, func(m Member) bool { return m.ID == id }) {
		return
	}
	if a, ok := l.addrs[id]; ok {
		from = a.Addr
	}
	if from != "" {
		l.join([]string{from})
	}
}

// knock asks one dead member for a sign of life.
func (l *loop) knock() {
	if len(l.dead) > 0 {
		id := l.dead[l.rand.IntN(len(l.dead))]
		l.sendFrame(l.addrs[id], l.seal.seal(knock{}))
	}
}

// trySeeds joins seeds that are no members, if it is time to.
func (l *loop) trySeeds(now time.Time) {
	if now.Before(l.nextSeed) {
		return
	}
	members, _ := l.g.Members()
	known := map[string]bool{l.g.cfg.Advertise.String(): true}
	for _, m := range members {
		known[l.addrs[m.ID].Addr] = true
	}
	var missing []string
	for _, s := range l.g.cfg.Seeds() {
		if a := netip.AddrPortFrom(s.Addr().Unmap(), s.Port()).String(); !known[a] {
			missing = append(missing, a)
		}
	}
	alone := len(members) == 1
	if len(missing) == 0 || len(missing) > l.wasMissing {
		l.seedWait = seedMin
	}
	l.wasMissing = len(missing)
	if len(missing) == 0 {
		return
	}
	l.rand.Shuffle(len(missing), func(i, j int) { missing[i], missing[j] = missing[j], missing[i] })
	if !l.join(missing[:min(len(missing), 3)]) {
		return
	}
	limit := seedMax
	if alone {
		limit = seedAlone
	}
	l.seedWait = min(l.seedWait*2, limit)
	l.nextSeed = now.Add(l.seedWait)
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
		if _, err := l.serf.Join(addrs, true); err != nil {
			l.g.cfg.Log.Debug("cannot join yet", weft.KeyPeer, addrs, weft.KeyErr, err)
		}
	})
	return true
}

// send seals each message once and sends it to its receivers.
func (l *loop) send(out []envelope) {
	for _, e := range out {
		frame := l.seal.seal(e.m)
		for _, id := range e.to {
			if a, ok := l.addrs[id]; ok {
				l.sendFrame(a, frame)
			}
		}
	}
}

func (l *loop) sendFrame(to memberlist.Address, frame []byte) {
	l.g.stats.sent.Add(1)
	if len(frame) > datagramBytes {
		l.g.stats.streamed.Add(1)
		l.out.send(to, frame)
		return
	}
	if _, err := l.mux.WriteToAddress(frame, to); err != nil {
		// As good as lost on the way; a digest makes it good.
		l.g.cfg.Log.Debug("cannot send a frame", weft.KeyPeer, to.Name, weft.KeyErr, fmt.Errorf("write to %s: %w", to.Addr, err))
	}
}
