package dns

import (
	"net/netip"
	"slices"

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
func respond(snap *Snapshot, v *view, req *miekg.Msg, turn uint64) (resp *miekg.Msg, forward bool) {
	resp = reply(req)
	if rcode := check(req); rcode != miekg.RcodeSuccess {
		resp.Rcode = rcode // of BADVERS EDNS has the upper bits; who asks for it has it
		return resp, false
	}
	q := req.Question[0]
	name := fold(q.Name)
	resp.Authoritative = true
	if p, exact, ok := reverseNet(name); ok {
		return respondReverse(snap, v, resp, p, exact)
	}
	if port, tasks, d, found := snap.service(v, []byte(name)); found {
		switch {
		case d == verdictAbsent:
			resp.Rcode = miekg.RcodeNameError
		case q.Qtype == miekg.TypeSRV || q.Qtype == miekg.TypeANY:
			appendSRV(resp, port, tasks, turn)
		}
		return resp, false
	}
	addrs, ttl, d := snap.lookup(v, []byte(name), q.Qtype == miekg.TypeAAAA)
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
		addrs6, ttl6, _ := snap.lookup(v, []byte(name), true)
		appendAddrs(resp, q.Name, addrs6, ttl6, turn)
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

// respondReverse answers about addresses p, or what stands before the name of p
// if it is not exact.
func respondReverse(snap *Snapshot, v *view, resp *miekg.Msg, p netip.Prefix, exact bool) (*miekg.Msg, bool) {
	if !exact || !p.IsSingleIP() {
		if !v.internal && !snap.isOverlay(p) {
			return nil, true
		}
		resp.Rcode = miekg.RcodeNameError
		return resp, false
	}
	target, d := snap.reverse(v, p.Addr())
	switch d {
	case verdictForward:
		return nil, true
	case verdictAbsent:
		resp.Rcode = miekg.RcodeNameError
		return resp, false
	}
	q := resp.Question[0]
	if q.Qtype == miekg.TypePTR || q.Qtype == miekg.TypeANY {
		resp.Answer = append(resp.Answer, &miekg.PTR{Hdr: header(q.Name, miekg.TypePTR, vipTTL), Ptr: target})
	}
	return resp, false
}

// appendSRV adds a record for each task, all of the same priority and weight (RFC
// 2782), and the addresses of the targets.
func appendSRV(resp *miekg.Msg, port uint16, tasks []*instance, turn uint64) {
	name := resp.Question[0].Name
	for i := range tasks {
		t := tasks[(turn+uint64(i))%uint64(len(tasks))]
		resp.Answer = append(resp.Answer, &miekg.SRV{Hdr: header(name, miekg.TypeSRV, taskTTL), Weight: 1, Port: port, Target: t.name})
		for _, a := range t.addrs {
			resp.Extra = append(resp.Extra, addrRecord(t.name, a.Unmap(), taskTTL))
		}
	}
	// EDNS stays last: it was there before.
	if opt := resp.IsEdns0(); opt != nil {
		i := slices.IndexFunc(resp.Extra, func(rr miekg.RR) bool { return rr == miekg.RR(opt) })
		resp.Extra = append(slices.Delete(resp.Extra, i, i+1), opt)
	}
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
		resp.Answer = append(resp.Answer, addrRecord(name, addrs[(start+i)%len(addrs)], ttl))
	}
}

func addrRecord(name string, a netip.Addr, ttl uint32) miekg.RR {
	if a.Is4() {
		return &miekg.A{Hdr: header(name, miekg.TypeA, ttl), A: a.AsSlice()}
	}
	return &miekg.AAAA{Hdr: header(name, miekg.TypeAAAA, ttl), AAAA: a.AsSlice()}
}

// udpLimit is the size of the biggest answer that the asker takes on UDP.
func udpLimit(req *miekg.Msg) int {
	if opt := req.IsEdns0(); opt != nil {
		return min(max(int(opt.UDPSize()), minUDPSize), maxUDPAnswer)
	}
	return minUDPSize
}
