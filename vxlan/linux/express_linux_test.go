package linux

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// farPeer is an endpoint on a host that is not there.
func farPeer(i int, holder string) vxlan.Peer {
	a := netip.AddrFrom4([4]byte{10, 100, 0, byte(100 + i)})
	if i%4 == 3 {
		a = netip.MustParseAddr(fmt.Sprintf("fd77::%d", 100+i))
	}
	return vxlan.Peer{Addr: a, MAC: weft.EndpointMAC(weft.ID(holder), a), VTEP: netip.AddrFrom4([4]byte{10, 99, 7, byte(10 + i%3)})}
}

func unlessGone(err error) error {
	if gone(err) {
		return nil
	}
	return err
}

// inHidden calls f with the devices of the test's network.
func (h *host) inHidden(f func(br, vx int) error) error {
	return netns.Do(h.k.path(testVNI), func() error {
		br, err := netlink.LinkByName(weft.BridgeName(testVNI))
		if err != nil {
			return err
		}
		vx, err := netlink.LinkByName(weft.VXLANName(testVNI))
		if err != nil {
			return err
		}
		return f(br.Attrs().Index, vx.Attrs().Index)
	})
}

// The ways to break an entry of a peer behind the engine's back.
var damages = map[string]func(br, vx int, p vxlan.Peer) error{
	"neighbour gone": func(br, _ int, p vxlan.Peer) error {
		return unlessGone(netlink.NeighDel(&netlink.Neigh{LinkIndex: br, IP: p.Addr.AsSlice()}))
	},
	"neighbour wrong": func(br, _ int, p vxlan.Peer) error {
		return netlink.NeighSet(&netlink.Neigh{LinkIndex: br, State: netlink.NUD_PERMANENT, IP: p.Addr.AsSlice(), HardwareAddr: []byte{2, 0, 0, 0, 0, 9}})
	},
	"wrong VTEP": func(_, vx int, p vxlan.Peer) error {
		return netlink.NeighSet(&netlink.Neigh{LinkIndex: vx, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: staticState, HardwareAddr: p.MAC, IP: []byte{10, 99, 7, 77}})
	},
	"device entry gone": func(_, vx int, p vxlan.Peer) error {
		return unlessGone(netlink.NeighDel(&netlink.Neigh{LinkIndex: vx, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, HardwareAddr: p.MAC, IP: []byte{0, 0, 0, 0}}))
	},
	"bridge entry gone": func(_, vx int, p vxlan.Peer) error {
		return unlessGone(netlink.NeighDel(&netlink.Neigh{LinkIndex: vx, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, HardwareAddr: p.MAC}))
	},
}

// TestExpress: a change of one peer is made without a pass over everything, and
// only if the entries that it is about are as they were left.
func TestExpress(t *testing.T) {
	hosts, wants, ports := two(t, false)
	h := hosts[0]
	base := wants[h].Networks[testVNI]
	with := func(more ...vxlan.Peer) vxlan.State {
		n := base
		n.Peers = append(slices.Clone(base.Peers), more...)
		return state(n)
	}
	p := func(i int) vxlan.Peer { return farPeer(i, "x") }
	moved := p(1)
	moved.VTEP = netip.MustParseAddr("10.99.7.99")
	vips := with(p(1))
	vips.Networks[testVNI] = func(n vxlan.Network) vxlan.Network {
		a := netip.MustParseAddr("10.100.0.250")
		n.VIPs = []vxlan.VIP{{Addr: a, MAC: weft.VIPMAC("s", a)}}
		return n
	}(vips.Networks[testVNI])
	spoil := func(how string, p vxlan.Peer) func() error {
		return func() error { return h.inHidden(func(br, vx int) error { return damages[how](br, vx, p) }) }
	}
	for _, c := range []struct {
		name  string
		spoil func() error
		want  vxlan.State
		quick bool
		// repaired are the kinds that are told at once, and later those of the
		// pass that follows.
		repaired, later string
	}{
		{"one more", nil, with(p(1)), true, "", ""},
		{"it moves", nil, with(moved), true, "", ""},
		{"another holder of its address", nil, with(farPeer(1, "y")), true, "", ""},
		{"one less", nil, with(), true, "", ""},
		{"both families", nil, with(p(1), p(2), p(3)), true, "", ""},
		{"a service address in their place", nil, vips, true, "", ""},
		{"and back", nil, with(p(1)), true, "", ""},
		{"nothing", nil, with(p(1)), false, "", ""},
		{"the one that moves led elsewhere", spoil("wrong VTEP", p(1)), with(moved), false, "fdb wrong", ""},
		{"the one that goes was half", spoil("bridge entry gone", moved), with(), false, "", ""}, // what goes is not put right
		{"the one that comes is there", spoil("neighbour wrong", p(2)), with(p(2)), false, "neighbour stray", ""},
		{"another one was lost", spoil("neighbour gone", p(2)), with(p(2), p(1)), true, "", "neighbour missing"},
		{"long after", func() error { h.k.whole = time.Now().Add(-2 * expressFor); return nil }, with(p(2)), false, "", ""},
		{"many", nil, with(p(0), p(1), p(2), p(3), p(4), p(5), p(6), p(7), p(8), p(9)), true, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.spoil != nil {
				must(t, c.spoil())
			}
			before := h.k.whole
			must(t, h.apply(c.want))
			if quick := h.k.whole.Equal(before); quick != c.quick {
				t.Errorf("without a whole pass: %v, want %v", quick, c.quick)
			}
			if got := kinds(h.taken()); got != c.repaired {
				t.Errorf("repaired %q, want %q", got, c.repaired)
			}
			if c.later == "" {
				expectEqual(t, h, c.want)
			}
			must(t, h.apply(c.want)) // no change: a whole pass
			expectEqual(t, h, c.want)
			if got := kinds(h.taken()); got != c.later {
				t.Errorf("repaired %q later, want %q", got, c.later)
			}
		})
	}
	meshWorks(t, ports)
}

func kinds(rs []weft.Repair) string {
	var out []string
	for _, r := range rs {
		out = append(out, r.Kind)
	}
	return strings.Join(out, ",")
}

// TestExpressIsAsAWholePass: over random histories with damage the tables, and the
// repairs of each kind, are those of the slow twin, a host that always reads everything.
func TestExpressIsAsAWholePass(t *testing.T) {
	hosts, wants, _ := two(t, false)
	const steps = 150
	quick, hurts := 0, map[string]int{}
	for seed := range uint64(2) {
		rng := rand.New(rand.NewPCG(seed, 7))
		holders := map[int]string{}
		vips := map[int]bool{}
		for step := range steps {
			for range 1 + rng.IntN(3) {
				if i := rng.IntN(20); holders[i] == "" || rng.IntN(2) == 0 {
					holders[i] = fmt.Sprint(step)
				} else {
					delete(holders, i)
				}
			}
			if rng.IntN(4) == 0 {
				i := rng.IntN(4)
				vips[i] = !vips[i]
			}
			how, at := "", rng.IntN(20)
			if rng.IntN(4) == 0 {
				how = slices.Sorted(maps.Keys(damages))[rng.IntN(len(damages))]
			}
			var counts [2]string
			for which, h := range hosts {
				n := wants[h].Networks[testVNI]
				n.Peers = slices.Clone(n.Peers)
				for i := range 20 {
					if holder := holders[i]; holder != "" {
						n.Peers = append(n.Peers, farPeer(i, holder))
					}
				}
				for i := range 4 {
					if a := netip.AddrFrom4([4]byte{10, 100, 0, byte(240 + i)}); vips[i] {
						n.VIPs = append(n.VIPs, vxlan.VIP{Addr: a, MAC: weft.VIPMAC("s", a)})
					}
				}
				if how != "" {
					must(t, h.inHidden(func(br, vx int) error { return damages[how](br, vx, farPeer(at, holders[at])) }))
				}
				if h == hosts[1] {
					h.k.whole = time.Time{}
				}
				before := h.k.whole
				must(t, h.apply(state(n)))
				if h == hosts[0] && h.k.whole.Equal(before) {
					quick++
				}
				if how != "" {
					must(t, h.apply(state(n))) // no change: a whole pass
				}
				counts[which] = kinds(h.taken())
				expectEqual(t, h, state(n))
			}
			if counts[0] != counts[1] || how == "" && counts[0] != "" || strings.Contains(counts[0], ",") {
				t.Fatalf("step %d of seed %d, damage %q: repairs %q, of the twin %q", step, seed, how, counts[0], counts[1])
			}
			if counts[0] != "" {
				hurts[how]++
			}
		}
	}
	if quick < steps {
		t.Errorf("%d of %d changes were made without a whole pass: the test shows little", quick, 2*steps)
	}
	if len(hurts) < len(damages) {
		t.Errorf("repaired were only %v", hurts)
	}
}
