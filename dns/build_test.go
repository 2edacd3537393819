package dns

import (
	"bytes"
	"fmt"
	"hash/maphash"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// slowZone is the slow twin of a zone: one map each, made of all services from the
// first to the last.
type slowZone struct {
	sets
	derived map[string]bool
}

func newSlowZone(n Network) *slowZone {
	z := &slowZone{sets{map[string]*rrset{}, map[netip.Addr]string{}, map[string]*offer{}}, map[string]bool{}}
	for i := range n.Services {
		z.addService(&n, &n.Services[i])
	}
	for _, svc := range n.Services {
		for _, t := range svc.Tasks {
			if len(t.Names) == 0 {
				continue
			}
			for _, a := range t.Addrs {
				if _, taken := z.byAddr[a.Unmap()]; !taken || t.Ready {
					z.byAddr[a.Unmap()] = qualified(t.Names[0], n.Name)
				}
			}
		}
	}
	return z
}

func (z *slowZone) addService(n *Network, svc *Service) {
	ready := &rrset{}
	places := map[string][]netip.Addr{}
	o := offer{ports: svc.Ports}
	for _, t := range svc.Tasks {
		for i, name := range t.Names {
			z.claimName(fold(name), rankTask, taskTTL, t.Addrs)
			if i == 0 {
				z.derived[fold(name)] = true
			}
		}
		addrs := readyAddrs(t)
		if at := t.place(); at != "" {
			places[at] = append(places[at], addrs...)
		}
		for _, a := range addrs {
			ready.add(a)
		}
		if len(t.Names) > 0 && len(addrs) > 0 {
			o.tasks = append(o.tasks, &instance{name: qualified(t.Names[0], n.Name), addrs: addrs})
		}
	}
	all := append(slices.Clone(ready.v4), ready.v6...)
	own, ttl := svc.VIP, vipTTL
	if len(own) == 0 {
		own, ttl = all, taskTTL
	}
	name := fold(svc.Name)
	z.claimName(name, rankService, ttl, own)
	z.sets.offer(&claim{name: name, rank: rankService, offer: &o, isPublic: isPublic(name)})
	for _, a := range svc.Aliases {
		z.claimName(fold(a), rankAlias, ttl, own)
		z.sets.offer(&claim{name: fold(a), rank: rankAlias, offer: &o, isPublic: isPublic(fold(a))})
	}
	derive := func(name string, addrs []netip.Addr) {
		z.claimName(name, rankSlot, taskTTL, addrs)
		z.derived[name] = true
	}
	derive("tasks."+name, all)
	for at, addrs := range places {
		derive(at+"."+name, addrs)
	}
	for _, a := range svc.VIP {
		z.byAddr[a.Unmap()] = qualified(svc.Name, n.Name)
	}
}

func (z *slowZone) claimName(name string, rk rank, ttl uint32, addrs []netip.Addr) {
	set, ok := z.byName[name]
	if ok && set.rank < rk {
		return
	}
	if !ok || rk < set.rank {
		set = &rrset{rank: rk, ttl: ttl}
		z.byName[name] = set
	}
	set.ttl = min(set.ttl, ttl)
	for _, a := range addrs {
		set.add(a)
	}
}

// drawService has names, aliases and addresses that others have, too.
func drawService(t *rapid.T) Service {
	addr := func(what string) netip.Addr {
		n := byte(rapid.IntRange(1, 12).Draw(t, what))
		if n > 9 {
			return netip.AddrFrom16([16]byte{0: 0xfd, 15: n})
		}
		return netip.AddrFrom4([4]byte{10, 0, 0, n})
	}
	name := rapid.SampledFrom([]string{"a", "b", "B", "c", "d", "e"})
	s := Service{Name: name.Draw(t, "name")}
	for range rapid.IntRange(0, 2).Draw(t, "aliases") {
		s.Aliases = append(s.Aliases, name.Draw(t, "alias"))
	}
	for range rapid.IntRange(0, 1).Draw(t, "vips") {
		s.VIP = append(s.VIP, addr("vip"))
	}
	for range rapid.IntRange(0, 3).Draw(t, "tasks") {
		task := Task{Slot: uint64(rapid.IntRange(0, 2).Draw(t, "slot")), Host: rapid.SampledFrom([]string{"", "h1"}).Draw(t, "host"), Ready: rapid.Bool().Draw(t, "ready"), Addrs: []netip.Addr{addr("task")}}
		for range rapid.IntRange(0, 2).Draw(t, "names") {
			task.Names = append(task.Names, s.Name+"."+name.Draw(t, "own"))
		}
		s.Tasks = append(s.Tasks, task)
	}
	if rapid.Bool().Draw(t, "port") {
		s.Ports = []Port{{Name: "http", Protocol: weft.TCP, Port: 80}}
	}
	return s
}

// TestChangesAreTheWhole: after any changes a Snapshot is what it would be if it were
// made of nothing, what has not changed is the former one's, and what was in the
// former one and is not in this is remembered.
func TestChangesAreTheWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b, now := newBuilder(), time.Unix(1000, 0)
		var services []Service
		name, last := "blue", b.last
		for range 12 {
			for range rapid.IntRange(0, 3).Draw(t, "changes") {
				if i := rapid.IntRange(-2, len(services)-1).Draw(t, "which"); i < 0 {
					services = append(services, drawService(t))
				} else if rapid.Bool().Draw(t, "goes") {
					services = slices.Delete(slices.Clone(services), i, i+1)
				} else {
					services = slices.Clone(services)
					services[i] = drawService(t)
				}
			}
			if rapid.IntRange(0, 9).Draw(t, "many") == 0 { // and shards
				for i := range 40 {
					services = append(services, Service{Name: fmt.Sprintf("m%d", i)})
				}
			}
			if rapid.IntRange(0, 9).Draw(t, "rename") == 0 {
				name = rapid.SampledFrom([]string{"", "blue", "Red"}).Draw(t, "network")
			}
			// In the order of names, as joined sets are.
			services = slices.Clone(services)
			slices.SortStableFunc(services, func(a, b Service) int { return bytes.Compare([]byte(fold(a.Name)), []byte(fold(b.Name))) })
			n := Network{Name: name, Services: services}
			snap := b.update(Records{Networks: map[weft.ID]Network{blue: n}})
			wantTwin(t, snap, newSlowZone(n))
			if again := b.update(Records{Networks: map[weft.ID]Network{blue: {Name: name, Services: slices.Clone(services)}}}); again != snap {
				t.Fatal("the same is made again")
			}
			p := past{names: map[string]time.Time{}}
			p.turn(last, snap, now)
			wantPast(t, &p, last, snap)
			last = snap
		}
	})
}

func wantTwin(t *rapid.T, snap *Snapshot, slow *slowZone) {
	z := snap.networks[blue]
	names, srv, addrs := 0, 0, 0
	for _, s := range z.shards {
		names, srv, addrs = names+len(s.byName), srv+len(s.srv), addrs+len(s.byAddr)
	}
	if names != len(slow.byName) || srv != len(slow.srv) || addrs != len(slow.byAddr) {
		t.Fatalf("%d names, %d offers, %d addresses, want %d, %d, %d", names, srv, addrs, len(slow.byName), len(slow.srv), len(slow.byAddr))
	}
	for name, want := range slow.byName {
		want.derived = slow.derived[name]
		if got := z.name([]byte(name)); got == nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%q is %+v, want %+v", name, got, want)
		}
		if snap.hasDerived([]byte(name)) != want.derived {
			t.Fatalf("%q is derived: %v", name, !want.derived)
		}
		hash := maphash.String(snap.seed, name)
		if got, count, _ := z.shard(hash).table.get(hash, []byte(name)).family(false); len(got) != 4*len(want.v4) || count != len(want.v4) {
			t.Fatalf("%q has %d addresses in the table, want %d", name, count, len(want.v4))
		}
	}
	for name, want := range slow.srv {
		if got := z.offered([]byte(name)); !reflect.DeepEqual(got, want) {
			t.Fatalf("%q offers %+v, want %+v", name, got, want)
		}
	}
	for a, want := range slow.byAddr {
		if got, ok := z.target(a); !ok || got != want {
			t.Fatalf("%v is %q, want %q", a, got, want)
		}
	}
}

// wantPast compares with the difference of all names.
func wantPast(t *rapid.T, p *past, before, now *Snapshot) {
	want := map[string]bool{}
	for id, old := range before.networks {
		for _, s := range old.shards {
			for name, set := range s.byName {
				if set.derived && !now.hasDerived([]byte(name)) {
					want[name] = true
				}
			}
			for name := range s.srv {
				z := now.networks[id]
				gone := z == nil || z.offered([]byte(name)) == nil
				if old.suffix != "" && (gone || z.suffix != old.suffix) {
					want[name+old.suffix] = true
				}
				if gone && !isPublic(name) {
					want[serviceOn(id, name)] = true
				}
			}
		}
	}
	if got := slices.Sorted(maps.Keys(p.names)); !slices.Equal(got, slices.Sorted(maps.Keys(want))) {
		t.Fatalf("remembered %q, want %q", got, slices.Sorted(maps.Keys(want)))
	}
}
