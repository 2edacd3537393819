package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Registers of the host's table that are the same in both families: protocol, first
// port and first address are a rule's key (ruleKey), with the slot that of a slot, with a
// client's address that of who may ask.
const (
	hostKey  = 8 // protocol
	hostPort = 9
	hostAt   = 10
)

var portKey = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)

// fewSlots is up to how many backends have a slot each: connection tracking keeps
// flows where they are, so that a backend that goes may move all others. More are
// seated (seats.go).
const fewSlots = 8

// slotCount is the number of slots for n backends.
func slotCount(n int) int {
	if n <= fewSlots {
		return n
	}
	return seatCount(n)
}

// slotCounts are all of them.
func slotCounts() []int {
	var out []int
	for n := 1; n <= mostSeats; n = slotCount(n + 1) {
		out = append(out, n)
		if n == mostSeats {
			break
		}
	}
	return out
}

// slotsOf are the backends of slots, by their index; a slot from mostSeats on is
// where an empty one below it leads to.
func slotsOf(keys []string) map[int]int {
	out := make(map[int]int, slotCount(len(keys)))
	if len(keys) > fewSlots {
		seats := seat(keys)
		for i, k := range seats.own {
			if k >= 0 {
				out[i] = k
			} else if k = seats.heir[i]; k >= 0 {
				out[i+mostSeats] = k
			}
		}
		return out
	}
	order := make([]int, len(keys))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return strings.Compare(keys[a], keys[b]) })
	for i, k := range order {
		out[i] = k
	}
	return out
}

// Three ways to give a flow its port, as names of chains: that of the backend,
// the one that it has (ranges), and another one of the backend's range. Those of
// ports that are bound to addresses have another name before.
const (
	pickOne   = "pick-"
	pickKeep  = "keep-"
	pickMove  = "move-"
	pickBound = "bound-"
)

// pickWays are all of them.
func pickWays() []string {
	return []string{pickOne, pickKeep, pickMove, pickBound + pickOne, pickBound + pickKeep, pickBound + pickMove}
}

// kind is what leads to a rule: its port, or one of a range, at all addresses or some.
type kind struct{ isBound, isRange bool }

// kinds are all of them, the commonest first. One rule at most has what is asked, so
// that their order changes nothing else.
func kinds() []kind { return []kind{{false, false}, {true, false}, {false, true}, {true, true}} }

func (k kind) String() string {
	word := "port"
	if k.isRange {
		word = "range"
	}
	if k.isBound {
		return "bound " + word
	}
	return word
}

// ports is the name of the map that leads rules of the kind to chains. For each change
// the kernel follows each element of such a map once for each rule that asks it
// (nft_table_validate), so each kind has one of its own.
func (k kind) ports() string {
	name := "ports"
	if k.isRange {
		name = "range-" + name
	}
	if k.isBound {
		name = "bound-" + name
	}
	return name
}

// publishedSets are the sets of published ports of a family, by name. A published
// port, or range of them, is a rule here, and all that is kept of it is kept by its
// key: protocol, first port, and the first address that it is bound to, which no other
// rule of the port has.
type publishedSets struct {
	f *family
	// ports lead from a rule to a chain, one map for each kind of them; slots to a
	// backend; targets are the ports of ranges that are others on the backend.
	ports          map[kind]set
	slots, targets set
	// What a packet asks leads to a rule: as it is, where the rule is one port on all
	// addresses; by ranges, to the first port; by at, from an address and a port
	// to the rule's first address; by spans, from an address and a port of a range to both.
	ranges, at, spans set
	// limited rules are for some clients; hidden ones hide their clients.
	limited, allowed, hidden set
	// twice: an element was put twice (ruleset.twice).
	twice *bool
}

func (f *family) publishedSets() publishedSets {
	proto, port := nftables.TypeInetProto, nftables.TypeInetService
	key := nftables.MustConcatSetType(proto, port, f.addr)
	none := func() map[string]string { return map[string]string{} }
	number := func(data string) string { return strconv.Itoa(int(binary.BigEndian.Uint16([]byte(data)))) }
	show := func(k, _ string) string { return f.showRule(k) }
	ports := map[kind]set{}
	for _, k := range kinds() {
		ports[k] = set{name: k.ports(), key: key, data: nftables.TypeVerdict, isMap: true, concat: true, elements: none(), show: func(k, v string) string { return f.showRule(k) + " -> " + v }}
	}
	return publishedSets{
		f: f, twice: new(bool), ports: ports,
		slots: set{name: "slots", key: nftables.MustConcatSetType(proto, port, f.addr, nftables.TypeInteger), data: f.slotData, isMap: true, concat: true, elements: none(), show: f.showSlot},
		targets: set{name: "targets", key: key, data: port, isMap: true, concat: true, elements: none(), show: func(k, v string) string {
			return f.showRule(k) + " -> " + number(v)
		}},
		// A key of several fields as one number: its intervals need one tree. Those of one
		// address are apart, so it comes first.
		ranges: set{name: "ranges", key: portKey, data: port, isMap: true, interval: true, elements: none(), show: func(k, v string) string {
			if v == intervalEnd {
				return "before " + showPort(k)
			}
			return "from " + showPort(k) + " -> " + number(v)
		}},
		at: set{name: "at", key: key, data: f.addr, isMap: true, concat: true, elements: none(), show: func(k, v string) string {
			return showPort(k) + " " + f.show(k[8:]) + " -> " + f.show(v)
		}},
		spans: set{name: "spans", key: nftables.MustConcatSetType(f.addr, proto, port), data: nftables.MustConcatSetType(port, f.addr), isMap: true, interval: true, elements: none(), show: func(k, v string) string {
			if v == intervalEnd {
				return f.show(k) + " before " + showPort(k[f.bytes:])
			}
			return f.show(k) + " from " + showPort(k[f.bytes:]) + " -> " + number(v) + " at " + f.show(v[4:])
		}},
		limited: set{name: "limited", key: key, concat: true, elements: none(), show: show},
		allowed: set{name: "allowed", key: nftables.MustConcatSetType(proto, port, f.addr, f.addr), interval: true, elements: none(), show: func(k, v string) string {
			end := ""
			if v == intervalEnd {
				end = "before "
			}
			return f.showRule(k) + " " + end + f.show(k[8+f.bytes:])
		}},
		hidden: set{name: "hidden", key: key, concat: true, elements: none(), show: show},
	}
}

func (s publishedSets) all() []set {
	var out []set
	for _, k := range kinds() {
		out = append(out, s.ports[k])
	}
	return append(out, s.slots, s.targets, s.ranges, s.at, s.spans, s.limited, s.allowed, s.hidden)
}

// add puts a port into the sets. One that is bound to addresses of the other family
// alone, or has clients of that alone, or no backend for new flows, is left to
// the host, which refuses.
func (s publishedSets) add(p ingress.Published) {
	slots, count := s.f.slotsOf(p)
	ips := s.f.boundTo(p)
	allow := slices.DeleteFunc(slices.Clone(p.Allow), func(n netip.Prefix) bool { return !s.f.has(n.Addr()) })
	if count == 0 || len(p.IPs) > 0 && len(ips) == 0 || len(p.Allow) > 0 && len(allow) == 0 {
		return
	}
	first := s.f.firstAddr(ips)
	key := portOf(p.Protocol, p.Port) + first
	k, way := kind{len(ips) > 0, p.Count > 1}, s.way(p, first)
	if k.isBound {
		way = pickBound + way
	}
	s.put(s.ports[k], key, way+strconv.Itoa(count))
	for i, data := range slots {
		s.put(s.slots, key+string(binaryutil.NativeEndian.PutUint32(uint32(i))), data)
	}
	s.lead(p, ips, first)
	if len(allow) > 0 {
		s.put(s.limited, key, "")
		s.allow(key, allow)
	}
	if p.HideClient {
		s.put(s.hidden, key, "")
	}
}

func (s publishedSets) put(in set, key, data string) {
	before := len(in.elements)
	if in.elements[key] = data; len(in.elements) == before {
		*s.twice = true
	}
}

// boundTo are the addresses of the family that p is bound to, in order.
func (f *family) boundTo(p ingress.Published) []netip.Addr {
	var out []netip.Addr
	for _, a := range p.IPs {
		if a = a.Unmap(); f.has(a) {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// firstAddr is the address in the key of a rule: the first of ips, which are in order, and
// zeros where there is none.
func (f *family) firstAddr(ips []netip.Addr) string {
	if len(ips) == 0 {
		return string(make([]byte, f.bytes))
	}
	return raw(ips[0])
}

// lead puts in what leads from what is asked to p.
func (s publishedSets) lead(p ingress.Published, ips []netip.Addr, first string) {
	port := string(binary.BigEndian.AppendUint16(nil, p.Port))
	start, end := portOf(p.Protocol, p.Port), portAfter(p.Protocol, p.Port+max(p.Count, 1)-1)+endMark
	switch {
	case p.Count <= 1:
		for _, a := range ips {
			s.put(s.at, start+raw(a), first)
		}
	case len(ips) == 0:
		s.put(s.ranges, start, port)
		s.put(s.ranges, end, intervalEnd)
	default:
		for _, a := range ips {
			s.put(s.spans, raw(a)+start, port+"\x00\x00"+first)
			s.put(s.spans, raw(a)+end, intervalEnd)
		}
	}
}

// way is how flows to p get their port. What a range needs for it is put in.
func (s publishedSets) way(p ingress.Published, first string) string {
	switch {
	case p.Count <= 1:
		return pickOne
	case p.Port == p.Target:
		return pickKeep
	}
	for i := range p.Count {
		s.put(s.targets, portOf(p.Protocol, p.Port+i)+first, string(binary.BigEndian.AppendUint16(nil, p.Target+i)))
	}
	return pickMove
}

// allow puts prefixes into the intervals of a rule's clients.
func (s publishedSets) allow(key string, allow []netip.Prefix) {
	open := false
	in := s.f.intervals(allow)
	last := ""
	for k, v := range in {
		s.put(s.allowed, key+k, v)
		if v != intervalEnd && k > last {
			last, open = k, true
		}
	}
	// What reaches to the last address of all ends with the rule.
	for k, v := range in {
		if v == intervalEnd && k > last {
			open = false
		}
	}
	if open {
		after := []byte(key)
		increment(after)
		s.put(s.allowed, string(after)+string(make([]byte, s.f.bytes))+endMark, intervalEnd)
	}
}

// slotsOf is the backend of each slot of p, as a slot keeps it, and their count.
func (f *family) slotsOf(p ingress.Published) (slots map[int]string, count int) {
	var keys, data []string
	for _, b := range p.Backends {
		if a := f.addressOf(b); !b.Draining && a.IsValid() {
			keys = append(keys, string(b.Task))
			data = append(data, raw(a)+string(binary.BigEndian.AppendUint16(nil, p.Target))+"\x00\x00")
		}
	}
	slots = make(map[int]string, len(keys))
	for slot, k := range slotsOf(keys) {
		slots[slot] = data[k]
	}
	return slots, slotCount(len(keys))
}

// publishedChains send connections to a published port of one of the host's own
// addresses to a backend. What has no backend is not translated: the host itself
// then answers with a reset or port unreachable. A loopback address is asked from
// the host itself alone, whatever comes in for it.
func (f *family) publishedChains() []chain {
	local := func(words string, match []expr.Any) rule {
		return rule{words, join(match, []expr.Any{
			&expr.Fib{Register: hostKey, ResultADDRTYPE: true, FlagDADDR: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: hostKey, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
			&expr.Verdict{Kind: expr.VerdictJump, Chain: "published"},
		})}
	}
	in, out := f.notLoopback(), f.notLoopback()
	if !f.is6 {
		in, out = []expr.Any{
			f.load(f.hash, f.destination),
			&expr.Bitwise{SourceRegister: f.hash, DestRegister: f.hash, Len: 4, Mask: []byte{0xff, 0, 0, 0}, Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: f.hash, Data: loopback.Addr().AsSlice()},
		}, nil
	}
	chains := []chain{{name: "published", rules: f.choiceRules()}}
	for _, n := range slotCounts() {
		for _, way := range pickWays() {
			chains = append(chains, chain{name: way + strconv.Itoa(n), rules: f.pickRules(way, n)})
		}
	}
	return append(chains,
		chain{name: "prerouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityNATDest,
			rules: []rule{local("to this host, but not to its loopback: maybe published", in)}},
		chain{name: "output", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityNATDest,
			rules: []rule{local("to this host: maybe published", out)}})
}

// choiceRules choose the chain that picks a backend, if the port is published, at
// this address, to this client. TCP that opens nothing is a host's socket's.
func (f *family) choiceRules() []rule {
	back := &expr.Verdict{Kind: expr.VerdictReturn}
	rules := []rule{{"tcp that opens nothing: the host's", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: hostKey},
		&expr.Cmp{Op: expr.CmpOpEq, Register: hostKey, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: hostKey, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
		&expr.Bitwise{SourceRegister: hostKey, DestRegister: hostKey, Len: 1, Mask: []byte{flagSYN | flagACK}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: hostKey, Data: []byte{flagSYN}},
		back,
	}}}
	for _, k := range kinds() {
		key := f.ruleKey(f.ofPacket(), k)
		rules = append(rules,
			rule{k.String() + " of other clients: the host's", join(key, []expr.Any{
				has("limited", hostKey), f.load(f.hostSlot, f.source),
				&expr.Lookup{SourceRegister: hostKey, SetName: "allowed", Invert: true}, back})},
			rule{k.String() + " published: pick a backend", join(key, []expr.Any{
				&expr.Lookup{SourceRegister: hostKey, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: k.ports()}})},
		)
	}
	return rules
}

// question loads what a client asks: the address, and the port.
type question struct {
	addr, port func(register uint32) expr.Any
}

// ofPacket is as the packet has it.
func (f *family) ofPacket() question {
	return question{func(r uint32) expr.Any { return f.load(r, f.destination) }, func(r uint32) expr.Any {
		return &expr.Payload{DestRegister: r, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2}
	}}
}

// asTracked is as the client's first packet had it, in the original direction.
func asTracked() question {
	return question{func(r uint32) expr.Any { return &expr.Ct{Key: expr.CtKeyDST, Register: r} }, func(r uint32) expr.Any {
		return &expr.Ct{Key: expr.CtKeyPROTODST, Register: r}
	}}
}

// ruleKey loads the key of a rule of one kind, and ends where what is asked has none.
func (f *family) ruleKey(q question, k kind) []expr.Any {
	proto := func(register uint32) expr.Any {
		return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register}
	}
	switch everywhere := (&expr.Immediate{Register: hostAt, Data: make([]byte, f.bytes)}); {
	case k.isBound && k.isRange:
		behind := hostKey + f.bytes/4
		return []expr.Any{q.addr(hostKey), proto(behind), q.port(behind + 1), lookup("spans", hostKey, hostPort), proto(hostKey)}
	case k.isBound:
		return []expr.Any{proto(hostKey), q.port(hostPort), q.addr(hostAt), lookup("at", hostKey, hostAt)}
	case k.isRange:
		return []expr.Any{proto(hostKey), q.port(hostPort), lookup("ranges", hostKey, hostPort), everywhere}
	default:
		return []expr.Any{proto(hostKey), q.port(hostPort), everywhere}
	}
}

// pickRules hash a flow to one of n slots.
func (f *family) pickRules(way string, n int) []rule {
	if n <= fewSlots {
		return []rule{f.pickRule(way, n, 1, 0)}
	}
	var rules []rule
	for _, t := range tries(n) {
		rules = append(rules, f.pickRule(way, n, t.number, t.heirs))
	}
	return rules
}

func (f *family) pickRule(way string, n, try, heirs int) rule {
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: f.nat, RegAddrMin: f.hostAddr, RegProtoMin: f.hostPort}
	port, isBound := strings.CutPrefix(way, pickBound)
	var target []expr.Any
	switch port {
	case pickKeep:
		nat.RegProtoMin = 0
	case pickMove: // the rule's first port makes way for the packet's
		target = []expr.Any{f.ofPacket().port(hostPort), lookup("targets", hostKey, f.hostPort)}
	}
	words := fmt.Sprintf("%s%d, try %d: to a backend", way, n, try)
	if heirs > 0 {
		words = fmt.Sprintf("%s%d, try %d was an empty seat: to its heir", way, n, try)
	}
	return rule{words, join(f.ruleKey(f.ofPacket(), kind{isBound, port != pickOne}), []expr.Any{
		f.load(f.hash, f.source),
		&expr.Payload{DestRegister: f.hashPorts, Base: expr.PayloadBaseTransportHeader, Offset: thPorts, Len: 4},
		&expr.Hash{SourceRegister: f.hash, DestRegister: f.hostSlot, Length: f.bytes + 4, Modulus: uint32(n), Offset: uint32(heirs), Seed: uint32(hashSeed + try - 1), Type: expr.HashTypeJenkins},
		lookup("slots", hostKey, f.hostAddr),
	}, target, []expr.Any{&expr.Counter{}, nat})}
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

// addressOf is a backend's address of the family; invalid without.
func (f *family) addressOf(b ingress.Backend) netip.Addr {
	for _, a := range []netip.Addr{b.Addr, b.Addr6} {
		if f.has(a) {
			return a
		}
	}
	return netip.Addr{}
}

func protocolNumber(p weft.Protocol) byte {
	switch p {
	case weft.UDP:
		return unix.IPPROTO_UDP
	case weft.SCTP:
		return unix.IPPROTO_SCTP
	}
	return unix.IPPROTO_TCP
}

// protocolOf is the inverse; "" = none of them.
func protocolOf(number byte) weft.Protocol {
	switch number {
	case unix.IPPROTO_TCP:
		return weft.TCP
	case unix.IPPROTO_UDP:
		return weft.UDP
	case unix.IPPROTO_SCTP:
		return weft.SCTP
	}
	return ""
}

// portOf is a published port as the kernel keeps it in a key.
func portOf(p weft.Protocol, port uint16) string {
	key := append([]byte{protocolNumber(p), 0, 0, 0}, binary.BigEndian.AppendUint16(nil, port)...)
	return string(append(key, 0, 0))
}

// portAfter is the key behind a port's, in the order of bytes.
func portAfter(p weft.Protocol, port uint16) string {
	if port < 1<<16-1 {
		return portOf(p, port+1)
	}
	return string([]byte{protocolNumber(p), 0, 0, 1, 0, 0, 0, 0})
}

// showPort prints protocol and port of a key.
func showPort(key string) string {
	return fmt.Sprintf("%s %d", protocolOf(key[0]), binary.BigEndian.Uint32([]byte(key[2:6])))
}

// showRule prints the key of a rule.
func (f *family) showRule(key string) string {
	if first, ok := netip.AddrFromSlice([]byte(key[8 : 8+f.bytes])); ok && !first.IsUnspecified() {
		return showPort(key) + " at " + first.String()
	}
	return showPort(key)
}

// showSlot prints an element of the slots: rule and slot to address and port, each
// padded to four bytes.
func (f *family) showSlot(key, data string) string {
	addr, err := netip.ParseAddr(f.show(data))
	if err != nil {
		return fmt.Sprintf("%s -> %x", f.showRule(key), data)
	}
	return fmt.Sprintf("%s -> %s", f.showRule(key), netip.AddrPortFrom(addr, binary.BigEndian.Uint16([]byte(data[f.bytes:f.bytes+2]))))
}
