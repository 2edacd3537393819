package gossip

import (
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// watch finds out which members have fallen silent, sooner than membership gives
// them up and without its word: what it says is this node's own view, and the
// first sign of life takes it back. It is a state machine as core is: events go
// in by its methods, messages come out by take.
//
// Each node watches its neighbours in order, one after and one before it, so that each
// member is watched by two. A member's way, seen from one node:
//
//	heard ── knockEvery passes (its watchers only), or another doubts ──► asked
//	asked ── no answer: three others are asked, then all others are told ──► doubted
//	doubted ── silentAfter in all, and silentOwn of own questions ──► silent
//	any of them ── a frame of it, or another's word that it lives ──► heard
//
// Among many (crowd) few do that: the two who watch a member, and those whom they ask to
// help, at half the pace. They give it up by themselves and tell all of it, and the others go
// by the word of two of them, after a question of their own that was not answered. Of a
// doubt all are told for their readers' sake, and ask nothing. Else a member that is late by
// a little gets questions of each and each gets words about it, and on a machine that has no
// processor to spare for that all are late for ever (TestWatchStarved). For the same reason
// a node has a store of such words (mayTell), asks the less the more members owe it an answer,
// and waits the longer the longer all answers take.
//
// Whoever doubts also asks three others again and again: where only the way between
// two is broken, they say so. A node that was kept from running does not
// count that time: the answers may be in its queue. Nor does it believe how long a silence
// has lasted by what it then reads, which may be as old.
type watch struct {
	self weft.ID
	rand *rand.Rand
	ring []weft.ID // alive by membership, self included, in order
	of   map[weft.ID]*watched
	all  []*watched // what of holds, in order
	due  time.Time  // when advance is to be called; zero: not by itself
	// ran is when this node last did anything. notBefore is when the next verdict may be:
	// later, if this node was late; what it reads until then may be as old as age.
	ran       time.Time
	notBefore time.Time
	age       time.Duration
	out       []envelope
	// words may be said of others to members of a crowd, as reckoned at wordsAt.
	words   float64
	wordsAt time.Time
	open    int // members that owe an answer
	// slow is what most members' answers take of late: more than the links if nodes
	// have to wait for a processor.
	slow   time.Duration
	slowAt time.Time // when an answer last told it
	// changed: who is doubted or silent has changed; the user clears it.
	changed bool
	counts  watchCounts
	// questions are the last ones, each at its number, of which number is the last.
	questions [1024]question
	number    uint16
}

// question is one that was asked, and may be answered yet.
type question struct {
	to     weft.ID
	number uint16
	at     time.Time
}

// watched is what a node knows of another's life.
type watched struct {
	id weft.ID
	// heard is when its last frame came; zero: none has, so it need not know us
	// yet, and only others can doubt it. vouched is when another said that it lives.
	heard, vouched time.Time
	// since is when its silence began, by what this node or the one that told it
	// has seen; zero: it owes no answer. first is our own first question.
	since, first time.Time
	measured     time.Time     // when an answer last told how long they take
	asked        int           // own questions since first
	told         int           // how often this node has told all of its doubt, and then of its verdict
	accusers     []weft.ID     // who has told this node that it has given it up, in a crowd
	doubtEnds    time.Time     // when a doubt ends that this node was only told of; zero: it was not
	helped       int           // how often this node has asked others to help
	by           cause         // of the silence's beginning here
	next         time.Time     // of the next question; zero: none
	patience     time.Duration // for an answer, as long as they take
	rest         time.Duration // before it is watched again
	askers       []weft.ID     // who wants to know when it is heard
	isDoubted    bool
	isSilent     bool
	isOld        bool // takes no questions with numbers
}

// watchCounts are counted since the start.
type watchCounts struct{ doubts, silences uint64 }

// cause is how a silence began for a node: by its own question, as one who is asked to
// help, or as one of all who were told.
type cause uint8

const (
	ownQuestion cause = iota
	asHelper
	asOneOfAll
)

// Times of the watch, our own choices. A member that gets no processor for a second
// must be able to answer in time, and a dead one must be out of sight within 1.5 s:
// silentAfter lies between. At 10 % loss a question goes unanswered one time in five. So
// questions follow each other quickly: a silence begins with the first one that was
// not answered, and one that was lost makes it seem longer than it is.
const (
	// knockEvery is the longest pause between two signs of life of a member that answers,
	// with questions for them. Up to a quarter less, by chance, so that two who watch each
	// other do not ask at once. With two watchers a death is noticed after 60 ms on average.
	knockEvery = 200 * time.Millisecond
	// knockStranger bounds that between two to one that was never heard.
	knockStranger = time.Second
	// patienceMin and patienceMax bound the wait for an answer, before the next
	// member in order is watched, too. It follows the time that answers take, so
	// that a long way is not asked twice each time. knockAgain comes after it.
	patienceMin = 100 * time.Millisecond
	patienceMax = 150 * time.Millisecond
	knockAgain  = 50 * time.Millisecond
	// watchMost members are watched to each side at a time, if as many before them owe an
	// answer.
	watchMost = 8
	// slowMost bounds how much longer is waited where all answers take long, and openFew
	// how many members that owe one are asked so often at a time; of more the pause gets
	// longer, up to pauseMost, with which silentAsked questions are asked within silentAfter.
	slowMost  = 2 * time.Second
	openFew   = 2
	pauseMost = 150 * time.Millisecond
	// slowAsks questions are asked at most while one is answered, so that silentAsked of them
	// go into the time for a verdict, which is longer by that.
	slowAsks = 8
	// slowFor is how long what answers took counts when none comes that tells it.
	slowFor = 3 * time.Second
	// helpers are asked after asksAfter, and all are told after tellsAfter.
	helpers    = 3
	asksAfter  = 300 * time.Millisecond
	tellsAfter = 400 * time.Millisecond
	// doubtAfter a silence is told to readers, who may make their own inquiries.
	doubtAfter = 500 * time.Millisecond
	// lastAsks is when the last inquiries with others begin.
	lastAsks    = 800 * time.Millisecond
	silentAfter = 1200 * time.Millisecond
	// silentOwn is how long, and silentAsked how often, a node itself asks before it gives a
	// member up; see crowd.go for the exceptions among many.
	silentOwn   = 500 * time.Millisecond
	silentAsked = 6
	// silentAgain paces questions to a silent member.
	silentAgain = 500 * time.Millisecond
	// freshFor is how old a sign of life may be to speak for a member: less than
	// the first inquiry takes, else a member that has just died would be spoken for.
	freshFor = 150 * time.Millisecond
	// restMax bounds the pause before a member that others speak for is asked again.
	restMax = 8 * time.Second
	// lateBy is how late a node may be woken before it counts as kept from
	// running; lateGrace is how long it then listens before any verdict.
	lateBy    = 100 * time.Millisecond
	lateGrace = 200 * time.Millisecond
)

func newWatch(self weft.ID, r *rand.Rand) *watch {
	return &watch{self: self, rand: r, ring: []weft.ID{self}, of: map[weft.ID]*watched{}}
}

// take returns the messages to send and forgets them.
func (w *watch) take() []envelope {
	out := w.out
	w.out = nil
	return out
}

func (w *watch) send(m message, ids ...weft.ID) {
	if len(ids) > 0 {
		w.out = append(w.out, envelope{to: slices.Clone(ids), m: m})
	}
}

// setMembers takes the members that are alive by membership.
func (w *watch) setMembers(now time.Time, ids []weft.ID) {
	ring := append([]weft.ID{w.self}, ids...)
	slices.Sort(ring)
	ring = slices.Compact(ring)
	if slices.Equal(ring, w.ring) {
		return
	}
	if w.wordsAt.IsZero() {
		w.words, w.wordsAt = float64(max(len(ring), wordsFirst)), now
	}
	w.ring = ring
	maps.DeleteFunc(w.of, func(id weft.ID, _ *watched) bool {
		_, stays := slices.BinarySearch(ring, id)
		return !stays
	})
	w.all = w.all[:0]
	for _, id := range ring {
		if id == w.self {
			continue
		}
		if w.of[id] == nil {
			w.of[id] = &watched{id: id, patience: patienceMin, rest: knockEvery}
		}
		w.all = append(w.all, w.of[id])
	}
	w.advance(now)
}

// setOld says which members take no questions with numbers.
func (w *watch) setOld(isOld func(weft.ID) bool) {
	for _, p := range w.all {
		p.isOld = isOld(p.id)
	}
}

// knows reports whether a member alive by membership has ever been heard of here.
func (w *watch) knows(id weft.ID) bool {
	p := w.of[id]
	return p != nil && !(p.heard.IsZero() && p.vouched.IsZero())
}

func (w *watch) isSilent(id weft.ID) bool {
	p := w.of[id]
	return p != nil && p.isSilent
}

func (w *watch) isDoubted(id weft.ID) bool {
	p := w.of[id]
	return p != nil && p.isDoubted
}

// hear takes a sign of life: an authentic frame of the member itself.
func (w *watch) hear(now time.Time, id weft.ID) {
	w.forgive(now)
	p := w.of[id]
	if p == nil {
		return
	}
	p.heard, p.rest = now, knockEvery
	if len(p.askers) > 0 {
		w.send(vouch{id}, p.askers...)
	}
	w.clear(now, p)
}

// answer takes the answer to question number n, by a member that was heard by it, too. Of
// those that were on their way at the same time one tells how long answers take: the others
// waited for the same. What else comes from a member does not tell it.
func (w *watch) answer(now time.Time, id weft.ID, n uint16) {
	p, q := w.of[id], &w.questions[n%uint16(len(w.questions))]
	if p == nil || n == 0 || q.number != n || q.to != id || q.at.Before(p.measured) {
		return
	}
	took := min(now.Sub(q.at), slowMost)
	p.measured, w.slowAt = now, now
	w.slowness(took)
	if took > p.patience {
		p.patience = min(2*p.patience, patienceMax)
	} else {
		p.patience = max(p.patience*7/8, patienceMin)
	}
}

// slowness follows what most answers take.
func (w *watch) slowness(took time.Duration) {
	if took > w.slow {
		w.slow += (took - w.slow) / 8
	} else {
		w.slow += (took - w.slow) / 4
	}
}

// clear ends a silence.
func (w *watch) clear(now time.Time, p *watched) {
	w.changed = w.changed || p.isDoubted || p.isSilent
	p.isDoubted, p.isSilent, p.askers, p.accusers, p.doubtEnds = false, false, nil, nil, time.Time{}
	p.since, p.first, p.asked, p.told, p.helped, p.by = time.Time{}, time.Time{}, 0, 0, 0, ownQuestion
	if !p.next.IsZero() {
		p.next = now.Add(p.rest - w.some(p.rest/4))
	}
}

// receive takes a message about a third member; the sender was heard before.
func (w *watch) receive(now time.Time, from weft.ID, m message) {
	switch m := m.(type) {
	case doubt:
		w.receiveDoubt(now, from, m)
	case vouch:
		if p := w.of[m.about]; p != nil && p.id != from && (!p.since.IsZero() || p.isSilent || p.isDoubted) {
			// Not forgetting whom it has to answer: that is for hear.
			askers := p.askers
			p.vouched, p.rest = now, min(2*p.rest, restMax)
			w.clear(now, p)
			p.askers = askers
		}
	}
	w.schedule()
}

func (w *watch) receiveDoubt(now time.Time, from weft.ID, m doubt) {
	p := w.of[m.about]
	switch {
	case p == nil || p.id == from:
		return
	case now.Sub(p.heard) <= freshFor:
		w.send(vouch{p.id}, from)
		return
	}
	if !slices.Contains(p.askers, from) && len(p.askers) < len(w.ring) {
		p.askers = append(p.askers, from)
	}
	if p.isSilent {
		return
	}
	// What this node has seen of it goes before what it is told.
	since := now.Add(-min(m.silence, silentAfter))
	if now.Before(w.notBefore) { // it may have lain in the queue
		since = earlier(now, since.Add(w.age))
	}
	for _, t := range []time.Time{p.heard, p.vouched} {
		if t.After(since) {
			since = t
		}
	}
	if w.isCrowd() && m.silence >= tellsAfter { // all were told
		w.setDoubted(p)
		if m.silence < allAskAfter && p.since.IsZero() {
			p.doubtEnds = now.Add(toldDoubt)
			return
		}
		if m.silence >= silentAfter && !slices.Contains(p.accusers, from) {
			p.accusers = append(p.accusers, from)
		}
	}
	p.doubtEnds = time.Time{}
	if p.since.IsZero() || since.Before(p.since) {
		p.since = since
	}
	if p.asked == 0 {
		if p.by = asHelper; m.silence >= tellsAfter {
			p.by = asOneOfAll
		}
		w.ask(now, p, w.again(p))
	}
	w.giveUp(now, p)
}

func (w *watch) setDoubted(p *watched) {
	if !p.isDoubted {
		p.isDoubted, w.changed = true, true
		w.counts.doubts++
	}
}

// again is the pause before the next question to one that owes an answer. Who waits for
// many is slow itself, or the machine is.
func (w *watch) again(p *watched) time.Duration {
	pause := max(min(knockAgain*time.Duration(max(1, w.open/openFew)), pauseMost), w.slow/slowAsks)
	switch {
	case !w.isCrowd() || p.by == ownQuestion:
		return pause
	case p.by == asHelper:
		return 2 * pause
	}
	return toldAgain
}

// ask sends a question; the next is due after pause.
func (w *watch) ask(now time.Time, p *watched, pause time.Duration) {
	if p.asked == 0 {
		p.first, p.doubtEnds = now, time.Time{}
		if p.since.IsZero() {
			p.since = now
		}
	}
	p.asked++
	p.next = now.Add(pause)
	w.knock(now, p)
}

// knock sends a question, with a number of its own if the member takes one.
func (w *watch) knock(now time.Time, p *watched) {
	if p.isOld {
		w.send(knock{}, p.id)
		return
	}
	w.number = max(w.number+1, 1)
	w.questions[w.number%uint16(len(w.questions))] = question{p.id, w.number, now}
	w.send(knock{w.number}, p.id)
}

// advance does what is due.
func (w *watch) advance(now time.Time) {
	w.forgive(now)
	if now.Sub(w.slowAt) >= slowFor {
		w.slow, w.slowAt = w.slow/2, now
	}
	watching := w.watching(now)
	w.open = 0
	for _, p := range w.all {
		if !p.since.IsZero() && !p.isSilent {
			w.open++
		}
	}
	for _, p := range w.all {
		w.step(now, p, watching[p.id])
	}
	w.schedule()
}

// forgive leaves out of every silence the time for which this node itself was kept
// from running.
func (w *watch) forgive(now time.Time) {
	ran, late := w.ran, now.Sub(w.due)
	w.ran = now
	if w.due.IsZero() || late <= lateBy {
		return
	}
	w.due, w.notBefore, w.age = now, now.Add(lateGrace), now.Sub(ran)
	for _, p := range w.all {
		if !p.since.IsZero() {
			p.since, p.first = earlier(now, p.since.Add(late)), earlier(now, p.first.Add(late))
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// watching are the first member after this node and the first before it, in order, that
// owe no answer, and as many more as owe one before them: of many that go at once, side by
// side, the last would else be asked only after all others. Most pairs thus watch each
// other, and a question is a sign of life, too: whoever asks first spares the other the
// question.
func (w *watch) watching(now time.Time) map[weft.ID]bool {
	out := map[weft.ID]bool{}
	me, _ := slices.BinarySearch(w.ring, w.self)
	n := len(w.ring)
	for _, step := range []int{1, n - 1} {
		owing, watched := 0, 0
		for i := (me + step) % n; i != me && watched < min(max(1, owing), watchMost); i = (i + step) % n {
			p := w.of[w.ring[i]]
			switch {
			case p.isSilent:
			case p.since.IsZero() || now.Sub(p.since) < p.patience+w.slow:
				out[p.id] = true
				watched++
			default:
				owing++
			}
		}
	}
	return out
}

func (w *watch) step(now time.Time, p *watched, isWatched bool) {
	if !p.doubtEnds.IsZero() && !now.Before(p.doubtEnds) {
		p.isDoubted, p.doubtEnds, p.askers, w.changed = false, time.Time{}, nil, true
	}
	due := !p.next.IsZero() && !now.Before(p.next)
	switch {
	case p.isSilent:
		if due {
			w.ask(now, p, silentAgain)
			w.accuse(now, p)
		}
	case p.since.IsZero() && p.heard.IsZero(): // until it knows us
		if due {
			w.knock(now, p)
		}
		if due || p.next.IsZero() {
			p.next = now.Add(w.some(knockStranger))
		}
	case p.since.IsZero() && !isWatched:
		p.next = time.Time{}
	case p.since.IsZero() && p.next.IsZero(): // each at its own moment
		if p.next = p.heard.Add(w.some(knockEvery)); p.next.Before(now) {
			w.ask(now, p, p.patience+w.slow)
		}
	case p.since.IsZero() && due:
		w.ask(now, p, p.patience+w.slow)
	case !p.since.IsZero():
		w.doubt(now, p, due)
	}
}

func (w *watch) some(d time.Duration) time.Duration { return time.Duration(w.rand.Int64N(int64(d))) }

// doubt goes on with a member that owes an answer.
func (w *watch) doubt(now time.Time, p *watched, due bool) {
	if w.giveUp(now, p) {
		return
	}
	silence := now.Sub(p.since) - w.slow // beyond what answers take
	if silence >= doubtAfter {
		w.setDoubted(p)
	}
	if !due {
		return
	}
	defer func() { w.ask(now, p, w.again(p)) }()
	if silence < asksAfter {
		return
	}
	if w.isCrowd() {
		w.doubtInCrowd(now, p, silence)
		return
	}
	switch {
	case p.told == 0 && silence >= tellsAfter && silence < lastAsks:
		p.told++
		w.send(doubt{p.id, silence}, w.others(p)...)
	case p.helped == 0 && p.told == 0 || silence >= lastAsks:
		p.helped++
		w.send(doubt{p.id, silence}, w.draw(w.others(p))...)
	}
}

// giveUp takes a member for silent if it is time to, and tells all of a crowd.
func (w *watch) giveUp(now time.Time, p *watched) bool {
	if !w.hasAsked(p) || now.Before(w.verdict(p)) {
		return false
	}
	p.isDoubted, p.isSilent, w.changed = false, true, true
	w.counts.silences++
	p.next, p.told = now.Add(silentAgain), 0
	w.accuse(now, p)
	return true
}

// hasAsked reports whether this node knows enough to give a member up, in time.
func (w *watch) hasAsked(p *watched) bool {
	enough := silentAsked
	if w.isCrowd() && p.by == asHelper {
		enough = helperAsked
	}
	return p.asked >= enough || w.isAccused(p)
}

// others are those who can be asked about a member.
func (w *watch) others(p *watched) []weft.ID {
	out := make([]weft.ID, 0, len(w.all))
	for _, q := range w.all {
		if q != p && !q.isSilent {
			out = append(out, q.id)
		}
	}
	return out
}

// draw takes as many as help: such as owe this node nothing, for they may be gone, too.
func (w *watch) draw(ids []weft.ID) []weft.ID {
	ids = slices.DeleteFunc(ids, func(id weft.ID) bool { return !w.of[id].since.IsZero() })
	w.rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	return ids[:min(len(ids), helpers)]
}

// verdict is the earliest moment at which a member is given up.
func (w *watch) verdict(p *watched) time.Time {
	at := later(p.since.Add(silentAfter+w.slow), w.notBefore)
	if w.isAccused(p) {
		return later(at, p.first.Add(p.patience+2*w.slow))
	}
	return later(at, p.first.Add(silentOwn+w.slow))
}

// schedule finds when advance has something to do.
func (w *watch) schedule() {
	w.due = time.Time{}
	sooner := func(t time.Time) {
		if !t.IsZero() && (w.due.IsZero() || t.Before(w.due)) {
			w.due = t
		}
	}
	for _, p := range w.all {
		sooner(p.next)
		sooner(p.doubtEnds)
		if !p.since.IsZero() && !p.isSilent && w.hasAsked(p) {
			sooner(w.verdict(p))
		}
	}
	if !w.due.IsZero() && w.due.Before(w.ran) {
		w.due = w.ran // what was due while this node was late: that time is forgiven once
	}
}
