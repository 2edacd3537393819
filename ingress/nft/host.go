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

// Registers of the host's table that are the same in both families: protocol,
// destination port and slot are the key of a slot map.
const (
	hostKey  = 8 // protocol
	hostPort = 9 // destination port
	hostSlot = 10
)

var slotKey = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeInteger)

// hostRules is weft's IPv4 table in the host's namespace: published ports, the
// tasks' way out, and what must not pass between overlay and host.
func hostRules(t ingress.Table) ruleset {
	r := ipv4.publishedRules(t)
	protect := set{name: "protect", key: nftables.TypeIPAddr, interval: true, elements: intervals(t.Gateway.Protect), show: showInterval}
	r.sets = append(r.sets, protect)
	r.chains = append(r.chains,
		chain{name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource, rules: postroutingChain(t)},
		chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter, rules: forwardChain(t)},
		chain{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: nftables.ChainPriorityFilter, rules: ipv4.inputChain(t)},
	)
	return r
}

// hostRules6 is its IPv6 twin. Tasks have no way out over IPv6 yet, so that the
// gateway bridge takes part in no forwarding at all.
func hostRules6(t ingress.Table) ruleset {
	r := ipv6.publishedRules(t)
	r.chains = append(r.chains,
		chain{name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource, rules: ipv6.entryRules(t.Ingress.Link, t.Ingress.Addr6.Addr())},
		chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter, rules: forwardChain6(t)},
		chain{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: nftables.ChainPriorityFilter, rules: ipv6.inputChain(t)},
	)
	return r
}

// publishedRules sends requests for published ports to backends.
func (f *family) publishedRules(t ingress.Table) ruleset {
	r := ruleset{family: f.host}
	slots := make([]set, len(ingress.RingSizes))
	for i, size := range ingress.RingSizes {
		slots[i] = set{name: slotsName(size), key: slotKey, data: f.slotData, isMap: true, concat: true, elements: map[string]string{}, show: f.showSlot}
	}
	for _, p := range t.Published {
		f.fillPublished(slots, p)
	}
	r.sets = append(slots, f.members(t.Underlay))
	dnat := f.publishedChain()
	r.chains = []chain{
		{name: "prerouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityNATDest, rules: dnat},
		{name: "output", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityNATDest, rules: dnat},
	}
	return r
}

func slotsName(size int) string {
	return map[int]string{64: "slots64", 1024: "slots1024", 16384: "slots16384"}[size]
}

// addressOf is a backend's address of the family; invalid without.
func (f *family) addressOf(b ingress.Backend) netip.Addr {
	for _, a := range []netip.Addr{b.Addr, b.Addr6} {
		if f.has(a) {
			return a
		}
	}
	return netip.Addr{}
}

func (f *family) fillPublished(slots []set, p ingress.Published) {
	var keys []string
	var data []string
	for _, b := range p.Backends {
		addr := f.addressOf(b)
		if b.Draining || !addr.IsValid() {
			continue
		}
		keys = append(keys, string(b.Task))
		data = append(data, raw(addr)+string(binary.BigEndian.AppendUint16(nil, p.Target))+"\x00\x00")
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
func (f *family) publishedChain() []rule {
	var rules []rule
	for _, size := range ingress.RingSizes {
		rules = append(rules, rule{"published port: pick from " + slotsName(size), join(f.notLoopback(), []expr.Any{
			&expr.Fib{Register: hostKey, ResultADDRTYPE: true, FlagDADDR: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: hostKey, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: hostKey},
			&expr.Payload{DestRegister: hostPort, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2},
			f.load(f.hash, f.source),
			&expr.Payload{DestRegister: f.hashPorts, Base: expr.PayloadBaseTransportHeader, Offset: thPorts, Len: 4},
			&expr.Hash{SourceRegister: f.hash, DestRegister: hostSlot, Length: f.bytes + 4, Modulus: uint32(size), Seed: hashSeed, Type: expr.HashTypeJenkins},
			lookup(slotsName(size), hostKey, f.hostAddr),
			&expr.Counter{},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: f.nat, RegAddrMin: f.hostAddr, RegProtoMin: f.hostPort},
		})})
	}
	return rules
}

// notLoopback leaves ::1 alone: a packet from there does not leave the loopback
// device, however it is translated (IPv4 has route_localnet for that). So it is
// refused at once, and who asks localhost goes on to 127.0.0.1.
func (f *family) notLoopback() []expr.Any {
	if !f.is6 {
		return nil
	}
	return []expr.Any{
		f.load(f.hash, f.destination),
		&expr.Cmp{Op: expr.CmpOpNeq, Register: f.hash, Data: netip.IPv6Loopback().AsSlice()},
	}
}

// entryRules give requests that enter the overlay by link the host's own address
// there.
func (f *family) entryRules(link string, addr netip.Addr) []rule {
	if link == "" || !addr.IsValid() {
		return nil
	}
	return []rule{{"to a backend: from " + addr.String() + " on " + link, join(
		outLink(expr.CmpOpEq, link), translated(expr.CmpOpNeq),
		[]expr.Any{
			&expr.Immediate{Register: f.hostAddr, Data: addr.AsSlice()},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: f.nat, RegAddrMin: f.hostAddr},
		})}}
}

// postroutingChain is that, and gives tasks' packets that leave the host the
// host's address.
func postroutingChain(t ingress.Table) []rule {
	rules := ipv4.entryRules(t.Ingress.Link, t.Ingress.Addr.Addr())
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
	rules := append(clampRules(t), entryForward(t)...)
	if t.Gateway.Bridge != "" {
		rules = append(rules, rule{"from " + t.Gateway.Bridge + " to an overlay range, untranslated: drop", join(
			inLink(t.Gateway.Bridge), []expr.Any{
				ipv4.load(hostKey, ipv4.destination),
				has("protect", hostKey),
			}, translated(expr.CmpOpEq), dropped())},
			rule{"into " + t.Gateway.Bridge + " new: drop", join(outLink(expr.CmpOpEq, t.Gateway.Bridge), unasked(), dropped())})
	}
	return rules
}

// forwardChain6 is forwardChain for IPv6, which tasks do not get out by: the host
// routes nothing of the gateway bridge but published ports that a task asks for.
func forwardChain6(t ingress.Table) []rule {
	rules := append(clampRules(t), entryForward(t)...)
	if b := t.Gateway.Bridge; b != "" {
		rules = append(rules,
			rule{"from " + b + " untranslated: drop", join(inLink(b), translated(expr.CmpOpEq), dropped())},
			rule{"into " + b + " new: drop", join(outLink(expr.CmpOpEq, b), unasked(), dropped())})
	}
	return rules
}

// entryForward: only translated requests enter by the ingress leg, and nothing
// new comes out of it.
func entryForward(t ingress.Table) []rule {
	l := t.Ingress.Link
	if l == "" {
		return nil
	}
	return []rule{
		{"into " + l + " untranslated: drop", join(outLink(expr.CmpOpEq, l), translated(expr.CmpOpEq), dropped())},
		{"out of " + l + " new: drop", join(inLink(l), unasked(), dropped())},
	}
}

func dropped() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
}

// inputChain keeps the host's own sockets out of the tasks' reach by way of the
// ingress leg, which tasks on internal networks have, too: to the host it
// brings answers only. And it keeps strangers from sending into the overlay.
func (f *family) inputChain(t ingress.Table) []rule {
	var rules []rule
	if t.Underlay.Port != 0 {
		rules = append(rules, rule{fmt.Sprintf("VXLAN (udp %d) from no member: drop", t.Underlay.Port), join([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(t.Underlay.Port)},
			f.load(f.hostAddr, f.source),
			&expr.Lookup{SourceRegister: f.hostAddr, SetName: "members", Invert: true},
		}, dropped())})
	}
	if t.Ingress.Link != "" {
		rules = append(rules, rule{"from " + t.Ingress.Link + " new: drop", join(inLink(t.Ingress.Link), unasked(), dropped())})
	}
	return rules
}

// members are the tunnel addresses that VXLAN is taken from.
func (f *family) members(u ingress.Underlay) set {
	s := f.addressSet("members")
	s.name = "members" // the families have tables of their own here
	for _, a := range u.Members {
		if a = a.Unmap(); f.has(a) {
			s.elements[raw(a)] = ""
		}
	}
	return s
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
		ipv4.load(1, ipv4.source),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
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
		start := raw(p.Masked().Addr())
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
func (f *family) showSlot(key, data string) string {
	proto := map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[key[0]]
	addr, err := netip.ParseAddr(f.show(data))
	if err != nil {
		return fmt.Sprintf("%s -> %x", proto, data)
	}
	to := netip.AddrPortFrom(addr, binary.BigEndian.Uint16([]byte(data[f.bytes:f.bytes+2])))
	return fmt.Sprintf("%s %d -> %s", proto, binary.BigEndian.Uint16([]byte(key[4:6])), to)
}

func showInterval(key, data string) string {
	if data == intervalEnd {
		return "before " + ipv4.show(key)
	}
	return "from " + ipv4.show(key)
}
