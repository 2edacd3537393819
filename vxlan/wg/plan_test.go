package wg

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

func addr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}) }

// key is a private key for tests, of which the public half is another.
func key(i int) (k privateKey) {
	k[0], k[31] = byte(i)<<3, 64
	return k
}

// drawDevice makes a device from a small world; every address is behind at most
// one peer, as in a kernel.
func drawDevice(t *rapid.T, label string) device {
	d := device{private: key(rapid.IntRange(1, 2).Draw(t, label+" key")), port: 51820, peers: map[weft.PublicKey]peer{}}
	for i := range 3 {
		if rapid.Bool().Draw(t, label+" has peer") {
			d.peers[weft.PublicKey{byte(i + 1)}] = peer{endpoint: netip.AddrPortFrom(addr(100+i), 51820), allowed: map[netip.Addr]bool{}}
		}
	}
	for i := range 6 {
		if p, ok := d.peers[weft.PublicKey{byte(rapid.IntRange(0, 3).Draw(t, label+" owner"))}]; ok {
			p.allowed[addr(i)] = true
		}
	}
	return d
}

// model does to a device what WireGuard does, one line of a change at a time,
// and calls look after each.
func model(d device, c change, look func(device)) device {
	if c.private != nil {
		d.private = *c.private
	}
	if c.port != nil {
		d.port = *c.port
	}
	d.peers = maps.Clone(d.peers)
	if c.isFresh {
		clear(d.peers)
	}
	for _, pc := range c.peers {
		if pc.remove {
			delete(d.peers, pc.public)
			look(d)
			continue
		}
		p, ok := d.peers[pc.public]
		if !ok {
			p = peer{allowed: map[netip.Addr]bool{}}
		}
		if pc.endpoint.IsValid() {
			p.endpoint = pc.endpoint
		}
		for _, a := range pc.allow {
			for k, o := range d.peers {
				if o.allowed[a] {
					o.allowed = maps.Clone(o.allowed)
					delete(o.allowed, a)
					d.peers[k] = o
				}
			}
			if q, ok := d.peers[pc.public]; ok {
				p.allowed = q.allowed
			}
			p.allowed = maps.Clone(p.allowed)
			p.allowed[a] = true
			d.peers[pc.public] = p
			look(d)
		}
		d.peers[pc.public] = p
	}
	return d
}

// show is a device in one order, for comparison.
func show(d device) string {
	out := fmt.Sprintf("%x %d", d.private, d.port)
	for _, k := range sortedKeys(d.peers) {
		p := d.peers[k]
		out += fmt.Sprintf("\n%x %s %v", k[0], p.endpoint, slices.SortedFunc(maps.Keys(p.allowed), netip.Addr.Compare))
	}
	return out
}

// TestDiffReachesWanted: the change makes one device into the other, and what
// both have behind the same peer is there at every moment between, unless the
// key changes.
func TestDiffReachesWanted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		have, want := drawDevice(t, "have"), drawDevice(t, "want")
		c := diff(have, want, time.Now())
		got := model(have, c, func(d device) {
			if c.private != nil {
				return
			}
			for k, w := range want.peers {
				for a := range w.allowed {
					if have.peers[k].allowed[a] && !d.peers[k].allowed[a] {
						t.Fatalf("%s is not behind peer %x for a moment of %+v", a, k[0], c)
					}
				}
			}
		})
		if show(got) != show(want) {
			t.Fatalf("got\n%s\nwant\n%s\nby %+v", show(got), show(want), c)
		}
		if again := diff(got, want, time.Now()); !again.empty() {
			t.Fatalf("still to do: %+v", again)
		}
	})
}

// TestRoaming: a peer that speaks from elsewhere is left there until it is silent.
func TestRoaming(t *testing.T) {
	k, now := weft.PublicKey{1}, time.Unix(1e9, 0)
	want := device{peers: map[weft.PublicKey]peer{k: {endpoint: netip.AddrPortFrom(addr(1), 51820)}}}
	for age, writes := range map[time.Duration]bool{time.Minute: false, time.Hour: true} {
		have := device{peers: map[weft.PublicKey]peer{k: {endpoint: netip.AddrPortFrom(addr(9), 1024), handshake: now.Add(-age)}}}
		if c := diff(have, want, now); !c.empty() != writes {
			t.Errorf("last heard %s ago: %+v, want a change: %v", age, c, writes)
		}
	}
}

func TestUAPI(t *testing.T) {
	private, port := key(3), uint16(51821)
	c := change{isFresh: true, private: &private, port: &port, peers: []peerChange{
		{public: weft.PublicKey{1}, endpoint: netip.MustParseAddrPort("[fd00::1]:51820"), allow: []netip.Addr{addr(1), netip.MustParseAddr("fd77::1")}, keepalive: true},
		{public: sink, remove: true},
	}}
	want := "set=1\nreplace_peers=true\nprivate_key=18" + strings.Repeat("00", 30) + "40\nlisten_port=51821\n" +
		"public_key=01" + strings.Repeat("00", 31) + "\nendpoint=[fd00::1]:51820\nallowed_ip=10.0.0.1/32\nallowed_ip=fd77::1/128\npersistent_keepalive_interval=25\n" +
		"public_key=" + strings.Repeat("a5", 32) + "\nremove=true\n\n"
	if got := c.encode(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	d, err := decode(strings.NewReader("private_key=18" + strings.Repeat("00", 30) + "40\nlisten_port=51821\nfwmark=0\n" +
		"public_key=01" + strings.Repeat("00", 31) + "\nendpoint=[::ffff:10.0.0.9]:51820\nlast_handshake_time_sec=5\nlast_handshake_time_nsec=0\nallowed_ip=10.0.0.1/32\nprotocol_version=1\nerrno=0\n\n"))
	if err != nil {
		t.Fatal(err)
	}
	expect := device{private: private, port: port, peers: map[weft.PublicKey]peer{{1}: {
		endpoint: netip.MustParseAddrPort("10.0.0.9:51820"), allowed: map[netip.Addr]bool{addr(1): true}, handshake: time.Unix(5, 0)}}}
	if !reflect.DeepEqual(d, expect) {
		t.Errorf("got %+v", d)
	}
	for _, bad := range []string{"errno=98\n\n", "nonsense\n", "private_key=00\n", "listen_port=x\n", "public_key=zz\n", "public_key=01" + strings.Repeat("00", 31) + "\nallowed_ip=x\n"} {
		if _, err := decode(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("private_key=18\nlisten_port=1\npublic_key=01\nallowed_ip=10.0.0.1/32\nerrno=0\n\n")
	f.Fuzz(func(t *testing.T, s string) { decode(strings.NewReader(s)) })
}

// TestChoose tells the story of one rotation, seen from one node.
func TestChoose(t *testing.T) {
	other := netip.MustParseAddr("10.99.0.2")
	k := func(epoch uint64) weft.NodeKey {
		return weft.NodeKey{Epoch: epoch, Public: weft.PublicKey{byte(epoch + 1)}}
	}
	ring := func(a, b uint64) (r keyring) {
		for _, e := range []uint64{a, b} {
			r[e%weft.KeySlots] = &slotKey{Epoch: e, Private: key(int(e + 1))}
		}
		return r
	}
	shook := func(keys ...weft.NodeKey) (d [weft.KeySlots]device) {
		for _, n := range keys {
			d[n.Slot()] = device{peers: map[weft.PublicKey]peer{n.Public: {handshake: time.Unix(1, 0)}}}
		}
		return d
	}
	for _, c := range []struct {
		name string
		own  keyring
		peer []weft.NodeKey
		have [weft.KeySlots]device
		want int
	}{
		{"settled", ring(4, 5), []weft.NodeKey{k(4), k(5)}, shook(k(4), k(5)), 1},
		{"own key is new, the other's is not", ring(6, 5), []weft.NodeKey{k(4), k(5)}, shook(k(4), k(5)), 1},
		{"the other's is new, own is not", ring(4, 5), []weft.NodeKey{k(5), k(6)}, shook(k(5), k(6)), 1},
		{"both, nothing proven", ring(6, 5), []weft.NodeKey{k(5), k(6)}, shook(k(5)), 1},
		{"both and proven", ring(6, 5), []weft.NodeKey{k(6), k(5)}, shook(k(5), k(6)), 0},
		{"first contact", ring(5, 5), []weft.NodeKey{k(5)}, shook(), 1},
		{"first contact, two epochs", ring(6, 5), []weft.NodeKey{k(5), k(6)}, shook(), 1},
		{"older key is said again", ring(6, 5), []weft.NodeKey{k(4), k(6), k(5)}, shook(k(6)), 0},
		{"no epoch in common", ring(6, 5), []weft.NodeKey{k(3), k(4)}, shook(k(3), k(4)), -1},
		{"it has no key", ring(6, 5), nil, shook(), -1},
	} {
		st := vxlan.State{Encryption: vxlan.Encryption{Epoch: 6, Peers: []vxlan.EncryptionPeer{{Node: "b", VTEP: other, Keys: c.peer}}}}
		got, ok := choose(st, c.own, c.have)[other]
		if !ok {
			got = -1
		}
		if got != c.want {
			t.Errorf("%s: slot %d, want %d", c.name, got, c.want)
		}
	}
}

// TestPaths: what a network's router may reach is that network's, and what a
// node may send into a network is from that network.
func TestPaths(t *testing.T) {
	st := vxlan.State{Networks: map[uint32]vxlan.Network{}}
	vteps := []netip.Addr{netip.MustParseAddr("10.99.0.2"), netip.MustParseAddr("10.99.0.3")}
	for i, vni := range []uint32{5001, 5002, 5003} {
		n := vxlan.Network{VNI: vni, Encrypted: vni != 5003, MTU: 1400 + i, Subnets: []netip.Prefix{netip.PrefixFrom(addr(16*i), 28)}}
		n.Ports = []vxlan.Port{{Task: "t", Addr: netip.PrefixFrom(addr(16*i+1), 28), MAC: []byte{2, 0, 0, 0, 0, byte(i)}}}
		n.Peers = []vxlan.Peer{{Addr: addr(16*i + 2), VTEP: vteps[0]}, {Addr: addr(16*i + 3), VTEP: vteps[1]}}
		st.Networks[vni] = n
	}
	p := derivePaths(st, map[netip.Addr]int{vteps[0]: 1}) // the other has no key
	if p.mtu != 1401 || !slices.Equal(p.links, []string{"wr5001", "wr5002"}) || len(p.neighs) != 2 {
		t.Errorf("got %+v", p)
	}
	var got []string
	for _, r := range p.routes {
		if r.dst.Addr().Is4() {
			got = append(got, fmt.Sprintf("%d %s %s", r.table, r.dst, r.link))
		}
	}
	want := []string{
		"5001 0.0.0.0/0 ", "5001 10.0.0.2/32 wg1", "5002 0.0.0.0/0 ", "5002 10.0.0.18/32 wg1",
		"16782217 0.0.0.0/0 ", "16782217 10.0.0.1/32 wr5001", "16782218 0.0.0.0/0 ", "16782218 10.0.0.17/32 wr5002",
		"33554433 0.0.0.0/0 ",
	}
	if !slices.Equal(got, want) {
		t.Errorf("routes\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, r := range p.rules {
		if r.is6 {
			continue
		}
		from := netip.Prefix{}
		if r.priority == prioIn {
			from = st.Networks[r.table-inbound].Subnets[0]
		}
		if r.from != from || r.priority == prioOut && r.link != weft.RouterName(r.table) {
			t.Errorf("rule %+v leads into another network", r)
		}
	}
}

func TestKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "keys.json")
	k := keys{path: path}
	for _, epoch := range []uint64{0, 1, 2, 1} {
		if _, err := k.ensure(epoch); err != nil {
			t.Fatal(err)
		}
	}
	before := k.ring
	again := keys{path: path}
	ring, err := again.ensure(2)
	if err != nil || !reflect.DeepEqual(ring, before) {
		t.Fatalf("read back %v, %v; want %v", ring, err, before)
	}
	pub, err := ring.public(51820)
	if err != nil || len(pub) != 2 || pub[0].Epoch != 1 || pub[1].Epoch != 2 || pub[0].Port != 51821 || pub[1].Port != 51820 || pub[0].Public == pub[1].Public {
		t.Errorf("public halves %v, %v", pub, err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	if s := fmt.Sprint(ring[0].Private); strings.Contains(s, fmt.Sprint(ring[0].Private[0])) && s != "(private key)" {
		t.Errorf("a private key prints as %s", s)
	}
	for text, want := range map[string]error{`{"Version":2}`: weft.ErrUnsupported, `{"Version":1,"Keys":[{"Epoch":1,"Private":"AAAA"}]}`: weft.ErrInvalid} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		bad := keys{path: path}
		if _, err := bad.ensure(1); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", text, err, want)
		}
	}
}

// TestPeerStaysWhileMember: a peer with nothing behind it keeps its session
// until its node leaves the cluster; one that was never met is left alone.
func TestPeerStaysWhileMember(t *testing.T) {
	vtep := netip.MustParseAddr("10.99.0.2")
	k := weft.NodeKey{Public: weft.PublicKey{1}, Port: 51820}
	ring := keyring{{Private: key(1)}}
	st := vxlan.State{Encryption: vxlan.Encryption{Peers: []vxlan.EncryptionPeer{{Node: "b", VTEP: vtep, Keys: []weft.NodeKey{k}}}}}
	met := [weft.KeySlots]device{{private: key(1), port: 51820, peers: map[weft.PublicKey]peer{
		k.Public: {endpoint: netip.AddrPortFrom(vtep, 51820), allowed: map[netip.Addr]bool{addr(1): true}}}}}
	for _, c := range []struct {
		name  string
		have  [weft.KeySlots]device
		peers []vxlan.EncryptionPeer
		want  int
	}{{"met and a member", met, st.Encryption.Peers, 1}, {"never met", [weft.KeySlots]device{}, st.Encryption.Peers, 0}, {"has left", met, nil, 0}} {
		st.Encryption.Peers = c.peers
		w := wanted(st, ring, 51820, c.have)[0]
		if len(w.peers) != c.want {
			t.Errorf("%s: peers %v", c.name, w.peers)
		}
		if got := model(c.have[0], diff(c.have[0], w, time.Now()), func(device) {}); show(got) != show(w) {
			t.Errorf("%s: got\n%s", c.name, show(got))
		}
	}
}
