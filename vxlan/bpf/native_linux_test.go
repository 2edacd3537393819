package bpf

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/native"
	"github.com/weftnet/weft/vxlan/netns"
)

// natives has every host of a mesh whose engine can send without encapsulation,
// as if all ways were proven, but to the hosts of the bridge engine.
func (m mesh) natives(t testing.TB) {
	t.Helper()
	for _, h := range m.hosts {
		if h.bridge {
			continue
		}
		n := m.want[h].Networks[testVNI]
		n.Native = true
		n.Peers = append([]vxlan.Peer(nil), n.Peers...)
		for i, p := range n.Peers {
			for _, other := range m.hosts {
				n.Peers[i].Native = n.Peers[i].Native || other.vtep() == p.VTEP && !other.bridge
			}
		}
		m.want[h] = state(n)
		must(t, h.apply(m.want[h]))
	}
}

// TestNativePacketsCross: every pair, both protocols, bulk and fragments, without
// a single packet of VXLAN where both ends and the family can, and by VXLAN alone
// where not.
func TestNativePacketsCross(t *testing.T) {
	for _, c := range []struct {
		name          string
		plan          plan
		v6            bool
		native, vxlan bool
	}{
		{"ipv4 in ipv4", plan{hosts: 2}, false, true, false},
		{"ipv6 in ipv4", plan{hosts: 2}, true, false, true},
		{"ipv4 in ipv6", plan{hosts: 2, under6: true}, false, true, false},
		{"ipv6 in ipv6", plan{hosts: 2, under6: true}, true, true, false},
		{"jumbo", plan{hosts: 2, mtu: 9000}, false, true, false},
		{"with the bridge engine", plan{hosts: 2, bridges: []int{2}}, false, false, true},
		{"two and the bridge engine", plan{hosts: 3, bridges: []int{3}}, false, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMesh(t, c.plan, c.v6)
			m.natives(t)
			w := tap(t, m.hosts[0])
			for _, h := range m.hosts {
				expectEqual(t, h, m.want[h])
			}
			t.Run("tcp", func(t *testing.T) { m.all(t, overTCP) })
			t.Run("udp", func(t *testing.T) { m.all(t, overUDP) })
			if n, v := w.at(wireNative), w.at(wireVXLAN); n > 0 != c.native || v > 0 != c.vxlan {
				t.Errorf("host 1 has sent %d packets as they are and %d in VXLAN", n, v)
			}
			for _, h := range m.hosts {
				if h.bridge {
					continue
				}
				for reason, n := range h.drops() {
					// Who has no checked way is told so by UDP's fragments at most.
					if n > 0 && strings.HasPrefix(reason, "received") {
						t.Errorf("host %d: %s: %d", h.i, reason, n)
					}
				}
			}
		})
	}
}

// TestOnlyOwnAddressesGoNatively: what has another address than its port's, or
// another than the task's whose hardware address it has, goes by VXLAN, as does
// what looks like a probe.
func TestOnlyOwnAddressesGoNatively(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	m.natives(t)
	h, other := m.hosts[0], m.hosts[1]
	from, to := m.ports[h][0], m.ports[other][0]
	vip := to
	vip.Addr = netip.MustParsePrefix("10.100.0.200/24")
	answer := from
	answer.Addr = vip.Addr
	probe := udpFrame(from, to, 9, "x", 100)
	probe[23] = protoProbe
	w := tap(t, h)
	for _, c := range []struct {
		name   string
		frame  []byte
		native bool
	}{
		{"own", udpFrame(from, to, 9, "x", 100), true},
		{"to a service", udpFrame(from, vip, 9, "x", 100), false},
		{"from a service", udpFrame(answer, to, 9, "x", 100), false},
		{"to the neighbour's address", udpFrame(from, vxlan.Port{Addr: m.ports[other][1].Addr, MAC: to.MAC}, 9, "x", 100), false},
		{"of the probes' protocol", probe, false},
	} {
		w.reset()
		rawSend(t, from.NetNS, "eth0", c.frame)
		if !eventually(func() bool { return w.at(wireNative)+w.at(wireVXLAN) > 0 }) {
			t.Errorf("%s: nothing was sent: %v", c.name, h.drops())
		}
		if got := w.at(wireNative) > 0; got != c.native {
			t.Errorf("%s: without encapsulation: %t", c.name, got)
		}
	}
}

// TestNativeStrangersAreNotHeard: on the way in the source must be a task of the
// same network on another node. Whoever is not one is dropped and counted.
func TestNativeStrangersAreNotHeard(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	m.natives(t)
	h, other := m.hosts[0], m.hosts[1]
	to, member := m.ports[h][0], m.ports[other][0]
	// A second network on both hosts, native too.
	foreign := map[*testHost][]vxlan.Port{}
	id := weft.NewID()
	for _, x := range m.hosts {
		p := x.task(5, false)
		p.Addr = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, 1, byte(x.i)}), 24)
		p.MAC = weft.EndpointMAC(p.Task, p.Addr.Addr())
		foreign[x] = []vxlan.Port{p}
	}
	for _, x := range m.hosts {
		n := network(x, id, 1450, foreign)
		n.VNI, n.Native, n.Peers[0].Native = testVNI+1, true, true
		n.Subnets = []netip.Prefix{netip.MustParsePrefix("10.100.1.0/24")}
		want := state(m.want[x].Networks[testVNI], n)
		must(t, x.apply(want))
		expectEqual(t, x, want)
	}
	var s net.PacketConn
	must(t, netns.Do(to.NetNS, func() (err error) { s, err = net.ListenPacket("udp4", to.Addr.Addr().String()+":7003"); return err }))
	defer s.Close()
	unknown := member
	unknown.Addr = netip.MustParsePrefix("10.100.0.77/24")
	local := m.ports[h][1]
	for _, c := range []struct {
		name string
		from vxlan.Port
		good bool
	}{
		{"nobody's address", unknown, false},
		{"a task of another network", foreign[other][0], false},
		{"a task of the receiving node", local, false},
		{"the host", vxlan.Port{Addr: netip.PrefixFrom(other.vtep(), 24), MAC: member.MAC}, false},
		{"a member", member, true},
	} {
		before := h.drops()["received from unknown"]
		sendNative(t, other, h, udpFrame(c.from, to, 7003, c.name, 100))
		if c.good {
			s.SetReadDeadline(time.Now().Add(limit))
			buf := make([]byte, 200)
			n, _, err := s.ReadFrom(buf)
			if err != nil || !strings.HasPrefix(string(buf[:n]), c.name) {
				t.Errorf("heard %q, %v; %v", buf[:n], err, h.drops())
			}
			continue
		}
		if !eventually(func() bool { return h.drops()["received from unknown"] > before }) {
			t.Errorf("%s is not counted: %v", c.name, h.drops())
		}
	}
}

// sendNative puts a frame on the segment as it is, but between the hosts.
func sendNative(t *testing.T, from, to *testHost, frame []byte) {
	t.Helper()
	for i, h := range []*testHost{to, from} {
		must(t, h.inHost("under0", func(l netlink.Link) error { copy(frame[6*i:], l.Attrs().HardwareAddr); return nil }))
	}
	rawSend(t, from.path, "under0", frame)
}

// TestNativeIsRefusedWhereNotWanted: a network that is not native takes nothing,
// and answers no probe.
func TestNativeIsRefusedWhereNotWanted(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	m.natives(t)
	h, other := m.hosts[0], m.hosts[1]
	from, to := m.ports[other][0], m.ports[h][0]
	way := m.way(other, h)
	if !other.asks(t, way) {
		t.Fatalf("a probe has no echo: %v, %v", h.drops(), other.drops())
	}
	n := m.want[h].Networks[testVNI]
	n.Native = false
	n.Peers = append([]vxlan.Peer(nil), n.Peers...)
	for i := range n.Peers {
		n.Peers[i].Native = false
	}
	must(t, h.apply(state(n)))
	expectEqual(t, h, state(n))
	if other.asks(t, way) {
		t.Error("a probe has an echo of a network that is not native")
	}
	if m := h.pinnedMap("natives"); count(t, m.Iterate().Next) != 0 {
		t.Error("addresses are left in the map")
	}
	// By VXLAN both go on, once the other node has noticed, too.
	m.hosts[1].forgetNatives(t, m)
	must(t, overTCP(from, to))
}

// forgetNatives sends everything by VXLAN, and still takes the other.
func (h *testHost) forgetNatives(t *testing.T, m mesh) {
	t.Helper()
	n := m.want[h].Networks[testVNI]
	n.Peers = append([]vxlan.Peer(nil), n.Peers...)
	for i := range n.Peers {
		n.Peers[i].Native = false
	}
	must(t, h.apply(state(n)))
	expectEqual(t, h, state(n))
}

func count(t *testing.T, next func(key, value any) bool) (n int) {
	t.Helper()
	var k addr16
	var v nativeValue
	for next(&k, &v) {
		n++
	}
	return n
}

// way is a probe between the first tasks of two hosts.
func (m mesh) way(from, to *testHost) vxlan.NativeProbe {
	return vxlan.NativeProbe{
		NativeWay: vxlan.NativeWay{VNI: testVNI, VTEP: to.vtep()},
		From:      m.ports[from][0].Addr.Addr(), To: m.ports[to][0].Addr.Addr(), ID: 4711,
	}
}

// asks sends a probe from a host and reports whether its echo comes.
func (h *testHost) asks(t *testing.T, p vxlan.NativeProbe) bool {
	t.Helper()
	got := false
	must(t, h.ns.Do(func() error {
		s, err := h.engine().OpenSegment()
		if err != nil {
			return err
		}
		defer s.Close()
		// The hardware address of the peer is asked for by whatever speaks to it.
		c, err := net.Dial("udp", netip.AddrPortFrom(p.VTEP, 9).String())
		if err != nil {
			return err
		}
		defer c.Close()
		c.Write([]byte("x"))
		for deadline := time.Now().Add(300 * time.Millisecond); !got && time.Now().Before(deadline); {
			p.ID++
			if err := s.Ask([]vxlan.NativeProbe{p})[p.NativeWay]; err != nil && !errors.Is(err, weft.ErrUnavailable) {
				return err
			}
			for again := time.Now().Add(50 * time.Millisecond); !got && time.Now().Before(again); {
				if got, err = s.Echoed(p); err != nil {
					return err
				}
			}
		}
		again, err := s.Echoed(p)
		if again {
			return errors.New("the same echo is reported twice")
		}
		return err
	}))
	return got
}

// TestProbesProve: a probe comes back of each family that packets can have,
// through the programs alone, and not where the segment filters, the peer has
// no program, or does not know the asker's task.
func TestProbesProve(t *testing.T) {
	for _, c := range []struct {
		name   string
		plan   plan
		v6     bool
		spoil  func(t *testing.T, m mesh, p *vxlan.NativeProbe)
		proven bool
	}{
		{"ipv4", plan{hosts: 2}, false, nil, true},
		{"ipv4 over ipv6", plan{hosts: 2, under6: true}, false, nil, true},
		{"ipv6", plan{hosts: 2, under6: true}, true, nil, true},
		{"ipv6 over ipv4", plan{hosts: 2}, true, nil, false},
		{"filter there", plan{hosts: 2}, false, func(t *testing.T, m mesh, _ *vxlan.NativeProbe) { tap(t, m.hosts[0]).filter(true) }, false},
		{"filter back", plan{hosts: 2}, false, func(t *testing.T, m mesh, _ *vxlan.NativeProbe) { tap(t, m.hosts[1]).filter(true) }, false},
		{"filter, ipv6", plan{hosts: 2, under6: true}, true, func(t *testing.T, m mesh, _ *vxlan.NativeProbe) { tap(t, m.hosts[1]).filter(true) }, false},
		{"bridge engine", plan{hosts: 2, bridges: []int{2}}, false, nil, false},
		{"unknown source", plan{hosts: 2}, false, func(_ *testing.T, _ mesh, p *vxlan.NativeProbe) { p.From = netip.MustParseAddr("10.100.0.77") }, false},
		{"unknown destination", plan{hosts: 2}, false, func(_ *testing.T, _ mesh, p *vxlan.NativeProbe) { p.To = netip.MustParseAddr("10.100.0.78") }, false},
		{"another network", plan{hosts: 2}, false, func(_ *testing.T, _ mesh, p *vxlan.NativeProbe) { p.VNI++ }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMesh(t, c.plan, c.v6)
			m.natives(t)
			p := m.way(m.hosts[0], m.hosts[1])
			if c.spoil != nil {
				c.spoil(t, m, &p)
			}
			if got := m.hosts[0].asks(t, p); got != c.proven {
				t.Errorf("proven: %t; %v", got, m.hosts[0].drops())
			}
		})
	}
}

// TestForgedEchoProvesNothing: an echo of another id is none.
func TestForgedEchoProvesNothing(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	m.natives(t)
	h, other := m.hosts[0], m.hosts[1]
	p := m.way(h, other)
	back := p
	back.From, back.To, back.ID = p.To, p.From, p.ID+1
	ip := marshalProbe(back)
	ip[24] = 2 // an echo
	frame := append(make([]byte, 14), ip...)
	binary.BigEndian.PutUint16(frame[12:], 0x0800)
	sendNative(t, other, h, frame)
	must(t, h.ns.Do(func() error {
		s, err := h.engine().OpenSegment()
		if err != nil {
			return err
		}
		defer s.Close()
		echoes := h.pinnedMap("echoes")
		key := echoKey{VNI: testVNI, Family: 2, VTEP: addrOf(other.vtep())}
		var id uint64
		if !eventually(func() bool { return echoes.Lookup(key, &id) == nil }) {
			return fmt.Errorf("the echo was not noted: %v", h.drops())
		}
		if ok, err := s.Echoed(p); ok || err != nil {
			return fmt.Errorf("believed: %t, %v", ok, err)
		}
		if echoes.Lookup(key, &id) == nil {
			return errors.New("a false echo stays")
		}
		return nil
	}))
}

// TestNativeRepair: what is damaged of a native network is seen and put right.
func TestNativeRepair(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	m.natives(t)
	h, other := m.hosts[0], m.hosts[1]
	n := m.want[h].Networks[testVNI]
	port, peer := m.ports[h][0], n.Peers[0]
	key := addrOf(port.Addr.Addr())
	var own nativeValue
	must(t, h.pinnedMap("natives").Lookup(key, &own))
	peerKey := macKey{VNI: testVNI, MAC: vxlan.MACOf(peer.MAC)}
	flags := func(f uint16) func() error {
		return func() error {
			var d destValue
			if err := h.pinnedMap("macs").Lookup(peerKey, &d); err != nil {
				return err
			}
			if d.Flags != wayNative|wayOnLink {
				return fmt.Errorf("the entry of a native peer has flags %d", d.Flags)
			}
			d.Flags = f
			return h.pinnedMap("macs").Put(peerKey, d)
		}
	}
	for _, c := range []struct {
		name  string
		spoil func() error
	}{
		{"address gone", func() error { return h.pinnedMap("natives").Delete(key) }},
		{"address of another", func() error {
			return h.pinnedMap("natives").Put(key, nativeValue{VNI: testVNI + 7, IfIndex: own.IfIndex, MAC: own.MAC})
		}},
		{"stray address", func() error { return h.pinnedMap("natives").Put(addrOf(netip.MustParseAddr("10.100.0.99")), own) }},
		{"peer not native", flags(wayOnLink)},
		{"peer by a router", flags(wayNative)},
		{"map unpinned", func() error { return os.Remove(h.engine().path("natives")) }},
		{"program unpinned", func() error {
			found, err := filepath.Glob(h.engine().path("progs", "from_native-*"))
			if err != nil || len(found) != 1 {
				return errors.Join(err, errors.New("no such pin"))
			}
			return os.Remove(found[0])
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			must(t, c.spoil())
			if ops := vxlan.Diff(h.read(), m.want[h]); len(ops) == 0 {
				t.Fatal("the damage is not seen")
			}
			must(t, h.apply(m.want[h]))
			expectEqual(t, h, m.want[h])
			w := tap(t, h)
			must(t, overTCP(port, m.ports[other][0]))
			if w.at(wireNative) == 0 || w.at(wireVXLAN) != 0 {
				t.Errorf("%d packets as they are, %d in VXLAN", w.at(wireNative), w.at(wireVXLAN))
			}
		})
	}
}

// TestNativeFollowsProofs: the prober and the engine together: a way is used once
// proven, and left when the segment begins to filter.
func TestNativeFollowsProofs(t *testing.T) {
	m := newMesh(t, plan{hosts: 2}, false)
	for _, h := range m.hosts {
		n := m.want[h].Networks[testVNI]
		n.Native = true
		m.want[h] = state(n)
		must(t, h.apply(m.want[h]))
	}
	h, other := m.hosts[0], m.hosts[1]
	w := tap(t, h)
	p, err := native.New(native.Config{
		Open: func() (l native.Link, err error) {
			err = h.ns.Do(func() error { l, err = h.engine().OpenSegment(); return err })
			return inSegment{h, l}, err
		},
		Log: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	way := m.way(h, other)
	p.Watch(map[vxlan.NativeWay]vxlan.NativeEnds{way.NativeWay: {From: []netip.Addr{way.From}, To: []netip.Addr{way.To}}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	defer func() { cancel(); must(t, <-done) }()

	from, to := m.ports[h][0], m.ports[other][0]
	follow := func(want bool) {
		t.Helper()
		for deadline := time.After(20 * time.Second); ; {
			proven, changed := p.Proven()
			if proven[way.NativeWay] == want {
				break
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("proven is not %t: %v", want, h.drops())
			}
		}
		n := m.want[h].Networks[testVNI]
		n.Peers = append([]vxlan.Peer(nil), n.Peers...)
		for i := range n.Peers {
			n.Peers[i].Native = want
		}
		must(t, h.apply(state(n)))
		expectEqual(t, h, state(n))
		w.reset()
		must(t, overTCP(from, to))
		if got := w.at(wireVXLAN) == 0; got != want {
			t.Errorf("without VXLAN: %t, want %t", got, want)
		}
	}
	must(t, h.ns.Do(func() error { // so that the kernel has the peer's hardware address
		c, err := net.Dial("udp", netip.AddrPortFrom(other.vtep(), 9).String())
		if err != nil {
			return err
		}
		_, err = c.Write([]byte("x"))
		return errors.Join(err, c.Close())
	}))
	follow(true)
	w.filter(true)
	follow(false)
}

// inSegment is a link of a host for a goroutine elsewhere.
type inSegment struct {
	h *testHost
	native.Link
}

func (s inSegment) Ask(probes []vxlan.NativeProbe) (failed map[vxlan.NativeWay]error) {
	must(s.h.t, s.h.ns.Do(func() error { failed = s.Link.Ask(probes); return nil }))
	return failed
}
