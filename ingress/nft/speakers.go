package nft

import (
	"net"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/ingress"
)

// A task tells others its hardware address by ARP and neighbour discovery, and could tell
// them that it has another one's address: those who believe it send to it what is for the
// other. So on a bridge each task may speak of its own addresses only. That a frame bears
// its port's own hardware address is the overlay's to see to (vxlan/linux).

// portPrefix begins the names of tasks' ports (weft.PortVethName), and of no other link of
// a network.
const portPrefix = "wp"

// spokenChain is where all goes that is no IPv4.
const spokenChain = "spoken"

// Registers of that chain: a key is a hardware address and an address behind it.
const (
	speakerMAC, speakerAddr = unix.NFT_REG32_00, unix.NFT_REG32_00 + 2
	speakerTmp              = unix.NFT_REG32_00 + 8
)

// Fields of ARP (RFC 826) and neighbour discovery (RFC 4861 section 4).
const (
	arpSender                                               = 14 // protocol address of the sender
	icmpRouterSolicit, icmpRouterAdvert                     = 133, 134
	icmpNeighbourSolicit, icmpNeighbourAdvert, icmpRedirect = 135, 136, 137
	neighbourTarget                                         = 8
	source6                                                 = 8
)

func (f *family) speakers() string { return "speakers" + f.suffix }

// etherIs compares the frame's EtherType.
func etherIs(op expr.CmpOp, proto uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: speakerTmp},
		&expr.Cmp{Op: op, Register: speakerTmp, Data: binaryutil.BigEndian.PutUint16(proto)},
	}
}

// speakerSets are who may speak of which address, by family. Who has none yet asks from
// the unspecified one (RFC 5227, RFC 4862).
func speakerSets(all []ingress.Speaker) (sets []set) {
	for _, f := range []*family{&ipv4, &ipv6} {
		s := set{name: f.speakers(), key: f.speakerKey(), concat: true, elements: map[string]string{}, show: f.showSpeaker}
		for _, p := range all {
			mac := string(p.MAC) + "\x00\x00"
			s.elements[mac+string(make([]byte, f.bytes))] = ""
			for _, a := range p.Addrs {
				if f.has(a) {
					s.elements[mac+raw(a)] = ""
				}
			}
		}
		sets = append(sets, s)
	}
	return sets
}

func (f *family) speakerKey() nftables.SetDatatype {
	return nftables.MustConcatSetType(nftables.TypeEtherAddr, f.addr)
}

func (f *family) showSpeaker(key, _ string) string {
	return net.HardwareAddr(key[:6]).String() + " " + f.show(key[8:])
}

// spoken is what tasks say of hardware addresses. Link-local ones are no network's: whoever
// uses them finds out by himself with whom he speaks.
func spoken() chain {
	c := chain{name: spokenChain}
	add := func(words string, parts ...[]expr.Any) { c.rules = append(c.rules, rule{words, join(parts...)}) }
	back := []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}
	th := func(offset, size uint32) expr.Any {
		return &expr.Payload{DestRegister: speakerTmp, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: size}
	}
	proto := func(op expr.CmpOp) []expr.Any {
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: speakerTmp}, &expr.Cmp{Op: op, Register: speakerTmp, Data: []byte{unix.IPPROTO_ICMPV6}}}
	}
	kind := func(from, to byte) []expr.Any {
		return []expr.Any{th(0, 1), &expr.Range{Op: expr.CmpOpEq, Register: speakerTmp, FromData: []byte{from}, ToData: []byte{to}}}
	}
	mac := &expr.Payload{DestRegister: speakerMAC, Base: expr.PayloadBaseLLHeader, Offset: etherSource, Len: 6}
	// local matches link-local addresses (RFC 4291 section 2.5.6).
	local := func(base expr.PayloadBase, offset uint32) []expr.Any {
		return []expr.Any{
			&expr.Payload{DestRegister: speakerTmp, Base: base, Offset: offset, Len: 4},
			&expr.Bitwise{SourceRegister: speakerTmp, DestRegister: speakerTmp, Len: 4, Mask: []byte{0xff, 0xc0, 0, 0}, Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: speakerTmp, Data: []byte{0xfe, 0x80, 0, 0}},
		}
	}
	// another matches what speaks of an address that is not the sender's.
	another := func(f *family, base expr.PayloadBase, offset uint32) []expr.Any {
		return []expr.Any{
			mac, &expr.Payload{DestRegister: speakerAddr, Base: base, Offset: offset, Len: f.bytes},
			&expr.Lookup{SourceRegister: speakerMAC, SetName: f.speakers(), Invert: true},
			&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop},
		}
	}
	drop := []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
	is6 := etherIs(expr.CmpOpEq, unix.ETH_P_IPV6)
	add("IPv6 that is no ICMP: back", is6, proto(expr.CmpOpNeq), back)
	add("not from a task: back", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG32_00},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: unix.NFT_REG32_00, Data: []byte(portPrefix)},
	}, back)
	add("ARP of another's address: drop", etherIs(expr.CmpOpEq, unix.ETH_P_ARP), another(&ipv4, expr.PayloadBaseNetworkHeader, arpSender))
	add("no ICMPv6: back", proto(expr.CmpOpNeq), back)
	add("a router's word by a task: drop", kind(icmpRouterAdvert, icmpRouterAdvert), drop)
	add("a redirect by a task: drop", kind(icmpRedirect, icmpRedirect), drop)
	add("an answer for a link-local address: back", kind(icmpNeighbourAdvert, icmpNeighbourAdvert), local(expr.PayloadBaseTransportHeader, neighbourTarget), back)
	add("an answer for another's address: drop", kind(icmpNeighbourAdvert, icmpNeighbourAdvert), another(&ipv6, expr.PayloadBaseTransportHeader, neighbourTarget))
	add("a question from a link-local address: back", local(expr.PayloadBaseNetworkHeader, source6), back)
	for _, k := range []byte{icmpRouterSolicit, icmpNeighbourSolicit} {
		add("a question from another's address: drop", kind(k, k), another(&ipv6, expr.PayloadBaseNetworkHeader, source6))
	}
	return c
}

// speak puts the sets and the chain into a network's table, and returns what leads there:
// IPv4, which is nearly all, pays one comparison.
func (r *ruleset) speak(all []ingress.Speaker) rule {
	r.sets = append(r.sets, speakerSets(all)...)
	r.chains = append(r.chains, spoken())
	return rule{"no IPv4: by " + spokenChain, join(etherIs(expr.CmpOpNeq, unix.ETH_P_IP), []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: spokenChain}})}
}
