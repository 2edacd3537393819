package nft

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// 32-bit registers of nftables (linux/netfilter/nf_tables.h: NFT_REG32_00 is
// 8). Neighbouring ones hold concatenations. The same layout serves all rules
// of the bridge table.
const (
	regVIP   = 8  // destination address; with regSlot the key of a ring
	regSlot  = 9  // slot chosen by the hash
	regTuple = 12 // source, destination, protocol, both ports: 16 bytes, key of "flows"
	regProto = 14
	regPorts = 15
	regMAC   = 16 // 6 bytes, two registers
)

// Offsets of header fields in bytes: IPv4 (RFC 791), TCP and UDP (RFC 9293, RFC
// 768) share the place of the ports; Ethernet starts with the destination.
const (
	ipSource, ipDestination = 12, 16
	thPorts, thDestination  = 0, 2
	etherDestination        = 0
)

// Our own choices.
const (
	// flowTimeout forgets a flow that has been silent this long; its next
	// packet is balanced anew. Two hours and a bit cover TCP's default
	// keepalive (7,200 s), so that idle connections live.
	flowTimeout = 7500 * time.Second
	// flowSize bounds the memory of one network's flow table.
	flowSize = 262144
)

var (
	ringKey  = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInteger)
	tupleKey = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInteger)
)

// bridgeRules is the balancing table of one network. In order: what is not for
// the hardware address of a service passes, for another node has balanced it
// already, or it is none of ours; a known flow
// keeps its backend; a service without a backend that takes connections is
// refused at once; a new flow is hashed into the ring of its service; what has
// no ports (ping) is hashed by its addresses.
func bridgeRules(n ingress.Network, reject bool) ruleset {
	r := ruleset{family: nftables.TableFamilyBridge, prune: map[string]bool{}}
	rings := make([]set, len(ingress.RingSizes))
	for i, size := range ingress.RingSizes {
		rings[i] = set{name: ringName(size), key: ringKey, data: nftables.TypeEtherAddr, isMap: true, concat: true, elements: map[string]string{}, show: showRing}
	}
	idle := addressSet("idle")
	for _, s := range n.Services {
		if !s.VIP.Is4() {
			continue
		}
		fillService(r.prune, rings, idle, s)
	}
	flows := set{
		name: "flows", key: tupleKey, data: nftables.TypeEtherAddr, isMap: true, concat: true,
		dynamic: true, timeout: flowTimeout, size: flowSize,
	}
	r.sets = append(append(r.sets, flows, idle), rings...)
	r.chains = []chain{{
		name: "prerouting", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRef(-300), // NF_BR_PRI_NAT_DST_BRIDGED
		rules: bridgeChain(reject),
	}}
	return r
}

// addressSet is an empty set of IPv4 addresses.
func addressSet(name string) set {
	return set{name: name, key: nftables.TypeIPAddr, elements: map[string]string{}, show: func(k, _ string) string { return address(k) }}
}

func ringName(size int) string {
	return map[int]string{64: "ring64", 1024: "ring1024", 16384: "ring16384"}[size]
}

func fillService(prune map[string]bool, rings []set, idle set, s ingress.Service) {
	var keys, macs []string
	for _, b := range s.Backends {
		prune[string(b.MAC)] = true
		if !b.Draining {
			keys = append(keys, string(b.Task))
			macs = append(macs, string(b.MAC))
		}
	}
	vip := s.VIP.As4()
	if len(keys) == 0 {
		idle.elements[string(vip[:])] = ""
		return
	}
	size := ingress.RingSize(len(keys))
	for i, m := range ingress.RingSizes {
		if m != size {
			continue
		}
		for slot, k := range ingress.Ring(keys, size) {
			rings[i].elements[string(vip[:])+string(binaryutil.NativeEndian.PutUint32(uint32(slot)))] = macs[k]
		}
	}
}

func bridgeChain(reject bool) []rule {
	// The first byte tells a service's hardware address from all others.
	vipMAC := weft.VIPMAC("", netip.IPv4Unspecified())[:1]
	rules := []rule{{fmt.Sprintf("not for a service (%02x:…): pass", vipMAC), []expr.Any{
		&expr.Payload{DestRegister: regMAC, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: regMAC, Data: vipMAC},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}}}
	writeMAC := []expr.Any{
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: regMAC, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 6},
		&expr.Counter{},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
	keep := &expr.Dynset{SrcRegKey: regTuple, SrcRegData: regMAC, SetName: "flows", Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: flowTimeout}
	protos := []struct {
		name   string
		number byte
	}{{"tcp", unix.IPPROTO_TCP}, {"udp", unix.IPPROTO_UDP}}
	for _, p := range protos {
		rules = append(rules, rule{p.name + " of a known flow: keep its backend", join(
			tuple(p.number),
			[]expr.Any{lookup("flows", regTuple, regMAC), keep}, writeMAC)})
	}
	rules = append(rules, idleRules(reject)...)
	for _, p := range protos {
		for _, size := range ingress.RingSizes {
			rules = append(rules, rule{"new " + p.name + " flow: pick from " + ringName(size), join(
				tuple(p.number),
				[]expr.Any{
					&expr.Hash{SourceRegister: regTuple, DestRegister: regSlot, Length: 16, Modulus: uint32(size), Seed: hashSeed, Type: expr.HashTypeJenkins},
					lookup(ringName(size), regVIP, regMAC), keep,
				}, writeMAC)})
		}
	}
	for _, size := range ingress.RingSizes {
		rules = append(rules, rule{"no ports: pick by addresses from " + ringName(size), join(
			ipv4(),
			[]expr.Any{
				&expr.Hash{SourceRegister: regTuple, DestRegister: regSlot, Length: 8, Modulus: uint32(size), Seed: hashSeed, Type: expr.HashTypeJenkins},
				lookup(ringName(size), regVIP, regMAC),
			}, writeMAC)})
	}
	return rules
}

// idleRules refuse what asks for a service that has no backend. Where the kernel
// cannot refuse on a bridge the frame is dropped there: with no device behind the
// service's hardware address it would be dropped all the same.
func idleRules(reject bool) []rule {
	if !reject {
		return []rule{{"to a service without backends: drop (this kernel cannot refuse on a bridge)", join(ipv4(), []expr.Any{
			has("idle", regVIP), &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}})}}
	}
	return []rule{
		{"tcp to a service without backends: reset", join(tuple(unix.IPPROTO_TCP), []expr.Any{
			has("idle", regVIP), &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})},
		{"other protocols to a service without backends: port unreachable", join(ipv4(), []expr.Any{
			has("idle", regVIP), &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3}})}, // ICMP code 3, RFC 792
	}
}

// hashSeed is fixed, so that all nodes and all generations of the table send a
// flow the same way.
const hashSeed = 0x77656674

// ipv4 matches IPv4 frames and loads their addresses.
func ipv4() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: regPorts},
		&expr.Cmp{Op: expr.CmpOpEq, Register: regPorts, Data: binaryutil.BigEndian.PutUint16(unix.ETH_P_IP)},
		&expr.Payload{DestRegister: regVIP, Base: expr.PayloadBaseNetworkHeader, Offset: ipDestination, Len: 4},
		&expr.Payload{DestRegister: regTuple, Base: expr.PayloadBaseNetworkHeader, Offset: ipSource, Len: 4},
		&expr.Payload{DestRegister: regTuple + 1, Base: expr.PayloadBaseNetworkHeader, Offset: ipDestination, Len: 4},
	}
}

// tuple matches one protocol over IPv4 and loads the flow's tuple.
func tuple(proto byte) []expr.Any {
	return append(ipv4(),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: regProto},
		&expr.Cmp{Op: expr.CmpOpEq, Register: regProto, Data: []byte{proto}},
		&expr.Payload{DestRegister: regPorts, Base: expr.PayloadBaseTransportHeader, Offset: thPorts, Len: 4},
	)
}

func lookup(set string, key, data uint32) expr.Any {
	return &expr.Lookup{SourceRegister: key, DestRegister: data, IsDestRegSet: true, SetName: set}
}

func has(set string, key uint32) expr.Any {
	return &expr.Lookup{SourceRegister: key, SetName: set}
}

func join(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// bytes4 is an IPv4 address as the kernel keeps it.
func bytes4(a netip.Addr) string {
	b := a.As4()
	return string(b[:])
}

// address is the inverse of bytes4.
func address(b string) string {
	if len(b) < 4 {
		return fmt.Sprintf("%x", b)
	}
	return netip.AddrFrom4([4]byte([]byte(b[:4]))).String()
}

func showRing(key, data string) string {
	return address(key) + " -> " + net.HardwareAddr(data).String()
}
