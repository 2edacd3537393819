package state

import (
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// holding is one address in the hands of one object.
type holding struct {
	network weft.ID
	addr    netip.Addr
	owner   weft.ID
}

// holdings counts slowly who holds what. seen: by nodes, too; a task without a
// node has an address that nobody has heard of.
func holdings(v *Snapshot, seen bool) map[holding]bool {
	out := map[holding]bool{}
	for _, k := range v.Tasks() {
		if k.Status.State.Ended() || seen && k.Node == "" {
			continue
		}
		for _, at := range k.Attachments {
			out[holding{at.Network, at.Addr.Addr(), k.ID}] = true
		}
	}
	for _, s := range v.Services() {
		for _, x := range s.VIPs {
			out[holding{x.Network, x.Addr.Addr(), s.ID}] = true
		}
	}
	if in, ok := v.Ingress(); ok {
		for _, n := range v.Nodes() {
			out[holding{in.ID, n.IngressAddr.Addr(), n.ID}] = true
		}
	}
	return out
}

// drawHolder draws a change of who holds what, over few addresses.
func drawHolder(t *rapid.T, v *Snapshot, index uint64) Change {
	n := rapid.IntRange(1, 3)
	net := func() weft.ID { return id(400 + n.Draw(t, "network")) }
	addr := func() netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 16, byte(n.Draw(t, "addr"))}), 20)
	}
	switch rapid.IntRange(0, 7).Draw(t, "kind") {
	case 0:
		x := testService(200 + n.Draw(t, "id"))
		if old, ok := v.Service(x.ID); ok {
			x.Meta.Index, x.SpecVersion = old.Meta.Index, old.SpecVersion
		}
		for range rapid.IntRange(0, 2).Draw(t, "vips") {
			x.VIPs = append(x.VIPs, weft.VIP{Network: net(), Addr: addr()})
		}
		return Change{Service: x}
	case 1, 2:
		x := testTask(300+n.Draw(t, "id"), 200+n.Draw(t, "service"), "")
		x.Status.State = weft.TaskNew
		if rapid.Bool().Draw(t, "assigned") {
			x.Status.State, x.Node = weft.TaskAssigned, id(100+n.Draw(t, "node"))
		}
		x.Attachments = []weft.Attachment{{Network: net(), Addr: addr()}}
		return Change{Task: x}
	case 3:
		k := id(300 + n.Draw(t, "id"))
		old, _ := v.Task(k)
		return Change{TaskStatus: &TaskStatus{Task: k, Node: old.Node, Status: weft.TaskStatus{State: weft.TaskFailed, At: t0}}}
	case 4:
		x := testNode(100 + n.Draw(t, "id"))
		x.IngressAddr = addr()
		return Change{Node: x}
	case 5:
		k := n.Draw(t, "id")
		x := testNetwork(400+k, weft.IngressVNI+uint32(k-1))
		return Change{Network: x}
	case 6:
		return Change{Release: &Release{
			Addrs:    []Rested{{Network: net(), Index: rapid.Uint64Range(0, index).Draw(t, "through"), Addrs: []netip.Addr{addr().Addr(), addr().Addr()}}},
			Networks: []weft.ID{net()},
		}}
	default:
		k := rapid.SampledFrom([]Kind{KindNode, KindService, KindNetwork, KindTask}).Draw(t, "delete")
		base := map[Kind]int{KindNode: 100, KindService: 200, KindTask: 300, KindNetwork: 400}[k]
		return Change{Delete: &Ref{Kind: k, ID: id(base + n.Draw(t, "id"))}}
	}
}

// TestFreedAddressesRest compares what rests, after each change of a random
// history, with a recount of who held what before and after it.
func TestFreedAddressesRest(t *testing.T) {
	type key struct {
		network weft.ID
		addr    netip.Addr
	}
	rapid.Check(t, func(t *rapid.T) {
		s := New()
		want := map[key]RestingAddr{}
		for index := uint64(1); index <= 40; index++ {
			old := s.View()
			c := drawHolder(t, old, index-1)
			b, err := EncodeEntry([]Command{{At: t0.Add(time.Duration(index) * time.Second), Changes: []Change{c}}})
			if err != nil {
				t.Fatal(err)
			}
			errs, err := s.Apply(index, b)
			if err != nil {
				t.Fatal(err)
			}
			now := s.View()
			after, all := holdings(now, true), holdings(now, false)
			for h := range holdings(old, true) {
				if _, ok := now.Network(h.network); ok && !after[h] {
					_, isTask := old.Task(h.owner)
					want[key{h.network, h.addr}] = RestingAddr{Network: h.network, Addr: h.addr, Owner: h.owner, Task: isTask, Index: index}
				}
			}
			for h := range all {
				if !holdings(old, false)[h] || c.Service != nil && c.Service.ID == h.owner && errs[0] == nil {
					delete(want, key{h.network, h.addr}) // it was given out
				}
			}
			maps.DeleteFunc(want, func(k key, r RestingAddr) bool {
				_, ok := now.Network(k.network)
				return !ok || c.Release != nil && c.Release.Addrs[0].Network == k.network &&
					r.Index <= c.Release.Addrs[0].Index && slices.Contains(c.Release.Addrs[0].Addrs, k.addr)
			})
			got := map[key]RestingAddr{}
			for _, r := range now.AllResting() {
				if !r.At.Equal(t0.Add(time.Duration(r.Index) * time.Second)) {
					t.Fatalf("%s was freed at %d and rests since %s", r.Addr, r.Index, r.At)
				}
				r.At = time.Time{}
				got[key{r.Network, r.Addr}] = r
				if one, ok := now.RestingAddr(r.Network, r.Addr); !ok || one.Owner != r.Owner {
					t.Fatalf("%s of %s cannot be looked up", r.Addr, r.Network)
				}
			}
			// Two objects that freed one address in one change: either counts.
			for k, w := range want {
				if g, ok := got[k]; ok && g.Index == index && w.Index == index {
					w.Owner, w.Task = g.Owner, g.Task
					want[k] = w
				}
			}
			if !maps.Equal(got, want) {
				t.Fatalf("change %d, %+v: resting %v, want %v", index, c, got, want)
			}
		}
	})
}
