package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Registers of the host's table: protocol, destination port and slot are the
// key of a slot map; source address and ports are hashed; the map's data is the
// backend's address and port.
const (
	hostKey   = 8 // protocol
	hostPort  = 9 // destination port
	hostSlot  = 10
	hostHash  = 12 // source address, then both ports
	hostPorts = 13
	hostAddr  = 16
	hostDPort = 17
)

var (
	slotKey  = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeInteger)
	slotData = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
)

// hostRules is weft's table in the host's namespace: published ports, the
// tasks' way out, and what must not pass between overlay and host.
func hostRules(t ingress.Table) ruleset {
	r := ruleset{family: nftables.TableFamilyIPv4}
	slots := make([]set, len(ingress.RingSizes))
	for i, size := range ingress.RingSizes {
		slots[i] = set{name: slotsName(size), key: slotKey, data: slotData, isMap: true, concat: true, elements: map[string]string{}, show: showSlot}
	}
	for _, p := range t.Published {
		fillPublished(slots, p)
	}
	protect := set{name: "protect", key: nftables.TypeIPAddr, interval: true, elements: intervals(t.Gateway.Protect), show: showInterval}
	members := addressSet("members")
	for _, a := range t.Underlay.Members {
		if a = a.Unmap(); a.Is4() {
			members.elements[bytes4(a)] = ""
		}
	}
	r.sets = append(slots, protect, members)
	dnat := publishedChain()
	r.chains = []chain{
		{name: "prerouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityNATDest, rules: dnat},
		{name: "output", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityNATDest, rules: dnat},
		{name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource, rules: postroutingChain(t)},
		{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter, rules: forwardChain(t)},
		{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: nftables.ChainPriorityFilter, rules: inputChain(t)},
	}
	return r
}

func slotsName(size int) string {
	return map[int]string{64: "slots64", 1024: "slots1024", 16384: "slots16384"}[size]
}

func fillPublished(slots []set, p ingress.Published) {
	var keys []string
	var data []string
	for _, b := range p.Backends {
		if b.Draining || !b.Addr.Is4() {
			continue
		}
		keys = append(keys, string(b.Task))
		data = append(data, bytes4(b.Addr)+string(binary.BigEndian.AppendUint16(nil, p.Target))+"\x00\x00")
	}
	size := ingress.RingSize(len(keys))
	for i, m := range ingress.RingSizes {
		if m != size {
			continue
		}
		for slot, k := range ingress.Ring(keys, size) {
			key := append([]byte{protocolNumber(p.Protocol), 0, 0, 0}, binary.BigEndian.AppendUint16(nil, p.Port)...)
			key = append(key, 0, 0)
			key = append(key, binaryutil.NativeEndian.PutUint32(uint32(slot))...)
			slots[i].elements[string(key)] = data[k]
		}
	}
}

func protocolNumber(p weft.Protocol) byte {
	if p == weft.UDP {
		return unix.IPPROTO_UDP
	}
	return unix.IPPROTO_TCP
}

// publishedChain sends connections to a published port of one of the host's
// own addresses to a backend. A port without a backend is not translated: the
// host itself then answers with a reset or port unreachable.
func publishedChain() []rule {
	var rules []rule
	for _, size := range ingress.RingSizes {
		rules = append(rules, rule{"published port: pick from " + slotsName(size), []expr.Any{
			&expr.Fib{Register: hostKey, ResultADDRTYPE: true, FlagDADDR: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: hostKey, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: hostKey},
			&expr.Payload{DestRegister: hostPort, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2},
			&expr.Payload{DestRegister: hostHash, Base: expr.PayloadBaseNetworkHeader, Offset: ipSource, Len: 4},
			&expr.Payload{DestRegister: hostPorts, Base: expr.PayloadBaseTransportHeader, Offset: thPorts, Len: 4},
			&expr.Hash{SourceRegister: hostHash, DestRegister: hostSlot, Length: 8, Modulus: uint32(size), Seed: hashSeed, Type: expr.HashTypeJenkins},
			lookup(slotsName(size), hostKey, hostAddr),
			&expr.Counter{},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: hostAddr, RegProtoMin: hostDPort},
		}})
	}
	return rules
}

// postroutingChain gives requests that enter the overlay the host's own
// ingress address, and tasks' packets that leave the host the host's address.
func postroutingChain(t ingress.Table) []rule {
	var rules []rule
	if t.Ingress.Link != "" {
		rules = append(rules, rule{"to a backend: from " + t.Ingress.Addr.Addr().String() + " on " + t.Ingress.Link, join(
			outLink(expr.CmpOpEq, t.Ingress.Link), translated(expr.CmpOpNeq),
			[]expr.Any{
				&expr.Immediate{Register: hostAddr, Data: []byte(bytes4(t.Ingress.Addr.Addr()))},
				&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: hostAddr},
			})})
	}
	if t.Gateway.Bridge != "" {
		rules = append(rules, rule{"way out of " + t.Gateway.Subnet.String() + " but by " + t.Gateway.Bridge, join(
			from(t.Gateway.Subnet), outLink(expr.CmpOpNeq, t.Gateway.Bridge), []expr.Any{&expr.Masq{}})})
	}
	return rules
}

// forwardChain keeps the host from becoming a router between overlay networks:
// only translated requests enter by the ingress leg, nothing new comes out of
// it, tasks do not reach overlay ranges through their gateway, and the gateway
// leads out only: neither another task nor a neighbour of the host that routes
// the bridge's range here opens a connection to a task's leg.
func forwardChain(t ingress.Table) []rule {
	var rules []rule
	drop := []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
	if t.Ingress.Link != "" {
		rules = append(rules,
			rule{"into " + t.Ingress.Link + " untranslated: drop", join(
				outLink(expr.CmpOpEq, t.Ingress.Link), translated(expr.CmpOpEq), drop)},
			rule{"out of " + t.Ingress.Link + " new: drop", join(
				inLink(t.Ingress.Link), unasked(), drop)},
		)
	}
	if t.Gateway.Bridge != "" {
		rules = append(rules, rule{"from " + t.Gateway.Bridge + " to an overlay range, untranslated: drop", join(
			inLink(t.Gateway.Bridge), []expr.Any{
				&expr.Payload{DestRegister: hostKey, Base: expr.PayloadBaseNetworkHeader, Offset: ipDestination, Len: 4},
				has("protect", hostKey),
			}, translated(expr.CmpOpEq), drop)},
			rule{"into " + t.Gateway.Bridge + " new: drop", join(outLink(expr.CmpOpEq, t.Gateway.Bridge), unasked(), drop)})
	}
	return rules
}

// inputChain keeps the host's own sockets out of the tasks' reach by way of the
// ingress leg, which tasks on internal networks have, too: to the host it
// brings answers only. And it keeps strangers from sending into the overlay.
func inputChain(t ingress.Table) []rule {
	var rules []rule
	drop := []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
	if t.Underlay.Port != 0 {
		rules = append(rules, rule{fmt.Sprintf("VXLAN (udp %d) from no member: drop", t.Underlay.Port), join([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(t.Underlay.Port)},
			&expr.Payload{DestRegister: hostKey, Base: expr.PayloadBaseNetworkHeader, Offset: ipSource, Len: 4},
			&expr.Lookup{SourceRegister: hostKey, SetName: "members", Invert: true},
		}, drop)})
	}
	if t.Ingress.Link != "" {
		rules = append(rules, rule{"from " + t.Ingress.Link + " new: drop", join(inLink(t.Ingress.Link), unasked(), drop)})
	}
	return rules
}

// unasked matches packets that belong to no connection seen before.
func unasked() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitNEW | expr.CtStateBitINVALID), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// translated matches packets whose connection has (CmpOpNeq) or has not
// (CmpOpEq) had its destination translated (IPS_DST_NAT, nf_conntrack_common.h).
func translated(op expr.CmpOp) []expr.Any {
	const ipsDstNAT = 1 << 5
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(ipsDstNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: make([]byte, 4)},
	}
}

func outLink(op expr.CmpOp, name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: linkName(name)}}
}

func inLink(name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: linkName(name)}}
}

// linkName pads to IFNAMSIZ (linux/if.h).
func linkName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func from(p netip.Prefix) []expr.Any {
	mask := binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-p.Bits()))
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: ipSource, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(bytes4(p.Masked().Addr()))},
	}
}

// intervals are the elements of an interval set that holds the prefixes.
// Prefixes are nested or apart, so dropping nested ones leaves no overlap;
// neighbours are joined, because the end of one is the start of the next.
func intervals(prefixes []netip.Prefix) map[string]string {
	out := map[string]string{}
	sorted := slices.Clone(prefixes)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var last netip.Prefix
	for _, p := range sorted {
		if !p.Addr().Is4() || last.IsValid() && last.Overlaps(p) {
			continue
		}
		last = p
		start := bytes4(p.Masked().Addr())
		if out[start] == intervalEnd {
			delete(out, start)
		} else {
			out[start] = ""
		}
		if end, ok := afterLast(p); ok {
			out[end] = intervalEnd
		}
	}
	return out
}

// afterLast is the first address behind p; there is none behind 255.255.255.255.
func afterLast(p netip.Prefix) (string, bool) {
	b := p.Masked().Addr().As4()
	n := uint64(binary.BigEndian.Uint32(b[:])) + 1<<(32-p.Bits())
	if n > 0xffffffff {
		return "", false
	}
	return string(binary.BigEndian.AppendUint32(nil, uint32(n))), true
}

// showSlot prints an element of a slot map: protocol, port and slot to address
// and port, each padded to four bytes.
func showSlot(key, data string) string {
	proto := map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[key[0]]
	return fmt.Sprintf("%s %d -> %s:%d", proto, binary.BigEndian.Uint16([]byte(key[4:6])),
		address(data), binary.BigEndian.Uint16([]byte(data[4:6])))
}

func showInterval(key, data string) string {
	if data == intervalEnd {
		return "before " + address(key)
	}
	return "from " + address(key)
}
