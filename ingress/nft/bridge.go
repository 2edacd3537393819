package nft

import (
	"net"
	"net/netip"
	"strconv"
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
	// endingTimeout is the same for a flow of which the client has closed its
	// half: what the other half still brings may take 300 s to begin. Without it
	// 35 short connections a second would fill the table.
	endingTimeout = 360 * time.Second
	// flowSize bounds the memory of each of one network's two flow tables. A flow
	// that finds no room goes where the ring says.
	flowSize = 262144
	// pieceTimeout is how long the pieces of a datagram may take, as the kernel
	// waits for them (ipfrag_time); pieceSize bounds their memory.
	pieceTimeout = 30 * time.Second
	pieceSize    = 16384
)

// bridgeRules is the balancing table of one network. What is not for the hardware
// address of a service passes: another node has balanced it already, or it is
// none of ours. What tasks say of hardware addresses is looked at before that
// (speakers.go). Then for each of the network's families:
//
//   - a known flow keeps its backend, one that ends for a shorter time;
//   - pieces of a datagram go to a chain of their own (piecesChain), and an ICMP
//     error goes where the flow goes that it quotes (errorsChain);
//   - what is new, and each request for a connection, goes by the map of ways to a
//     chain for its service's number of seats (pickChains), where the flow is hashed
//     to a seat, or to one that refuses at once.
func bridgeRules(n ingress.Network, reject bool) ruleset {
	r := ruleset{family: nftables.TableFamilyBridge, prune: map[string]bool{}}
	rules := []rule{r.speak(n.Speakers), forServices()}
	fams := families(n.IPv6)
	var others []chain
	for i, f := range fams {
		r.sets = append(append(r.sets, f.flowSets()...), f.serviceSets()...)
		other := ipv4.accept()
		if i+1 < len(fams) {
			other = fams[i+1].then(expr.VerdictGoto, "prerouting")
		}
		if own := f.bridgeChain(other); i == 0 {
			rules = append(rules, own...)
		} else {
			others = append(others, chain{name: "prerouting" + f.suffix, rules: own})
		}
		others = append(append(others, f.associationsChain(), f.errorsChain(), f.piecesChain(), f.newChain(), f.idleChain(reject)), f.pickChains()...)
	}
	fill := r.filler()
	for _, s := range n.Services {
		fillService(fill, s)
		for _, b := range s.Backends {
			r.prune[string(b.MAC)] = true
		}
	}
	r.chains = append(append([]chain{{
		name: "prerouting", kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRef(-300), // NF_BR_PRI_NAT_DST_BRIDGED
		rules: rules,
	}}, r.chains...), others...)
	return r
}

// addressSet is an empty set of addresses.
func (f *family) addressSet(name string) set {
	return set{name: name + f.suffix, key: f.addr, elements: map[string]string{}, show: func(k, _ string) string { return f.show(k) }}
}

// serviceSets are the maps of services, empty.
func (f *family) serviceSets() []set {
	return []set{
		{name: f.ways(), key: f.addr, data: nftables.TypeVerdict, isMap: true, elements: map[string]string{}, show: func(k, v string) string { return f.show(k) + " -> " + v }},
		{name: f.seats(), key: f.seatKey, data: nftables.TypeEtherAddr, isMap: true, concat: true, elements: map[string]string{}, show: f.showSeat},
	}
}

// familyOf is the one that an address is of.
func familyOf(a netip.Addr) *family {
	if a.Is6() {
		return &ipv6
	}
	return &ipv4
}

// fillService puts the elements of a service.
func fillService(put filler, s ingress.Service) {
	f, vip := familyOf(s.VIP), raw(s.VIP)
	var keys, macs []string
	for _, b := range s.Backends {
		if !b.Draining {
			keys = append(keys, string(b.Task))
			macs = append(macs, string(b.MAC))
		}
	}
	if len(keys) == 0 {
		put(f.ways(), vip, "idle"+f.suffix)
		return
	}
	seats := seat(keys)
	put(f.ways(), vip, pickOne+strconv.Itoa(len(seats.own))+f.suffix)
	for i, k := range seats.own {
		if k >= 0 {
			put(f.seats(), vip+string(binaryutil.NativeEndian.PutUint32(uint32(i))), macs[k])
		} else if k = seats.heir[i]; k >= 0 {
			put(f.seats(), vip+string(binaryutil.NativeEndian.PutUint32(uint32(i+mostSeats))), macs[k])
		}
	}
}

// serviceBit is set in the first byte of the hardware addresses of services, of
// either family, and of no task, node or router (weft.VIPMAC).
const serviceBit = 0x04

// forServices lets pass what is not for the hardware address of a service.
func forServices() rule {
	return rule{"not for a service: pass", join(served(expr.CmpOpEq), ipv4.accept())}
}

// neighbourDiscovery lets the messages of RFC 4861 section 4 (types 133 to 137)
// pass unbalanced.
func neighbourDiscovery() rule {
	f := &ipv6
	return rule{f.words + "neighbour discovery: leave to the bridge", join(f.isFamily(expr.CmpOpEq), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: f.proto},
		&expr.Cmp{Op: expr.CmpOpEq, Register: f.proto, Data: []byte{unix.IPPROTO_ICMPV6}},
		&expr.Payload{DestRegister: f.ports, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: f.ports, FromData: []byte{133}, ToData: []byte{137}},
		&expr.Verdict{Kind: expr.VerdictAccept},
	})}
}

// idleChain refuses what asks for a service that has no backend. Where the kernel
// cannot refuse on a bridge the frame is dropped there: with no device behind the
// service's hardware address it would be dropped all the same.
func (f *family) idleChain(reject bool) chain {
	c := chain{name: "idle" + f.suffix}
	if !reject {
		c.rules = []rule{{f.words + "to a service without backends: drop (this kernel cannot refuse on a bridge)", dropped()}}
		return c
	}
	c.rules = []rule{
		{f.words + "tcp to a service without backends: reset", join(f.protocol(expr.CmpOpEq, unix.IPPROTO_TCP), []expr.Any{
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})},
		{f.words + "sctp to a service without backends: unreachable", join(f.protocol(expr.CmpOpEq, unix.IPPROTO_SCTP), []expr.Any{f.noAssociations()})},
		{f.words + "other protocols to a service without backends: port unreachable", []expr.Any{
			&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: f.unreachable}}},
	}
	return c
}

// noAssociations refuses SCTP: by protocol unreachable, which ends an association at once
// (RFC 9260 section 10). IPv6's twin of it, a parameter problem, nftables cannot say; of
// port unreachable an association hears, and waits on.
func (f *family) noAssociations() expr.Any {
	code := f.unreachable
	if !f.is6 {
		code = 2 // RFC 792: protocol unreachable
	}
	return &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: code}
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

func (f *family) showSeat(key, data string) string {
	as := ""
	if binaryutil.NativeEndian.Uint32([]byte(key[f.bytes:])) >= mostSeats {
		as = " as heir"
	}
	return f.show(key) + " -> " + net.HardwareAddr(data).String() + as
}
