package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/weftnet/weft"
)

// stamp orders the states of one owner's tables: epochs count its starts,
// counters its writes since. Zero means "nothing".
type stamp struct {
	epoch, counter uint64
}

func (s stamp) newer(t stamp) bool {
	return s.epoch > t.epoch || (s.epoch == t.epoch && s.counter > t.counter)
}

// message is what nodes say about tables. The sender is known from the frame or
// from its certificate.
type message interface{ isMessage() }

type (
	// update is a part of a new state of one table, perhaps passed on by a
	// third node. The parts together are a body: see openBody.
	update struct {
		tree           uint8 // 0 and 1: to be passed on in that tree
		network, owner weft.ID
		stamp          stamp
		part, parts    uint64
		body           []byte
	}
	// have tells stamps that the sender knows.
	have struct {
		// full: these are all that the sender knows of these networks, and it
		// waits for what it lacks, and a done. Else they are news, and the
		// hashes, where not 0, are over all.
		full bool
		nets []netStamps
	}
	// want asks for tables that are newer than these stamps.
	want struct{ nets []netStamps }
	// netStamps are of one network; "" is of what owners are attached to.
	netStamps struct {
		network weft.ID
		hash    uint64
		items   []ownerStamp
	}
	ownerStamp struct {
		owner weft.ID
		stamp stamp
	}
	// cold compares all that sender and receiver share: tables is a hash over
	// the stamps of live owners on networks of both, live one over the live
	// members.
	cold struct {
		tables uint64
		live   uint32
	}
	// done ends the answer to a full have.
	done struct{}
	// knock asks a member for a sign of life, knocked is it, with the number of the
	// question; 0: it had none.
	knock   struct{ number uint16 }
	knocked struct{ number uint16 }
	// doubt says that nothing was heard of a member for that long, and asks who
	// hears it; vouch answers that it was heard just now.
	doubt struct {
		about   weft.ID
		silence time.Duration // in milliseconds on the wire
	}
	vouch struct{ about weft.ID }
)

func (*update) isMessage() {}
func (*have) isMessage()   {}
func (*want) isMessage()   {}
func (cold) isMessage()    {}
func (done) isMessage()    {}
func (knock) isMessage()   {}
func (knocked) isMessage() {}
func (doubt) isMessage()   {}
func (vouch) isMessage()   {}

// Kinds of message, version 2 of the format. Version 1 had 1 to 7. Numbers are
// never used again.
const (
	kindUpdate  byte = 8
	kindHave    byte = 9
	kindWant    byte = 10
	kindCold    byte = 11
	kindDone    byte = 12
	kindKnock   byte = 13
	kindKnocked byte = 14
	kindDoubt   byte = 15
	kindVouch   byte = 16
)

// noTree is the tree of an update that is not passed on.
const noTree = 2

// Bounds of the decoder: what a node can run is far below, and a sender that
// knows the key cannot make us take more memory than it sends.
const (
	maxEntries   = 1 << 17
	maxBodyBytes = 6 << 20 // on a stream, in one part
	maxParts     = 64      // of a body that goes by datagrams
	maxSilence   = 1 << 16 // of a doubt, in milliseconds
)

// encode appends m to b. Numbers are uvarints, hashes big endian.
func encode(b []byte, m message) []byte {
	switch m := m.(type) {
	case *update:
		b = append(b, kindUpdate, m.tree)
		b = appendStamp(appendID(appendID(b, m.network), m.owner), m.stamp)
		b = binary.AppendUvarint(binary.AppendUvarint(b, m.part), m.parts)
		return append(b, m.body...)
	case *have:
		b = append(b, kindHave, 0)
		if m.full {
			b[len(b)-1] = 1
		}
		return appendNets(b, m.nets)
	case *want:
		return appendNets(append(b, kindWant), m.nets)
	case cold:
		b = binary.BigEndian.AppendUint64(append(b, kindCold), m.tables)
		return binary.BigEndian.AppendUint32(b, m.live)
	case done:
		return append(b, kindDone)
	case knock:
		return appendNumber(append(b, kindKnock), m.number)
	case knocked:
		return appendNumber(append(b, kindKnocked), m.number)
	case doubt:
		return binary.AppendUvarint(appendID(append(b, kindDoubt), m.about), uint64(m.silence/time.Millisecond))
	case vouch:
		return appendID(append(b, kindVouch), m.about)
	}
	panic(fmt.Sprintf("encode gossip message: unknown type %T", m))
}

// appendNumber adds the number of a question, if it has one.
func appendNumber(b []byte, n uint16) []byte {
	if n == 0 {
		return b
	}
	return binary.BigEndian.AppendUint16(b, n)
}

func appendStamp(b []byte, s stamp) []byte {
	return binary.AppendUvarint(binary.BigEndian.AppendUint64(b, s.epoch), s.counter)
}

func appendNets(b []byte, nets []netStamps) []byte {
	b = binary.AppendUvarint(b, uint64(len(nets)))
	for _, n := range nets {
		b = binary.BigEndian.AppendUint64(appendID(b, n.network), n.hash)
		b = binary.AppendUvarint(b, uint64(len(n.items)))
		for _, it := range n.items {
			b = appendStamp(appendID(b, it.owner), it.stamp)
		}
	}
	return b
}

var errTruncated = errors.New("message is cut off, or a number is not in its only form")

// decoder reads a message; after the first failure it reads zeros.
type decoder struct {
	b   []byte
	err error
}

// decode reads exactly one message, which keeps b. Whatever it returns without
// an error encodes to bytes that decode to the same.
func decode(b []byte) (message, error) {
	if len(b) == 0 {
		return nil, errTruncated
	}
	d := &decoder{b: b[1:]}
	var m message
	switch b[0] {
	case kindUpdate:
		m = d.update()
	case kindHave:
		flag := d.byte()
		if flag > 1 {
			d.fail(fmt.Errorf("unknown flags %#x of a have", flag))
		}
		m = &have{flag == 1, d.nets()}
	case kindWant:
		m = &want{d.nets()}
	case kindCold:
		m = cold{d.uint64(), binary.BigEndian.Uint32(d.exactly(4))}
	case kindDone:
		m = done{}
	case kindKnock:
		m = knock{d.number()}
	case kindKnocked:
		m = knocked{d.number()}
	case kindDoubt:
		m = d.doubt()
	case kindVouch:
		m = vouch{d.id()}
	default:
		return nil, fmt.Errorf("message of unknown kind %d", b[0])
	}
	if err := d.end(); err != nil {
		return nil, err
	}
	return m, nil
}

// end says what is wrong with what was read, and that nothing may be left.
func (d *decoder) end() error {
	if d.err == nil && len(d.b) > 0 {
		d.err = fmt.Errorf("message has %d bytes too many", len(d.b))
	}
	return d.err
}

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err, d.b = err, nil
	}
}

// uvarint takes no number that could be shorter: there is one form of each.
func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 || n > 1 && d.b[n-1] == 0 {
		d.fail(errTruncated)
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) varint() int64 {
	u := d.uvarint() // as encoding/binary folds the sign
	v := int64(u >> 1)
	if u&1 != 0 {
		v = ^v
	}
	return v
}

func (d *decoder) bytes(n uint64) []byte {
	if n > uint64(len(d.b)) {
		d.fail(errTruncated)
		return nil
	}
	out := d.b[:n:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) byte() byte { return d.exactly(1)[0] }

func (d *decoder) uint64() uint64 { return binary.BigEndian.Uint64(d.exactly(8)) }

func (d *decoder) stamp() stamp { return stamp{d.uint64(), d.uvarint()} }

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

func (d *decoder) update() *update {
	m := &update{tree: d.byte(), network: d.id(), owner: d.id(), stamp: d.stamp(), part: d.uvarint(), parts: d.uvarint()}
	switch {
	case m.tree > noTree:
		d.fail(fmt.Errorf("update for tree %d", m.tree))
	case m.parts < 1 || m.parts > maxParts || m.part >= m.parts:
		d.fail(fmt.Errorf("part %d of %d", m.part, m.parts))
	case len(d.b) == 0 || len(d.b) > maxBodyBytes:
		d.fail(fmt.Errorf("update of %d bytes, limit %d", len(d.b), maxBodyBytes))
	}
	m.body = d.bytes(uint64(len(d.b)))
	return m
}

func (d *decoder) doubt() doubt {
	about, ms := d.id(), d.uvarint()
	if ms > maxSilence {
		d.fail(fmt.Errorf("silence of %d ms", ms))
	}
	return doubt{about, time.Duration(ms) * time.Millisecond}
}

// number reads that of a question. None is told by leaving it out, so 0 is refused: there is
// one form of each.
func (d *decoder) number() uint16 {
	if len(d.b) == 0 {
		return 0
	}
	n := binary.BigEndian.Uint16(d.exactly(2))
	if n == 0 {
		d.fail(errors.New("question of number 0"))
	}
	return n
}

func (d *decoder) nets() []netStamps {
	nets := make([]netStamps, d.count(10))
	for i := range nets {
		n := &nets[i]
		n.network, n.hash = d.id(), d.uint64()
		n.items = make([]ownerStamp, d.count(10))
		for j := range n.items {
			n.items[j] = ownerStamp{d.id(), d.stamp()}
		}
	}
	return nets
}

// body is the new state of a table and its owner's word for it:
//
//	proof: a byte with its length (0 or proofBytes), and the proof
//	kind:  a byte
//	whole: entries; attached: see attachment; delta: stamp it is based on, steps
//
// The proof is over the whole new state, however it is told (digestOf).
type body struct {
	proof   []byte
	kind    byte
	base    stamp  // of a delta
	content []byte // what follows
}

const (
	bodyWhole    byte = 1
	bodyDelta    byte = 2
	bodyAttached byte = 3

	// proofBytes is the length of a signature by ECDSA P-256.
	proofBytes = 64
)

func (o body) encode() []byte {
	b := append([]byte{byte(len(o.proof))}, o.proof...)
	b = append(b, o.kind)
	if o.kind == bodyDelta {
		b = appendStamp(b, o.base)
	}
	return append(b, o.content...)
}

func openBody(b []byte) (body, error) {
	d := &decoder{b: b}
	var o body
	n := d.byte()
	if n != 0 && n != proofBytes {
		return o, fmt.Errorf("proof of %d bytes", n)
	}
	o.proof = d.bytes(uint64(n))
	if o.kind = d.byte(); o.kind == bodyDelta {
		o.base = d.stamp()
	}
	if d.err == nil && (o.kind < bodyWhole || o.kind > bodyAttached) {
		d.fail(fmt.Errorf("body of unknown kind %d", o.kind))
	}
	o.content = d.b
	return o, d.err
}

// attachment is the content of an owner's table of network "": what it is
// attached to, and the certificate that proves its tables.
type attachment struct {
	nets []weft.ID // sorted
	cert []byte    // DER
}

func (a attachment) encode() []byte {
	b := binary.AppendUvarint(nil, uint64(len(a.nets)))
	for _, n := range a.nets {
		b = appendID(b, n)
	}
	return append(b, a.cert...)
}

func openAttachment(b []byte) (attachment, error) {
	d := &decoder{b: b}
	a := attachment{nets: make([]weft.ID, d.count(1))}
	for i := range a.nets {
		if a.nets[i] = d.id(); i > 0 && a.nets[i] <= a.nets[i-1] || a.nets[i] == "" {
			d.fail(fmt.Errorf("networks are not in order: %q", a.nets[i]))
		}
	}
	a.cert = d.b
	return a, d.err
}

func (a attachment) has(network weft.ID) bool {
	_, ok := slices.BinarySearch(a.nets, network)
	return ok
}

// step changes a table: entries of the tasks gone and set go, those in set come.
type step struct {
	gone []weft.ID
	set  []weft.Endpoint // in order
}

func (s step) append(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(s.gone)))
	for _, id := range s.gone {
		b = appendID(b, id)
	}
	return appendEntries(b, s.set)
}

func (d *decoder) step(network weft.ID) step {
	s := step{gone: make([]weft.ID, d.count(1))}
	for i := range s.gone {
		s.gone[i] = d.id()
	}
	s.set = d.entries(network)
	return s
}

// difference is the step from one set of entries to another, both in order.
func difference(from, to []weft.Endpoint) step {
	var s step
	before := map[weft.Endpoint]bool{}
	for _, e := range from {
		before[e] = true
	}
	touched := map[weft.ID]bool{}
	for _, e := range to {
		if !before[e] {
			touched[e.Task] = true
		}
		delete(before, e)
	}
	for e := range before {
		touched[e.Task] = true
	}
	kept := map[weft.ID]bool{}
	for _, e := range to {
		if touched[e.Task] {
			s.set = append(s.set, e)
			kept[e.Task] = true
		}
	}
	for id := range touched {
		if !kept[id] {
			s.gone = append(s.gone, id)
		}
	}
	slices.Sort(s.gone)
	return s
}

// apply returns entries after s.
func (s step) apply(entries []weft.Endpoint) []weft.Endpoint {
	touched := make(map[weft.ID]bool, len(s.gone)+len(s.set))
	for _, id := range s.gone {
		touched[id] = true
	}
	for _, e := range s.set {
		touched[e.Task] = true
	}
	out := make([]weft.Endpoint, 0, len(entries)+len(s.set))
	for _, e := range entries {
		if !touched[e.Task] {
			out = append(out, e)
		}
	}
	out = append(out, s.set...)
	slices.SortFunc(out, compareEntries)
	return slices.Compact(out)
}
