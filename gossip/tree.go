package gossip

import (
	"slices"

	"github.com/weftnet/weft"
)

// fanOut is the number of children in a tree: 200 members are three hops away.
const fanOut = 8

// Two trees of all members lead from every owner to all others. In the first
// the members stand in order behind the owner, in the second in reverse: who
// passes on in one is a leaf of the other, so that a loss near the root of one
// is made good by the other.

// children are to whom self passes on what comes from root in a tree (0 or 1).
// members are sorted; self must be one.
func children(members []weft.ID, root, self weft.ID, tree uint8) []weft.ID {
	r, ok := slices.BinarySearch(members, root)
	if !ok { // not yet known to be one
		members = slices.Insert(slices.Clone(members), r, root)
	}
	s, ok := slices.BinarySearch(members, self)
	if !ok {
		return nil
	}
	n := len(members)
	at := func(place int) int { // its own inverse, but for the root's place
		if tree == 0 || place == 0 {
			return place
		}
		return n - place
	}
	place := at((s - r + n) % n)
	var out []weft.ID
	for child := fanOut*place + 1; child <= fanOut*place+fanOut && child < n; child++ {
		out = append(out, members[(r+at(child))%n])
	}
	return out
}

// tellers are the two members that self tells of news in a round. They are far
// from self in the order, and others in each round: near it are those that
// share its parents in the trees, and its losses.
func tellers(members []weft.ID, self weft.ID, round int) []weft.ID {
	s, ok := slices.BinarySearch(members, self)
	n := len(members)
	if !ok || n < 2 {
		return nil
	}
	far := 1 + n/(3+2*round)
	if far%n == 0 {
		far = 1
	}
	a, b := members[(s+far)%n], members[(s-far%n+n)%n]
	if a == b {
		return []weft.ID{a}
	}
	return []weft.ID{a, b}
}
