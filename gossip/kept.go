package gossip

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"
	"sync"

	"github.com/weftnet/weft"
)

// A table of entries is kept in memory as
//
//	uvarint, the length of the bytes
//	bytes: by group, as on the wire: the tasks of a plain group, 16 each, or all of a general one
//	bits:  by group, the rest: which service, how many, slots and addresses
//
// without what the other tables of the network say, too. A service is a number of
// the network's dictionary, which goes on by one in a table that knows the same
// services in the same order. A service's tasks have been given addresses in
// order of their slots, so an address is foretold by the slot and the service's
// base, and only how far it is off is written, as a difference to the entry before.
// A number takes as few bits as it has, in one of five codes, each fit to the
// table's numbers of that kind: see bitWriter.number. No table: no bytes at all.
type kept struct {
	// In two pieces, since the allocator rounds up: the first fills its size class.
	first, rest string
}

// The kinds of number in bits, each with a code of its own.
const (
	ofService = iota // difference of the service's number to what it would be
	ofSize           // of a group, less 1
	ofSlot           // first slot of a group, less the least of the table
	ofStep           // further slots, less the one before
	ofAddr           // difference of what the address is off to that of the entry before
	kinds

	// These are not counted: whether the group is of the same head as the one
	// before, and the length of a general one.
	ofHead   = kinds
	ofLength = kinds + 1
)

// headCode is for the numbers that say the codes, and for lengths.
const headCode = 4

// keeper turns tables into what is kept. Its fields are room for one that is
// under way; a zero one is ready for use.
type keeper struct {
	groups []keptGroup
	slots  []uint64 // of plain entries
	addrs  []uint32 // of plain entries
	bytes  []byte
	coded  []codedNumber
	bits   bitWriter
	all    []byte
}

type keptGroup struct {
	service serviceID
	head    uint64 // as on the wire, without the size
	size    int
	length  int // of the bytes of a general group
}

type codedNumber struct {
	kind uint8
	v    uint64
}

// keep reads entries as they are on the wire and returns what to keep of them,
// and their number. Services that are new get numbers. It takes the one form of a
// set only: its owner's proof is over that, and must hold when we pass it on.
func (k *keeper) keep(d *decoder, network weft.ID, n *dictionary) (kept, int) {
	count := k.read(d, network)
	if d.err != nil || count == 0 {
		return kept{}, 0
	}
	k.coded = k.coded[:0]
	least := k.leastSlot()
	next, head, at, off := 0, uint64(weft.EndpointReady), 0, uint32(0)
	for _, g := range k.groups {
		var base uint32
		if g.head&groupGeneral == 0 {
			base = k.addrs[at] - uint32(k.slots[at])
		}
		number := n.number(g.service, base)
		k.code(ofService, fold(int64(number-next)))
		k.code(ofSize, uint64(g.size-1))
		k.code(ofHead, g.head^head)
		next, head = number+1, g.head
		if g.head&groupGeneral != 0 {
			k.code(ofLength, uint64(g.length))
			continue
		}
		base = n.bases[number]
		for i := range g.size {
			if slot := k.slots[at]; i == 0 {
				k.code(ofSlot, slot-least)
			} else {
				k.code(ofStep, slot-k.slots[at-1])
			}
			is := k.addrs[at] - uint32(k.slots[at]) - base
			k.code(ofAddr, fold(int64(int32(is-off))))
			off = is
			at++
		}
	}
	return k.write(least), count
}

func (k *keeper) leastSlot() uint64 {
	least, at := ^uint64(0), 0
	for _, g := range k.groups {
		if g.head&groupGeneral == 0 {
			least = min(least, k.slots[at])
			at += g.size
		}
	}
	if at == 0 {
		return 0
	}
	return least
}

func (k *keeper) code(kind uint8, v uint64) { k.coded = append(k.coded, codedNumber{kind, v}) }

// write puts bytes and numbers together.
func (k *keeper) write(least uint64) kept {
	var lengths [kinds][65]int
	for _, c := range k.coded {
		if c.kind < kinds {
			lengths[c.kind][bits.Len64(c.v)]++
		}
	}
	var codes [kinds]uint
	w := &k.bits
	w.reset()
	w.number(uint64(len(k.groups)), headCode)
	w.number(least, headCode)
	for i := range codes {
		codes[i] = bestCode(&lengths[i])
		w.put(uint64(codes[i]), 6)
	}
	for _, c := range k.coded {
		switch c.kind {
		case ofHead:
			w.head(c.v)
		case ofLength:
			w.number(c.v, headCode)
		default:
			w.number(c.v, codes[c.kind])
		}
	}
	k.all = binary.AppendUvarint(k.all[:0], uint64(len(k.bytes)))
	k.all = append(append(k.all, k.bytes...), w.end()...)
	return inPieces(k.all)
}

// read takes a table from the wire apart and returns how many entries it has.
func (k *keeper) read(d *decoder, network weft.ID) (count int) {
	k.groups, k.slots, k.addrs, k.bytes = k.groups[:0], k.slots[:0], k.addrs[:0], k.bytes[:0]
	var addr uint32
	for i := range d.count(2) {
		g := keptGroup{service: d.serviceID()}
		if i > 0 && g.service.compare(k.groups[i-1].service) <= 0 {
			d.fail(errOrder)
		}
		g.head, g.size = d.group()
		if g.head&groupGeneral == 0 {
			addr = k.readPlain(d, g.size, addr)
		} else {
			begin := d.b
			d.skipGeneral(g.size, weft.Endpoint{Network: network, Service: g.service.id()})
			if d.err == nil {
				g.length = len(begin) - len(d.b)
				k.bytes = append(k.bytes, begin[:g.length]...)
			}
		}
		if d.err != nil {
			return 0
		}
		count += g.size
		k.groups = append(k.groups, g)
	}
	return count
}

// readPlain reads and checks the entries of a plain group. addr is the address before.
func (k *keeper) readPlain(d *decoder, size int, addr uint32) uint32 {
	var slot uint64
	var last packed
	for i := range size {
		task, step, to := d.plain(addr)
		if order := bytes.Compare(last[:], task[:]); i > 0 && step == 0 && (order > 0 || order == 0 && to <= addr) {
			d.fail(errOrder)
		}
		if d.err != nil {
			return 0
		}
		slot, addr, last = slot+step, to, task
		k.slots, k.addrs = append(k.slots, slot), append(k.addrs, addr)
		k.bytes = append(k.bytes, task[:]...)
	}
	return addr
}

// sizeClasses are the sizes in which the allocator gives memory, up to bigSize, in order. They
// are asked for, not known: append takes all that it is given.
var sizeClasses = sync.OnceValue(func() (out []int) {
	for n := 1; n <= bigSize; n = out[len(out)-1] + 1 {
		out = append(out, cap(slices.Grow([]byte(nil), n)))
	}
	return out
})

const (
	// bigSize and more is given in multiples of bigStep.
	bigSize, bigStep = 32 << 10, 8 << 10
	// spareBytes are not worth a second piece.
	spareBytes = 16
)

// inPieces cuts b so that little room is wasted: of 3,600 bytes in one piece the
// allocator makes 4,096.
func inPieces(b []byte) kept {
	n := len(b)
	below, above := n/bigStep*bigStep, (n+bigStep-1)/bigStep*bigStep
	if n < bigSize {
		all := sizeClasses()
		i, _ := slices.BinarySearch(all, n)
		below, above = 0, all[i]
		if i > 0 {
			below = all[i-1]
		}
	}
	if above-n < spareBytes {
		below = n
	}
	return kept{string(b[:below]), string(b[below:])}
}

// size is what is kept, in bytes.
func (k kept) size() int { return len(k.first) + len(k.rest) }

// entries are those that are kept, in order.
func (k kept) entries(network weft.ID, count int, n services) []weft.Endpoint {
	r := k.open(n)
	out := make([]weft.Endpoint, 0, count)
	for range r.groups {
		number, head, size := r.group()
		e := weft.Endpoint{Network: network, Service: n.ids[number], State: weft.EndpointState(head & 3)}
		if head&groupGeneral != 0 {
			d := &decoder{b: r.general()}
			for range size {
				out = append(out, d.general(&e))
			}
			continue
		}
		for i := range size {
			task, addr := r.plain(i, number, &e.Slot)
			e.Task, e.Addr = task.id(), fromUint32(addr)
			out = append(out, e)
		}
	}
	return out
}

// appendWire appends what is kept as it is on the wire.
func (k kept) appendWire(b []byte, n services) []byte {
	r := k.open(n)
	b = binary.AppendUvarint(slices.Grow(b, 2*k.size()), uint64(r.groups))
	var last uint32
	for range r.groups {
		number, head, size := r.group()
		b = binary.AppendUvarint(n.appendID(b, number), uint64(size)<<groupShift|head)
		if head&groupGeneral != 0 {
			b = append(b, r.general()...)
			continue
		}
		var slot uint64
		for i := range size {
			before := slot
			task, addr := r.plain(i, number, &slot)
			b = binary.AppendUvarint(append(b, task[:]...), slot-before)
			b = binary.AppendVarint(b, int64(addr)-int64(last))
			last = addr
		}
	}
	return b
}

// keptReader reads what a keeper has written, and nothing else: it does not check.
type keptReader struct {
	bytes  []byte
	bits   bitReader
	bases  []uint32
	groups int // of all
	least  uint64
	codes  [kinds]uint
	next   int // the number of a service that goes on as foretold
	head   uint64
	off    uint32
}

func (k kept) open(n services) *keptReader {
	r := &keptReader{bases: n.bases, head: uint64(weft.EndpointReady)}
	if k.size() == 0 {
		return r
	}
	// Eight more bytes, so that bits can be read eight bytes at a time.
	all := make([]byte, k.size()+8)
	copy(all[copy(all, k.first):], k.rest)
	length, at := binary.Uvarint(all)
	r.bytes = all[at:][:length]
	r.bits = bitReader{b: all[at+int(length):]}
	r.groups = int(r.bits.number(headCode))
	r.least = r.bits.number(headCode)
	for i := range r.codes {
		r.codes[i] = uint(r.bits.take(6))
	}
	return r
}

func (r *keptReader) number(kind int) uint64 { return r.bits.number(r.codes[kind]) }

// group is the next one's service, head and size.
func (r *keptReader) group() (number int, head uint64, size int) {
	number = r.next + int(unfold(r.number(ofService)))
	size = 1 + int(r.number(ofSize))
	r.head ^= r.bits.head()
	r.next = number + 1
	return number, r.head, size
}

// general are the bytes of a general group.
func (r *keptReader) general() []byte { return r.cut(int(r.bits.number(headCode))) }

func (r *keptReader) cut(n int) (out []byte) {
	out, r.bytes = r.bytes[:n:n], r.bytes[n:]
	return out
}

// plain is the i-th entry of a plain group. slot is that of the entry before, and
// becomes its own.
func (r *keptReader) plain(i, number int, slot *uint64) (task packed, addr uint32) {
	if i == 0 {
		*slot = r.least + r.number(ofSlot)
	} else {
		*slot += r.number(ofStep)
	}
	r.off += uint32(unfold(r.number(ofAddr)))
	return packed(r.cut(len(task))), r.bases[number] + uint32(*slot) + r.off
}

func fromUint32(a uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, a)))
}

// fold makes a number of few bits of one that is near zero on either side.
func fold(v int64) uint64 { return uint64(v<<1) ^ uint64(v>>63) }

func unfold(u uint64) int64 { return int64(u>>1) ^ -int64(u&1) }
