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
	name  [maxNameLen]byte // folded, with dots
	len   int
	end   int // of the question in the packet
	qtype uint16
	edns  bool
	do    bool
	limit int // bytes of the answer that the asker takes on UDP
	room  [16 * maxInTable]byte
	// zones are the networks of view in snap.
	snap  *Snapshot
	view  *view
	zones []*zone
}

// held finds, as lookup does, what the first of v's networks has that has an address
// of the family for name; nil = ask lookup.
func (q *plainQuery) held(snap *Snapshot, v *view, name []byte) (addrs []byte, ttl uint32, d verdict) {
	if q.snap != snap || q.view != v {
		q.snap, q.view, q.zones = snap, v, q.zones[:0]
		for _, id := range v.networks {
			if z := snap.networks[id]; z != nil {
				q.zones = append(q.zones, z)
			}
		}
	}
	hash := maphash.Bytes(snap.seed, name)
	for _, z := range q.zones {
		addrs, ttl, known := z.quick(hash, name, q.qtype == miekg.TypeAAAA)
		if host, ok := cutSuffix(name, z.suffix); !known && ok && z.suffix != "" {
			addrs, ttl, known = z.quick(maphash.Bytes(snap.seed, host), host, q.qtype == miekg.TypeAAAA)
		}
		switch {
		case len(addrs) > 0:
			return addrs, ttl, verdictFound
		case known: // without an address of the family, or with many
			return nil, 0, verdictForward
		}
	}
	return nil, 0, verdictForward
}

// quick looks a name of this hash up in the table.
func (z *zone) quick(hash uint64, name []byte, want6 bool) (addrs []byte, ttl uint32, known bool) {
	s := z.shard(hash)
	if addrs, ttl = s.table.get(hash, name, want6); len(addrs) > 0 {
		return addrs, ttl, true
	}
	return nil, 0, s.byName[string(name)] != nil
}

// read reports whether the packet is such a question.
func (q *plainQuery) read(p []byte) bool {
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
		for _, c := range p[off : off+l] {
			switch {
			case 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_':
			case 'A' <= c && c <= 'Z':
				c += 'a' - 'A'
			default: // escapes are respond's business
				return 0, false
			}
			q.name[n] = c
			n++
		}
		n++ // the dot
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
	q.limit = min(max(int(binary.BigEndian.Uint16(p[3:])), minUDPSize), maxUDPAnswer)
	return true
}

// answer writes the answer to packet p, which q was read from, into out and
// returns its length. ok is false when it is not for here to give, or does not
// fit.
func (q *plainQuery) answer(snap *Snapshot, v *view, p, out []byte, turn uint64) (n int, ok bool) {
	name := q.name[:q.len]
	if name[0] == '_' || hasARPA(name) { // SRV and reverse names
		return 0, false
	}
	size := 4
	if q.qtype == miekg.TypeAAAA {
		size = 16
	}
	raw, ttl, d := q.held(snap, v, name)
	if raw == nil {
		var addrs []netip.Addr
		if addrs, ttl, d = snap.lookup(v, name, size == 16); d == verdictForward || len(addrs) > maxInTable {
			return 0, false
		}
		raw = q.room[:0]
		for _, a := range addrs {
			if size == 4 {
				b := a.As4()
				raw = append(raw, b[:]...)
			} else {
				b := a.As16()
				raw = append(raw, b[:]...)
			}
		}
	}
	count := len(raw) / size
	need := q.end + count*(rrHeadLen+size)
	if q.edns {
		need += optLen
	}
	if need > min(q.limit, len(out)) {
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
	at := 0
	if count > 0 {
		at = int(turn%uint64(count)) * size
	}
	for range count {
		rr := out[n : n+rrHeadLen+size]
		binary.BigEndian.PutUint16(rr, pointerName)
		binary.BigEndian.PutUint16(rr[2:], q.qtype)
		binary.BigEndian.PutUint16(rr[4:], miekg.ClassINET)
		binary.BigEndian.PutUint32(rr[6:], ttl)
		binary.BigEndian.PutUint16(rr[10:], uint16(size))
		copy(rr[rrHeadLen:], raw[at:at+size])
		n += len(rr)
		if at += size; at == len(raw) {
			at = 0
		}
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
