package dns

import (
	"hash/maphash"
	"math"
	"net/netip"
)

// table holds what the names of a shard mean as bytes that lie together: a question
// touches two or three lines of memory that way, where the maps of the zone cost it
// five and ten times the room. It is built from them, and what does not fit in is
// found in them. It is immutable.
type table struct {
	// slots are open to the next: 32 bits of the hash, and 1 + where in data; 0 =
	// none. At most half of them are taken.
	slots []uint64
	// data has for each name: its length, the number of addresses of either
	// family, the TTL (a byte each), the name, the addresses.
	data []byte
}

// maxInTable is the most addresses of a family that a name in the table has: more
// than a quick answer has room for.
const maxInTable = ednsSize / (rrHeadLen + 4)

func newTable(seed maphash.Seed, names map[string]*rrset) table {
	size := 2
	for size < 2*len(names) {
		size *= 2
	}
	t := table{slots: make([]uint64, size)}
	for name, set := range names {
		if len(name) > maxNameLen || len(set.v4) > maxInTable || len(set.v6) > maxInTable || set.ttl > math.MaxUint8 || len(t.data) >= math.MaxUint32-1 {
			continue
		}
		h := maphash.String(seed, name)
		i := h & uint64(size-1)
		for t.slots[i] != 0 {
			i = (i + 1) & uint64(size-1)
		}
		t.slots[i] = h>>32<<32 | uint64(len(t.data)+1)
		t.data = append(t.data, byte(len(name)), byte(len(set.v4)), byte(len(set.v6)), byte(set.ttl))
		t.data = append(t.data, name...)
		for _, addrs := range [][]netip.Addr{set.v4, set.v6} {
			for _, a := range addrs {
				t.data = append(t.data, a.AsSlice()...)
			}
		}
	}
	return t
}

// get returns the addresses of one family that name, of hash h, has, one behind the
// other; none if the table does not have it.
func (t *table) get(h uint64, name []byte, want6 bool) (addrs []byte, ttl uint32) {
	for i := h; ; i++ {
		slot := t.slots[i&uint64(len(t.slots)-1)]
		if slot == 0 {
			return nil, 0
		}
		if slot>>32 != h>>32 {
			continue
		}
		e := t.data[uint32(slot)-1:]
		n, v4, v6 := int(e[0]), 4*int(e[1]), 16*int(e[2])
		if string(e[4:4+n]) != string(name) {
			continue
		}
		if want6 {
			return e[4+n+v4:][:v6], uint32(e[3])
		}
		return e[4+n:][:v4], uint32(e[3])
	}
}
