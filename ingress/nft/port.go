package nft

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/ingress"
)

// portRules is the table that refuses, at the tasks' own ports, what asks for a
// service that has no backend. It is used where the kernel cannot refuse on a
// bridge but on a device (nft_reject_netdev).
//
// It meets packets before the bridge's table does, so a service whose last
// backends drain is refused new TCP connections only: what is open goes on.
func portRules(n ingress.Network) ruleset {
	r := ruleset{family: nftables.TableFamilyNetdev}
	fams := families(n.IPv6)
	for _, f := range fams {
		idle, dead := f.addressSet("idle"), f.addressSet("dead")
		for _, s := range n.Services {
			if !f.has(s.VIP) {
				continue
			}
			if len(s.Backends) == 0 {
				dead.elements[raw(s.VIP)] = ""
			}
			if !takesConnections(s) {
				idle.elements[raw(s.VIP)] = ""
			}
		}
		r.sets = append(r.sets, idle, dead)
		r.chains = append(r.chains, f.othersChain())
	}
	for _, port := range n.Ports {
		c := chain{
			name: "in-" + port, kind: nftables.ChainTypeFilter, device: port,
			hook: nftables.ChainHookIngress, priority: nftables.ChainPriorityFilter,
		}
		for _, f := range fams {
			c.rules = append(c.rules, f.portChain(port)...)
		}
		r.chains = append(r.chains, c)
	}
	return r
}

func takesConnections(s ingress.Service) bool {
	for _, b := range s.Backends {
		if !b.Draining {
			return true
		}
	}
	return false
}

// tcpFlags is the offset of TCP's flags, and the two that tell a request for a
// connection from everything else (RFC 9293 section 3.1).
const (
	tcpFlags = 13
	flagSYN  = 0x02
	flagACK  = 0x10
)

func (f *family) portChain(port string) []rule {
	reset := &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}
	words := f.words + port + ": "
	idle, dead := has("idle"+f.suffix, f.vip), has("dead"+f.suffix, f.vip)
	var rules []rule
	if f.is6 {
		rules = append(rules, neighbourDiscovery())
	}
	return append(rules,
		rule{words + "new tcp to a service that takes no connections: reset", join(f.protocol(expr.CmpOpEq, unix.IPPROTO_TCP), f.toService(), []expr.Any{
			idle,
			&expr.Payload{DestRegister: f.ports, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
			&expr.Bitwise{SourceRegister: f.ports, DestRegister: f.ports, Len: 1, Mask: []byte{flagSYN | flagACK}, Xor: []byte{0}},
			&expr.Cmp{Op: expr.CmpOpEq, Register: f.ports, Data: []byte{flagSYN}},
			&expr.Counter{}, reset})},
		rule{words + "other tcp to a service without backends: reset", join(f.protocol(expr.CmpOpEq, unix.IPPROTO_TCP), f.toService(), []expr.Any{
			dead, &expr.Counter{}, reset})},
		rule{words + "other protocols: by others", join(f.protocol(expr.CmpOpNeq, unix.IPPROTO_TCP), f.then(expr.VerdictJump, "others"))},
	)
}

// othersChain refuses what is no TCP.
func (f *family) othersChain() chain {
	idle, dead := has("idle"+f.suffix, f.vip), has("dead"+f.suffix, f.vip)
	isSCTP := f.protocol(expr.CmpOpEq, unix.IPPROTO_SCTP)
	return chain{name: "others" + f.suffix, rules: []rule{
		{f.words + "new sctp to a service that takes no connections: unreachable", join(isSCTP, f.toService(), []expr.Any{idle}, newAssociation(f.ports), []expr.Any{
			&expr.Counter{}, f.noAssociations()})},
		{f.words + "other sctp to a service without backends: unreachable", join(isSCTP, f.toService(), []expr.Any{
			dead, &expr.Counter{}, f.noAssociations()})},
		{f.words + "other protocols to a service without backends: port unreachable", join(f.toService(), []expr.Any{
			dead, &expr.Counter{}, &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: f.unreachable}})},
	}}
}

// portProbe is a table of the same expressions on the loopback device, which
// every namespace has.
func portProbe(with6 bool) ruleset {
	return portRules(ingress.Network{IPv6: with6, Ports: []string{"lo"}})
}
