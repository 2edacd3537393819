package nft

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// What stands in the namespace of a task on the ingress network, so that answers
// to clients, whose addresses are kept, go back by the node through which the
// request came:
//
//	prerouting  a packet from an entry node's hardware address is marked, and
//	            tracked in that node's zone; a new connection keeps the mark
//	input       datagrams, SCTP: who asked, and at which address, is remembered
//	output      an answer gets its connection's mark, and by it the route back
//	egress      ... and the entry node's hardware address
//
// One rule and one route serve all entry nodes, however many there are.

// insideTable is apart from a table that others of weft may keep there.
const insideTable = weft.TableName + "-mesh"

// Our own choices.
const (
	// askedTimeout is how long a datagram may be answered after the last one
	// of its flow: as long as connection tracking keeps a stream of them.
	askedTimeout = 120 * time.Second
	// associatedTimeout is the same for SCTP, where each end asks for the other every
	// 30 s at most (RFC 9260 section 16, HB.interval).
	associatedTimeout = 300 * time.Second
	// askedSize bounds the memory of one task's table of them.
	askedSize = 65536
)

// Registers inside: an address of either family fits below 12.
const (
	insideKey  = 8  // address, of the client
	insideData = 14 // mark, zone
	insideTmp  = 1
)

var (
	entryData = nftables.MustConcatSetType(nftables.TypeMark, nftables.TypeInteger)
	askedKey4 = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService, nftables.TypeInetService)
	askedKey6 = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService, nftables.TypeInetService)
)

// end is where tasks answer: count ports from port on.
type end struct {
	proto byte
	port  uint16
	count uint16
}

// wish is what is wanted in one task's namespace: a task's port on the ingress network,
// its gateway leg, or both. What is not wanted has no link.
type wish struct {
	ingress.EntryTask
	gateway ingress.EntryTask
	// ports are those on which the task answers at its gateway leg.
	ports []end
	// sctp: ports of SCTP are published on this node.
	sctp bool
}

func (w wish) equal(o wish) bool {
	return w.EntryTask == o.EntryTask && w.gateway == o.gateway && slices.Equal(w.ports, o.ports) && w.sctp == o.sctp
}

// insideRules is a task's table of the family. Most packets are those of known TCP: what
// they fail at stands first in each rule, and a link's name, which the kernel copies and
// compares by bytes (220 instructions), last.
func (f *family) insideRules(e ingress.Entry, t wish) ruleset {
	own, _ := f.addrs(e, t.EntryTask)
	entries := set{name: "entries", key: nftables.TypeEtherAddr, data: entryData, isMap: true, elements: map[string]string{}, show: showEntry}
	for _, n := range e.Nodes {
		entries.elements[string(n.MAC)] = string(binaryutil.NativeEndian.PutUint32(n.Mark())) + string(binaryutil.NativeEndian.PutUint16(n.Zone())) + "\x00\x00"
	}
	near := set{name: "near", key: f.addr, interval: true, elements: f.intervals(f.near(own)), show: f.showInterval}
	asked := set{name: "asked", key: askedKey4, data: f.addr, isMap: true, concat: true, dynamic: true, timeout: askedTimeout, size: askedSize}
	if f.is6 {
		asked.key = askedKey6
	}
	filter := func(name string, hook *nftables.ChainHook, priority int32, rules ...rule) chain {
		return chain{name: name, kind: nftables.ChainTypeFilter, hook: hook, priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)), rules: rules}
	}
	route := func(name string, priority int32, rules ...rule) chain {
		return chain{name: name, kind: nftables.ChainTypeRoute, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)), rules: rules}
	}
	// Priorities are linux/netfilter_ipv4.h's: raw -300, tracking -200, mangle
	// -150, source translation 100.
	return ruleset{family: f.host, name: insideTable, sets: []set{entries, near, asked}, chains: []chain{
		filter("in", nftables.ChainHookPrerouting, -300,
			rule{"not by " + t.Link + ": as it is", join(notInLink(t.Link), f.accept())},
			rule{t.Link + ": no mark of others", join(hasMark(), setMark(0))},
			rule{t.Link + ": maybe from an entry node", f.then(expr.VerdictJump, "zone")},
			f.guardRule(t.Link)),
		{name: "zone" + f.suffix, original: true, rules: []rule{f.zoneRule(t.Link)}},
		filter("mark", nftables.ChainHookPrerouting, -150, keepMark(t.Link), restoreMark("what is passed on: its mark", notInLink(t.Link))),
		{name: "ports", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookInput, priority: nftables.ChainPriorityNATSource},
		filter("asked", nftables.ChainHookInput, 300, f.askedRules(t)...),
		route("answer", -350, f.answerRule("datagram", unix.IPPROTO_UDP), f.answerRule("association", unix.IPPROTO_SCTP)),
		// A socket that has accepted a connection bears its mark already, so that
		// its packets need no second route (tcp_fwmark_accept).
		route("back", -150, restoreMark("an answer: its mark", nil), rule{"no mark but ours", join(marked(expr.CmpOpEq), setMark(0))}),
		filter("only", nftables.ChainHookPostrouting, 0, f.onlyRule(t.Link)),
	}}
}

// insideLink is the table that gives answers the hardware address of the node they
// go back by.
func insideLink(e ingress.Entry, t ingress.EntryTask) ruleset {
	hops := set{name: "hops", key: nftables.TypeMark, data: nftables.TypeEtherAddr, isMap: true, elements: map[string]string{}, show: showHop}
	for _, n := range e.Nodes {
		hops.elements[string(binaryutil.NativeEndian.PutUint32(n.Mark()))] = string(n.MAC)
	}
	return ruleset{family: nftables.TableFamilyNetdev, name: insideTable, sets: []set{hops}, chains: []chain{{
		name: "back-" + t.Link, kind: nftables.ChainTypeFilter, device: t.Link,
		hook: nftables.ChainHookEgress, priority: nftables.ChainPriorityFilter,
		rules: []rule{{t.Link + ": back to the entry node", []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: insideKey},
			lookup("hops", insideKey, insideData),
			&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: insideData, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 6},
			&expr.Counter{},
		}}},
	}}}
}

// near are the addresses of the family that a task's port may have to do with
// without an entry node: those of the network, and what never leaves a link.
func (f *family) near(own netip.Prefix) []netip.Prefix {
	out := []netip.Prefix{own.Masked()}
	for _, p := range []string{"0.0.0.0/32", "224.0.0.0/4", "255.255.255.255/32", "::/128", "fe80::/10", "ff00::/8"} {
		if p := netip.MustParsePrefix(p); f.has(p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

const etherSource = 6

// zoneRule marks a packet by the hardware address it comes from.
func (f *family) zoneRule(link string) rule {
	return rule{link + ": from an entry node: its mark and its zone", join([]expr.Any{
		&expr.Payload{DestRegister: insideKey, Base: expr.PayloadBaseLLHeader, Offset: etherSource, Len: 6},
		lookup("entries", insideKey, insideData),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: insideData},
		&expr.Ct{Key: expr.CtKeyZONE, SourceRegister: true, Register: insideData + 1},
	}, f.accept())}
}

// guardRule: only entry nodes, whose packets do not come so far, bring what comes from afar.
func (f *family) guardRule(link string) rule {
	return rule{link + ": from afar, by no entry node: drop", join([]expr.Any{
		f.load(insideKey, f.source),
		&expr.Lookup{SourceRegister: insideKey, SetName: "near", Invert: true},
	}, dropped())}
}

// onlyRule: a task answers by an entry node and opens nothing.
func (f *family) onlyRule(link string) rule {
	return rule{link + ": to afar, no answer: drop", join(marked(expr.CmpOpNeq), outLink(expr.CmpOpEq, link), []expr.Any{
		f.load(insideKey, f.destination),
		&expr.Lookup{SourceRegister: insideKey, SetName: "near", Invert: true},
	}, dropped())}
}

// keepMark gives a new connection the mark of its first packet.
func keepMark(link string) rule {
	return rule{link + ": a new connection: keep its mark", join(unasked(), marked(expr.CmpOpEq), inLink(link), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: insideTmp},
		&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: insideTmp},
	})}
}

// restoreMark gives a packet of an answer its connection's mark.
func restoreMark(words string, match []expr.Any) rule {
	return rule{words, join([]expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: insideTmp},
		&expr.Cmp{Op: expr.CmpOpEq, Register: insideTmp, Data: []byte{1}}, // IP_CT_DIR_REPLY
	}, match, []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: insideTmp},
	}, isEntryMark(expr.CmpOpEq), []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: insideTmp},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: insideTmp},
		&expr.Verdict{Kind: expr.VerdictAccept},
	})}
}

// askedRules remember at which address a datagram asked. A server that waits at
// all addresses does not say which of them answers, and the route to a client
// afar would choose the address of the way out. SCTP chooses so for associations,
// too. What came by the gateway leg, for ports in mode host, would be answered by
// whichever way the last rule leads.
func (f *family) askedRules(t wish) []rule {
	var rules []rule
	from := func(link string, match []expr.Any) {
		rules = append(rules, f.askedRule(link+": a datagram", join(f.isOf(expr.CmpOpEq, unix.IPPROTO_UDP), match), askedTimeout),
			f.askedRule(link+": an association", join(f.isOf(expr.CmpOpEq, unix.IPPROTO_SCTP), match), associatedTimeout))
	}
	from(t.Link, join(marked(expr.CmpOpEq), inLink(t.Link)))
	if l := t.gateway.Link; l != "" {
		from(l, inLink(l))
	}
	return rules
}

func (f *family) askedRule(what string, match []expr.Any, known time.Duration) rule {
	client := f.bytes / 4
	return rule{what + ": remember at which address it asked", join(match, []expr.Any{
		f.load(insideKey, f.source),
		&expr.Payload{DestRegister: insideKey + client, Base: expr.PayloadBaseTransportHeader, Offset: thPorts, Len: 2},
		&expr.Payload{DestRegister: insideKey + client + 1, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2},
		f.load(insideKey+client+2, f.destination),
		&expr.Dynset{SrcRegKey: insideKey, SrcRegData: insideKey + client + 2, SetName: "asked", Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: known},
	})}
}

// answerRule lets the answer come from there. It stands before connection
// tracking, which knows the flow by that address.
func (f *family) answerRule(what string, proto byte) rule {
	client := f.bytes / 4
	return rule{"an answering " + what + ": from the address that was asked", join(f.isOf(expr.CmpOpEq, proto), []expr.Any{
		f.load(insideKey, f.destination),
		&expr.Payload{DestRegister: insideKey + client, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2},
		&expr.Payload{DestRegister: insideKey + client + 1, Base: expr.PayloadBaseTransportHeader, Offset: thPorts, Len: 2},
		lookup("asked", insideKey, insideKey+client+2),
		f.writeSource(insideKey + client + 2),
	})}
}

// writeSource writes the source address and what sums it up.
func (f *family) writeSource(register uint32) expr.Any { return f.writeAddress(register, f.source) }

// writeAddress writes an address at its offset in the header, and the sums over it:
// that of the transport's header (SCTP's does not cover it, RFC 9260 section 6.8), and
// IPv4's own at 10 (RFC 791). IPv6 has none, but the library names no sums at all
// without one, so it is said to be where the address is: the kernel changes the sums
// first and then writes the address over it (nft_payload.c).
func (f *family) writeAddress(register, offset uint32) expr.Any {
	own := uint32(10)
	if f.is6 {
		own = offset
	}
	return &expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: register, Base: expr.PayloadBaseNetworkHeader,
		Offset: offset, Len: f.bytes, CsumType: expr.CsumTypeInet, CsumOffset: own, CsumFlags: unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR,
	}
}

func isProtocol(proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: insideTmp},
		&expr.Cmp{Op: expr.CmpOpEq, Register: insideTmp, Data: []byte{proto}},
	}
}

// marked matches packets that bear (CmpOpEq) or do not bear (CmpOpNeq) an entry
// node's mark.
func marked(op expr.CmpOp) []expr.Any {
	return join([]expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: insideTmp}}, isEntryMark(op))
}

// hasMark matches packets that bear any mark.
func hasMark() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: insideTmp},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: insideTmp, Data: make([]byte, 4)},
	}
}

func isEntryMark(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Bitwise{SourceRegister: insideTmp, DestRegister: insideTmp, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(ingress.EntryMarkMask), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: insideTmp, Data: binaryutil.NativeEndian.PutUint32(ingress.EntryMark)},
	}
}

func setMark(m uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: insideTmp, Data: binaryutil.NativeEndian.PutUint32(m)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: insideTmp},
	}
}

func notInLink(name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: linkName(name)}}
}

func showEntry(key, data string) string {
	return fmt.Sprintf("%s -> mark %#x zone %d", net.HardwareAddr(key), binary.NativeEndian.Uint32([]byte(data)), binary.NativeEndian.Uint16([]byte(data[4:])))
}

func showHop(key, data string) string {
	return fmt.Sprintf("%#x -> %s", binary.NativeEndian.Uint32([]byte(key)), net.HardwareAddr(data))
}

// addrs are the task's port of the family and the way to afar from there: this
// node's own leg, whose hardware address is replaced on the way. Invalid without.
func (f *family) addrs(e ingress.Entry, t ingress.EntryTask) (own netip.Prefix, via netip.Addr) {
	for _, p := range []netip.Prefix{t.Addr, t.Addr6} {
		if f.has(p.Addr()) {
			own = p
		}
	}
	return own, f.addressOf(ingress.Backend{Addr: e.Addr.Addr(), Addr6: e.Addr6.Addr()})
}
