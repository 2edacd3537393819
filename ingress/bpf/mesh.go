package bpf

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// The following are the structs of c/mesh.h, without holes. Ports are in network
// order.

// endsValue is both ends of a flow: with the published address as the host's, or
// with the backend's.
type endsValue struct {
	Client, Host [16]byte
	CPort, HPort [2]byte
	Proto        uint32
}

type turnValue struct {
	Host         [16]byte
	MAC          vxlan.MAC
	HPort, CPort [2]byte
	Zero         uint16
	Link, Seen   uint32
	State, Since uint32
	Hop          hopValue
	VTEP         [16]byte
}

type passingValue struct {
	Request endsValue
	Since   uint32
}

type hopValue struct {
	MTU, Family uint32
	NextHop     [16]byte // IPv4: the first four
}

// family6 is in the link of a route of IPv6.
const family6 = 1 << 31

type reachKey struct {
	Bits, Link uint32
	Client     [16]byte
}

type entryValue struct {
	Leg, VNI, Tunnel uint32
	UDP              [2]byte
	MAC              vxlan.MAC
	VTEP             [16]byte
	MTU              uint16
	Zero             uint16
}

// portWords is how many words of the map published have one bit for each port.
const portWords = 2 * (1 << 16) / 64

// portBits are the ports whose flows may go past the host, by word of the map.
type portBits map[uint32]uint64

func protocolNumber(p weft.Protocol) (n uint32, ok bool) {
	switch p {
	case weft.TCP:
		return 6, true
	case weft.UDP:
		return 17, true
	}
	return 0, false
}

func (b portBits) set(proto uint32, port uint16) {
	n := uint32(port)
	if proto == 17 {
		n |= 1 << 16
	}
	b[n/64] |= 1 << (n % 64)
}

// goesPast reports whether flows to p may go past the host: those that keep their
// client's address on the way to the ingress network.
func goesPast(p ingress.Published) bool {
	_, ok := protocolNumber(p.Protocol)
	return ok && !p.Host && !p.HideClient
}

// lead is where a published port leads: count ports from port on, to those from
// target on; at which addresses and for which clients, in words to compare.
type lead struct {
	proto        uint32
	port, target uint16
	count        uint16
	backend      vxlan.MAC
	addr4, addr6 netip.Addr
	at, allow    string
}

// leadOf is a lead with the port that it is of.
type leadOf struct {
	lead
	published *ingress.Published
}

// leads are all of them. Those of one port are found by it.
type leads struct {
	all  map[lead]bool
	one  map[[2]uint32][]leadOf // by protocol and port
	wide []leadOf
}

// planMesh computes which ports may go past the host, and where their flows may
// lead to.
func planMesh(published []ingress.Published) (portBits, leads) {
	bits, l := portBits{}, leads{all: map[lead]bool{}, one: map[[2]uint32][]leadOf{}}
	for i := range published {
		p := &published[i]
		if !goesPast(*p) {
			continue
		}
		proto, _ := protocolNumber(p.Protocol)
		count := max(p.Count, 1)
		for i := range count {
			bits.set(proto, p.Port+i)
		}
		var at, allow string
		if len(p.IPs)+len(p.Allow) > 0 {
			at, allow = fmt.Sprint(p.IPs), fmt.Sprint(p.Allow)
		}
		for _, b := range p.Backends {
			d := lead{proto: proto, port: p.Port, target: p.Target, count: count, backend: vxlan.MACOf(b.MAC), addr4: b.Addr, addr6: b.Addr6, at: at, allow: allow}
			l.all[d] = true
			if count > 1 {
				l.wide = append(l.wide, leadOf{d, p})
			} else {
				k := [2]uint32{proto, uint32(p.Port)}
				l.one[k] = append(l.one[k], leadOf{d, p})
			}
		}
	}
	return bits, l
}

// flow is one of the table of requests: who asked which address, and where it leads.
type flow struct {
	proto         uint32
	client, asked netip.Addr
	port, target  uint16
	backend       vxlan.MAC
	addr          netip.Addr
}

func (d leadOf) takes(f flow) bool {
	return d.proto == f.proto && f.port >= d.port && f.port-d.port < d.count && f.port-d.port == f.target-d.target &&
		d.backend == f.backend && (d.addr4 == f.addr || d.addr6 == f.addr) &&
		d.published.IsAt(d.published.Protocol, netip.AddrPortFrom(f.asked, f.port)) && d.published.Admits(f.client)
}

// allows reports whether a flow may stay: its backend is still one of those of the port
// that it asked, be it that it drains, and its client may still ask there.
func (l leads) allows(f flow) bool {
	for _, d := range l.one[[2]uint32{f.proto, uint32(f.port)}] {
		if d.takes(f) {
			return true
		}
	}
	for _, d := range l.wide {
		if d.takes(f) {
			return true
		}
	}
	return false
}

// lost reports whether something that flows may lead to by before is not in l.
func (l leads) lost(before leads) bool {
	for d := range before.all {
		if !l.all[d] {
			return true
		}
	}
	return false
}

// flowOf is the flow of an entry of requests, and of one of answers.
func flowOf(key endsValue, to turnValue, isAnswer bool) flow {
	port, target, asked, addr := key.HPort, to.HPort, key.Host, to.Host
	if isAnswer {
		port, target, asked, addr = to.HPort, key.HPort, to.Host, key.Host
	}
	return flow{
		proto: key.Proto, client: netip.AddrFrom16(key.Client).Unmap(), asked: netip.AddrFrom16(asked).Unmap(), port: uint16(port[0])<<8 | uint16(port[1]), target: uint16(target[0])<<8 | uint16(target[1]),
		backend: to.MAC, addr: netip.AddrFrom16(addr).Unmap(),
	}
}

// hostRoute is one of the host's, of whichever table.
type hostRoute struct {
	Link   int
	Dst    netip.Prefix
	Via    netip.Addr // invalid: those whom it leads to are on the link
	MTU    int        // of the link, or narrower
	IsMain bool       // it is in the main table
}

// maxReaches bounds the map of that name (c/mesh.h).
const maxReaches = 16384

// families of next hops, as the kernel numbers them.
const afInet, afInet6 = 2, 10

// reachesOf are the prefixes of clients that a link of these leads to, and how.
// The kernel is asked for the next hop of each packet where more than one comes into
// question. A prefix that a wider one speaks for is left out; so are the narrowest
// where the map would not hold all, and the flows of their clients go by the wider
// one's way or through the host.
func reachesOf(links []int, routes []hostRoute) map[reachKey]hopValue {
	sorted := slices.DeleteFunc(slices.Clone(routes), func(r hostRoute) bool { return !slices.Contains(links, r.Link) })
	slices.SortStableFunc(sorted, func(a, b hostRoute) int { return cmp.Compare(a.Dst.Bits(), b.Dst.Bits()) })
	areRules := slices.ContainsFunc(sorted, func(r hostRoute) bool { return !r.IsMain })
	all := map[reachKey]hopValue{}
	for _, r := range sorted {
		k, h := reachOf(r.Link, r.Dst), r.hop()
		if have, ok := all[k]; ok && have != h {
			h = hopValue{MTU: min(h.MTU, have.MTU)}
		}
		if areRules {
			h = hopValue{MTU: h.MTU}
		}
		all[k] = h
	}
	out := map[reachKey]hopValue{}
	for _, r := range sorted {
		k := reachOf(r.Link, r.Dst)
		isCovered := false
		for bits := r.Dst.Bits() - 1; bits >= 0; bits-- {
			if wider, ok := out[reachOf(r.Link, netip.PrefixFrom(r.Dst.Addr(), bits))]; ok {
				isCovered = wider == all[k]
				break
			}
		}
		if !isCovered && len(out) < maxReaches {
			out[k] = all[k]
		}
	}
	return out
}

func reachOf(link int, p netip.Prefix) reachKey {
	bits, at := p.Bits(), uint32(link)
	if p.Addr().Is4() {
		bits += 96
	} else {
		at |= family6
	}
	return reachKey{Bits: 32 + uint32(bits), Link: at, Client: p.Masked().Addr().As16()}
}

func (r hostRoute) hop() hopValue {
	h := hopValue{MTU: uint32(r.MTU), Family: afInet}
	if r.Dst.Addr().Is6() || r.Via.Is6() {
		h.Family = afInet6
	}
	if r.Via.IsValid() {
		copy(h.NextHop[:], r.Via.AsSlice())
	}
	return h
}

// hostLink is what decides whether clients come by a link of the host.
type hostLink struct {
	Index      int
	Name       string
	Alias      string
	IsEthernet bool
	HasMaster  bool
	Addrs      []netip.Addr
}

// isOutside reports whether requests may come by a link: it has an address that
// can be asked, frames begin with an Ethernet header, and it is not weft's own. A
// packet that comes by another link goes through the host, as ever.
func (l hostLink) isOutside() bool {
	if !l.IsEthernet || l.HasMaster || l.Name == weft.IngressLeg || l.Name == weft.GatewayBridge || strings.HasPrefix(l.Alias, weft.LinkAlias("")) {
		return false
	}
	for _, a := range l.Addrs {
		if a.IsGlobalUnicast() {
			return true
		}
	}
	return false
}
