package dns

import (
	"net/netip"

	miekg "github.com/miekg/dns"
)

// parse reads a packet as a question. ok is false for what is no question at
// all: it is dropped, because an answer to garbage (or to an answer) only
// feeds loops.
func parse(packet []byte) (req *miekg.Msg, ok bool) {
	req = new(miekg.Msg)
	if err := req.Unpack(packet); err != nil || req.Response || len(req.Question) == 0 {
		return nil, false
	}
	return req, true
}

// respond answers req for v from snap. forward is true when the question must
// go to an upstream; then the answer is empty. turn rotates answers of several
// addresses.
func respond(snap *Snapshot, v *View, req *miekg.Msg, turn uint64) (resp *miekg.Msg, forward bool) {
	resp = reply(req)
	if rcode := check(req); rcode != miekg.RcodeSuccess {
		resp.Rcode = rcode
		if rcode == miekg.RcodeBadVers {
			resp.SetEdns0(maxUDPAnswer, false) // carries the upper bits of the code
		}
		return resp, false
	}
	q := req.Question[0]
	name := fold(q.Name)
	resp.Authoritative = true
	if q.Qtype == miekg.TypePTR {
		if addr, ok := reverseAddr(name); ok {
			return respondPTR(snap, v, resp, addr)
		}
	}
	want6 := q.Qtype == miekg.TypeAAAA
	addrs, ttl, d := snap.lookup(v, name, want6)
	switch d {
	case verdictForward:
		return nil, true
	case verdictAbsent:
		resp.Rcode = miekg.RcodeNameError
		return resp, false
	}
	switch q.Qtype {
	case miekg.TypeA, miekg.TypeAAAA:
		appendAddrs(resp, q.Name, addrs, ttl, turn)
	case miekg.TypeANY: // RFC 8482 section 4.1: a subset will do
		appendAddrs(resp, q.Name, addrs, ttl, turn)
		addrs6, _, _ := snap.lookup(v, name, true)
		appendAddrs(resp, q.Name, addrs6, ttl, turn)
	}
	return resp, false
}

// reply is SetReply with what every answer of ours has.
func reply(req *miekg.Msg) *miekg.Msg {
	resp := new(miekg.Msg)
	resp.SetReply(req)
	resp.RecursionAvailable = true
	resp.Compress = true
	if opt := req.IsEdns0(); opt != nil {
		resp.SetEdns0(maxUDPAnswer, opt.Do())
	}
	return resp
}

// check refuses what no part of this server does.
func check(req *miekg.Msg) (rcode int) {
	if req.Opcode != miekg.OpcodeQuery {
		return miekg.RcodeNotImplemented
	}
	if len(req.Question) != 1 {
		return miekg.RcodeFormatError // RFC 9619: exactly one
	}
	if opt := req.IsEdns0(); opt != nil && opt.Version() != 0 {
		return miekg.RcodeBadVers // RFC 6891 section 6.1.3
	}
	q := req.Question[0]
	if q.Qclass != miekg.ClassINET || q.Qtype == miekg.TypeAXFR || q.Qtype == miekg.TypeIXFR {
		return miekg.RcodeRefused
	}
	return miekg.RcodeSuccess
}

func respondPTR(snap *Snapshot, v *View, resp *miekg.Msg, addr netip.Addr) (*miekg.Msg, bool) {
	target, d := snap.reverse(v, addr)
	switch d {
	case verdictForward:
		return nil, true
	case verdictAbsent:
		resp.Rcode = miekg.RcodeNameError
	default:
		q := resp.Question[0]
		resp.Answer = append(resp.Answer, &miekg.PTR{Hdr: header(q.Name, miekg.TypePTR, vipTTL), Ptr: target})
	}
	return resp, false
}

func header(name string, rrtype uint16, ttl uint32) miekg.RR_Header {
	return miekg.RR_Header{Name: name, Rrtype: rrtype, Class: miekg.ClassINET, Ttl: ttl}
}

func appendAddrs(resp *miekg.Msg, name string, addrs []netip.Addr, ttl uint32, turn uint64) {
	if len(addrs) == 0 {
		return
	}
	start := int(turn % uint64(len(addrs)))
	for i := range addrs {
		a := addrs[(start+i)%len(addrs)]
		if a.Is4() {
			resp.Answer = append(resp.Answer, &miekg.A{Hdr: header(name, miekg.TypeA, ttl), A: a.AsSlice()})
		} else {
			resp.Answer = append(resp.Answer, &miekg.AAAA{Hdr: header(name, miekg.TypeAAAA, ttl), AAAA: a.AsSlice()})
		}
	}
}

// udpLimit is the size of the biggest answer that the asker takes on UDP.
func udpLimit(req *miekg.Msg) int {
	if opt := req.IsEdns0(); opt != nil {
		return min(max(int(opt.UDPSize()), minUDPSize), maxUDPAnswer)
	}
	return minUDPSize
}
