package gossip

import "time"

// How the watch goes among many, our own choices; see watch and Times of the watch.
const (
	// crowd is the number of members above which few ask for all.
	crowd = 16
	// helpRounds times helpers are asked, and as often again after lastAsks. All are told
	// after doubtAfter, after allAskAfter, when they ask, too, and tellsCrowd times of a verdict.
	helpRounds  = 2
	allAskAfter = time.Second
	tellsCrowd  = 2
	// accusers are needed before a node gives a member up by their word, and helperAsked is
	// silentAsked of one who was asked to help: its word alone does nothing.
	accusers    = 2
	helperAsked = 5
	// toldAgain paces the questions of one who was told, in a crowd, and toldDoubt is how
	// long it goes by a doubt.
	toldAgain = 400 * time.Millisecond
	toldDoubt = time.Second
	// wordsEach of each member, and wordsMin in all, bound what a node tells of others at a
	// time, in a crowd: enough for two that die at once beside it. wordsPace a second come
	// to what is left. A newcomer begins with one of each member, and wordsFirst at least.
	wordsEach  = 8
	wordsMin   = 500
	wordsPace  = 10
	wordsFirst = 100
	// dearPer is what answers take that makes a word cost twice as much, and no more: where a
	// machine is overloaded, words about who is late make more so, but a doubt and two
	// verdicts after it must stay within what a node may tell at a time.
	dearPer = 100 * time.Millisecond
	// askWords are kept for those who are asked to help: without their answer a member that
	// only this node does not reach would be given up.
	askWords = 50
)

func (w *watch) isCrowd() bool { return len(w.ring) > crowd }

// mayTell reports whether there are words left to tell n members of another one, and to
// spare, and takes n of them. To tell few costs nothing: where most of a crowd has gone,
// there is much to tell, and few are told.
func (w *watch) mayTell(now time.Time, n, spare int) bool {
	if n > helpers && n <= crowd {
		return true
	}
	w.words = min(w.words+wordsPace*now.Sub(w.wordsAt).Seconds(), float64(max(wordsEach*len(w.ring), wordsMin)))
	w.wordsAt = now
	each := 1 + min(w.slow.Seconds()/dearPer.Seconds(), 1)
	if w.words < each*float64(n+spare) {
		return false
	}
	w.words -= each * float64(n)
	return true
}

// doubtInCrowd asks some of the others, and tells all, if that is for this node to do.
// A word to some must not look like one to all, which tells of tellsAfter or more.
func (w *watch) doubtInCrowd(now time.Time, p *watched, silence time.Duration) {
	rounds, says := 0, min(silence, tellsAfter-1)
	switch p.by {
	case ownQuestion:
		rounds = helpRounds
	case asHelper:
		says = min(now.Sub(p.first), says)
	}
	if silence >= lastAsks {
		rounds += helpRounds
	}
	if p.helped < rounds && w.mayTell(now, helpers, 0) {
		p.helped++
		w.send(doubt{p.id, says}, w.draw(w.others(p))...)
	}
	tells := 0
	switch {
	case p.by != ownQuestion || silence < doubtAfter:
	case silence < allAskAfter:
		tells = 1
	default:
		tells = 2
	}
	if p.told >= tells {
		return
	}
	// A verdict goes before a doubt.
	if others := w.others(p); w.mayTell(now, len(others), 2*len(others)) {
		p.told = tells
		w.send(doubt{p.id, min(silence, silentAfter-1)}, others...)
	}
}

// accuse tells all of a crowd that this node has given a member up, and once more when it
// asks it again.
func (w *watch) accuse(now time.Time, p *watched) {
	if !w.isCrowd() || p.by == asOneOfAll || p.told >= tellsCrowd {
		return
	}
	if others := w.others(p); w.mayTell(now, len(others), askWords) {
		p.told++
		w.send(doubt{p.id, silentAfter}, others...)
	}
}

func (w *watch) isAccused(p *watched) bool { return w.isCrowd() && len(p.accusers) >= accusers }
