package bpf

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// The structs of c/recent.h.

type frameWords struct {
	MACs  [12]byte // destination and source
	Proto be16
	Zero  uint16
}

type sentValue struct {
	Epoch    uint64
	MACs     [12]byte
	Port     uint32
	IfIndex  uint32
	Kind     uint16
	MTU      uint16
	Src, Dst [4]byte
	VXLAN    [8]byte
	Sum      uint32
	UDP      be16
	MAC      vxlan.MAC
	NHFamily uint32
	NextHop  [16]byte
}

type gotValue struct {
	Epoch    uint64
	Frame    frameWords
	VXLAN    [8]byte
	Src, Dst [4]byte
	IfIndex  uint32
	UDP      be16
	Zero     uint16
}

type plainValue struct {
	Epoch    uint64
	Frame    frameWords
	Src, Dst [4]byte
	IfIndex  uint32
	Zero     uint32
}

const (
	sentVXLAN = 0
	sentPlain = 1
	sentLocal = 2
)

func dstOf(macs [12]byte) vxlan.MAC { return vxlan.MAC(macs[:6]) }
func srcOf(macs [12]byte) vxlan.MAC { return vxlan.MAC(macs[6:]) }

func mapped4(a [4]byte) addr16 { return addrOf(netip.AddrFrom4(a)) }

// twins are the programs with epochs, and the same ones that look up every packet.
// Both have the tables; the former's are looked at.
type twins struct {
	quick, slow *ebpf.Collection
	tables
	// last are the packets that are sent again after a change.
	last []trial
}

// trial is a packet at a program, which a port of netkit may have sent.
type trial struct {
	prog    string
	ifindex uint32
	netkit  bool
	packet  []byte
}

const repeated = 12

// tables are what the maps hold.
type tables struct {
	ports   map[uint32]portValue
	macs    map[macKey]destValue
	eps     map[epKey]epValue
	natives map[addr16]nativeValue
}

// newTwins loads both into the calling thread's namespace.
func newTwins(t *testing.T) *twins {
	t.Helper()
	load := func() *ebpf.Collection {
		spec, err := loadOverlay()
		must(t, err)
		must(t, spec.Variables[overlayVarCanSwitchFamily].Set(uint8(1)))
		coll, err := ebpf.NewCollection(spec)
		must(t, err)
		t.Cleanup(coll.Close)
		return coll
	}
	return &twins{quick: load(), slow: load(), tables: tables{map[uint32]portValue{}, map[macKey]destValue{}, map[epKey]epValue{}, map[addr16]nativeValue{}}}
}

// put changes one entry of both as the engine does, and sends the last packets
// again; the zero value removes it.
func put[K, V comparable](r *rapid.T, w *twins, name string, table map[K]V, k K, v V) {
	var zero V
	check := func(err error) {
		if err != nil {
			r.Fatal(err)
		}
	}
	check(endEpoch(w.quick.Maps[overlayMapEpoch]))
	_, there := table[k]
	for _, c := range []*ebpf.Collection{w.quick, w.slow} {
		switch {
		case v != zero:
			check(c.Maps[name].Put(k, v))
		case there:
			check(c.Maps[name].Delete(k))
		}
	}
	if v != zero {
		table[k] = v
	} else {
		delete(table, k)
	}
	check(beginEpoch(w.quick.Maps[overlayMapEpoch]))
	for _, p := range w.last {
		w.compare(r, p)
	}
}

func (w *twins) clear(r *rapid.T) {
	w.last = nil
	for k := range w.ports {
		put(r, w, overlayMapPorts, w.ports, k, portValue{})
	}
	for k := range w.macs {
		put(r, w, overlayMapMacs, w.macs, k, destValue{})
	}
	for k := range w.eps {
		put(r, w, overlayMapEps, w.eps, k, epValue{})
	}
	for k := range w.natives {
		put(r, w, overlayMapNatives, w.natives, k, nativeValue{})
	}
}

// same compares, now and after the next changes.
func (w *twins) same(r *rapid.T, prog string, ifindex uint32, packet []byte) {
	p := trial{prog, ifindex, prog == overlayProgFromTask && rapid.Bool().Draw(r, "netkit"), packet}
	w.compare(r, p)
	w.last = append(w.last, p)
	w.last = w.last[max(0, len(w.last)-repeated):]
}

// compare runs a program of both on a packet, and wants one verdict and one packet.
func (w *twins) compare(r *rapid.T, p trial) {
	prog, ifindex, packet := p.prog, p.ifindex, p.packet
	a, left, err := runFrom(w.quick.Programs[prog], ifindex, p.netkit, packet)
	if err != nil {
		r.Fatal(err)
	}
	b, right, err := runFrom(w.slow.Programs[prog], ifindex, p.netkit, packet)
	if err != nil {
		r.Fatal(err)
	}
	for _, p := range [][]byte{left, right} {
		if len(p) == len(packet)+50 && p[12] == 8 && p[14] == 0x45 { // identification and checksum
			if n := sum16(p[14:34]); n != 0xffff {
				r.Fatalf("the outer header's checksum is wrong (%04x): % x", n, p[14:34])
			}
			copy(p[18:20], []byte{0, 0})
			copy(p[24:26], []byte{0, 0})
		}
	}
	if a != b || !bytes.Equal(left, right) {
		r.Fatalf("%s at %d of % x\nremembers: %d, % x\nlooks up:  %d, % x", prog, ifindex, packet, int32(a), left, int32(b), right)
	}
}

// sum16 adds up words (RFC 1071).
func sum16(b []byte) uint32 {
	n := uint32(0)
	for ; len(b) > 1; b = b[2:] {
		n += uint32(binary.BigEndian.Uint16(b))
	}
	return n&0xffff + n>>16
}

// kinds counts what was remembered.
type kinds struct{ vxlan, plain, local, got, native int }

// remembered counts the entries that count now; each must say what the tables say.
func (w *twins) remembered(r *rapid.T, seen *kinds) {
	var now uint64
	if err := w.quick.Maps[overlayMapEpoch].Lookup(uint32(0), &now); err != nil || now == 0 {
		r.Fatalf("epoch %d, %v", now, err)
	}
	eachNow(r, w.quick.Maps["sents"], func(v sentValue) bool { return v.Epoch == now }, func(v sentValue) bool {
		*map[uint16]*int{sentVXLAN: &seen.vxlan, sentPlain: &seen.plain, sentLocal: &seen.local}[v.Kind]++
		return w.isSent(v)
	})
	eachNow(r, w.quick.Maps["gots"], func(v gotValue) bool { return v.Epoch == now }, func(v gotValue) bool {
		seen.got++
		return w.isGot(v)
	})
	eachNow(r, w.quick.Maps["plains"], func(v plainValue) bool { return v.Epoch == now }, func(v plainValue) bool {
		seen.native++
		return w.isPlain(v)
	})
}

func eachNow[V any](r *rapid.T, m *ebpf.Map, isNow, isRight func(V) bool) {
	for slot := range m.MaxEntries() {
		var each []V
		if err := m.Lookup(slot, &each); err != nil {
			r.Fatal(err)
		}
		for _, v := range each {
			if isNow(v) && !isRight(v) {
				r.Fatalf("%s remembers %+v", m, v)
			}
		}
	}
}

func (t tables) isSent(v sentValue) bool {
	p, ok := t.ports[v.Port]
	d := t.macs[macKey{VNI: p.VNI, MAC: dstOf(v.MACs)}]
	if !ok || p.MAC != srcOf(v.MACs) || v.IfIndex != d.IfIndex || v.MTU != d.MTU {
		return false
	}
	vtep := func(a addr16) [4]byte { return [4]byte(a[12:]) }
	mayPlain := d.Flags == wayNative|wayOnLink
	switch v.Kind {
	case sentLocal:
		far, ok := t.ports[d.IfIndex]
		if !ok {
			far.MAC = dstOf(v.MACs)
		}
		return (d.Kind == destTask || d.Kind == destSealedTask) && v.MAC == far.MAC
	case sentVXLAN:
		return d.Kind == destDirect && !mayPlain && v.Src == vtep(p.VTEP) && v.Dst == vtep(d.VTEP) && v.UDP == d.UDP &&
			binary.BigEndian.Uint32(v.VXLAN[4:]) == p.VNI<<8 && v.NHFamily == uint32(d.NHFamily) && v.NextHop == d.NextHop
	}
	return d.Kind == destDirect && mayPlain && t.eps[epKey{VNI: p.VNI, Addr: mapped4(v.Src)}].MAC == p.MAC &&
		t.eps[epKey{VNI: p.VNI, Addr: mapped4(v.Dst)}].MAC == dstOf(v.MACs) && v.NHFamily == uint32(d.NHFamily) && v.NextHop == d.NextHop
}

func (t tables) isGot(v gotValue) bool {
	vni := binary.BigEndian.Uint32(v.VXLAN[4:]) >> 8
	to, from := t.macs[macKey{VNI: vni, MAC: dstOf(v.Frame.MACs)}], t.macs[macKey{VNI: vni, MAC: srcOf(v.Frame.MACs)}]
	return to.Kind == destTask && to.UDP == v.UDP && to.VTEP == mapped4(v.Dst) && to.IfIndex == v.IfIndex &&
		from.Kind.isRemote() && from.VTEP == mapped4(v.Src)
}

func (t tables) isPlain(v plainValue) bool {
	n, ok := t.natives[mapped4(v.Dst)]
	ep, known := t.eps[epKey{VNI: n.VNI, Addr: mapped4(v.Src)}]
	return ok && known && t.macs[macKey{VNI: n.VNI, MAC: ep.MAC}].Kind.isRemote() &&
		n.IfIndex == v.IfIndex && n.MAC == dstOf(v.Frame.MACs) && ep.MAC == srcOf(v.Frame.MACs)
}

// TestRemembering: whatever changes between packets, the programs do with each what
// they would do if they looked everything up.
func TestRemembering(t *testing.T) {
	netnstest.NeedRoot(t)
	var links []uint32
	for i := range 2 {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprint("near", i)}, PeerName: fmt.Sprint("far", i)}
		must(t, netlink.LinkAdd(v))
		t.Cleanup(func() { must(t, netlink.LinkDel(v)) })
		links = append(links, uint32(v.Index))
	}
	w := newTwins(t)
	var seen kinds
	rapid.Check(t, func(r *rapid.T) {
		w.clear(r)
		w.play(r, links, &seen)
	})
	t.Logf("remembered %+v", seen)
	if min(seen.vxlan, seen.plain, seen.local, seen.got, seen.native) == 0 {
		t.Errorf("remembered %+v: what is 0 was not tested", seen)
	}
}

// play changes tables and sends packets.
func (w *twins) play(r *rapid.T, links []uint32, seen *kinds) {
	macs := []vxlan.MAC{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}, {2, 0, 0, 0, 0, 3}, {2, 0, 0, 0, 1, 1}}
	ips := [][4]byte{{10, 0, 0, 1}, {10, 0, 0, 2}, {10, 0, 0, 3}, {10, 0, 0, 4}}
	vteps := [][4]byte{{192, 0, 2, 1}, {192, 0, 2, 2}}
	// begin: two tasks are here and two there, of which the last gets packets as they are.
	begin := func() {
		for i, l := range links {
			put(r, w, overlayMapPorts, w.ports, l, portValue{VNI: 1, UDP: be(testPort), MAC: macs[i], Tunnel: links[0], VTEP: mapped4(vteps[0])})
			put(r, w, overlayMapMacs, w.macs, macKey{VNI: 1, MAC: macs[i]}, destValue{Kind: destTask, MTU: 1450, IfIndex: l, UDP: be(testPort), VTEP: mapped4(vteps[0])})
			put(r, w, overlayMapNatives, w.natives, mapped4(ips[i]), nativeValue{VNI: 1, IfIndex: l, MAC: macs[i]})
			d := destValue{Kind: destDirect, MTU: 1450, IfIndex: 1, UDP: be(testPort), VTEP: mapped4(vteps[1]), NHFamily: unix.AF_INET, Flags: uint16(i) * (wayNative | wayOnLink)}
			copy(d.NextHop[:], vteps[1][:])
			put(r, w, overlayMapMacs, w.macs, macKey{VNI: 1, MAC: macs[2+i]}, d)
		}
		for i := range ips {
			put(r, w, overlayMapEps, w.eps, epKey{VNI: 1, Addr: mapped4(ips[i])}, epValue{MAC: macs[i]})
		}
	}
	begin()
	vni := func() uint32 { return rapid.SampledFrom([]uint32{1, 1, 1, 2}).Draw(r, "vni") }
	mac := func() vxlan.MAC { return rapid.SampledFrom(macs).Draw(r, "mac") }
	ip := func() [4]byte { return rapid.SampledFrom(ips).Draw(r, "ip") }
	vtep := func() [4]byte { return rapid.SampledFrom(vteps).Draw(r, "vtep") }
	link := func() uint32 { return rapid.SampledFrom(links).Draw(r, "link") }
	isThere := func() bool { return rapid.IntRange(0, 4).Draw(r, "there") > 0 }
	// inner is a packet from one end to the other one, mostly: what fits nothing is dull.
	inner := func(from, to int) []byte {
		pick := func(at int) int {
			if isThere() {
				return at + rapid.IntRange(0, 1).Draw(r, "which")
			}
			return rapid.IntRange(0, 3).Draw(r, "any")
		}
		a, b := pick(from), pick(to)
		f := ipv4Frame(macs[a], macs[b], rapid.SampledFrom([]int{60, 60, 60, 1500}).Draw(r, "size"))
		if !isThere() {
			a, b = pick(from), pick(to)
		}
		copy(f[26:], ips[a][:])
		copy(f[30:], ips[b][:])
		f[15] = rapid.SampledFrom([]byte{0, 0, 1, 3}).Draw(r, "tos")
		f[23] = rapid.SampledFrom([]byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP, 253}).Draw(r, "protocol")
		if rapid.IntRange(0, 4).Draw(r, "IPv6") == 0 {
			f[12], f[13], f[14] = 0x86, 0xdd, 0x60
			f[20] = rapid.SampledFrom([]byte{unix.IPPROTO_UDP, unix.IPPROTO_ICMPV6}).Draw(r, "next header")
		}
		return f
	}
	const here, there = 0, 2
	out := func(*rapid.T) {
		at, f := link(), inner(here, rapid.SampledFrom([]int{here, there, there}).Draw(r, "to"))
		if p, ok := w.ports[at]; ok && isThere() {
			copy(f[6:], p.MAC[:])
		}
		w.same(r, overlayProgFromTask, at, f)
		w.same(r, overlayProgForward, at, f)
		w.same(r, overlayProgFromTask, at, f)
	}
	in := func(*rapid.T) {
		f := inner(there, here)
		src, dst := vteps[1], vteps[0]
		if !isThere() {
			src, dst = vtep(), vtep()
		}
		p := make([]byte, 50, 50+len(f))
		outer := ipv4Frame(vxlan.MAC{}, vxlan.MAC{}, 20)
		copy(p, outer)
		p[15] = rapid.SampledFrom([]byte{0, 2, 3}).Draw(r, "outer tos")
		binary.BigEndian.PutUint16(p[16:], uint16(36+len(f)))
		copy(p[26:], src[:])
		copy(p[30:], dst[:])
		binary.BigEndian.PutUint16(p[36:], rapid.SampledFrom([]uint16{testPort, testPort, 5}).Draw(r, "outer port"))
		p[42] = 8
		binary.BigEndian.PutUint32(p[46:], vni()<<8)
		copy(p[:12], make([]byte, 12)) // addressed to the loopback, where a test run begins
		packet := append(p, f...)
		w.same(r, overlayProgFromUnderlay, 0, packet)
		w.same(r, overlayProgFromNative, 0, packet)
	}
	asItIs := func(*rapid.T) {
		f := inner(there, here)
		copy(f[:12], make([]byte, 12))
		w.same(r, overlayProgFromNative, 0, f)
		w.same(r, overlayProgFromNative, 0, f)
	}
	r.Repeat(map[string]func(*rapid.T){
		"port": func(*rapid.T) {
			v := portValue{}
			if isThere() {
				v = portValue{VNI: vni(), UDP: be(testPort), MAC: mac(), Tunnel: links[0], VTEP: mapped4(vtep())}
			}
			put(r, w, overlayMapPorts, w.ports, link(), v)
		},
		"mac": func(*rapid.T) {
			v := destValue{}
			if isThere() {
				v = destValue{Kind: rapid.SampledFrom([]kind{destTask, destTask, destDirect, destDirect, destDirect, destTunnel, destVIP, destLeg, destSealedTask}).Draw(r, "kind"),
					MTU: rapid.SampledFrom([]uint16{1450, 1400}).Draw(r, "MTU"), IfIndex: link(), UDP: be(testPort), VTEP: mapped4(vtep()), NHFamily: unix.AF_INET}
				if v.Kind == destDirect {
					v.Flags = rapid.SampledFrom([]uint16{0, wayOnLink, wayNative, wayNative | wayOnLink}).Draw(r, "flags")
					copy(v.NextHop[:], v.VTEP[12:])
				}
			}
			put(r, w, overlayMapMacs, w.macs, macKey{VNI: vni(), MAC: mac()}, v)
		},
		"address": func(*rapid.T) {
			v := epValue{}
			if isThere() {
				v.MAC = mac()
			}
			put(r, w, overlayMapEps, w.eps, epKey{VNI: vni(), Addr: mapped4(ip())}, v)
		},
		"native": func(*rapid.T) {
			v := nativeValue{}
			if isThere() {
				v = nativeValue{VNI: vni(), IfIndex: link(), MAC: mac()}
			}
			put(r, w, overlayMapNatives, w.natives, mapped4(ip()), v)
		},
		"out":         out,
		"in":          in,
		"in as it is": asItIs,
	})
	// Of tables that have changed at random few packets are sent on as they are.
	if rapid.Bool().Draw(r, "as in the beginning") {
		begin()
	}
	for range 5 {
		out(r)
		in(r)
		asItIs(r)
	}
	w.remembered(r, seen)
}

// TestEpochs: no entry changes while an epoch lasts, every pass ends with a new
// one, also one that breaks off, and packets go by what was changed. Without an
// epoch, as after a kill between two entries, they go, too.
func TestEpochs(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	h, far := m.hosts[0], m.hosts[1]
	e := h.engine()
	epoch := func() (n uint64) {
		t.Helper()
		must(t, h.pinnedMap(overlayMapEpoch).Lookup(uint32(0), &n))
		return n
	}
	crosses := func() error { return overTCP(m.ports[h][0], m.ports[far][0]) }
	n := m.want[h].Networks[testVNI]
	a := netip.MustParseAddr("10.100.0.222")
	more := n
	more.Peers = append(append([]vxlan.Peer(nil), n.Peers...), vxlan.Peer{Addr: a, MAC: weft.EndpointMAC("far", a), VTEP: far.vtep()})
	narrow := n
	narrow.MTU -= 8
	must(t, crosses())
	last := epoch()
	for _, c := range []struct {
		name  string
		want  vxlan.Network
		quick bool
		fail  error
	}{
		{"a peer, without a pass over everything", more, true, nil},
		{"nothing", more, false, nil},
		{"another MTU, broken off", narrow, false, unix.EIO},
		{"another MTU", narrow, false, nil},
		{"as it was", n, false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, asked := e.last.at, 0
			if !c.quick {
				e.cfg.fail = func(vxlan.Op) error {
					if asked++; epoch() != 0 {
						t.Error("an epoch lasts while entries change")
					}
					return c.fail
				}
				defer func() { e.cfg.fail = nil }()
			}
			if err := h.apply(state(c.want)); (err != nil) != (c.fail != nil) {
				t.Fatal(err)
			}
			if quick := e.last.at.Equal(before); quick != c.quick {
				t.Errorf("without a whole pass: %v, want %v", quick, c.quick)
			}
			if c.fail != nil && asked == 0 {
				t.Error("nothing was to be changed")
			}
			if now := epoch(); now <= last {
				t.Errorf("epoch %d after %d", now, last)
			} else {
				last = now
			}
			must(t, crosses())
		})
	}
	must(t, endEpoch(h.pinnedMap(overlayMapEpoch)))
	must(t, crosses())
	h.restart(h.way)
	must(t, h.apply(state(n)))
	if now := epoch(); now <= last {
		t.Errorf("epoch %d after %d and a new daemon", now, last)
	}
	must(t, crosses())
	// What was remembered leads nowhere any more.
	before := h.drops()["unknown destination"]
	gone := n.Peers[0]
	n.Peers = nil
	must(t, h.apply(state(n)))
	me := m.ports[h][0]
	rawSend(t, me.NetNS, me.IfName, ipv4Frame(vxlan.MACOf(me.MAC), vxlan.MACOf(gone.MAC), 60))
	if !eventually(func() bool { return h.drops()["unknown destination"] > before }) {
		t.Error("a packet to a peer that is gone was not dropped")
	}
}
