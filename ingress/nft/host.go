package nft

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// hostRules is weft's IPv4 table in the host's namespace: published ports, the
// tasks' way out, and what must not pass between overlay and host.
func hostRules(t ingress.Table) ruleset {
	r := ipv4.publishedRules(t)
	protect := set{name: "protect", key: nftables.TypeIPAddr, interval: true, elements: ipv4.intervals(t.Gateway.Protect), show: ipv4.showInterval}
	r.sets = append(r.sets, protect)
	r.chains = append(r.chains,
		chain{name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource, rules: append(lastingRules(t.Ingress.Link, t.Gateway.Bridge), postroutingChain(t)...)},
		chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter, rules: forwardChain(t)},
		chain{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: nftables.ChainPriorityFilter, rules: ipv4.inputChain(t)},
	)
	return r
}

// hostRules6 is its IPv6 twin. Tasks have no way out over IPv6 yet: of the gateway
// bridge nothing is forwarded but what ports in mode host are asked, and answers to it.
func hostRules6(t ingress.Table) ruleset {
	r := ipv6.publishedRules(t)
	r.chains = append(r.chains,
		chain{name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource, rules: append(lastingRules(t.Ingress.Link, t.Gateway.Bridge), postroutingChain6(t)...)},
		chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter, rules: forwardChain6(t)},
		chain{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: nftables.ChainPriorityFilter, rules: ipv6.inputChain(t)},
	)
	return r
}

// publishedRules sends requests for published ports to backends.
func (f *family) publishedRules(t ingress.Table) ruleset {
	sets := f.publishedSets()
	for _, p := range t.Published {
		sets.add(p)
	}
	return ruleset{family: f.host, twice: *sets.twice, sets: append(sets.all(), f.members(t.Underlay)), times: []times{f.lasting()}, chains: append([]chain{
		{name: "untracked-in", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRaw, rules: f.untracked(t.Underlay, "to", f.destination)},
		{name: "untracked-out", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityRaw, rules: f.untracked(t.Underlay, "from", f.source)},
	}, f.publishedChains()...)}
}

// entryRules give requests that enter the overlay by link the host's own address
// there, if it is asked for, or if theirs leads nowhere from a task. All others
// keep their client's.
func (f *family) entryRules(link string, addr netip.Addr) []rule {
	if link == "" || !addr.IsValid() {
		return nil
	}
	own := []expr.Any{
		&expr.Immediate{Register: f.hostAddr, Data: addr.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: f.nat, RegAddrMin: f.hostAddr},
	}
	var rules []rule
	for _, k := range kinds() {
		rules = append(rules, rule{k.String() + " whose clients are hidden: from " + addr.String() + " on " + link, join(
			outLink(expr.CmpOpEq, link), translated(expr.CmpOpNeq), f.ruleKey(asTracked(), k), []expr.Any{has("hidden", hostKey)}, own)})
	}
	if !f.is6 {
		rules = append(rules, rule{"to a backend, from loopback: from " + addr.String() + " on " + link, join(
			outLink(expr.CmpOpEq, link), translated(expr.CmpOpNeq), from(loopback), own)})
	}
	return rules
}

// loopback is RFC 1122 section 3.2.1.3's (g).
var loopback = netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8)

// postroutingChain is that, and gives tasks' packets that leave the host the
// host's address.
func postroutingChain(t ingress.Table) []rule {
	rules := ipv4.entryRules(t.Ingress.Link, t.Ingress.Addr.Addr())
	if t.Gateway.Bridge != "" {
		rules = append(rules, rule{"way out of " + t.Gateway.Subnet.String() + " but by " + t.Gateway.Bridge, join(
			from(t.Gateway.Subnet), outLink(expr.CmpOpNeq, t.Gateway.Bridge), []expr.Any{&expr.Masq{}})})
		// A task's answer to another task, or to the host's loopback, would not
		// come by the host, or not at all.
		for _, near := range []netip.Prefix{t.Gateway.Subnet, loopback} {
			rules = append(rules, rule{"port of a task, from " + near.String() + ": from the address of " + t.Gateway.Bridge, join(
				outLink(expr.CmpOpEq, t.Gateway.Bridge), translated(expr.CmpOpNeq), from(near), []expr.Any{&expr.Masq{}})})
		}
	}
	return rules
}

// postroutingChain6 is that for IPv6, but for the way out.
func postroutingChain6(t ingress.Table) []rule {
	rules := ipv6.entryRules(t.Ingress.Link, t.Ingress.Addr6.Addr())
	if b := t.Gateway.Bridge; b != "" {
		near := weft.GatewayPool6()
		rules = append(rules, rule{"port of a task, from " + near.String() + ": from the address of " + b, join(
			outLink(expr.CmpOpEq, b), translated(expr.CmpOpNeq), from(near), []expr.Any{&expr.Masq{}})})
	}
	return rules
}

// forwardChain keeps the host from becoming a router between overlay networks:
// only translated requests enter by the ingress leg, nothing new comes out of
// it, tasks do not reach overlay ranges through their gateway, and the gateway
// leads out only, but for ports in mode host: neither another task nor a
// neighbour of the host that routes the bridge's range here opens a connection to
// a task's leg.
func forwardChain(t ingress.Table) []rule {
	rules := append(clampRules(t), entryForward(t)...)
	if t.Gateway.Bridge != "" {
		rules = append(rules, rule{"from " + t.Gateway.Bridge + " to an overlay range, untranslated: drop", join(
			inLink(t.Gateway.Bridge), []expr.Any{
				ipv4.load(hostKey, ipv4.destination),
				has("protect", hostKey),
			}, translated(expr.CmpOpEq), dropped())},
			rule{"into " + t.Gateway.Bridge + " new, untranslated: drop", join(outLink(expr.CmpOpEq, t.Gateway.Bridge), unasked(), translated(expr.CmpOpEq), dropped())})
	}
	return rules
}

// forwardChain6 is forwardChain for IPv6, which tasks do not get out by: the host
// routes nothing of the gateway bridge but what published ports are asked and answer.
func forwardChain6(t ingress.Table) []rule {
	rules := append(clampRules(t), entryForward(t)...)
	if b := t.Gateway.Bridge; b != "" {
		rules = append(rules,
			rule{"from " + b + " untranslated: drop", join(inLink(b), translated(expr.CmpOpEq), dropped())},
			rule{"into " + b + " new, untranslated: drop", join(outLink(expr.CmpOpEq, b), unasked(), translated(expr.CmpOpEq), dropped())})
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
		rules = append(rules, rule{fmt.Sprintf("VXLAN (udp %d) from no member: drop", t.Underlay.Port), join(toTunnel(t.Underlay), []expr.Any{
			f.load(f.hostAddr, f.source),
			&expr.Lookup{SourceRegister: f.hostAddr, SetName: "members", Invert: true},
		}, dropped())})
	}
	if b := t.Gateway.Bridge; b != "" && !f.is6 {
		// The way back of what the host's loopback asks of a task is open.
		rules = append(rules, rule{"from " + b + " to loopback, new: drop", join(inLink(b), []expr.Any{
			f.load(1, f.destination),
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: []byte{0xff, 0, 0, 0}, Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: loopback.Addr().AsSlice()},
		}, unasked(), dropped())})
	}
	if t.Ingress.Link != "" {
		rules = append(rules, rule{"from " + t.Ingress.Link + " new: drop", join(inLink(t.Ingress.Link), unasked(), dropped())})
	}
	return rules
}

// untracked keeps tunnels out of connection tracking, which the chains of address
// translation have the kernel do for every packet of the host. Each connection
// inside would be a flow of its own there, as VXLAN's source port is made of it
// (RFC 7348 section 5), and no packet of a tunnel is the answer to another.
// Only this node's own tunnels are meant: others' that pass through this host may
// be translated on it.
func (f *family) untracked(u ingress.Underlay, what string, offset uint32) []rule {
	self := u.Self.Unmap()
	if u.Port == 0 || !f.has(self) {
		return nil
	}
	return []rule{{fmt.Sprintf("VXLAN (udp %d) %s %s: not tracked", u.Port, what, self), append(toTunnel(u),
		f.load(f.hostAddr, offset), &expr.Cmp{Op: expr.CmpOpEq, Register: f.hostAddr, Data: self.AsSlice()}, &expr.Notrack{})}}
}

// toTunnel matches packets to the UDP port of VXLAN.
func toTunnel(u ingress.Underlay) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(u.Port)},
	}
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

// from matches packets whose source is of a prefix of the table's family.
func from(p netip.Prefix) []expr.Any {
	f := familyOf(p.Addr())
	return []expr.Any{
		f.load(1, f.source),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: f.bytes, Mask: net.CIDRMask(p.Bits(), int(8*f.bytes)), Xor: make([]byte, f.bytes)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

// intervals are the elements of an interval set that holds the family's prefixes.
// Prefixes are nested or apart, so dropping nested ones leaves no overlap;
// neighbours are joined, because the end of one is the start of the next.
func (f *family) intervals(prefixes []netip.Prefix) map[string]string {
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
		if !f.has(p.Addr()) || last.IsValid() && last.Overlaps(p) {
			continue
		}
		last = p
		start := raw(p.Masked().Addr())
		if _, ok := out[start+endMark]; ok {
			delete(out, start+endMark)
		} else {
			out[start] = ""
		}
		if end, ok := afterLast(p); ok {
			out[end+endMark] = intervalEnd
		}
	}
	return out
}

// afterLast is the first address behind p; there is none behind the last of all.
func afterLast(p netip.Prefix) (string, bool) {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	ok := increment(b)
	return string(b), ok
}

// increment makes a number, its upper bytes first, one more; false = it was the largest.
func increment(b []byte) bool {
	for i := len(b) - 1; i >= 0; i-- {
		if b[i]++; b[i] != 0 {
			return true
		}
	}
	return false
}

func (f *family) showInterval(key, data string) string {
	if data == intervalEnd {
		return "before " + f.show(key)
	}
	return "from " + f.show(key)
}
