package nft

import (
	"net"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/ingress"
)

// Offsets of header fields in bytes: TCP and UDP (RFC 9293, RFC 768) share the
// place of the ports; Ethernet starts with the destination.
const (
	thPorts, thDestination = 0, 2
	etherDestination       = 0
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

// bridgeRules is the balancing table of one network. What is not for the hardware
// address of a service passes: another node has balanced it already, or it is
// none of ours. Then for each of the network's families, in order: a known flow
// keeps its backend; a service without a backend that takes connections is
// refused at once; a new flow is hashed into the ring of its service; what has
// no ports (ping) is hashed by its addresses.
func bridgeRules(n ingress.Network, reject bool) ruleset {
	r := ruleset{family: nftables.TableFamilyBridge, prune: map[string]bool{}}
	rules := []rule{forServices()}
	for _, f := range families(n.IPv6) {
		rings := make([]set, len(ingress.RingSizes))
		for i, size := range ingress.RingSizes {
			rings[i] = set{name: f.ring(size), key: f.ringKey, data: nftables.TypeEtherAddr, isMap: true, concat: true, elements: map[string]string{}, show: f.showRing}
		}
		idle := f.addressSet("idle")
		for _, s := range n.Services {
			if f.has(s.VIP) {
				fillService(r.prune, rings, idle, s)
			}
		}
		flows := set{
			name: f.flows(), key: f.tupleKey, data: nftables.TypeEtherAddr, isMap: true, concat: true,
			dynamic: true, timeout: flowTimeout, size: flowSize,
		}
		r.sets = append(append(r.sets, flows, idle), rings...)
		rules = append(rules, f.bridgeChain(reject)...)
	}
	r.chains = []chain{{
		name: "prerouting", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRef(-300), // NF_BR_PRI_NAT_DST_BRIDGED
		rules: rules,
	}}
	return r
}

// addressSet is an empty set of addresses.
func (f *family) addressSet(name string) set {
	return set{name: name + f.suffix, key: f.addr, elements: map[string]string{}, show: func(k, _ string) string { return f.show(k) }}
}

func (f *family) ring(size int) string {
	return map[int]string{64: "ring64", 1024: "ring1024", 16384: "ring16384"}[size] + f.suffix
}

func (f *family) flows() string { return "flows" + f.suffix }

func fillService(prune map[string]bool, rings []set, idle set, s ingress.Service) {
	var keys, macs []string
	for _, b := range s.Backends {
		prune[string(b.MAC)] = true
		if !b.Draining {
			keys = append(keys, string(b.Task))
			macs = append(macs, string(b.MAC))
		}
	}
	if len(keys) == 0 {
		idle.elements[raw(s.VIP)] = ""
		return
	}
	size := ingress.RingSize(len(keys))
	for i, m := range ingress.RingSizes {
		if m != size {
			continue
		}
		for slot, k := range ingress.Ring(keys, size) {
			rings[i].elements[raw(s.VIP)+string(binaryutil.NativeEndian.PutUint32(uint32(slot)))] = macs[k]
		}
	}
}

// serviceBit is set in the first byte of the hardware addresses of services, of
// either family, and of no task, node or router (weft.VIPMAC).
const serviceBit = 0x04

// forServices lets pass what is not for the hardware address of a service.
func forServices() rule {
	return rule{"not for a service: pass", []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG32_00, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 1},
		&expr.Bitwise{SourceRegister: unix.NFT_REG32_00, DestRegister: unix.NFT_REG32_00, Len: 1, Mask: []byte{serviceBit}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG32_00, Data: []byte{0}},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}}
}

func (f *family) bridgeChain(reject bool) []rule {
	var rules []rule
	add := func(words string, parts ...[]expr.Any) { rules = append(rules, rule{f.words + words, join(parts...)}) }
	writeMAC := []expr.Any{
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: f.mac, Base: expr.PayloadBaseLLHeader, Offset: etherDestination, Len: 6},
		&expr.Counter{},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
	keep := &expr.Dynset{SrcRegKey: f.tuple, SrcRegData: f.mac, SetName: f.flows(), Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: flowTimeout}
	if f.is6 {
		// Who asks for a service's hardware address is answered by the bridge.
		rules = append(rules, neighbourDiscovery())
	}
	protos := []struct {
		name   string
		number byte
	}{{"tcp", unix.IPPROTO_TCP}, {"udp", unix.IPPROTO_UDP}}
	for _, p := range protos {
		add(p.name+" of a known flow: keep its backend", f.tupleOf(p.number), []expr.Any{lookup(f.flows(), f.tuple, f.mac), keep}, writeMAC)
	}
	rules = append(rules, f.idleRules(reject)...)
	for _, p := range protos {
		for _, size := range ingress.RingSizes {
			add("new "+p.name+" flow: pick from "+f.ring(size), f.tupleOf(p.number), []expr.Any{
				&expr.Hash{SourceRegister: f.tuple, DestRegister: f.slot, Length: f.tupleBytes, Modulus: uint32(size), Seed: hashSeed, Type: expr.HashTypeJenkins},
				lookup(f.ring(size), f.vip, f.mac), keep,
			}, writeMAC)
		}
	}
	for _, size := range ingress.RingSizes {
		add("no ports: pick by addresses from "+f.ring(size), f.noPorts(), []expr.Any{
			&expr.Hash{SourceRegister: f.tuple, DestRegister: f.slot, Length: f.tupleBytes, Modulus: uint32(size), Seed: hashSeed, Type: expr.HashTypeJenkins},
			lookup(f.ring(size), f.vip, f.mac),
		}, writeMAC)
	}
	return rules
}

// neighbourDiscovery lets the messages of RFC 4861 section 4 (types 133 to 137)
// pass unbalanced.
func neighbourDiscovery() rule {
	f := &ipv6
	return rule{f.words + "neighbour discovery: leave to the bridge", join(f.addresses(), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: f.proto},
		&expr.Cmp{Op: expr.CmpOpEq, Register: f.proto, Data: []byte{unix.IPPROTO_ICMPV6}},
		&expr.Payload{DestRegister: f.ports, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: f.ports, FromData: []byte{133}, ToData: []byte{137}},
		&expr.Verdict{Kind: expr.VerdictAccept},
	})}
}

// idleRules refuse what asks for a service that has no backend. Where the kernel
// cannot refuse on a bridge the frame is dropped there: with no device behind the
// service's hardware address it would be dropped all the same.
func (f *family) idleRules(reject bool) []rule {
	idle := has("idle"+f.suffix, f.vip)
	if !reject {
		return []rule{{f.words + "to a service without backends: drop (this kernel cannot refuse on a bridge)", join(f.addresses(), []expr.Any{
			idle, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}})}}
	}
	return []rule{
		{f.words + "tcp to a service without backends: reset", join(f.tupleOf(unix.IPPROTO_TCP), []expr.Any{
			idle, &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})},
		{f.words + "other protocols to a service without backends: port unreachable", join(f.addresses(), []expr.Any{
			idle, &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: f.unreachable}})},
	}
}

// hashSeed is fixed, so that all nodes and all generations of the table send a
// flow the same way.
const hashSeed = 0x77656674

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

func (f *family) showRing(key, data string) string {
	return f.show(key) + " -> " + net.HardwareAddr(data).String()
}
