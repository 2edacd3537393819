package gossip

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
)

// packed is an identifier as a number: NewID makes 25 digits in base 36 of 128
// random bits.
type packed [16]byte

const (
	idDigits  = 25
	chunkBase = 36 * 36 * 36 * 36 * 36 // five digits at a time
)

// pack says false of an identifier that no NewID has made; it travels as text.
func pack(id weft.ID) (packed, bool) {
	var p packed
	if len(id) != idDigits {
		return p, false
	}
	var hi, lo uint64
	for i := range idDigits {
		c := uint64(id[i])
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'z':
			c -= 'a' - 10
		default:
			return p, false
		}
		over, top := bits.Mul64(hi, 36)
		carry, low := bits.Mul64(lo, 36)
		low, c = bits.Add64(low, c, 0)
		top, c = bits.Add64(top, carry, c)
		if over+c > 0 {
			return p, false
		}
		hi, lo = top, low
	}
	binary.BigEndian.PutUint64(p[:8], hi)
	binary.BigEndian.PutUint64(p[8:], lo)
	return p, true
}

func (p packed) id() weft.ID {
	hi, lo := binary.BigEndian.Uint64(p[:8]), binary.BigEndian.Uint64(p[8:])
	var b [idDigits]byte
	for i := idDigits; i > 0; {
		var rest uint64
		hi, rest = hi/chunkBase, hi%chunkBase
		lo, rest = bits.Div64(rest, lo, chunkBase)
		for range 5 {
			i--
			b[i] = "0123456789abcdefghijklmnopqrstuvwxyz"[rest%36]
			rest /= 36
		}
	}
	return weft.ID(b[:])
}

// An identifier is a byte and what that announces: idPacked and 16 bytes, or
// idText plus a length and as many bytes.
const (
	idPacked   byte = 16
	idText     byte = 17
	maxIDBytes      = 64
)

func appendID(b []byte, id weft.ID) []byte {
	if p, ok := pack(id); ok {
		return append(append(b, idPacked), p[:]...)
	}
	return append(append(b, idText+byte(len(id))), id...)
}

func (d *decoder) id() weft.ID {
	tag := d.byte()
	if tag == idPacked {
		return d.packed().id()
	}
	if tag < idText || tag > idText+maxIDBytes {
		d.fail(fmt.Errorf("identifier begins with %#x", tag))
		return ""
	}
	id := weft.ID(d.bytes(uint64(tag - idText)))
	if _, ok := pack(id); ok {
		d.fail(fmt.Errorf("identifier %s is not packed", id))
	}
	return id
}

func (d *decoder) packed() (p packed) {
	copy(p[:], d.bytes(16))
	return p
}

// compareEntries is the order of entries in one table: what belongs together is
// near, so that differences are small.
func compareEntries(a, b weft.Endpoint) int {
	return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Slot, b.Slot), cmp.Compare(a.Task, b.Task),
		a.Addr.Compare(b.Addr), a.Addr6.Compare(b.Addr6), cmp.Compare(a.State, b.State))
}

// Entries of a table, in order, are packed by service:
//
//	groups: uvarint
//	group:  service, uvarint(entries<<3 | general<<2 | state)
//	entry of a plain group:   task (16), uvarint slot, varint address
//	entry of a general group: uvarint slot, address kind<<2 | state, task (as an identifier), addresses
//
// Slots are differences to the one before in the group; the addresses of plain
// groups, which are of IPv4 alone, to the one before in any. All entries of a
// plain group have the group's state; the head of a general one has none. There
// is one form of each set. How it is kept in memory: kept.go.
const (
	groupGeneral = 4
	groupShift   = 3

	addrFour = 0
	addrSix  = 1
	addrBoth = 2
)

// appendEntries packs entries, which are in order, without equal ones, and fit.
func appendEntries(b []byte, entries []weft.Endpoint) []byte {
	groups := uint64(0)
	for i := range entries {
		if i == 0 || entries[i].Service != entries[i-1].Service {
			groups++
		}
	}
	b = binary.AppendUvarint(b, groups)
	var addr int64
	for len(entries) > 0 {
		size := 1
		for size < len(entries) && entries[size].Service == entries[0].Service {
			size++
		}
		group := entries[:size]
		entries = entries[size:]
		b = appendID(b, group[0].Service)
		if isPlain(group) {
			b = binary.AppendUvarint(b, uint64(size)<<groupShift|uint64(group[0].State))
			b, addr = appendPlain(b, group, addr)
			continue
		}
		b = binary.AppendUvarint(b, uint64(size)<<groupShift|groupGeneral)
		b = appendGeneral(b, group)
	}
	return b
}

func isPlain(group []weft.Endpoint) bool {
	for _, e := range group {
		if _, ok := pack(e.Task); !ok || !e.Addr.Is4() || e.Addr6.IsValid() || e.State != group[0].State {
			return false
		}
	}
	return true
}

func appendPlain(b []byte, group []weft.Endpoint, addr int64) ([]byte, int64) {
	var slot uint64
	for _, e := range group {
		p, _ := pack(e.Task)
		b = append(b, p[:]...)
		b = binary.AppendUvarint(b, e.Slot-slot)
		a := e.Addr.As4()
		next := int64(binary.BigEndian.Uint32(a[:]))
		b = binary.AppendVarint(b, next-addr)
		slot, addr = e.Slot, next
	}
	return b, addr
}

func appendGeneral(b []byte, group []weft.Endpoint) []byte {
	var slot uint64
	for _, e := range group {
		kind := addrFour
		switch {
		case e.Addr6.IsValid():
			kind = addrBoth
		case e.Addr.Is6():
			kind = addrSix
		}
		b = binary.AppendUvarint(b, e.Slot-slot)
		b = append(b, byte(kind)<<2|byte(e.State))
		b = appendID(b, e.Task)
		b = append(append(b, e.Addr.AsSlice()...), e.Addr6.AsSlice()...)
		slot = e.Slot
	}
	return b
}

// Least bytes of an entry on the wire, so that memory follows what was sent.
const (
	plainBytes   = 18
	generalBytes = 7
)

// group reads the head of a group, and its size.
func (d *decoder) group() (head uint64, size int) {
	all := d.uvarint()
	head = all & (1<<groupShift - 1)
	n, least := all>>groupShift, uint64(plainBytes)
	if head&groupGeneral != 0 {
		least = generalBytes
	}
	if n == 0 || n > maxEntries || n*least > uint64(len(d.b)) {
		d.fail(fmt.Errorf("group of %d entries in %d bytes", n, len(d.b)))
		return 0, 0
	}
	if head > groupGeneral || head < groupGeneral && weft.EndpointState(head) > weft.EndpointDraining {
		d.fail(fmt.Errorf("group's head %d is unknown", head))
		return 0, 0
	}
	return head, int(n)
}

// plain reads an entry of a plain group: its task, how far its slot is from the one
// before, and its address, with that of the entry before.
func (d *decoder) plain(before uint32) (task packed, step uint64, addr uint32) {
	task, step = d.packed(), d.uvarint()
	to := int64(before) + d.varint()
	if to < 0 || to > 1<<32-1 {
		d.fail(fmt.Errorf("address %#x is none of IPv4", to))
		return packed{}, 0, 0
	}
	return task, step, uint32(to)
}

// entries reads what appendEntries made.
func (d *decoder) entries(network weft.ID) []weft.Endpoint {
	var out []weft.Endpoint
	var addr uint32
	for range d.count(2) {
		e := weft.Endpoint{Network: network, Service: d.id()}
		head, size := d.group()
		out = slices.Grow(out, size)
		if head&groupGeneral != 0 {
			for range size {
				out = append(out, d.general(&e))
			}
		} else {
			e.State = weft.EndpointState(head)
			for range size {
				task, step, to := d.plain(addr)
				e.Task, e.Slot, addr = task.id(), e.Slot+step, to
				e.Addr = fromUint32(addr)
				out = append(out, e)
			}
		}
		if d.err != nil {
			return nil
		}
	}
	return out
}

// general reads an entry of a general group. group has its service and network, and
// the slot of the entry before, which becomes this one's.
func (d *decoder) general(group *weft.Endpoint) weft.Endpoint {
	group.Slot += d.uvarint()
	e := *group
	flags := d.byte()
	e.State = weft.EndpointState(flags & 3)
	if e.State > weft.EndpointDraining {
		d.fail(fmt.Errorf("endpoint state %d is unknown", e.State))
	}
	e.Task = d.id()
	kind := flags >> 2
	if kind == addrFour || kind == addrBoth {
		e.Addr = netip.AddrFrom4([4]byte(d.exactly(4)))
	}
	switch six := &e.Addr; kind {
	case addrFour:
	case addrBoth:
		six = &e.Addr6
		fallthrough
	case addrSix:
		if *six = netip.AddrFrom16([16]byte(d.exactly(16))); six.Is4In6() {
			d.fail(fmt.Errorf("address %s is not of IPv6", *six))
		}
	default:
		d.fail(fmt.Errorf("address kind %d is unknown", kind))
	}
	return e
}

var errOrder = errors.New("services or entries are not in order")

// skipGeneral reads and checks entries of a general group; service is theirs.
func (d *decoder) skipGeneral(size int, e weft.Endpoint) {
	begin := d.b
	var group []weft.Endpoint
	for range size {
		next := d.general(&e)
		if d.err != nil {
			return
		}
		if n := len(group); n > 0 && compareEntries(group[n-1], next) >= 0 {
			d.fail(errOrder)
		}
		group = append(group, next)
	}
	if isPlain(group) {
		d.fail(errors.New("plain entries in a general group"))
	}
	if b := begin[:len(begin)-len(d.b)]; d.err == nil && !bytes.Equal(b, appendGeneral(nil, group)) {
		d.fail(errors.New("entries are not in their only form"))
	}
}

// exactly reads n bytes; after a failure they are zero.
func (d *decoder) exactly(n int) []byte {
	if b := d.bytes(uint64(n)); len(b) == n {
		return b
	}
	return make([]byte, n)
}

// fits reports whether an endpoint can be told to others, and changes addresses
// to the form they travel in.
func fits(e *weft.Endpoint) bool {
	e.Addr, e.Addr6 = e.Addr.Unmap(), e.Addr6.Unmap()
	e.Addr, e.Addr6 = e.Addr.WithZone(""), e.Addr6.WithZone("")
	switch {
	case !e.Network.Valid(), len(e.Task) > maxIDBytes, len(e.Service) > maxIDBytes, e.State > weft.EndpointDraining:
		return false
	case !e.Addr.IsValid():
		return false
	case e.Addr6.IsValid():
		return e.Addr.Is4() && e.Addr6.Is6()
	}
	return true
}
