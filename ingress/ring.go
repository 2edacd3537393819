package ingress

import (
	"hash/fnv"
)

// RingSizes are the slot counts of the balancers' rings, powers of two. A
// service takes the smallest ring with at least SlotsPerBackend slots for each
// of its backends, so that no backend gets more than a few percent over its
// share; the last size serves all larger services.
var RingSizes = [...]int{64, 1024, 16384}

// SlotsPerBackend is the least number of slots per backend: with Maglev's
// filling the shares then differ by at most one slot in eight.
const SlotsPerBackend = 8

// RingSize is the number of slots for n backends.
func RingSize(n int) int {
	for _, m := range RingSizes {
		if n*SlotsPerBackend <= m {
			return m
		}
	}
	return RingSizes[len(RingSizes)-1]
}

// Ring fills size slots (a power of two) with indexes into keys by Maglev's
// rule (Eisenbud et al., NSDI 2016, section 3.4): each key walks the slots in
// its own order and the keys take turns, so that shares differ by at most one
// slot, and adding or removing a key moves few slots of the others. The ring of
// no keys is nil. Duplicate keys are the caller's fault and each get a share.
func Ring(keys []string, size int) []int {
	if len(keys) == 0 || size <= 0 {
		return nil
	}
	offset, skip := make([]int, len(keys)), make([]int, len(keys))
	for i, k := range keys {
		h := fnv.New64a()
		h.Write([]byte(k))
		s := mix(h.Sum64())
		offset[i] = int(s % uint64(size))
		// An odd step is prime to a power of two: the walk visits all slots.
		skip[i] = int(s>>32%uint64(size)) | 1
	}
	ring := make([]int, size)
	for i := range ring {
		ring[i] = -1
	}
	next := make([]int, len(keys))
	for filled := 0; ; {
		for i := range keys {
			slot := (offset[i] + next[i]*skip[i]) % size
			for ring[slot] >= 0 {
				next[i]++
				slot = (offset[i] + next[i]*skip[i]) % size
			}
			ring[slot] = i
			next[i]++
			if filled++; filled == size {
				return ring
			}
		}
	}
}

// mix spreads FNV's weak high bits (the finaliser of splitmix64).
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}
