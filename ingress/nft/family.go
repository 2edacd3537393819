package nft

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// family is what differs between IPv4 and IPv6 in the rules: header offsets,
// names of sets, and where in the registers the parts of a packet are laid.
//
// Registers are 32 bits each (linux/netfilter/nf_tables.h: NFT_REG32_00 is 8,
// there are 16); neighbouring ones hold concatenations. Bridge table:
//
//	IPv4   8 VIP  9 slot             12 source  13 destination  14 protocol  15 port  16 its port  17 MAC
//	IPv6   8 source  12 protocol  13 port  14 its port  15 destination = VIP  19 slot                 20 MAC
//
// VIP and slot are the key of a seat, the tuple that of the flows. Host's table:
//
//	IPv4   8 protocol  9 port  10 bound to  11 slot  12 source  13 ports  16 address  17 port
//	IPv6   8 protocol  9 port  10 bound to  14 slot  15 source  19 ports  16 address  20 port
//
// The hash is made before the backend's address is looked up.
type family struct {
	is6    bool
	suffix string // of the names of sets
	words  string // before those of a rule
	// ether is the EtherType, host the family of the host's table.
	ether       uint16
	host        nftables.TableFamily
	nat         uint32 // NFPROTO of address translation
	addr        nftables.SetDatatype
	bytes       uint32 // of an address
	source      uint32 // offsets of addresses in the header
	destination uint32
	unreachable uint8 // ICMP code of "port unreachable"
	icmp        byte  // its protocol number
	bridgeLayout
	hostLayout
}

// bridgeLayout is the registers of the bridge table.
type bridgeLayout struct {
	// ports is that of the source; the destination's is in the next register.
	vip, slot, tuple, from, to, proto, ports, mac uint32
	tupleBytes                                    uint32
	tupleKey, seatKey                             nftables.SetDatatype
}

// hostLayout is those registers of the host's table that the families have in
// different places: hash is where the hashed part begins. A client's address stands
// where the slot does.
type hostLayout struct {
	hostSlot, hash, hashPorts, hostAddr, hostPort uint32
	slotData                                      nftables.SetDatatype
}

var ipv4 = family{
	ether: unix.ETH_P_IP, host: nftables.TableFamilyIPv4, nat: unix.NFPROTO_IPV4, addr: nftables.TypeIPAddr,
	bytes: 4, source: 12, destination: 16, // RFC 791
	unreachable: 3, icmp: unix.IPPROTO_ICMP, // RFC 792

	bridgeLayout: bridgeLayout{vip: 8, slot: 9, tuple: 12, from: 12, to: 13, proto: 14, ports: 15, mac: 17, tupleBytes: 20,
		tupleKey: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInteger, nftables.TypeInteger),
		seatKey:  nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInteger)},

	hostLayout: hostLayout{hostSlot: 11, hash: 12, hashPorts: 13, hostAddr: 16, hostPort: 17,
		slotData: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)},
}

var ipv6 = family{
	is6: true, suffix: "v6", words: "IPv6: ",
	ether: unix.ETH_P_IPV6, host: nftables.TableFamilyIPv6, nat: unix.NFPROTO_IPV6, addr: nftables.TypeIP6Addr,
	bytes: 16, source: 8, destination: 24, // RFC 8200 section 3
	unreachable: 4, icmp: unix.IPPROTO_ICMPV6, // RFC 4443 section 3.1

	bridgeLayout: bridgeLayout{vip: 15, slot: 19, tuple: 8, from: 8, to: 15, proto: 12, ports: 13, mac: 20, tupleBytes: 44,
		tupleKey: nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInteger, nftables.TypeInteger, nftables.TypeIP6Addr),
		seatKey:  nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInteger)},

	hostLayout: hostLayout{hostSlot: 14, hash: 15, hashPorts: 19, hostAddr: 16, hostPort: 20,
		slotData: nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService)},
}

// has reports whether a is of the family.
func (f *family) has(a netip.Addr) bool { return a.IsValid() && a.Is6() == f.is6 }

// families are those of a network's or host's table.
func families(with6 bool) []*family {
	if with6 {
		return []*family{&ipv4, &ipv6}
	}
	return []*family{&ipv4}
}

// isFamily matches frames that are (CmpOpEq) or are not (CmpOpNeq) of the family.
func (f *family) isFamily(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: f.mac},
		&expr.Cmp{Op: op, Register: f.mac, Data: binaryutil.BigEndian.PutUint16(f.ether)},
	}
}

// addresses loads the addresses of a frame of the family into the tuple.
func (f *family) addresses() []expr.Any {
	return []expr.Any{f.load(f.from, f.source), f.load(f.to, f.destination)}
}

// service loads the address that may be a service's, the key of a seat. After it
// stands what needs it; where the tuple holds that address in its place it costs
// nothing.
func (f *family) service(parts ...expr.Any) []expr.Any {
	if f.vip == f.to {
		return parts
	}
	return append([]expr.Any{f.load(f.vip, f.destination)}, parts...)
}

// toService matches frames of the family and loads that address alone.
func (f *family) toService() []expr.Any {
	return append(f.isFamily(expr.CmpOpEq), f.load(f.vip, f.destination))
}

func (f *family) load(register, offset uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: f.bytes}
}

// protocol matches one, and leaves it in its place in the tuple.
func (f *family) protocol(op expr.CmpOp, proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: f.proto},
		&expr.Cmp{Op: op, Register: f.proto, Data: []byte{proto}},
	}
}

// loadPorts loads the ports of a frame of the family into the tuple.
func (f *family) loadPorts() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: f.ports, Base: expr.PayloadBaseTransportHeader, Offset: thPorts, Len: 2},
		&expr.Payload{DestRegister: f.ports + 1, Base: expr.PayloadBaseTransportHeader, Offset: thDestination, Len: 2},
	}
}

// tupleOf matches one protocol and loads the tuple of a flow of the family.
func (f *family) tupleOf(proto byte) []expr.Any {
	return join(f.protocol(expr.CmpOpEq, proto), f.addresses(), f.loadPorts())
}

// flow loads the tuple of a flow of the family, of any protocol with ports.
func (f *family) flow() []expr.Any {
	return join([]expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: f.proto}}, f.addresses(), f.loadPorts())
}

// noPorts loads the tuple without protocol and ports.
func (f *family) noPorts() []expr.Any {
	return append(f.addresses(),
		&expr.Immediate{Register: f.proto, Data: make([]byte, 4)},
		&expr.Immediate{Register: f.ports, Data: make([]byte, 8)},
	)
}

// raw is an address as the kernel keeps it.
func raw(a netip.Addr) string { return string(a.AsSlice()) }

// show is the inverse of raw; what follows the address is left alone.
func (f *family) show(b string) string {
	a, ok := netip.AddrFromSlice([]byte(b[:min(len(b), int(f.bytes))]))
	if !ok {
		return "?"
	}
	return a.String()
}
