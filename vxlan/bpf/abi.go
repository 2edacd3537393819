package bpf

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// abiVersion is the number of c/overlay.h's layouts. It names the folder of the
// pins, so that engines of two versions never share a map: the newer one fills
// maps of its own, and then takes the older ones away.
const abiVersion = 2

// Limits of c/overlay.h.
const (
	maxSubnets  = 8
	maxIDLength = 63
)

// kind says where a hardware address lives (enum kind).
type kind uint8

const (
	destTask   kind = 1
	destLeg    kind = 2
	destDirect kind = 3
	destTunnel kind = 4
	destVIP    kind = 5
	// The local ones of an encrypted network.
	destSealedTask kind = 6
	destSealedLeg  kind = 7
)

// Flags of an entry (enum flags).
const (
	wayNative uint16 = 1
	wayOnLink uint16 = 2
)

func (k kind) isLocal() bool {
	return k == destTask || k == destLeg || k == destSealedTask || k == destSealedLeg
}
func (k kind) isRemote() bool { return k == destDirect || k == destTunnel }

// Hooks are the slots of the pinned map "hooks" (c/overlay.h).
const (
	hookBalance = 0
	hookForward = 1
)

// addr16 is an address as the maps have it: IPv4 as ::ffff:a.b.c.d.
type addr16 [16]byte

func addrOf(a netip.Addr) addr16 {
	if !a.IsValid() {
		return addr16{}
	}
	return a.As16()
}

// Addr is the opposite of addrOf. Only the zero value is no address.
func (a addr16) Addr() netip.Addr {
	if a == (addr16{}) {
		return netip.Addr{}
	}
	return netip.AddrFrom16(a).Unmap()
}

// be16 is a number in network order.
type be16 [2]byte

func be(v uint16) (b be16) { binary.BigEndian.PutUint16(b[:], v); return b }
func (b be16) v() uint16   { return binary.BigEndian.Uint16(b[:]) }

// The following are the structs of c/overlay.h, field by field, in the machine's
// byte order, without holes.

type macKey struct {
	VNI  uint32
	MAC  vxlan.MAC
	Zero uint16
}

type epKey struct {
	VNI  uint32
	Addr addr16
}

type epValue struct {
	MAC  vxlan.MAC
	Zero uint16
}

type destValue struct {
	Kind     kind
	NHFamily uint8
	MTU      uint16
	IfIndex  uint32
	UDP      be16
	Flags    uint16
	VTEP     addr16
	NextHop  [16]byte // IPv4: the first four
}

type portValue struct {
	VNI    uint32
	UDP    be16
	MAC    vxlan.MAC
	Tunnel uint32
	VTEP   addr16
}

type prefixValue struct {
	Addr addr16
	Bits uint32
}

type netValue struct {
	ID      [maxIDLength + 1]byte
	MTU     uint16
	UDP     be16
	Count   uint16
	Flags   uint16
	VTEP    addr16
	Subnets [maxSubnets]prefixValue
}

// Flags of a netValue.
const (
	netEncrypted = 1
	netNative    = 2
)

func (v netValue) isEncrypted() bool { return v.Flags&netEncrypted != 0 }
func (v netValue) isNative() bool    { return v.Flags&netNative != 0 }

// nativeValue and the next are those of c/native.h.
type nativeValue struct {
	VNI     uint32
	IfIndex uint32
	MAC     vxlan.MAC
	Zero    uint16
}

type echoKey struct {
	VNI    uint32
	Family uint32
	VTEP   addr16
}

// encodeNet is the head of a network as the map has it. What does not fit is
// weft.ErrInvalid.
func encodeNet(n vxlan.Network) (netValue, error) {
	v := netValue{MTU: uint16(n.MTU), UDP: be(n.Port), Count: uint16(len(n.Subnets)), VTEP: addrOf(n.VTEP)}
	if n.Encrypted {
		v.Flags |= netEncrypted
	}
	if n.Native {
		v.Flags |= netNative
	}
	if len(n.ID) > maxIDLength || bytes.IndexByte([]byte(n.ID), 0) >= 0 {
		return v, fmt.Errorf("network %d: id %q is longer than %d bytes or has a zero byte: %w", n.VNI, n.ID, maxIDLength, weft.ErrInvalid)
	}
	if len(n.Subnets) > maxSubnets {
		return v, fmt.Errorf("network %d: %d subnets, at most %d: %w", n.VNI, len(n.Subnets), maxSubnets, weft.ErrInvalid)
	}
	copy(v.ID[:], n.ID)
	for i, p := range n.Subnets {
		v.Subnets[i] = prefixValue{Addr: addrOf(p.Addr()), Bits: uint32(p.Bits())}
	}
	return v, nil
}

// decodeNet is the opposite of encodeNet. A value that encodeNet does not make
// gives false.
func decodeNet(vni uint32, v netValue) (vxlan.Network, bool) {
	n := vxlan.Network{VNI: vni, MTU: int(v.MTU), Port: v.UDP.v(), VTEP: v.VTEP.Addr(), Encrypted: v.isEncrypted(), Native: v.isNative()}
	end := bytes.IndexByte(v.ID[:], 0)
	if end < 0 || v.Count > maxSubnets {
		return n, false
	}
	n.ID = weft.ID(v.ID[:end])
	for _, s := range v.Subnets[:v.Count] {
		p := netip.PrefixFrom(s.Addr.Addr(), int(s.Bits))
		if !p.IsValid() {
			return n, false
		}
		n.Subnets = append(n.Subnets, p)
	}
	again, err := encodeNet(n)
	return n, err == nil && again == v
}

// reasons are the names of enum count, in its order, for people.
var reasons = [...]string{
	"malformed", "spoofed source", "multicast", "other protocol", "unknown destination", "unknown address",
	"no balancer", "refused by kernel", "too big", "received for unknown", "received from unknown", "received other protocol",
	"unencrypted",
}
