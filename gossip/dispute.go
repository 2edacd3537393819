package gossip

import (
	"time"

	"github.com/weftnet/weft"
)

// disputeFor is how long a member stays in sight that membership has given up and the watch
// has not, our own choice: the word has to get to the member, and its answer back, each by
// news of members (gossipInterval). Membership takes four times as long for its verdict
// as the watch, so a member that is dead is out of sight when it comes.
const disputeFor = time.Second

// disputes are the members that membership says have failed while the watch does not miss
// them, with the moment until which they stay in sight. Such a verdict is of an old
// silence: a suspicion whose answer one node has not been told (see makeUp), which comes true
// there seconds after all is well. The member refutes it as soon as it is told.
type disputes map[weft.ID]time.Time

// stays takes membership's word that a member has failed, and reports whether it stays in
// sight. inSight: it was until now, by membership; missed: the watch misses it.
func (d disputes) stays(now time.Time, id weft.ID, inSight, missed bool) bool {
	until, ok := d[id]
	if !ok && inSight {
		until = now.Add(disputeFor)
	}
	if missed {
		until = time.Time{} // for good: the watch asks nothing of who is out of sight
	}
	d[id] = until
	return now.Before(until)
}

// settle takes membership's word that a member is alive, or is none any more.
func (d disputes) settle(id weft.ID) { delete(d, id) }
