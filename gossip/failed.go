package gossip

import (
	"time"

	"github.com/weftnet/weft"
)

// disputeFor is how long a member stays in sight at least that membership has given up and
// the watch has not; at most it is a tick more. Our own choice: the word has to get to the
// member, and its answer back, each by news of members (gossipInterval). Membership takes
// three times as long for its verdict as the watch, so a member that has died, and was ever
// heard of here, is out of sight when it comes.
const disputeFor = time.Second

// failures are the members that membership gives up, each with the moment until which it
// stays in sight. A verdict on one that the watch does not miss is of an old silence: a
// suspicion whose answer one node has not been told (see makeUp), which comes true there
// seconds after all is well. The member refutes it as soon as it is told.
type failures map[weft.ID]time.Time

// stays takes membership's word that a member has failed, and reports whether it stays in
// sight. inSight: it was until now, by membership; missed: the watch misses it.
func (f failures) stays(now time.Time, id weft.ID, inSight, missed bool) bool {
	until, ok := f[id]
	if !ok && inSight {
		until = now.Add(disputeFor)
	}
	if missed {
		until = time.Time{} // for good: the watch asks nothing of who is out of sight
	}
	f[id] = until
	return now.Before(until)
}

// settle takes membership's word that a member is alive, or is none any more.
func (f failures) settle(id weft.ID) { delete(f, id) }

func (f failures) has(id weft.ID) bool {
	_, ok := f[id]
	return ok
}
