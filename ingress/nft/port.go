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
	idle, dead := addressSet("idle"), addressSet("dead")
	for _, s := range n.Services {
		if !s.VIP.Is4() {
			continue
		}
		if len(s.Backends) == 0 {
			dead.elements[bytes4(s.VIP)] = ""
		}
		if !takesConnections(s) {
			idle.elements[bytes4(s.VIP)] = ""
		}
	}
	r.sets = []set{idle, dead}
	for _, port := range n.Ports {
		r.chains = append(r.chains, chain{
			name: "in-" + port, kind: nftables.ChainTypeFilter, device: port,
			hook: nftables.ChainHookIngress, priority: nftables.ChainPriorityFilter, rules: portChain(port),
		})
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

func portChain(port string) []rule {
	reset := &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}
	return []rule{
		{port + ": new tcp to a service that takes no connections: reset", join(tuple(unix.IPPROTO_TCP), []expr.Any{
			has("idle", regVIP),
			&expr.Payload{DestRegister: regPorts, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
			&expr.Bitwise{SourceRegister: regPorts, DestRegister: regPorts, Len: 1, Mask: []byte{flagSYN | flagACK}, Xor: []byte{0}},
			&expr.Cmp{Op: expr.CmpOpEq, Register: regPorts, Data: []byte{flagSYN}},
			&expr.Counter{}, reset})},
		{port + ": other tcp to a service without backends: reset", join(tuple(unix.IPPROTO_TCP), []expr.Any{
			has("dead", regVIP), &expr.Counter{}, reset})},
		{port + ": other protocols to a service without backends: port unreachable", join(ipv4(), []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: regProto},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: regProto, Data: []byte{unix.IPPROTO_TCP}},
			has("dead", regVIP), &expr.Counter{},
			&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3}})}, // ICMP code 3, RFC 792
	}
}

// portProbe is a table of the same expressions on the loopback device, which
// every namespace has.
func portProbe() ruleset {
	return portRules(ingress.Network{Ports: []string{"lo"}})
}
