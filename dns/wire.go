package dns

import (
	"encoding/binary"
	"hash/maphash"
	"net/netip"

	miekg "github.com/miekg/dns"
)

// This file answers the questions that nearly all are, without a message in
// between: one question of class IN for A or AAAA, of a plain name, alone or with
// EDNS that asks for nothing else. Everything else is left to respond; what is
// answered here is what respond would answer, to the byte.

// Layout of a message (RFC 1035 section 4.1.1, RFC 6891 section 6.1.2).
const (
	headerLen   = 12
	rrHeadLen   = 12 // of a record whose name is a pointer
	maxNameLen  = 255
	optLen      = 11
	ttlFlagDO   = 0x8000
	flagQR      = 0x8000
	flagAA      = 0x0400
	flagRD      = 0x0100
	flagRA      = 0x0080
	flagCD      = 0x0010
	maskOpcode  = 0x7800
	pointerName = 0xc000 | headerLen // the name of the question, again
)

// plainQuery is such a question, read.
type plainQuery struct {
	// isPlain: it is one. The rest has a meaning only then.
	isPlain  bool
	edns, do bool
	qtype    uint16
	limit    uint16           // bytes of the answer that the asker takes on UDP
	touched  uint32           // nothing: see touch
	hash     uint64           // of name
	len      int              // of name
	end      int              // of the question in the packet
	name     [maxNameLen]byte // folded, with dots
}

// scope is what a view sees of a Snapshot.
type scope struct {
	snap  *Snapshot
	view  *view
	zones []*zone // of the view's networks
}

// look makes s a scope of snap.
func (s *scope) look(snap *Snapshot, v *view) {
	if s.snap == snap && s.view == v {
		return
	}
	s.snap, s.view, s.zones = snap, v, nil
	for _, id := range v.networks {
		if z := snap.networks[id]; z != nil {
			s.zones = append(s.zones, z)
		}
	}
}

// touch reads what the tables have for questions, first all their slots, then all
// their entries. It finds nothing, but the lines of memory are near when answers are
// made: the processor waits for many of them at the same time here, where an answer
// would wait for one after the other.
func (s *scope) touch(questions []plainQuery) {
	var tables [burstSize]*table
	var lines [burstSize]uint32
	for _, z := range s.zones {
		for i := range questions {
			tables[i] = &z.shard(questions[i].hash).table
			lines[i] = tables[i].mask
		}
		for i := range questions {
			lines[i] = tables[i].slot(uint32(questions[i].hash))
		}
		for i := range questions {
			lines[i] = uint32(tables[i].mem[at(lines[i])])
		}
		for i := range questions {
			questions[i].touched += lines[i]
		}
	}
}

// held finds, as lookup does, what the first of the networks has that has an address
// of the family for q's name. ok is false if lookup is to be asked.
func (s *scope) held(q *plainQuery) (addrs string, ttl uint32, ok bool) {
	name, want6 := q.name[:q.len], q.qtype == miekg.TypeAAAA
	isHeld := false
	for _, z := range s.zones {
		t := &z.shard(q.hash).table
		e := t.get(q.hash, name)
		if e == "" && !t.isPart && z.suffix != "" {
			if host, ok := cutSuffix(name, z.suffix); ok {
				hash := maphash.Bytes(s.snap.seed, host)
				t = &z.shard(hash).table
				e = t.get(hash, host)
			}
		}
		if e == "" {
			if t.isPart {
				return "", 0, false
			}
			continue
		}
		addrs, count, others := e.family(want6)
		switch {
		case count == manyInTable:
			return "", 0, false
		case count > 0:
			return addrs, e.ttl(), true
		}
		isHeld = isHeld || others > 0
	}
	return "", 0, isHeld
}

// folded is the form of each byte that a plain name may have; 0 = escapes and the like,
// which are respond's business.
const folded = zero16 + zero16 +
	zero8 + "\x00\x00\x00\x00\x00-\x00\x00" +
	"0123456789\x00\x00\x00\x00\x00\x00" +
	"\x00abcdefghijklmnopqrstuvwxyz\x00\x00\x00\x00_" +
	"\x00abcdefghijklmnopqrstuvwxyz\x00\x00\x00\x00\x00" +
	zero16 + zero16 + zero16 + zero16 + zero16 + zero16 + zero16 + zero16

const (
	zero8  = "\x00\x00\x00\x00\x00\x00\x00\x00"
	zero16 = zero8 + zero8
)

// read reports whether the packet is such a question; seed is that of the Snapshot.
func (q *plainQuery) read(p []byte, seed maphash.Seed) bool {
	const counts = 1 << 48 // one question, nothing else
	if len(p) < headerLen || binary.BigEndian.Uint16(p[2:])&(flagQR|maskOpcode) != 0 {
		return false
	}
	has := binary.BigEndian.Uint64(p[4:])
	if has != counts && has != counts+1 {
		return false
	}
	off, ok := q.readName(p)
	if !ok || len(p)-off < 4 || binary.BigEndian.Uint16(p[off+2:]) != miekg.ClassINET {
		return false
	}
	q.qtype, q.end = binary.BigEndian.Uint16(p[off:]), off+4
	if q.qtype != miekg.TypeA && q.qtype != miekg.TypeAAAA {
		return false
	}
	q.hash = maphash.Bytes(seed, q.name[:q.len])
	q.edns, q.do, q.limit = has != counts, false, minUDPSize
	return !q.edns || q.readEDNS(p[q.end:])
}

// readName folds the name after the header and says where it ends.
func (q *plainQuery) readName(p []byte) (off int, ok bool) {
	n := 0
	for off = headerLen; off < len(p); {
		l := int(p[off])
		off++
		if l == 0 {
			q.len = n - 1
			return off, n > 0
		}
		// A name has 255 bytes on the wire: with a byte for the length of
		// each label, and one for the end.
		if l > 63 || off+l > len(p) || off-headerLen+l >= maxNameLen {
			return 0, false
		}
		if n > 0 {
			q.name[n-1] = '.'
		}
		label := p[off : off+l]
		into := q.name[n:][:len(label)]
		for i, c := range label {
			if c = folded[c]; c == 0 {
				return 0, false
			}
			into[i] = c
		}
		n += l + 1 // the dot
		off += l
	}
	return 0, false
}

// readEDNS takes an OPT record of version 0 without options.
func (q *plainQuery) readEDNS(p []byte) bool {
	if len(p) < optLen || p[0] != 0 || binary.BigEndian.Uint16(p[1:]) != miekg.TypeOPT || p[6] != 0 || p[9]|p[10] != 0 {
		return false
	}
	q.do = binary.BigEndian.Uint16(p[7:])&ttlFlagDO != 0
	q.limit = min(max(binary.BigEndian.Uint16(p[3:]), minUDPSize), maxUDPAnswer)
	return true
}

// answer writes the answer to packet p, which q was read from, into out and
// returns its length; out may be the room of p. ok is false when it is not for here
// to give, or does not fit; nothing is written then.
func (q *plainQuery) answer(s *scope, p, out []byte, turn uint64) (n int, ok bool) {
	name := q.name[:q.len]
	if name[0] == '_' || hasARPA(name) { // SRV and reverse names
		return 0, false
	}
	size := 4
	if q.qtype == miekg.TypeAAAA {
		size = 16
	}
	var more []netip.Addr
	var d verdict
	raw, ttl, ok := s.held(q)
	count := len(raw) / size
	if !ok {
		if more, ttl, d = s.snap.lookup(s.view, name, size == 16); d == verdictForward {
			return 0, false
		}
		count = len(more)
	}
	need := q.end + count*(rrHeadLen+size)
	if q.edns {
		need += optLen
	}
	if need > min(int(q.limit), len(out)) {
		return 0, false
	}
	flags := binary.BigEndian.Uint16(p[2:])&(flagRD|flagCD) | flagQR | flagAA | flagRA
	if d == verdictAbsent {
		flags |= miekg.RcodeNameError
	}
	n = copy(out, p[:q.end])
	binary.BigEndian.PutUint16(out[2:], flags)
	binary.BigEndian.PutUint16(out[6:], uint16(count))
	clear(out[8:11]) // and the last byte says whether there is EDNS, as in the question
	first := 0
	if count > 1 {
		first = int(turn % uint64(count))
	}
	for i := range count {
		k := first + i
		if k >= count {
			k -= count
		}
		rr := out[n : n+rrHeadLen+size]
		binary.BigEndian.PutUint64(rr, pointerName<<48|uint64(q.qtype)<<32|miekg.ClassINET<<16|uint64(ttl>>16))
		binary.BigEndian.PutUint32(rr[8:], ttl<<16|uint32(size))
		switch {
		case more == nil:
			copy(rr[rrHeadLen:], raw[k*size:])
		case size == 4:
			b := more[k].As4()
			copy(rr[rrHeadLen:], b[:])
		default:
			b := more[k].As16()
			copy(rr[rrHeadLen:], b[:])
		}
		n += len(rr)
	}
	if q.edns {
		opt := out[n : n+optLen]
		clear(opt)
		binary.BigEndian.PutUint16(opt[1:], miekg.TypeOPT)
		binary.BigEndian.PutUint16(opt[3:], maxUDPAnswer)
		if q.do {
			binary.BigEndian.PutUint16(opt[7:], ttlFlagDO)
		}
		n += optLen
	}
	return n, true
}

// hasARPA reports whether name is of the domain of reverse names.
func hasARPA(name []byte) bool {
	_, ok := cutSuffix(name, ".arpa")
	return ok
}
