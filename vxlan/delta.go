package vxlan

import (
	"cmp"
	"net/netip"
	"slices"
)

// maxDelta bounds how many peers and service addresses Delta takes for a few.
// Our own choice: beyond it a whole pass costs little more for each.
const maxDelta = 64

// Delta is Diff for states of which one became the other by a few peers or
// service addresses, the change that comes most often: it costs a comparison of
// two lists and no table of anything. was are the networks that change, with only
// those of their peers and service addresses that the operations are about. It
// says false, and then nothing, of any other change, of none, and of a want that
// may not be valid: Diff and Validate judge those. left must be valid. Neither
// argument is changed.
func Delta(left, want State) (ops []Op, was State, ok bool) {
	if len(left.Networks) != len(want.Networks) {
		return nil, State{}, false
	}
	was = State{Networks: map[uint32]Network{}}
	is := State{Networks: map[uint32]Network{}}
	for vni, w := range want.Networks {
		l, ok := left.Networks[vni]
		if !ok || !sameBody(l, w) {
			return nil, State{}, false
		}
		dl, dw, ok := changed(l, w)
		if !ok {
			return nil, State{}, false
		}
		if len(dl.Peers)+len(dl.VIPs)+len(dw.Peers)+len(dw.VIPs) == 0 {
			continue
		}
		if w.Encrypted || !fits(dw, w) {
			return nil, State{}, false // on an encrypted network one entry serves many peers
		}
		was.Networks[vni], is.Networks[vni] = dl, dw
	}
	ops = Diff(was, is)
	return ops, was, len(ops) > 0
}

// sameBody reports whether two networks differ in peers and service addresses
// at most.
func sameBody(a, b Network) bool {
	if a.ID != b.ID || a.VNI != b.VNI || a.MTU != b.MTU || a.VTEP != b.VTEP || a.Port != b.Port || a.Encrypted != b.Encrypted || a.Native != b.Native {
		return false
	}
	if (a.HostLeg == nil) != (b.HostLeg == nil) || a.HostLeg != nil && !equalLegs(*a.HostLeg, *b.HostLeg) {
		return false
	}
	return slices.Equal(a.Subnets, b.Subnets) && slices.EqualFunc(a.Ports, b.Ports, func(p, q Port) bool { return comparePorts(p, q) == 0 })
}

// changed reduces two networks to what only one of them has, and to all that
// shares a hardware address with that. It says false if this is much.
func changed(l, w Network) (dl, dw Network, ok bool) {
	lp, wp := inOrder(l.Peers, comparePeers), inOrder(w.Peers, comparePeers)
	lv, wv := inOrder(l.VIPs, compareVIPs), inOrder(w.VIPs, compareVIPs)
	macs := map[MAC]bool{}
	onlyPeers(lp, wp, macs)
	onlyVIPs(lv, wv, macs)
	if len(macs) > maxDelta {
		return dl, dw, false
	}
	dl, dw = *header(l), *header(w)
	if len(macs) == 0 {
		return dl, dw, true
	}
	peers := func(ps []Peer) []Peer {
		return slices.DeleteFunc(slices.Clone(ps), func(p Peer) bool { return !macs[MACOf(p.MAC)] })
	}
	vips := func(vs []VIP) []VIP {
		return slices.DeleteFunc(slices.Clone(vs), func(v VIP) bool { return !macs[MACOf(v.MAC)] })
	}
	dl.Peers, dl.VIPs, dw.Peers, dw.VIPs = peers(lp), vips(lv), peers(wp), vips(wv)
	return dl, dw, true
}

// inOrder is s itself if it is sorted, else a sorted copy.
func inOrder[E any](s []E, compare func(a, b E) int) []E {
	if !slices.IsSortedFunc(s, compare) {
		s = slices.Clone(s)
		slices.SortFunc(s, compare)
	}
	return s
}

// only calls f with what is in one of two ordered lists alone.
func only[E any](a, b []E, compare func(a, b E) int, f func(E)) {
	for len(a) > 0 && len(b) > 0 {
		switch c := compare(a[0], b[0]); {
		case c == 0:
			a, b = a[1:], b[1:]
		case c < 0:
			f(a[0])
			a = a[1:]
		default:
			f(b[0])
			b = b[1:]
		}
	}
	for _, e := range append(slices.Clip(a), b...) {
		f(e)
	}
}

func onlyPeers(a, b []Peer, macs map[MAC]bool) {
	wholly := func(p, q Peer) int {
		if c := comparePeers(p, q); c != 0 {
			return c
		}
		return cmp.Compare(p.MTU, q.MTU)
	}
	only(a, b, wholly, func(p Peer) { macs[MACOf(p.MAC)] = true })
}

func onlyVIPs(a, b []VIP, macs map[MAC]bool) {
	wholly := func(v, w VIP) int {
		if c := compareVIPs(v, w); c != 0 {
			return c
		}
		return cmp.Compare(v.MTU, w.MTU)
	}
	only(a, b, wholly, func(v VIP) { macs[MACOf(v.MAC)] = true })
}

// fits reports whether the part of a network is valid and shares no address
// with the rest of it.
func fits(part, whole Network) bool {
	if part.Validate() != nil {
		return false
	}
	addrs, macs := map[netip.Addr]int{}, map[MAC]int{}
	for _, p := range part.Peers {
		addrs[p.Addr.Unmap()]++
		macs[MACOf(p.MAC)]++
	}
	for _, v := range part.VIPs {
		addrs[v.Addr.Unmap()]++
		macs[MACOf(v.MAC)]++
	}
	seen := func(a netip.Addr, mac []byte) {
		if _, ok := addrs[a.Unmap()]; ok {
			addrs[a.Unmap()]--
		}
		if _, ok := macs[MACOf(mac)]; ok {
			macs[MACOf(mac)]--
		}
	}
	for _, p := range whole.Peers {
		seen(p.Addr, p.MAC)
	}
	for _, v := range whole.VIPs {
		seen(v.Addr, v.MAC)
	}
	for _, p := range whole.Ports {
		for _, a := range p.Addrs() {
			seen(a.Addr(), p.MAC)
		}
	}
	if l := whole.HostLeg; l != nil {
		for _, a := range l.Addrs() {
			seen(a.Addr(), l.MAC)
		}
	}
	for _, n := range addrs {
		if n != 0 {
			return false
		}
	}
	for _, n := range macs {
		if n != 0 {
			return false
		}
	}
	return true
}
