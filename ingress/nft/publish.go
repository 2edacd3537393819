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

// Registers of the host's table that are the same in both families: protocol and
// destination port are a port's key, with the slot that of a slot, with an
// address that of who may ask where.
const (
	hostKey  = 8 // protocol
	hostPort = 9 // destination port
	hostSlot = 10
)

var (
	portKey = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	slotKey = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeInteger)
)

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
// the one that it has (ranges), and another one of the backend's range.
const (
	pickOne  = "pick-"
	pickKeep = "keep-"
	pickMove = "move-"
)

// publishedSets are the sets of published ports of a family, by name.
type publishedSets struct {
	f *family
	// ports lead to a chain, slots to a backend; ranges to the first port of
	// theirs, by which everything else is kept; targets are the ports of
	// ranges that are others on the backend.
	ports, slots, ranges, targets set
	// bound ports are answered at some addresses only, limited ones to some
	// clients; hidden ones hide their clients.
	bound, at, limited, allowed, hidden set
	// twice: an element was put twice (ruleset.twice).
	twice *bool
}

func (f *family) publishedSets() publishedSets {
	addressed := nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService, f.addr)
	none := func() map[string]string { return map[string]string{} }
	who := func(key, data string) string {
		end := ""
		if data == intervalEnd {
			end = "before "
		}
		return showPort(key, "") + " " + end + f.show(key[8:])
	}
	return publishedSets{
		f: f, twice: new(bool),
		ports: set{name: "ports", key: portKey, data: nftables.TypeVerdict, isMap: true, concat: true, elements: none(), show: func(k, v string) string { return showPort(k, "") + " -> " + v }},
		slots: set{name: "slots", key: slotKey, data: f.slotData, isMap: true, concat: true, elements: none(), show: f.showSlot},
		// A key of several fields as one number: its intervals need one tree.
		ranges: set{name: "ranges", key: portKey, data: nftables.TypeInetService, isMap: true, interval: true, elements: none(), show: showRange},
		targets: set{name: "targets", key: portKey, data: nftables.TypeInetService, isMap: true, concat: true, elements: none(), show: func(k, v string) string {
			return fmt.Sprintf("%s -> %d", showPort(k, ""), binary.BigEndian.Uint16([]byte(v)))
		}},
		bound:   set{name: "bound", key: portKey, concat: true, elements: none(), show: showPort},
		at:      set{name: "at", key: addressed, concat: true, elements: none(), show: who},
		limited: set{name: "limited", key: portKey, concat: true, elements: none(), show: showPort},
		allowed: set{name: "allowed", key: addressed, interval: true, elements: none(), show: who},
		hidden:  set{name: "hidden", key: portKey, concat: true, elements: none(), show: showPort},
	}
}

func (s publishedSets) all() []set {
	return []set{s.ports, s.slots, s.ranges, s.targets, s.bound, s.at, s.limited, s.allowed, s.hidden}
}

// add puts a port into the sets. One that is bound to addresses of the other family
// alone, or has clients of that alone, or no backend for new flows, is left to
// the host, which refuses.
func (s publishedSets) add(p ingress.Published) {
	key := portOf(p.Protocol, p.Port)
	slots, count := s.f.slotsOf(p)
	ips := slices.DeleteFunc(slices.Clone(p.IPs), func(a netip.Addr) bool { return !s.f.has(a.Unmap()) })
	allow := slices.DeleteFunc(slices.Clone(p.Allow), func(n netip.Prefix) bool { return !s.f.has(n.Addr()) })
	if count == 0 || len(p.IPs) > 0 && len(ips) == 0 || len(p.Allow) > 0 && len(allow) == 0 {
		return
	}
	s.put(s.ports, key, s.way(p)+strconv.Itoa(count))
	for i, data := range slots {
		s.put(s.slots, key+string(binaryutil.NativeEndian.PutUint32(uint32(i))), data)
	}
	if len(ips) > 0 {
		s.put(s.bound, key, "")
	}
	for _, a := range ips {
		s.put(s.at, key+raw(a.Unmap()), "")
	}
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

// way is how flows to p get their port. What a range needs for it is put in.
func (s publishedSets) way(p ingress.Published) string {
	if p.Count <= 1 {
		return pickOne
	}
	s.put(s.ranges, portOf(p.Protocol, p.Port), string(binary.BigEndian.AppendUint16(nil, p.Port)))
	s.put(s.ranges, portAfter(p.Protocol, p.Port+p.Count-1)+endMark, intervalEnd)
	if p.Port == p.Target {
		return pickKeep
	}
	for i := range p.Count {
		s.put(s.targets, portOf(p.Protocol, p.Port+i), string(binary.BigEndian.AppendUint16(nil, p.Target+i)))
	}
	return pickMove
}

// allow puts prefixes into the intervals of a port's clients.
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
	// What reaches to the last address of all ends with the port.
	for k, v := range in {
		if v == intervalEnd && k > last {
			open = false
		}
	}
	if open {
		after := []byte(key + string(make([]byte, s.f.bytes)))
		after[7] = 1 // the padding behind the port
		s.put(s.allowed, string(after)+endMark, intervalEnd)
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
		for _, way := range []string{pickOne, pickKeep, pickMove} {
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
	for _, by := range []struct {
		words string
		port  []expr.Any
	}{{"port", packetPort()}, {"range", firstPort(packetPort())}} {
		rules = append(rules,
			rule{by.words + " bound to other addresses: the host's", join(by.port, []expr.Any{
				has("bound", hostKey), f.load(hostSlot, f.destination),
				&expr.Lookup{SourceRegister: hostKey, SetName: "at", Invert: true}, back})},
			rule{by.words + " of other clients: the host's", join(by.port, []expr.Any{
				has("limited", hostKey), f.load(hostSlot, f.source),
				&expr.Lookup{SourceRegister: hostKey, SetName: "allowed", Invert: true}, back})},
			rule{by.words + " published: pick a backend", join(by.port, []expr.Any{
				&expr.Lookup{SourceRegister: hostKey, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: "ports"}})},
		)
	}
	return rules
}

// packetPort loads protocol and destination port.
func packetPort() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: hostKey},
		&expr.Payload{DestRegister: hostPort, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2},
	}
}

// askedPort loads them as the client asked for them.
func askedPort() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: hostKey},
		&expr.Ct{Key: expr.CtKeyPROTODST, Register: hostPort},
	}
}

// firstPort goes on to the first port of the range that the port is in.
func firstPort(port []expr.Any) []expr.Any {
	return join(port, []expr.Any{lookup("ranges", hostKey, hostPort)})
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
	port, nat := packetPort(), &expr.NAT{Type: expr.NATTypeDestNAT, Family: f.nat, RegAddrMin: f.hostAddr, RegProtoMin: f.hostPort}
	var target []expr.Any
	switch way {
	case pickKeep:
		port, nat.RegProtoMin = firstPort(port), 0
	case pickMove:
		port, target = firstPort(port), join(packetPort(), []expr.Any{lookup("targets", hostKey, f.hostPort)})
	}
	words := fmt.Sprintf("%s%d, try %d: to a backend", way, n, try)
	if heirs > 0 {
		words = fmt.Sprintf("%s%d, try %d was an empty seat: to its heir", way, n, try)
	}
	return rule{words, join(port, []expr.Any{
		f.load(f.hash, f.source),
		&expr.Payload{DestRegister: f.hashPorts, Base: expr.PayloadBaseTransportHeader, Offset: thPorts, Len: 4},
		&expr.Hash{SourceRegister: f.hash, DestRegister: hostSlot, Length: f.bytes + 4, Modulus: uint32(n), Offset: uint32(heirs), Seed: uint32(hashSeed + try - 1), Type: expr.HashTypeJenkins},
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

// showPort prints the port of a key.
func showPort(key, _ string) string {
	proto := map[byte]weft.Protocol{unix.IPPROTO_TCP: weft.TCP, unix.IPPROTO_UDP: weft.UDP, unix.IPPROTO_SCTP: weft.SCTP}[key[0]]
	return fmt.Sprintf("%s %d", proto, binary.BigEndian.Uint32([]byte(key[2:6])))
}

func showRange(key, data string) string {
	if data == intervalEnd {
		return "before " + showPort(key, "")
	}
	return fmt.Sprintf("from %s -> %d", showPort(key, ""), binary.BigEndian.Uint16([]byte(data)))
}

// showSlot prints an element of the slots: protocol, port and slot to address and
// port, each padded to four bytes.
func (f *family) showSlot(key, data string) string {
	addr, err := netip.ParseAddr(f.show(data))
	if err != nil {
		return fmt.Sprintf("%s -> %x", showPort(key, ""), data)
	}
	return fmt.Sprintf("%s -> %s", showPort(key, ""), netip.AddrPortFrom(addr, binary.BigEndian.Uint16([]byte(data[f.bytes:f.bytes+2]))))
}
