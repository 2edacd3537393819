package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/weftnet/weft"
)

// stamp orders the states of one owner's table: epochs count its starts,
// counters its writes since. Zero means "nothing".
type stamp struct {
	epoch, counter uint64
}

func (s stamp) newer(t stamp) bool {
	return s.epoch > t.epoch || (s.epoch == t.epoch && s.counter > t.counter)
}

// message is what nodes say about tables. The sender is known from the frame.
type message interface{ isMessage() }

type (
	// table is the sender's own table, whole.
	table struct {
		stamp   stamp
		entries []weft.Endpoint
	}
	// have announces the stamp of the sender's table.
	have struct{ stamp stamp }
	// want asks the receiver for its table, unless that still has this stamp.
	want struct{ stamp stamp }
	// digest compares all that sender and receiver know: stamp is of the
	// sender's own table, tables a hash over every live owner's stamp, live
	// a hash over the live members.
	digest struct {
		stamp        stamp
		tables, live uint64
	}
	// vector lists the stamps of every live owner the sender knows a table
	// of, and of the receiver's.
	vector struct {
		reply bool // the sender would like the receiver's vector
		items []vectorItem
	}
	vectorItem struct {
		owner weft.ID
		stamp stamp
	}
	// knock asks a member thought dead for a sign of life, knocked is it.
	knock   struct{}
	knocked struct{}
)

func (*table) isMessage()  {}
func (have) isMessage()    {}
func (want) isMessage()    {}
func (digest) isMessage()  {}
func (*vector) isMessage() {}
func (knock) isMessage()   {}
func (knocked) isMessage() {}

// Kinds of message, version 1 of the format. Numbers are never used again.
const (
	kindTable   byte = 1
	kindHave    byte = 2
	kindWant    byte = 3
	kindDigest  byte = 4
	kindVector  byte = 5
	kindKnock   byte = 6
	kindKnocked byte = 7
)

// Bounds of the decoder: what a node can run is far below, and a sender that
// knows the key cannot make us take more memory than it sends.
const (
	maxIDBytes = 64
	maxEntries = 1 << 17
)

// encode appends m to b. Numbers are uvarints, strings have their length
// before them, hashes are 8 bytes, big endian. A table names each network and
// service once and refers to it by position. The addresses of an entry are 4
// bytes, 16, or both one after the other; builds that know one address for each
// entry refuse a table with both.
func encode(b []byte, m message) []byte {
	switch m := m.(type) {
	case *table:
		return encodeTable(append(b, kindTable), m)
	case have:
		return appendStamp(append(b, kindHave), m.stamp)
	case want:
		return appendStamp(append(b, kindWant), m.stamp)
	case digest:
		b = appendStamp(append(b, kindDigest), m.stamp)
		b = binary.BigEndian.AppendUint64(b, m.tables)
		return binary.BigEndian.AppendUint64(b, m.live)
	case *vector:
		b = append(b, kindVector, 0)
		if m.reply {
			b[len(b)-1] = 1
		}
		b = binary.AppendUvarint(b, uint64(len(m.items)))
		for _, it := range m.items {
			b = appendStamp(appendString(b, string(it.owner)), it.stamp)
		}
		return b
	case knock:
		return append(b, kindKnock)
	case knocked:
		return append(b, kindKnocked)
	}
	panic(fmt.Sprintf("encode gossip message: unknown type %T", m))
}

func appendStamp(b []byte, s stamp) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(b, s.epoch), s.counter)
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func encodeTable(b []byte, t *table) []byte {
	b = appendStamp(b, t.stamp)
	index := map[weft.ID]uint64{}
	var names []weft.ID
	for _, e := range t.entries {
		for _, id := range [2]weft.ID{e.Network, e.Service} {
			if _, ok := index[id]; !ok {
				index[id] = uint64(len(names))
				names = append(names, id)
			}
		}
	}
	b = binary.AppendUvarint(b, uint64(len(names)))
	for _, n := range names {
		b = appendString(b, string(n))
	}
	b = binary.AppendUvarint(b, uint64(len(t.entries)))
	for _, e := range t.entries {
		b = binary.AppendUvarint(b, index[e.Network])
		b = binary.AppendUvarint(b, index[e.Service])
		b = appendString(b, string(e.Task))
		b = binary.AppendUvarint(b, e.Slot)
		b = append(b, byte(e.State))
		b = appendString(b, string(append(e.Addr.Unmap().AsSlice(), e.Addr6.AsSlice()...)))
	}
	return b
}

var errTruncated = errors.New("message is cut off")

// decoder reads a message; after the first failure it reads zeros.
type decoder struct {
	b   []byte
	err error
}

// decode reads exactly one message. Whatever it returns without an error
// encodes to bytes that decode to the same.
func decode(b []byte) (message, error) {
	if len(b) == 0 {
		return nil, errTruncated
	}
	d := &decoder{b: b[1:]}
	var m message
	switch b[0] {
	case kindTable:
		m = d.table()
	case kindHave:
		m = have{d.stamp()}
	case kindWant:
		m = want{d.stamp()}
	case kindDigest:
		m = digest{stamp: d.stamp(), tables: d.uint64(), live: d.uint64()}
	case kindVector:
		m = d.vector()
	case kindKnock:
		m = knock{}
	case kindKnocked:
		m = knocked{}
	default:
		return nil, fmt.Errorf("message of unknown kind %d", b[0])
	}
	if d.err == nil && len(d.b) > 0 {
		d.err = fmt.Errorf("message has %d bytes too many", len(d.b))
	}
	if d.err != nil {
		return nil, d.err
	}
	return m, nil
}

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err, d.b = err, nil
	}
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail(errTruncated)
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) bytes(n uint64) []byte {
	if n > uint64(len(d.b)) {
		d.fail(errTruncated)
		return nil
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) byte() byte {
	if b := d.bytes(1); len(b) == 1 {
		return b[0]
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if b := d.bytes(8); len(b) == 8 {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) stamp() stamp { return stamp{d.uvarint(), d.uvarint()} }

func (d *decoder) id() weft.ID {
	n := d.uvarint()
	if n > maxIDBytes {
		d.fail(fmt.Errorf("identifier of %d bytes, limit %d", n, maxIDBytes))
		return ""
	}
	return weft.ID(d.bytes(n))
}

// count reads a number of items of at least size bytes each, so that what is
// allocated for them follows what was sent.
func (d *decoder) count(size int) int {
	n := d.uvarint()
	if n > maxEntries || n*uint64(size) > uint64(len(d.b)) {
		d.fail(fmt.Errorf("%d items in %d bytes", n, len(d.b)))
		return 0
	}
	return int(n)
}

func (d *decoder) vector() *vector {
	flag := d.byte()
	if flag > 1 {
		d.fail(fmt.Errorf("unknown flags %#x of a vector", flag))
	}
	v := &vector{reply: flag == 1, items: make([]vectorItem, d.count(3))}
	for i := range v.items {
		v.items[i] = vectorItem{d.id(), d.stamp()}
	}
	return v
}

func (d *decoder) table() *table {
	t := &table{stamp: d.stamp()}
	names := make([]weft.ID, d.count(1))
	for i := range names {
		names[i] = d.id()
	}
	name := func() weft.ID {
		i := d.uvarint()
		if i >= uint64(len(names)) {
			d.fail(fmt.Errorf("name %d of %d", i, len(names)))
			return ""
		}
		return names[i]
	}
	t.entries = make([]weft.Endpoint, d.count(6))
	for i := range t.entries {
		e := &t.entries[i]
		e.Network, e.Service, e.Task = name(), name(), d.id()
		e.Slot = d.uvarint()
		e.State = weft.EndpointState(d.byte())
		if e.State > weft.EndpointDraining {
			d.fail(fmt.Errorf("endpoint state %d is unknown", e.State))
		}
		e.Addr, e.Addr6 = d.addrs()
	}
	return t
}

// addrs reads the addresses of an entry.
func (d *decoder) addrs() (first, second netip.Addr) {
	raw := d.bytes(d.uvarint())
	if len(raw) == 4+16 {
		if second = netip.AddrFrom16([16]byte(raw[4:])); second.Is4In6() {
			d.fail(fmt.Errorf("second address %s is not of IPv6", second))
			return netip.Addr{}, netip.Addr{}
		}
		raw = raw[:4]
	}
	first, ok := netip.AddrFromSlice(raw)
	if d.err == nil && !ok {
		d.fail(fmt.Errorf("address of %d bytes", len(raw)))
	}
	return first.Unmap(), second
}
