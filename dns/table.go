package dns

import (
	"encoding/binary"
	"hash/maphash"
	"math"
	"net/netip"
)

// table holds what the names of a shard mean as bytes that lie together: a question
// touches two or three lines of memory that way, where the maps of the shard cost it
// five and ten times the room. It is built from them. It is immutable.
//
// A slot has slotTagBits of a name's hash, and where its entry lies, in units of
// entryAlign; 0 = free. A name is in the first slot that was free from its hash on, and
// at most half of them are taken.
type table struct {
	// mem has the slots, then the entries. It is a string because the header of
	// one, which has no capacity, lets a shard be half a line of memory.
	mem  string
	mask uint32 // number of slots - 1; the number is 2^n
	// isPart: some names found no room. A name that the table does not have is in
	// the maps, perhaps.
	isPart bool
}

// Our own choices for the layout of a table.
const (
	slotBytes   = 4
	slotTagBits = 12 // one of 4096 other names in a slot is compared in vain
	entryAlign  = 4
	entryHead   = 4
	maxTable    = entryAlign << (32 - slotTagBits) // bytes
	// maxInTable is the most addresses of a family that a name in the table has: more
	// than a quick answer has room for.
	maxInTable = ednsSize / (rrHeadLen + 4)
	// manyInTable, in place of a number, says that there are more, or that the TTL
	// finds no room.
	manyInTable = 0xff
)

// entry is a name in a table: its length, the number of addresses of either family, the
// TTL (a byte each), the name, the addresses.
type entry string

func newTable(seed maphash.Seed, names map[string]*rrset) table {
	size := 2
	for size < 2*len(names) {
		size *= 2
	}
	t := table{mask: uint32(size - 1)}
	room := size * slotBytes
	for name := range names {
		room += entryHead + len(name) + 16
	}
	mem := make([]byte, size*slotBytes, room)
	for name, set := range names {
		if len(name) > maxNameLen {
			continue // nobody can ask for it
		}
		for len(mem)%entryAlign != 0 {
			mem = append(mem, 0)
		}
		if len(mem) >= maxTable {
			t.isPart = true
			break
		}
		h := maphash.String(seed, name)
		i := uint32(h) & t.mask
		for binary.LittleEndian.Uint32(mem[i*slotBytes:]) != 0 {
			i = (i + 1) & t.mask
		}
		binary.LittleEndian.PutUint32(mem[i*slotBytes:], slotTag(h)|uint32(len(mem)/entryAlign))
		mem = appendEntry(mem, name, set)
	}
	t.mem = string(mem)
	return t
}

func appendEntry(mem []byte, name string, set *rrset) []byte {
	at := len(mem)
	mem = append(mem, byte(len(name)), manyInTable, manyInTable, 0)
	mem = append(mem, name...)
	if set.ttl > math.MaxUint8 {
		return mem
	}
	mem[at+3] = byte(set.ttl)
	for i, addrs := range [][]netip.Addr{set.v4, set.v6} {
		if len(addrs) > maxInTable {
			continue
		}
		mem[at+1+i] = byte(len(addrs))
		for _, a := range addrs {
			mem = append(mem, a.AsSlice()...)
		}
	}
	return mem
}

// slotTag is the part of a hash that stands in a slot.
func slotTag(h uint64) uint32 { return uint32(h>>32) &^ (1<<(32-slotTagBits) - 1) }

// slot is the one from the i-th on, as slots go round.
func (t *table) slot(i uint32) uint32 {
	b := t.mem[i&t.mask*slotBytes:]
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// at is where the entry of a slot begins.
func at(slot uint32) uint32 { return slot & (1<<(32-slotTagBits) - 1) * entryAlign }

// get finds name, of hash h; "" if the table does not have it.
func (t *table) get(h uint64, name []byte) entry {
	for i := uint32(h); ; i++ {
		slot := t.slot(i)
		if slot == 0 {
			return ""
		}
		if (slot^slotTag(h))>>(32-slotTagBits) != 0 {
			continue
		}
		e := t.mem[at(slot):]
		if n := int(e[0]); e[entryHead:entryHead+n] == string(name) {
			return entry(e)
		}
	}
}

// family gives the addresses of one family, one behind the other, how many they are,
// and how many there are of the other. Of manyInTable it gives none: the maps have them.
func (e entry) family(want6 bool) (addrs string, count, others int) {
	n, v4, v6 := int(e[0]), int(e[1]), int(e[2])
	begin := entryHead + n
	if !want6 {
		if v4 == manyInTable {
			return "", v4, v6
		}
		return string(e[begin:][:4*v4]), v4, v6
	}
	if v6 == manyInTable {
		return "", v6, v4
	}
	if v4 != manyInTable {
		begin += 4 * v4
	}
	return string(e[begin:][:16*v6]), v6, v4
}

// ttl is that of all its addresses.
func (e entry) ttl() uint32 { return uint32(e[3]) }
