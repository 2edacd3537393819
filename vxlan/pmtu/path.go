package pmtu

import (
	"slices"
	"time"
)

// Sizes are of whole IP packets in bytes.
const (
	// floor4 and floor6 are what every path carries (RFC 791 section 3.1, RFC
	// 8200 section 5). Below them there is nothing to find.
	floor4 = 576
	floor6 = 1280
	// assumed is how much is believed of a path that nobody has answered on:
	// plain Ethernet. More must be proven, for a jumbo link may end at a switch
	// that drops jumbo frames without a word.
	assumed = 1500
)

// commonSizes are the MTUs that real paths have: jumbo frames and tunnels
// inside, Ethernet, PPPoE, GRE, VPNs and clouds, WireGuard, IPv6's least.
var commonSizes = [...]int{
	9216, 9001, 9000, 8981, 8951, 8921, 8500, 8000, 4470, 4000, 2000,
	1500, 1492, 1480, 1476, 1472, 1460, 1450, 1442, 1440, 1430, 1420, 1410, 1400, 1390, 1380, 1370, 1360, 1350, 1340, 1320, 1300, 1280,
	1200, 1000,
}

// Our own choices for the search.
const (
	// A size counts as lost when it was sent so often and others came through.
	// Of the check, on which hangs whether there is a search at all, that is
	// wrong once in a thousand at a loss of 5 % each way; of the others only
	// the value is a little low until the next check.
	checkTries, searchTries = 3, 2
	// The pause between two tries: twice the round trip, within these.
	minPause, maxPause = 150 * time.Millisecond, time.Second
	// refineWidth is how many sizes are tried at once between two that are
	// known: 8 leave a ninth of the distance.
	refineWidth = 8
	// askGap bounds the searches that a peer can ask for.
	askGap = 250 * time.Millisecond
	// silence is the pause after a search without any answer, doubled up to
	// the period.
	silence = 500 * time.Millisecond
)

type stage uint8

// The search for one path:
//
//	  period over, cap changed, asked to           cap answered, or proven
//	  ┌──────────────────────────────────► check ──and nothing above────► idle
//	  │                                      │ changed
//	idle ◄──exact── refine ◄──none left── ladder
//	                 └──┘ narrower
//
// A stage sends waves: sizes that are sent together, again and again until each
// is answered, made needless by a larger one, or was tried often enough. If a
// whole search has no answer at all, the peer is away, and nothing is learnt of
// the path.
const (
	idle stage = iota
	check
	ladder
	refine
)

// path is the search for the largest packet that reaches one peer. It is pure;
// the caller serializes.
type path struct {
	floor int
	cap   int // what the own link and route take; 0 = not known yet
	// proven is the result: the largest size that was answered and not
	// disproved by a later search; 0 = none.
	proven int

	stage stage
	due   time.Time // of the next step
	tries int       // of this wave so far
	wave  []int     // sizes of this wave that may still teach something, descending
	low   int       // largest answered in this search; 0 = none
	high  int       // smallest taken as lost in this search
	was   int       // proven when the search began
	quiet int       // searches in a row without an answer
	again bool      // search once more after this one
	pause time.Duration
	began time.Time // of the search
	// search counts them: what was sent in an earlier one teaches nothing.
	search uint64
}

func newPath(is4 bool, now time.Time) *path {
	p := &path{floor: floor6, due: now, pause: minPause}
	if is4 {
		p.floor = floor4
	}
	return p
}

// mtu is what may be sent now.
func (p *path) mtu() int {
	if p.proven > 0 {
		return min(p.proven, p.cap)
	}
	return min(assumed, p.cap)
}

// setCap takes what the own side allows and reports whether that is news. A
// search under way begins anew.
func (p *path) setCap(now time.Time, limit int) bool {
	if limit == p.cap {
		return false
	}
	p.cap = limit
	p.proven = min(p.proven, limit)
	p.stage, p.due = idle, now
	return true
}

// ask begins a search, or has another one follow that which is under way.
func (p *path) ask(now time.Time) {
	if p.stage != idle {
		p.again = true
		return
	}
	p.due = p.soon(now)
}

// step returns the sizes to send now, none if it is not time. next is the pause
// between two searches.
func (p *path) step(now time.Time, next time.Duration) []int {
	if now.Before(p.due) || p.cap <= 0 {
		return nil
	}
	if p.stage == idle {
		p.begin(now)
	}
	for len(p.wave) == 0 || p.tries == p.most() {
		if !p.conclude() {
			p.due = p.rest(now, next)
			return nil
		}
	}
	p.tries++
	p.due = now.Add(p.pause)
	return slices.Clone(p.sizes())
}

func (p *path) most() int {
	if p.stage == check {
		return checkTries
	}
	return searchTries
}

// sizes are those of this try. What every path carries only tells a narrow path
// from a peer that is away; that waits for the second try.
func (p *path) sizes() []int {
	if p.stage != check || p.tries > 1 {
		return p.wave
	}
	least := p.was
	if least == 0 {
		least = p.cap
	}
	if i := slices.IndexFunc(p.wave, func(s int) bool { return s < least }); i > 0 {
		return p.wave[:i]
	}
	return p.wave
}

func (p *path) begin(now time.Time) {
	p.began = now
	p.search++
	p.low, p.high, p.was = 0, p.cap+1, p.proven
	p.stage, p.tries, p.again = check, 0, false
	p.wave = p.wave[:0]
	sizes := []int{p.cap, floor6, p.floor}
	if p.proven > 0 {
		// One more shows whether the path has become wider at all.
		sizes = []int{p.cap, p.proven + 1, p.proven, min(floor6, p.proven), p.floor}
	}
	for _, s := range sizes {
		if s <= p.cap && !slices.Contains(p.wave, s) {
			p.wave = append(p.wave, s)
		}
	}
	slices.SortFunc(p.wave, func(a, b int) int { return b - a })
}

// conclude ends a wave: what is left of it is lost. It reports whether another
// wave follows.
func (p *path) conclude() bool {
	if p.low == 0 {
		p.quiet++
		p.stage, p.wave = idle, nil
		return false
	}
	p.quiet = 0
	if len(p.wave) > 0 {
		p.high = min(p.high, p.wave[len(p.wave)-1])
	}
	p.proven = p.low
	isSteady := p.stage == check && p.low == p.was // and nothing above came through
	if p.high-p.low <= 1 || isSteady {
		p.stage, p.wave = idle, nil
		return false
	}
	p.tries, p.wave = 0, nil
	if p.stage == check {
		p.stage = ladder
		for _, s := range commonSizes {
			if s > p.low && s < p.high {
				p.wave = append(p.wave, s)
			}
		}
		if len(p.wave) > 0 {
			return true
		}
	}
	p.stage = refine
	gap := p.high - p.low - 1
	n := min(gap, refineWidth)
	for i := n; i >= 1; i-- {
		p.wave = append(p.wave, p.low+(gap+1)*i/(n+1))
	}
	return true
}

// rest is when the next search begins.
func (p *path) rest(now time.Time, next time.Duration) time.Time {
	switch {
	case p.again:
		return p.soon(now)
	case p.quiet > 0:
		return now.Add(min(next, silence<<min(p.quiet-1, 10)))
	}
	return now.Add(next)
}

// soon is now, but for a peer that asks more often than askGap.
func (p *path) soon(now time.Time) time.Time {
	if t := p.began.Add(askGap); t.After(now) {
		return t
	}
	return now
}

// answered takes the news that a packet of this size came through; rtt is how
// long that took.
func (p *path) answered(now time.Time, size int, rtt time.Duration) {
	if size > p.cap {
		return // the link has become narrower since
	}
	p.pause = min(max(2*rtt, minPause), maxPause)
	p.proven = max(p.proven, size)
	if p.stage == idle {
		return
	}
	p.low = max(p.low, size)
	if p.high <= size {
		p.high = p.cap + 1 // it was late, not lost
	}
	p.wave = slices.DeleteFunc(p.wave, func(s int) bool { return s <= p.low })
	if len(p.wave) == 0 {
		p.due = now
	}
}
