package gossip

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// crowdOf is the watch of node 0 of n, which has just heard all.
func crowdOf(n int, now time.Time) (w *watch, ids []weft.ID) {
	w = newWatch(nodeID(0), rand.New(rand.NewPCG(1, 1)))
	for i := range n {
		ids = append(ids, nodeID(i))
	}
	w.setMembers(now, ids)
	for _, id := range ids {
		w.hear(now, id)
	}
	return w, ids
}

// TestCrowdLateNodeBelievesAccusers: a node that was late by a little reads that two have
// given a member up. The words may be as old as it did nothing, no older: it gives the
// member up soon, after a question of its own; one accuser alone is not enough.
func TestCrowdLateNodeBelievesAccusers(t *testing.T) {
	for _, by := range []int{1, 2} {
		now := time.Unix(1000, 0)
		w, ids := crowdOf(30, now)
		gone := nodeID(15) // not one that this node watches
		live := func(d time.Duration) {
			for end := now.Add(d); now.Before(end); now = now.Add(5 * time.Millisecond) {
				for _, id := range ids {
					if id != gone {
						w.hear(now, id)
					}
				}
				w.advance(now)
			}
		}
		live(2 * time.Second)
		now = now.Add(400 * time.Millisecond)
		for n := range by {
			w.hear(now, nodeID(20+n))
			w.receive(now, nodeID(20+n), doubt{gone, silentAfter})
		}
		if w.isSilent(gone) {
			t.Errorf("it is given up by the word of %d, without a question", by)
		}
		live(500 * time.Millisecond)
		if got := w.isSilent(gone); got != (by == 2) {
			t.Errorf("half a second after the word of %d it is silent: %v", by, got)
		}
	}
}

// TestStallIsForgivenOnce: a node that did nothing for a while, and then reads many frames
// before it does what is due, leaves that time out of each silence, once, and takes each
// word for as old as it may be.
func TestStallIsForgivenOnce(t *testing.T) {
	const stall = 400 * time.Millisecond
	now := time.Unix(1000, 0)
	w, _ := crowdOf(30, now)
	p := w.of[nodeID(1)] // watched, and says nothing
	for p.since.IsZero() {
		now = now.Add(5 * time.Millisecond)
		w.advance(now)
	}
	due, before := w.due, p.since
	now = now.Add(stall)
	for n := range 8 {
		w.hear(now, nodeID(10+n))
		w.receive(now, nodeID(10+n), doubt{nodeID(20 + n), silentAfter})
		now = now.Add(time.Millisecond)
	}
	if got, want := p.since.Sub(before), stall-due.Sub(before.Add(now.Sub(before)-stall-8*time.Millisecond)); got != want {
		t.Errorf("the silence is shorter by %v, want %v", got, want)
	}
	if w.age < stall {
		t.Errorf("what is read may be as old as %v, want %v", w.age, stall)
	}
}

func isKnock(m message) bool {
	_, ok := m.(knock)
	return ok
}

// TestAnswersTellHowLongTheyTake: however often a member is asked before it can have
// answered, and whatever is lost.
func TestAnswersTellHowLongTheyTake(t *testing.T) {
	const way = 700 * time.Millisecond // there and back
	for _, lost := range []int{0, 3} { // one of so many
		now := time.Unix(1000, 0)
		w, _ := crowdOf(3, now)
		type answer struct {
			at     time.Time
			id     weft.ID
			number uint16
		}
		var coming []answer
		for i, end := 0, now.Add(time.Minute); now.Before(end); now = now.Add(5 * time.Millisecond) {
			for len(coming) > 0 && !coming[0].at.After(now) {
				w.hear(now, coming[0].id)
				w.answer(now, coming[0].id, coming[0].number)
				coming = coming[1:]
			}
			w.advance(now)
			for _, e := range w.take() {
				if m, ok := e.m.(knock); ok {
					if i++; lost == 0 || i%lost != 0 {
						coming = append(coming, answer{now.Add(way), e.to[0], m.number})
					}
				}
			}
		}
		if w.slow < way*9/10 || w.slow > way*11/10 {
			t.Errorf("answers take %v, with every %dth question lost %v", way, lost, w.slow)
		}
	}
}

// TestOldMembersGetNoNumbers: they would not understand the question.
func TestOldMembersGetNoNumbers(t *testing.T) {
	now := time.Unix(1000, 0)
	w, _ := crowdOf(3, now)
	w.setOld(func(id weft.ID) bool { return id == nodeID(1) })
	asked := map[weft.ID]int{}
	for end := now.Add(time.Second); now.Before(end); now = now.Add(5 * time.Millisecond) {
		w.advance(now)
		for _, e := range w.take() {
			if m, ok := e.m.(knock); ok {
				asked[e.to[0]]++
				if (m.number == 0) != (e.to[0] == nodeID(1)) {
					t.Fatalf("question %d to %s", m.number, e.to[0])
				}
				w.hear(now, e.to[0])
				w.answer(now, e.to[0], m.number)
			}
		}
	}
	if len(asked) != 2 {
		t.Errorf("asked were %v", asked)
	}
}

// TestOldAnswersAreForgotten: what answers took counts no longer when none comes that
// tells it, and a question whose number was used again does not.
func TestOldAnswersAreForgotten(t *testing.T) {
	now := time.Unix(1000, 0)
	w, ids := crowdOf(3, now)
	w.slow, w.slowAt = time.Second, now
	for end := now.Add(15 * time.Second); now.Before(end); now = now.Add(50 * time.Millisecond) {
		for _, id := range ids {
			w.hear(now, id) // so nobody is asked
		}
		w.advance(now)
	}
	if w.slow > 100*time.Millisecond {
		t.Errorf("15 s after an answer that took a second %v are waited for", w.slow)
	}
	p := w.of[nodeID(1)]
	w.number, w.slow = 65525, 0
	w.knock(now, p)
	first := w.number
	for range len(w.questions) + 1 { // none has number 0
		w.knock(now, p)
	}
	if w.number == 0 || w.number >= first {
		t.Fatalf("%d questions after number %d comes %d", len(w.questions)+1, first, w.number)
	}
	if w.answer(now.Add(time.Second), nodeID(1), first); w.slow != 0 {
		t.Error("an answer counts whose question is forgotten")
	}
	if w.answer(now.Add(time.Second), nodeID(1), w.number); w.slow == 0 {
		t.Error("the last one does not count")
	}
}

// TestDearWordsFitTheStore: however long answers take, a node that has told nothing for
// long may tell all of a doubt, and of two deaths after it.
func TestDearWordsFitTheStore(t *testing.T) {
	for _, n := range []int{crowd + 2, 30, 60, 62, 63, 100, 200, 1000} {
		now := time.Unix(1000, 0)
		w, _ := crowdOf(n, now)
		now = now.Add(time.Hour)
		w.slow = slowMost
		if others := n - 2; !w.mayTell(now, others, 2*others) || !w.mayTell(now, others, askWords) || !w.mayTell(now, others, askWords) {
			t.Errorf("of %d members one cannot tell all: %.0f words are left", n, w.words)
		}
	}
}

// TestNumbersHaveOneForm: 0 is told by leaving it out.
func TestNumbersHaveOneForm(t *testing.T) {
	for _, kind := range []byte{kindKnock, kindKnocked} {
		for _, bad := range [][]byte{{kind, 0, 0}, {kind, 7}, {kind, 0, 7, 0}} {
			if m, err := decode(bad); err == nil {
				t.Errorf("%x is taken for %v", bad, m)
			}
		}
	}
}
