package nft

import (
	"cmp"
	"hash/fnv"
	"math/bits"
	"slices"
)

// mostSeats is the largest number of seats, and so of backends that one service
// gives new flows to.
const mostSeats = 16384

// seatTries is how often a flow looks for a taken seat, by another hash each time,
// before it takes what is left to the empty one that it has come to. With at most
// half of the seats empty three tries leave every backend within one in eight of
// its share (TestSeatShares).
const seatTries = 3

// seating gives n backends the smallest power of two of seats that holds them. Each
// has one of its own; every other seat is empty and left to one backend, another
// one each. It is a function of the keys alone, in whatever order they stand.
//
// Where a ring wants some eight slots for each backend to be fair, this wants two
// at most, and a backend that goes moves its own flows and few others.
type seating struct {
	own  []int // by seat, the index of its key; -1 = empty
	heir []int // whom an empty seat is left to; -1 = it is taken
}

// seatCount is the number of seats for n backends.
func seatCount(n int) int {
	return min(1<<bits.Len(uint(max(n, 1)-1)), mostSeats)
}

// seat is the seating of the keys, which must differ; those for whom mostSeats has
// none left get none. There is none for no keys.
func seat(keys []string) seating {
	if len(keys) == 0 {
		return seating{}
	}
	size := seatCount(len(keys))
	guests := make([]guest, len(keys))
	for i, k := range keys {
		guests[i] = newGuest(i, k)
	}
	slices.SortFunc(guests, func(a, b guest) int {
		return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(keys[a.key], keys[b.key]))
	})
	s := seating{own: make([]int, size), heir: make([]int, size)}
	for i := range size {
		s.own[i], s.heir[i] = -1, -1
	}
	free := size
	for _, of := range [][]int{s.own, s.heir} {
		for i := range guests {
			if free == 0 {
				return s
			}
			g := &guests[i]
			for at := g.next(size); ; at = g.next(size) {
				if s.own[at] < 0 && s.heir[at] < 0 {
					of[at] = g.key
					free--
					break
				}
			}
		}
	}
	return s
}

// guest walks all seats in an order of its own. It begins where the upper bits of
// its hash point, as those of a flow's hash do: when the seats double, half of the
// flows find their backend at once.
type guest struct {
	key     int
	hash    uint64
	visited int
}

func newGuest(i int, key string) guest {
	h := fnv.New64a()
	h.Write([]byte(key))
	x := h.Sum64() // FNV's upper bits are weak: the finaliser of splitmix64
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return guest{key: i, hash: x ^ x>>31}
}

// next is the next seat of the walk; an odd step is prime to a power of two.
func (g *guest) next(size int) int {
	first := int(g.hash >> 32 * uint64(size) >> 32)
	g.visited++
	return (first + (g.visited-1)*(int(g.hash%mostSeats)|1)) % size
}
