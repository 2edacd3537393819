package wg

import (
	"bytes"
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Our own choices.
const (
	// keepalive makes a peer speak at least this often. It keeps a NAT's entry
	// alive, and it is what completes the handshake on a slot that carries no
	// traffic yet, so that the change to it costs none.
	keepalive = 25 * time.Second
	// silence is how old a handshake is when the peer has surely gone from
	// where it was last heard: WireGuard makes a new one every two minutes
	// and gives up a session after three (its paper, section 6.1).
	silence = 3 * time.Minute
)

// device is what one WireGuard device holds or shall hold.
type device struct {
	private privateKey
	port    uint16
	peers   map[weft.PublicKey]peer
}

// peer is another node on one device.
type peer struct {
	endpoint netip.AddrPort
	// allowed are the addresses behind it: whither packets to them go, and
	// whence packets from them are believed.
	allowed map[netip.Addr]bool
	// handshake is when the last one was completed; of a device that is, not
	// of one that shall be.
	handshake time.Time
}

// behind are the addresses of encrypted networks by the node that has them.
func behind(st vxlan.State) map[netip.Addr]map[netip.Addr]bool {
	out := map[netip.Addr]map[netip.Addr]bool{}
	for _, n := range st.Networks {
		if !n.Encrypted {
			continue
		}
		for _, p := range n.Peers {
			vtep := p.VTEP.Unmap()
			if out[vtep] == nil {
				out[vtep] = map[netip.Addr]bool{}
			}
			out[vtep][p.Addr.Unmap()] = true
		}
	}
	return out
}

// newest is a peer's newest key of each slot.
func newest(p vxlan.EncryptionPeer) [weft.KeySlots]*weft.NodeKey {
	var out [weft.KeySlots]*weft.NodeKey
	for _, k := range p.Keys {
		if old := out[k.Slot()]; old == nil || old.Epoch < k.Epoch {
			out[k.Slot()] = &k
		}
	}
	return out
}

// wanted are the two devices. A slot for which this node has no key yet has no
// peers. Both know every peer and all its addresses, so that a packet is taken
// from whichever the sender chose.
//
// A peer that is there (have) stays while its node is a member, also when nothing
// is behind it for a moment, as when a new daemon has not yet heard of the
// others' tasks: its session would be lost, and a handshake is slower than a route.
func wanted(st vxlan.State, ring keyring, port uint16, have [weft.KeySlots]device) [weft.KeySlots]device {
	var out [weft.KeySlots]device
	addrs := behind(st)
	for slot := range out {
		out[slot] = device{port: port + uint16(slot), peers: map[weft.PublicKey]peer{}}
		if ring[slot] == nil {
			continue
		}
		out[slot].private = ring[slot].Private
		for _, p := range st.Encryption.Peers {
			vtep := p.VTEP.Unmap()
			k := newest(p)[slot]
			if k == nil {
				continue
			}
			// Nodes that never shared an encrypted network stay strangers.
			if _, known := have[slot].peers[k.Public]; known || len(addrs[vtep]) > 0 {
				out[slot].peers[k.Public] = peer{
					endpoint: netip.AddrPortFrom(vtep, k.Port), allowed: addrs[vtep],
				}
			}
		}
	}
	return out
}

// choose picks, for each node, the device by which this one sends to it: of the
// slots whose epoch both have, the newest that has had a handshake, which proves
// that each has the other's key of that epoch; else the oldest, which worked
// before the change. A node with no epoch in common cannot be reached.
func choose(st vxlan.State, ring keyring, have [weft.KeySlots]device) map[netip.Addr]int {
	out := map[netip.Addr]int{}
	for _, p := range st.Encryption.Peers {
		best, proven := -1, false
		for slot, k := range newest(p) {
			if k == nil || ring[slot] == nil || ring[slot].Epoch != k.Epoch {
				continue
			}
			shook := !have[slot].peers[k.Public].handshake.IsZero()
			newer := best >= 0 && ring[slot].Epoch > ring[best].Epoch
			switch {
			case best < 0, shook && !proven, shook && newer, !shook && !proven && !newer:
				best, proven = slot, shook
			}
		}
		if best >= 0 {
			out[p.VTEP.Unmap()] = best
		}
	}
	return out
}

// change is what is written to one device, in the order of its fields and
// lists. A nil field stays.
type change struct {
	// isFresh removes all peers, before anything else: wireguard-go can wait for
	// itself for ever when a device that has peers gets another private key,
	// while the answer to a handshake comes in.
	isFresh bool
	private *privateKey
	port    *uint16
	peers   []peerChange
}

// peerChange adds, alters or removes a peer.
type peerChange struct {
	public    weft.PublicKey
	remove    bool
	endpoint  netip.AddrPort // invalid: stays
	allow     []netip.Addr   // added; taken from whichever peer has them
	keepalive bool           // set it
}

func (c change) empty() bool {
	return !c.isFresh && c.private == nil && c.port == nil && len(c.peers) == 0
}

// sink is a peer that exists for the length of one change. An address that no
// peer shall have any more is moved to it and goes with it: to write a peer's
// list anew would drop the packets of its other addresses for a moment. Nobody
// has the private half of this key.
var sink = weft.PublicKey(bytes.Repeat([]byte{0xa5}, 32))

// diff is the least change that makes have into want. An endpoint is written
// only when the peer is new or silent: a peer behind a NAT is where its packets
// come from. With another private key all peers are made anew, for a handshake
// of before proves nothing of the new key.
func diff(have, want device, now time.Time) change {
	var c change
	if have.private != want.private {
		c.private, c.isFresh = &want.private, len(have.peers) > 0
		have.peers = nil
	}
	if have.port != want.port {
		c.port = &want.port
	}
	owned := map[netip.Addr]bool{}
	for _, key := range sortedKeys(want.peers) {
		w := want.peers[key]
		h, known := have.peers[key]
		pc := peerChange{public: key, keepalive: !known}
		if !known || h.endpoint != w.endpoint && now.Sub(h.handshake) > silence {
			pc.endpoint = w.endpoint
		}
		for a := range w.allowed {
			owned[a] = true
			if !h.allowed[a] {
				pc.allow = append(pc.allow, a)
			}
		}
		slices.SortFunc(pc.allow, netip.Addr.Compare)
		if !known || pc.endpoint.IsValid() || len(pc.allow) > 0 {
			c.peers = append(c.peers, pc)
		}
	}
	var stale []netip.Addr
	var gone []peerChange
	for _, key := range sortedKeys(have.peers) {
		if _, ok := want.peers[key]; !ok {
			gone = append(gone, peerChange{public: key, remove: true})
			continue
		}
		for a := range have.peers[key].allowed {
			if !owned[a] {
				stale = append(stale, a)
			}
		}
	}
	if len(stale) > 0 {
		slices.SortFunc(stale, netip.Addr.Compare)
		c.peers = append(c.peers, peerChange{public: sink, allow: stale}, peerChange{public: sink, remove: true})
	}
	c.peers = append(c.peers, gone...)
	return c
}

func sortedKeys(m map[weft.PublicKey]peer) []weft.PublicKey {
	return slices.SortedFunc(maps.Keys(m), func(a, b weft.PublicKey) int { return bytes.Compare(a[:], b[:]) })
}

// route sends an address on one network to a link.
type route struct {
	table uint32
	dst   netip.Prefix
	link  string // "": refused
}

// rule chooses the table for packets from a link.
type rule struct {
	priority int
	link     string
	from     netip.Prefix // invalid: any of the family
	is6      bool
	table    uint32
}

// neigh is a local task as the router of its network knows it.
type neigh struct {
	link string
	addr netip.Addr
	mac  vxlan.MAC
}

// paths is all that is routed between the networks' routers and the devices.
type paths struct {
	routes []route
	rules  []rule
	neighs []neigh
	// mtu is that of the devices: the largest of a network.
	mtu int
	// links are the routers, which the overlay engine makes.
	links []string
}

// Our own choices: tables and priorities inside the namespace. A network's
// VNI is the table of what leaves by its router, the VNI plus inbound that of what
// comes from other nodes.
const (
	inbound     = 1 << 24
	prioOut     = 100
	prioIn      = 200
	prioRefused = 300
	// refusedTable has nothing but a refusal.
	refusedTable = 1<<25 + 1
)

// derivePaths computes the routing. Networks are kept apart by it: what comes
// from a network's router finds that network's endpoints and no others, and what
// comes from another node finds those of the network that its source is in. The
// devices themselves take a source only from the node that has it.
func derivePaths(st vxlan.State, slots map[netip.Addr]int) paths {
	var p paths
	for _, vni := range slices.Sorted(maps.Keys(st.Networks)) {
		n := st.Networks[vni]
		if !n.Encrypted {
			continue
		}
		router := weft.RouterName(vni)
		p.mtu = max(p.mtu, n.MTU)
		p.links = append(p.links, router)
		local := func(a netip.Addr, mac vxlan.MAC) {
			a = a.Unmap()
			p.routes = append(p.routes, route{table: vni + inbound, dst: netip.PrefixFrom(a, a.BitLen()), link: router})
			p.neighs = append(p.neighs, neigh{link: router, addr: a, mac: mac})
		}
		for _, port := range n.Ports {
			for _, a := range port.Addrs() {
				local(a.Addr(), vxlan.MACOf(port.MAC))
			}
		}
		if n.HostLeg != nil {
			for _, a := range n.HostLeg.Addrs() {
				local(a.Addr(), vxlan.MACOf(n.HostLeg.MAC))
			}
		}
		for _, q := range n.Peers {
			if slot, ok := slots[q.VTEP.Unmap()]; ok {
				a := q.Addr.Unmap()
				p.routes = append(p.routes, route{table: vni, dst: netip.PrefixFrom(a, a.BitLen()), link: weft.CryptLink(slot)})
			}
		}
		for _, is6 := range []bool{false, true} {
			p.routes = append(p.routes, route{table: vni, dst: everything(is6)}, route{table: vni + inbound, dst: everything(is6)})
			p.rules = append(p.rules, rule{priority: prioOut, link: router, is6: is6, table: vni})
		}
		for _, s := range n.Subnets {
			for slot := range weft.KeySlots {
				p.rules = append(p.rules, rule{priority: prioIn, link: weft.CryptLink(slot), from: s, is6: s.Addr().Is6(), table: vni + inbound})
			}
		}
	}
	// A source in no network of this node.
	for _, is6 := range []bool{false, true} {
		p.routes = append(p.routes, route{table: refusedTable, dst: everything(is6)})
		p.rules = append(p.rules, rule{priority: prioRefused, is6: is6, table: refusedTable})
	}
	slices.SortFunc(p.routes, func(a, b route) int {
		return cmp.Or(cmp.Compare(a.table, b.table), a.dst.Addr().Compare(b.dst.Addr()), cmp.Compare(a.dst.Bits(), b.dst.Bits()))
	})
	return p
}

func everything(is6 bool) netip.Prefix {
	if is6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}
