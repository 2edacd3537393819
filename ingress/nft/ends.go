package nft

import (
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

// What stands in the namespace of a task that takes what is sent to service
// addresses, without connection tracking. Direct return brings a packet as its
// client sent it, and the task has the service's address on its loopback: a server
// that waits at all addresses takes a connection there and answers by itself. Two
// kinds of servers do not:
//
//   - of datagrams, one that waits at all addresses answers from the task's own;
//   - one that waits at the task's own address alone is not asked.
//
// So at the input hook, where pieces are one and routes are chosen, a datagram to a
// service address gets the task's own one, and who asked is remembered for the answer;
// a segment that no socket waits for does, too, and its connection bears a mark, so
// that the packets of others cost no look at the output hook. Whoever has bound a
// socket to the service's address itself is left alone.
//
// An association of SCTP always gets the task's own address, and its answers the
// service's: the kernel's rules cannot ask which of its sockets waits. So one that is
// bound to the service's address itself is not reached. SCTP's sum does not cover addresses.

// endsTable is apart from the tables of the mesh in the same namespace.
const endsTable = weft.TableName + "-vip"

// Names of its chains and maps.
const (
	endsOwn    = "own"    // service address to the task's own
	endsAsked  = "asked"  // datagrams: who asked, to the service address
	endsOpen   = "opened" // connections, by the client and the server's port
	endsClosed = "closed" // those that one end has closed
	endsJoined = "joined" // associations of SCTP, by the client and the server's port
)

// Registers: a key is an address and two ports, as askedKey4 and 6; data are behind it.
func (f *family) endsData() uint32 { return insideKey + f.bytes/4 + 2 }

// endsRules is the table of a task, of one family.
func (f *family) endsRules(e ingress.End) ruleset {
	own := set{name: endsOwn, key: f.addr, data: f.addr, isMap: true, elements: map[string]string{}, show: func(k, v string) string { return f.show(k) + " -> " + f.show(v) }}
	for _, a := range e.Addrs {
		if f.has(a.VIP) && f.has(a.Own) {
			own.elements[raw(a.VIP)] = raw(a.Own)
		}
	}
	known := func(name string, timeout time.Duration) set {
		s := set{name: name, key: askedKey4, data: f.addr, isMap: true, concat: true, dynamic: true, timeout: timeout, size: askedSize}
		if f.is6 {
			s.key = askedKey6
		}
		return s
	}
	hooked := func(name string, hook *nftables.ChainHook, priority int32, rules ...rule) chain {
		return chain{name: name, kind: nftables.ChainTypeFilter, hook: hook, priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)), rules: rules}
	}
	in := []rule{
		{"tcp that a socket waits for: as it is", join(isTCP(), anySocket(), f.accept())},
		{"to a service address: by vip", join([]expr.Any{f.load(insideKey, f.destination), lookup(endsOwn, insideKey, f.endsData())}, f.then(expr.VerdictGoto, "vip"))},
		{"a datagram to another address: its answers, too, come from there", join(isProtocol(unix.IPPROTO_UDP), f.asking(), f.forget(endsAsked))},
		{"a new association at another address: its answers, too, come from there", join(isProtocol(unix.IPPROTO_SCTP), newAssociation(insideTmp), f.asking(), f.forget(endsJoined))},
	}
	if e.Direct {
		in = append(f.endsDirect(e), in...)
	}
	r := ruleset{family: f.host, name: endsTable,
		sets: []set{own, known(endsAsked, askedTimeout), known(endsOpen, flowTimeout), known(endsClosed, endingTimeout), known(endsJoined, associatedTimeout)},
		chains: []chain{
			// Behind what the mesh remembers (inside.go), before connection tracking.
			hooked("in", nftables.ChainHookInput, 310, in...),
			hooked("out", nftables.ChainHookOutput, -350,
				rule{"no tcp: by others", join(f.isOf(expr.CmpOpNeq, unix.IPPROTO_TCP), f.then(expr.VerdictGoto, "others"))},
				rule{"tcp of a connection to the own address: by connections", join(endMarked(), f.then(expr.VerdictGoto, "connections"))},
			),
			{name: "others" + f.suffix, rules: []rule{
				f.endsAnswer("datagram", unix.IPPROTO_UDP, endsAsked), f.endsAnswer("association", unix.IPPROTO_SCTP, endsJoined),
			}},
			{name: "vip" + f.suffix, rules: append(append(f.endsDatagrams(), f.endsConnections()...),
				f.askedOwn(unix.IPPROTO_SCTP, nil, endsJoined, associatedTimeout))},
			{name: "datagram" + f.suffix, rules: []rule{f.askedOwn(unix.IPPROTO_UDP, nil, endsAsked, askedTimeout)}},
			{name: "connections" + f.suffix, rules: f.endsAnswers()},
		}}
	if f.is6 {
		r.chains = append(r.chains, chain{name: "whole" + f.suffix, rules: []rule{f.makeWhole()}})
	}
	return r
}

// endsAnswer gives an answer the address that was asked.
func (f *family) endsAnswer(what string, proto byte, name string) rule {
	return rule{"an answering " + what + ": from the service address", join(isProtocol(proto), f.answering(), []expr.Any{
		lookup(name, insideKey, f.endsData()), f.writeSource(f.endsData()),
	}, f.accept())}
}

// endsDirect lets in connections to the task's own addresses by two comparisons, without
// a look for the socket that a request waits for.
func (f *family) endsDirect(e ingress.End) (rules []rule) {
	var seen []netip.Addr
	for _, a := range e.Addrs {
		if !f.has(a.Own) || slices.Contains(seen, a.Own) {
			continue
		}
		seen = append(seen, a.Own)
		rules = append(rules, rule{"tcp to " + a.Own.String() + ": as it is", join([]expr.Any{
			f.load(insideKey, f.destination), &expr.Cmp{Op: expr.CmpOpEq, Register: insideKey, Data: a.Own.AsSlice()},
		}, f.isOf(expr.CmpOpEq, unix.IPPROTO_TCP), f.accept())})
	}
	return rules
}

// endsDatagrams is what a datagram to a service address meets.
func (f *family) endsDatagrams() []rule {
	wild := func(v byte) []expr.Any {
		return join(isProtocol(unix.IPPROTO_UDP), []expr.Any{
			&expr.Socket{Key: expr.SocketKeyWildcard, Register: insideTmp}, // linux/netfilter/nf_tables.h: NFT_SOCKET_WILDCARD
			&expr.Cmp{Op: expr.CmpOpEq, Register: insideTmp, Data: []byte{v}},
		})
	}
	return []rule{
		{"a datagram for a server at all addresses: by datagram", join(wild(1), f.then(expr.VerdictGoto, "datagram"))},
		{"a datagram for a server at the service address: as it is", join(wild(0), f.accept())},
		{"a datagram: by datagram", join(isProtocol(unix.IPPROTO_UDP), f.then(expr.VerdictJump, "datagram"))},
		{"a datagram that a server at the own address waits for: let in", join(isProtocol(unix.IPPROTO_UDP), anySocket(), f.accept())},
		{"a datagram for nobody: refused by the service address", join(isProtocol(unix.IPPROTO_UDP), f.asking(), []expr.Any{lookup(endsAsked, insideKey, f.endsData()), f.writeDestination(f.endsData())}, f.accept())},
	}
}

// endsConnections is what a segment to a service address meets that no socket waits for.
func (f *family) endsConnections() []rule {
	syn := f.endsFlags(flagSYN|flagACK, expr.CmpOpEq, flagSYN)
	return []rule{
		// Nobody answers it, so that it is the last that is seen of its connection.
		{"a reset by the client: of a connection that ends, to the own address", join(isTCP(), f.endsFlags(flagRST, expr.CmpOpEq, flagRST), f.asking(), []expr.Any{
			lookup(endsOpen, insideKey, f.endsData()), f.remember(endsClosed, unix.NFT_DYNSET_OP_UPDATE, endingTimeout), f.remember(endsOpen, opDelete, 0),
		}, f.toOwn(), f.accept())},
		{"a request for a connection: one that opens", join(isTCP(), syn, f.asking(), f.forget(endsClosed))},
		{"tcp of a connection that ends: to the own address", join(isTCP(), f.asking(), []expr.Any{
			lookup(endsClosed, insideKey, f.endsData()), f.remember(endsClosed, unix.NFT_DYNSET_OP_UPDATE, endingTimeout),
		}, f.toOwn(), setMark(ingress.EndMark), f.accept())},
		f.askedOwn(unix.IPPROTO_TCP, setMark(ingress.EndMark), endsOpen, flowTimeout),
	}
}

// makeWhole is in a chain that nothing leads to. That a rule of its kind is there makes
// the kernel put pieces of datagrams together before the first hook (nft_tproxy.c:
// nf_defrag_ipv6_enable). IPv6's input hook sees pieces otherwise, and the later ones have
// no ports to tell the server by. IPv4's stands behind that anyway (ip_local_deliver), so
// that there the rule would only cost every packet a hook more each way.
func (f *family) makeWhole() rule {
	return rule{"pieces of datagrams are one", []expr.Any{
		&expr.Immediate{Register: insideTmp, Data: []byte{0, 1, 0, 0}},
		&expr.TProxy{Family: byte(f.nat), TableFamily: byte(f.nat), RegPort: insideTmp},
	}}
}

// endsAnswers are the rules for what a server sends on a marked connection.
func (f *family) endsAnswers() []rule {
	known := func(name string) []expr.Any {
		return join(f.answering(), []expr.Any{lookup(name, insideKey, f.endsData())})
	}
	return []rule{
		{"the end of a connection: it is one that ends", join(f.endsFlags(flagFIN|flagRST, expr.CmpOpNeq, 0), known(endsOpen), []expr.Any{
			f.remember(endsClosed, unix.NFT_DYNSET_OP_UPDATE, endingTimeout), f.remember(endsOpen, opDelete, 0), f.writeSource(f.endsData()),
		}, f.accept())},
		{"of a connection that is open: from the service address", join(known(endsOpen), []expr.Any{
			f.remember(endsOpen, unix.NFT_DYNSET_OP_UPDATE, flowTimeout), f.writeSource(f.endsData()),
		}, f.accept())},
		{"of a connection that ends: from the service address", join(known(endsClosed), []expr.Any{
			f.remember(endsClosed, unix.NFT_DYNSET_OP_UPDATE, endingTimeout), f.writeSource(f.endsData()),
		}, f.accept())},
	}
}

// askedOwn remembers which service address was asked, and asks the own one.
func (f *family) askedOwn(proto byte, more []expr.Any, name string, timeout time.Duration) rule {
	words := map[byte]string{unix.IPPROTO_UDP: "a datagram", unix.IPPROTO_TCP: "tcp that no socket waits for there", unix.IPPROTO_SCTP: "an association"}[proto]
	return rule{words + ": to the own address", join(isProtocol(proto), f.asking(), []expr.Any{
		f.load(f.endsData(), f.destination), f.remember(name, unix.NFT_DYNSET_OP_UPDATE, timeout),
	}, f.toOwn(), more)}
}

// toOwn gives a packet to a service address the own one.
func (f *family) toOwn() []expr.Any {
	return []expr.Any{f.load(f.endsData(), f.destination), lookup(endsOwn, f.endsData(), f.endsData()), f.writeDestination(f.endsData())}
}

// asking loads the key of what comes in: the client's address and port, the server's port.
func (f *family) asking() []expr.Any { return f.endsKey(f.source, thPorts, thDestination) }

// answering is asking of what goes out.
func (f *family) answering() []expr.Any { return f.endsKey(f.destination, thDestination, thPorts) }

func (f *family) endsKey(client, clientPort, port uint32) []expr.Any {
	ports := insideKey + f.bytes/4
	return []expr.Any{
		f.load(insideKey, client),
		&expr.Payload{DestRegister: ports, Base: expr.PayloadBaseTransportHeader, Offset: clientPort, Len: 2},
		&expr.Payload{DestRegister: ports + 1, Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
	}
}

func (f *family) remember(name string, op uint32, timeout time.Duration) expr.Any {
	return &expr.Dynset{SrcRegKey: insideKey, SrcRegData: f.endsData(), SetName: name, Operation: op, Timeout: timeout}
}

// forget takes a key away; a map wants data for each operation.
func (f *family) forget(name string) []expr.Any {
	return []expr.Any{&expr.Immediate{Register: f.endsData(), Data: make([]byte, f.bytes)}, f.remember(name, opDelete, 0)}
}

// endsFlags compares flags of TCP as family.flags does, in a register that is free here.
func (f *family) endsFlags(mask byte, op expr.CmpOp, want byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: insideTmp, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags - 1, Len: 4},
		&expr.Bitwise{SourceRegister: insideTmp, DestRegister: insideTmp, Len: 4, Mask: []byte{0, mask, 0, 0}, Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: insideTmp, Data: []byte{0, want, 0, 0}},
	}
}

func (f *family) writeDestination(register uint32) expr.Any {
	return f.writeAddress(register, f.destination)
}

// anySocket matches packets that a socket of this namespace waits for: the key is
// one that every kind of socket has, and its value does not matter.
func anySocket() []expr.Any {
	return []expr.Any{&expr.Socket{Key: expr.SocketKeyTransparent, Register: insideTmp}}
}

func endMarked() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: insideTmp},
		&expr.Cmp{Op: expr.CmpOpEq, Register: insideTmp, Data: binaryutil.NativeEndian.PutUint32(ingress.EndMark)},
	}
}

// isOf compares the protocol as isProtocol does, for what every packet meets: a byte of
// IPv4's header is read without a call, and IPv6 may have headers between.
func (f *family) isOf(op expr.CmpOp, proto byte) []expr.Any {
	read := expr.Any(&expr.Payload{DestRegister: insideTmp, Base: expr.PayloadBaseNetworkHeader, Offset: 9, Len: 1}) // RFC 791
	if f.is6 {
		read = &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: insideTmp}
	}
	return []expr.Any{read, &expr.Cmp{Op: op, Register: insideTmp, Data: []byte{proto}}}
}

func isTCP() []expr.Any { return isProtocol(unix.IPPROTO_TCP) }

// endsProbe has an address of each family.
func endsProbe() ingress.End {
	at := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	return ingress.End{Addrs: []ingress.EndAddr{{VIP: at("192.0.2.1"), Own: at("192.0.2.2")}, {VIP: at("2001:db8::1"), Own: at("2001:db8::2")}}}
}
