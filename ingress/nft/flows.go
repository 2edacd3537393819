package nft

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// opDelete is NFT_DYNSET_OP_DELETE (linux/netfilter/nf_tables.h, Linux 5.4), which
// the library of constants lacks: the rule takes the element away.
const opDelete = 2

// Flags of TCP that begin and end a flow (RFC 9293 section 3.1).
const (
	flagFIN = 0x01
	flagRST = 0x04
)

// hashSeed is fixed, so that all nodes and all generations of the table send a
// flow the same way.
const hashSeed = 0x77656674

// Chunks of SCTP (RFC 9260 sections 3.1 and 3.2): INIT is alone in its packet, and the only
// one whose packet has the tag 0; what ends an association comes first in its packet.
const (
	sctpTag, sctpChunk           = 4, 12 // offsets in the packet
	chunkAbort, chunkShutdownAck = 6, 8  // SHUTDOWN is between them
)

// protocols with ports, which most flows are of; associations of SCTP have a chain of
// their own, so that others pay one comparison for them.
var protocols = []protocol{{"tcp", unix.IPPROTO_TCP}, {"udp", unix.IPPROTO_UDP}}

type protocol struct {
	name   string
	number byte
}

// Names of the maps of flows. A flow is in one of the first two: in ending when
// its client has closed its half.
func (f *family) flows() string  { return "flows" + f.suffix }
func (f *family) ending() string { return "ending" + f.suffix }
func (f *family) pieces() string { return "pieces" + f.suffix }

// Names of the maps of services: ways leads an address to the chain for new flows to
// it, seats an address and a seat to a backend.
func (f *family) ways() string  { return "ways" + f.suffix }
func (f *family) seats() string { return "seats" + f.suffix }

// flowSets are the maps that packets fill: tuple to hardware address.
func (f *family) flowSets() []set {
	flow := func(name string, timeout time.Duration, size uint32) set {
		return set{
			name: name, key: f.tupleKey, data: nftables.TypeEtherAddr, isMap: true, concat: true,
			dynamic: true, timeout: timeout, size: size,
		}
	}
	return []set{flow(f.flows(), flowTimeout, flowSize), flow(f.ending(), endingTimeout, flowSize), flow(f.pieces(), pieceTimeout, pieceSize)}
}

// dynset changes a map by what the registers hold. An update that finds no room
// ends its rule.
func (f *family) dynset(op uint32, name string, timeout time.Duration) expr.Any {
	return &expr.Dynset{SrcRegKey: f.tuple, SrcRegData: f.mac, SetName: name, Operation: op, Timeout: timeout}
}

func (f *family) keep() expr.Any { return f.dynset(unix.NFT_DYNSET_OP_UPDATE, f.flows(), flowTimeout) }

func (f *family) keepEnding() expr.Any {
	return f.dynset(unix.NFT_DYNSET_OP_UPDATE, f.ending(), endingTimeout)
}

// writeMAC gives the packet the hardware address in its register.
func (f *family) writeMAC() expr.Any {
	return &expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: f.mac, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 6}
}

func (f *family) accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }

// back returns to where a chain was jumped to from, and at last to the bridge.
func (f *family) back() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} }

func (f *family) send() []expr.Any { return join([]expr.Any{f.writeMAC()}, f.accept()) }

func (f *family) then(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain + f.suffix}}
}

// flags matches segments of which any of (CmpOpNeq) or none but want of (CmpOpEq)
// the flags in mask is set; that they are of TCP has been matched. Four bytes
// are what the kernel compares without a call.
func (f *family) flags(mask byte, op expr.CmpOp, want byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: f.ports, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags - 1, Len: 4},
		&expr.Bitwise{SourceRegister: f.ports, DestRegister: f.ports, Len: 4, Mask: []byte{0, mask, 0, 0}, Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: f.ports, Data: []byte{0, want, 0, 0}},
	}
}

// bridgeChain is what each packet to a service meets, in the order of how many there
// are of its kind. Those of another family leave it behind the first rule for other.
func (f *family) bridgeChain(other []expr.Any) []rule {
	var rules []rule
	add := func(words string, parts ...[]expr.Any) { rules = append(rules, rule{f.words + words, join(parts...)}) }
	known := func(name string, keep expr.Any) []expr.Any { return []expr.Any{lookup(name, f.tuple, f.mac), keep} }
	tcp := f.protocol(expr.CmpOpEq, unix.IPPROTO_TCP)
	add("tcp of a known flow, whole, in its midst: keep its backend", f.isFamily(expr.CmpOpEq), f.wholeTCP(),
		f.flags(flagSYN|flagFIN|flagRST, expr.CmpOpEq, 0), f.addresses(), f.loadPorts(), known(f.flows(), f.keep()), f.send())
	add("another family: elsewhere", f.isFamily(expr.CmpOpNeq), other)
	if f.is6 {
		// Who asks for a service's hardware address is answered by the bridge.
		rules = append(rules, neighbourDiscovery())
	}
	add("a piece of a datagram: to pieces", f.isPiece(), f.then(expr.VerdictGoto, "pieces"))
	// A client's port that is used again is balanced anew: its last backend may drain.
	add("a request for a connection: forget what its ports led to, by ways", tcp, f.flags(flagSYN|flagACK, expr.CmpOpEq, flagSYN), f.tupleOf(unix.IPPROTO_TCP), []expr.Any{
		&expr.Immediate{Register: f.mac, Data: make([]byte, 6)}, // a map wants data for each operation
		f.dynset(opDelete, f.flows(), 0), f.dynset(opDelete, f.ending(), 0),
	}, f.byWays())
	add("tcp that ends a known flow: it is one that ends", tcp, f.flags(flagFIN|flagRST, expr.CmpOpNeq, 0), f.tupleOf(unix.IPPROTO_TCP),
		[]expr.Any{lookup(f.flows(), f.tuple, f.mac), f.writeMAC(), f.keepEnding(), f.dynset(opDelete, f.flows(), 0)}, f.accept())
	add("tcp of a flow that ends: keep its backend", f.tupleOf(unix.IPPROTO_TCP), known(f.ending(), f.keepEnding()), f.send())
	for _, p := range protocols {
		add("other "+p.name+" of a known flow: keep its backend", f.tupleOf(p.number), known(f.flows(), f.keep()), f.send())
	}
	add("sctp: by associations", f.protocol(expr.CmpOpEq, unix.IPPROTO_SCTP), f.then(expr.VerdictGoto, "associations"))
	add("icmp: by errors", f.protocol(expr.CmpOpEq, f.icmp), f.then(expr.VerdictJump, "errors"))
	add("the rest: by ways", f.addressed(), f.byWays())
	return rules
}

// associationsChain is to associations of SCTP what bridgeChain is to TCP's connections.
func (f *family) associationsChain() chain {
	c := chain{name: "associations" + f.suffix}
	add := func(words string, parts ...[]expr.Any) {
		c.rules = append(c.rules, rule{f.words + words, join(parts...)})
	}
	add("a request for an association: forget what its ports led to, by ways", newAssociation(f.ports), f.flow(), []expr.Any{
		&expr.Immediate{Register: f.mac, Data: make([]byte, 6)},
		f.dynset(opDelete, f.flows(), 0), f.dynset(opDelete, f.ending(), 0),
	}, f.byWays())
	add("what ends a known association: it is one that ends", []expr.Any{
		&expr.Payload{DestRegister: f.ports, Base: expr.PayloadBaseTransportHeader, Offset: sctpChunk, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: f.ports, FromData: []byte{chunkAbort}, ToData: []byte{chunkShutdownAck}},
	}, f.flow(), []expr.Any{lookup(f.flows(), f.tuple, f.mac), f.writeMAC(), f.keepEnding(), f.dynset(opDelete, f.flows(), 0)}, f.accept())
	add("of a known association: keep its backend", f.flow(), []expr.Any{lookup(f.flows(), f.tuple, f.mac), f.keep()}, f.send())
	add("of one that ends: keep its backend", f.flow(), []expr.Any{lookup(f.ending(), f.tuple, f.mac), f.keepEnding()}, f.send())
	add("of an unknown one: by ways", f.addressed(), f.byWays())
	return c
}

// newAssociation matches requests for an association of SCTP, whose protocol has been
// matched.
func newAssociation(register uint32) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: sctpTag, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: make([]byte, 4)},
	}
}

// wholeTCP matches TCP that is no piece of a segment, and leaves the protocol in its
// place in the tuple.
func (f *family) wholeTCP() []expr.Any {
	tcp := &expr.Cmp{Op: expr.CmpOpEq, Register: f.proto, Data: []byte{unix.IPPROTO_TCP}}
	if f.is6 { // no header stands between
		return []expr.Any{f.nh(f.proto, next6, 1), tcp}
	}
	return join([]expr.Any{f.nh(f.proto, protocol4, 1), tcp}, f.masked(fragment4, 0x3fff, expr.CmpOpEq))
}

// addressed loads the address alone that a frame is sent to.
func (f *family) addressed() []expr.Any { return []expr.Any{f.load(f.to, f.destination)} }

// byWays leads to the chain for a new flow to the service whose address is in its
// place in the tuple.
func (f *family) byWays() []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: f.to, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: f.ways()}}
}

// errorsChain sends an ICMP error to the backend whose packet it quotes. One of
// another flow returns: it is spread by addresses.
func (f *family) errorsChain() chain {
	c := chain{name: "errors" + f.suffix}
	for _, name := range []string{f.flows(), f.ending()} {
		c.rules = append(c.rules, rule{f.words + "an error about a flow of " + name + ": to its backend",
			join(f.quoted(), []expr.Any{lookup(name, f.tuple, f.mac)}, f.send())})
	}
	return c
}

// Offsets of what an ICMP error quotes, from its own header of 8 bytes (RFC 792,
// RFC 4443 section 3): the packet begins with its IP header, and the ports follow.
const quote = 8

// quoted matches ICMP errors, whose protocol has been matched, and loads the tuple
// of the flow that the quoted packet answered: its two ends the other way round.
func (f *family) quoted() []expr.Any {
	th := func(register, offset, size uint32) expr.Any {
		return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: size}
	}
	lowest, highest, next, header := byte(3), byte(12), uint32(9), uint32(20) // RFC 792: unreachable to parameter problem
	if f.is6 {
		lowest, highest, next, header = 1, 4, 6, 40 // RFC 4443 section 2.1
	}
	out := []expr.Any{
		th(f.ports, 0, 1),
		&expr.Range{Op: expr.CmpOpEq, Register: f.ports, FromData: []byte{lowest}, ToData: []byte{highest}},
	}
	if !f.is6 { // no options, or the ports are elsewhere
		out = append(out, th(f.ports, quote, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: f.ports, Data: []byte{0x45}})
	}
	return append(out,
		th(f.from, quote+f.destination, f.bytes),
		th(f.to, quote+f.source, f.bytes),
		th(f.proto, quote+next, 1),
		th(f.ports, quote+header+thDestination, 2),
		th(f.ports+1, quote+header+thPorts, 2),
	)
}

// Offsets in the header of IPv4 (RFC 791): identification, flags and offset of a
// piece, protocol; in IPv6's (RFC 8200 sections 3 and 4.5) the next header, and
// behind it the fragment header.
const (
	id4, fragment4, protocol4 = 4, 6, 9
	next6, fragment6          = 6, 40
	offset6, id6              = fragment6 + 2, fragment6 + 4
)

func (f *family) nh(register, offset, size uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
}

// isPiece matches packets that are part of a datagram only. In IPv6 a fragment
// header behind other extension headers is not seen: nobody sends it.
func (f *family) isPiece() []expr.Any {
	if f.is6 {
		return []expr.Any{f.nh(f.ports, next6, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: f.ports, Data: []byte{unix.IPPROTO_FRAGMENT}}}
	}
	return f.masked(fragment4, 0x3fff, expr.CmpOpNeq)
}

// isLater matches those of them that are not the first.
func (f *family) isLater() []expr.Any {
	if f.is6 {
		return f.masked(offset6, 0xfff8, expr.CmpOpNeq)
	}
	return f.masked(fragment4, 0x1fff, expr.CmpOpNeq)
}

// masked compares two bytes, of which mask counts, with nothing. With the two before
// them they are four, which the kernel compares without a call.
func (f *family) masked(offset uint32, mask uint16, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		f.nh(f.ports, offset-2, 4),
		&expr.Bitwise{SourceRegister: f.ports, DestRegister: f.ports, Len: 4, Mask: []byte{0, 0, byte(mask >> 8), byte(mask)}, Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: f.ports, Data: make([]byte, 4)},
	}
}

// datagram loads what the pieces of one have in common, the addresses aside, in
// the place of protocol and ports.
func (f *family) datagram() []expr.Any {
	none := &expr.Immediate{Register: f.ports + 1, Data: make([]byte, 4)}
	if f.is6 {
		return []expr.Any{f.nh(f.proto, fragment6, 1), f.nh(f.ports, id6, 4), none}
	}
	return []expr.Any{f.nh(f.proto, protocol4, 1), f.nh(f.ports, id4, 2), none}
}

// piecesChain sends all pieces of a datagram where its flow goes: the first has
// the ports and comes first, the others follow it. One that does not is spread by
// addresses.
func (f *family) piecesChain() chain {
	c := chain{name: "pieces" + f.suffix}
	add := func(words string, parts ...[]expr.Any) {
		c.rules = append(c.rules, rule{f.words + words, join(parts...)})
	}
	remember := join(f.datagram(), []expr.Any{f.dynset(unix.NFT_DYNSET_OP_UPDATE, f.pieces(), pieceTimeout)}, f.accept())
	add("a later piece: where the first went", f.isLater(), f.addresses(), f.datagram(), []expr.Any{lookup(f.pieces(), f.tuple, f.mac)}, f.send())
	add("a later piece, and no first: by ways", f.isLater(), f.addressed(), f.byWays())
	for _, p := range append(slices.Clone(protocols), protocol{"sctp", unix.IPPROTO_SCTP}) {
		add("first piece of a known "+p.name+" flow: keep its backend", f.tupleOf(p.number), []expr.Any{lookup(f.flows(), f.tuple, f.mac), f.keep(), f.writeMAC()}, remember)
	}
	add("first piece of a new flow: by new", f.then(expr.VerdictJump, "new"))
	add("first piece that has its backend: remember it", served(expr.CmpOpEq), f.addresses(), []expr.Any{
		&expr.Payload{DestRegister: f.mac, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 6},
	}, remember)
	return c
}

// newChain is the way of a new flow, for who wants to go on when it is taken.
func (f *family) newChain() chain {
	return chain{name: "new" + f.suffix, rules: []rule{{f.words + "by ways", join(f.addressed(), f.byWays())}}}
}

// served matches frames that are (CmpOpNeq) or are no longer (CmpOpEq) for the
// hardware address of a service.
func served(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG32_00, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 4},
		&expr.Bitwise{SourceRegister: unix.NFT_REG32_00, DestRegister: unix.NFT_REG32_00, Len: 4, Mask: []byte{serviceBit, 0, 0, 0}, Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: unix.NFT_REG32_00, Data: make([]byte, 4)},
	}
}

// pick hashes what the tuple holds to one of size seats, and loads who has it, or to
// whom it is left.
func (f *family) pick(size, try, heirs int) []expr.Any {
	return f.service(
		&expr.Hash{SourceRegister: f.tuple, DestRegister: f.slot, Length: f.tupleBytes, Modulus: uint32(size), Offset: uint32(heirs), Seed: uint32(hashSeed + try - 1), Type: expr.HashTypeJenkins},
		lookup(f.seats(), f.vip, f.mac),
	)
}

// tries are the rules by which a flow finds a seat, in their order: its number
// seeds the hash, and heirs is added to the seat that is asked for.
func tries(size int) []struct{ number, heirs int } {
	type try = struct{ number, heirs int }
	if size <= 2 {
		return []try{{1, 0}} // two seats are for two
	}
	var out []try
	for n := 1; n <= seatTries; n++ {
		out = append(out, try{n, 0})
	}
	return append(out, try{seatTries, mostSeats})
}

// pickChains are for new flows to services of each number of seats: one for what
// has ports, which is remembered, and one for what has none. A packet that has its
// backend passes the rest of its chain by; one that the flows have no room for
// goes where it was picked for all the same.
func (f *family) pickChains() []chain {
	var out []chain
	for size := 1; size <= mostSeats; size *= 2 {
		n := strconv.Itoa(size)
		ports, plain := chain{name: pickOne + n + f.suffix}, chain{name: "plain-" + n + f.suffix}
		add := func(c *chain, words string, parts ...[]expr.Any) {
			c.rules = append(c.rules, rule{f.words + words + " of " + n, join(parts...)})
		}
		add(&ports, "no ports: by addresses to one", f.protocol(expr.CmpOpNeq, unix.IPPROTO_TCP), f.protocol(expr.CmpOpNeq, unix.IPPROTO_UDP),
			f.protocol(expr.CmpOpNeq, unix.IPPROTO_SCTP), f.then(expr.VerdictGoto, "plain-"+n))
		for i, t := range tries(size) {
			words, match := fmt.Sprintf("new flow, try %d: to one", t.number), f.flow()
			if t.heirs > 0 {
				words = fmt.Sprintf("new flow, try %d was an empty seat: to its heir", t.number)
			}
			if i > 0 {
				match = join(served(expr.CmpOpNeq), match)
			}
			add(&ports, words, match, f.pick(size, t.number, t.heirs), []expr.Any{f.writeMAC(), f.keep()}, f.back())
		}
		add(&ports, "a later piece: by addresses to one", served(expr.CmpOpNeq), f.then(expr.VerdictGoto, "plain-"+n))
		add(&plain, "no ports: to one", f.noPorts(), f.pick(size, 1, 0), []expr.Any{f.writeMAC()}, f.back())
		if size > 2 {
			add(&plain, "no ports, an empty seat: to its heir", f.noPorts(), f.pick(size, 1, mostSeats), []expr.Any{f.writeMAC()}, f.back())
		}
		out = append(out, ports, plain)
	}
	return out
}
