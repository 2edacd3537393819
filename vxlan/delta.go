package vxlan

import (
	"bytes"
	"cmp"
	"net"
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
	var macs few[MAC]
	only(l.Peers, w.Peers, samePeer, wholePeers, func(p *Peer) { macs.add(macKey(p.MAC)) })
	only(l.VIPs, w.VIPs, sameVIP, wholeVIPs, func(v *VIP) { macs.add(macKey(v.MAC)) })
	if len(macs.n) > maxDelta {
		return dl, dw, false
	}
	dl, dw = *header(l), *header(w)
	if len(macs.n) == 0 {
		return dl, dw, true
	}
	isPeer := func(p *Peer) bool { return macs.has(macKey(p.MAC)) }
	isVIP := func(v *VIP) bool { return macs.has(macKey(v.MAC)) }
	dl.Peers, dl.VIPs, dw.Peers, dw.VIPs = those(l.Peers, isPeer), those(l.VIPs, isVIP), those(w.Peers, isPeer), those(w.VIPs, isVIP)
	return dl, dw, true
}

// few counts a few keys that are looked for among many: most of the many are told
// by their last byte.
type few[K comparable] struct {
	n      map[K]int
	byLast [256]bool
}

func (f *few[K]) add(k K, last byte) {
	if f.n == nil {
		f.n = map[K]int{}
	}
	f.n[k]++
	f.byLast[last] = true
}

func (f *few[K]) has(k K, last byte) bool {
	if !f.byLast[last] {
		return false
	}
	_, ok := f.n[k]
	return ok
}

// take is the opposite of add, for a key that was added.
func (f *few[K]) take(k K, last byte) {
	if f.has(k, last) {
		f.n[k]--
	}
}

// isEven reports whether every key was taken as often as it was added.
func (f *few[K]) isEven() bool {
	for _, n := range f.n {
		if n != 0 {
			return false
		}
	}
	return true
}

func macKey(a net.HardwareAddr) (MAC, byte) {
	m := MACOf(a)
	return m, m[5]
}

func addrKey(a netip.Addr) (netip.Addr, byte) {
	b := a.As16()
	return a.Unmap(), b[15]
}

// those are the elements that f is true of, in a list of their own.
func those[E any](s []E, f func(*E) bool) []E {
	var out []E
	for i := range s {
		if f(&s[i]) {
			out = append(out, s[i])
		}
	}
	return out
}

// only calls f with what is in one of two lists alone. The lists are most often
// alike but for a few elements: what both begin and end with is only looked at, and
// not put in order.
func only[E any](a, b []E, same func(a, b *E) bool, compare func(a, b E) int, f func(*E)) {
	for len(a) > 0 && len(b) > 0 && same(&a[0], &b[0]) {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && same(&a[len(a)-1], &b[len(b)-1]) {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	if len(a) > 0 && len(b) > 0 {
		a, b = inOrder(a, compare), inOrder(b, compare)
	}
	for len(a) > 0 && len(b) > 0 {
		switch c := compare(a[0], b[0]); {
		case c == 0:
			a, b = a[1:], b[1:]
		case c < 0:
			f(&a[0])
			a = a[1:]
		default:
			f(&b[0])
			b = b[1:]
		}
	}
	for i := range a {
		f(&a[i])
	}
	for i := range b {
		f(&b[i])
	}
}

// inOrder is s itself if it is sorted, else a sorted copy.
func inOrder[E any](s []E, compare func(a, b E) int) []E {
	if !slices.IsSortedFunc(s, compare) {
		s = slices.Clone(s)
		slices.SortFunc(s, compare)
	}
	return s
}

func samePeer(a, b *Peer) bool {
	return a.Addr == b.Addr && bytes.Equal(a.MAC, b.MAC) && a.VTEP == b.VTEP && a.Native == b.Native && a.MTU == b.MTU
}

func sameVIP(a, b *VIP) bool {
	return a.Addr == b.Addr && bytes.Equal(a.MAC, b.MAC) && a.MTU == b.MTU
}

func wholePeers(p, q Peer) int { return cmp.Or(comparePeers(p, q), cmp.Compare(p.MTU, q.MTU)) }

func wholeVIPs(v, w VIP) int { return cmp.Or(compareVIPs(v, w), cmp.Compare(v.MTU, w.MTU)) }

// fits reports whether the part of a network is valid and shares no address
// with the rest of it.
func fits(part, whole Network) bool {
	if part.Validate() != nil {
		return false
	}
	var addrs few[netip.Addr]
	var macs few[MAC]
	for _, p := range part.Peers {
		addrs.add(addrKey(p.Addr))
		macs.add(macKey(p.MAC))
	}
	for _, v := range part.VIPs {
		addrs.add(addrKey(v.Addr))
		macs.add(macKey(v.MAC))
	}
	seen := func(a netip.Addr, mac net.HardwareAddr) {
		addrs.take(addrKey(a))
		macs.take(macKey(mac))
	}
	for i := range whole.Peers {
		seen(whole.Peers[i].Addr, whole.Peers[i].MAC)
	}
	for i := range whole.VIPs {
		seen(whole.VIPs[i].Addr, whole.VIPs[i].MAC)
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
	return addrs.isEven() && macs.isEven()
}
