package dns

import (
	"cmp"
	"hash/maphash"
	"maps"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
)

// Our own choices for the shards of a zone.
const (
	// servicesPerShard is what a zone is made for: some 35 names lie in a shard
	// then, and a service of three tasks lies in some 14 of them.
	servicesPerShard = 4
	// maxPerShard and minPerShard (an inverse) are how far it may grow, and
	// shrink, before all of it is made again.
	maxPerShard, minPerShard = 16, 4
)

// builder makes one Snapshot of another: what has not changed is shared, and names
// are made again where a service has changed. It is not safe for concurrent use.
type builder struct {
	last  *Snapshot
	zones map[weft.ID]*zoneBuilder
}

func newBuilder() *builder {
	return &builder{last: &Snapshot{seed: maphash.MakeSeed(), networks: map[weft.ID]*zone{}}, zones: map[weft.ID]*zoneBuilder{}}
}

// update returns the Snapshot of r, the last one if it says the same. It keeps r,
// which must not be written any more.
func (b *builder) update(r Records) *Snapshot {
	next := &Snapshot{seed: b.last.seed, networks: make(map[weft.ID]*zone, len(r.Networks))}
	for id, n := range r.Networks {
		next.subnets = append(next.subnets, n.Subnets...)
		if b.zones[id] == nil {
			b.zones[id] = &zoneBuilder{seed: next.seed}
		}
		next.networks[id] = b.zones[id].update(n)
	}
	maps.DeleteFunc(b.zones, func(id weft.ID, _ *zoneBuilder) bool { return next.networks[id] == nil })
	slices.SortFunc(next.subnets, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	if !maps.Equal(next.networks, b.last.networks) || !slices.Equal(next.subnets, b.last.subnets) {
		b.last = next
	}
	return b.last
}

// zoneBuilder is what makes one zone of another.
type zoneBuilder struct {
	seed  maphash.Seed
	name  string // of the network
	given []Service
	parts map[string]*part // by the service's name, folded
	// in are the parts that have something in a shard, in the order of names.
	in   [][]*part
	zone *zone
}

func (z *zoneBuilder) update(n Network) *zone {
	before := z.given
	z.given = n.Services
	count, size := len(n.Services), len(z.in)
	if z.zone == nil || z.name != n.Name || count > maxPerShard*size || size > 1 && minPerShard*count < size {
		z.name = n.Name
		return z.whole()
	}
	// Both are in the same order, mostly.
	head := 0
	for head < min(len(before), len(n.Services)) && sameService(&before[head], &n.Services[head]) {
		head++
	}
	old, now := before[head:], n.Services[head:]
	for len(old) > 0 && len(now) > 0 && sameService(&old[len(old)-1], &now[len(now)-1]) {
		old, now = old[:len(old)-1], now[:len(now)-1]
	}
	if len(old)+len(now) == 0 {
		return z.zone
	}
	return z.change(old, now)
}

// whole makes all parts and shards.
func (z *zoneBuilder) whole() *zone {
	size := 1
	for size*servicesPerShard < len(z.given) {
		size *= 2
	}
	z.in, z.parts = make([][]*part, size), map[string]*part{}
	z.zone = &zone{seed: z.seed, shards: make([]shard, size)}
	if z.name != "" {
		z.zone.suffix = "." + fold(z.name)
		z.zone.isPublic = isPublic(fold(z.name))
	}
	byName := map[string][]*Service{}
	for i := range z.given {
		name := fold(z.given[i].Name)
		byName[name] = append(byName[name], &z.given[i])
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		p := z.part(name, byName[name])
		z.parts[name] = p
		for i := range z.shardsOf(p) {
			z.in[i] = append(z.in[i], p)
		}
	}
	for i, parts := range z.in {
		z.zone.shards[i] = z.shard(i, parts)
	}
	return z.zone
}

// change makes again the shards of services that were old and are now.
func (z *zoneBuilder) change(old, now []Service) *zone {
	had, byName := map[string]int{}, map[string][]*Service{}
	for i := range old {
		had[fold(old[i].Name)]++
	}
	for i := range now {
		byName[fold(now[i].Name)] = append(byName[fold(now[i].Name)], &now[i])
	}
	for name := range had {
		if _, still := byName[name]; !still {
			byName[name] = nil // gone
		}
	}
	turned := map[int]bool{}
	for name, services := range byName {
		was := z.parts[name]
		if was != nil && was.services > had[name] { // others have the name, and stay
			services = nil
			for i := range z.given {
				if fold(z.given[i].Name) == name {
					services = append(services, &z.given[i])
				}
			}
		}
		if was != nil {
			for i := range z.shardsOf(was) {
				at, _ := slices.BinarySearchFunc(z.in[i], name, byPart)
				z.in[i] = slices.Delete(z.in[i], at, at+1)
				turned[i] = true
			}
		}
		delete(z.parts, name)
		if len(services) == 0 {
			continue
		}
		p := z.part(name, services)
		z.parts[name] = p
		for i := range z.shardsOf(p) {
			at, _ := slices.BinarySearchFunc(z.in[i], name, byPart)
			z.in[i] = slices.Insert(z.in[i], at, p)
			turned[i] = true
		}
	}
	next := *z.zone
	next.shards = slices.Clone(next.shards)
	for i := range turned {
		next.shards[i] = z.shard(i, z.in[i])
	}
	z.zone = &next
	return z.zone
}

func byPart(p *part, name string) int { return cmp.Compare(p.name, name) }

// shardsOf are the shards that a part has something in.
func (z *zoneBuilder) shardsOf(p *part) map[int]bool {
	out := map[int]bool{}
	for i := range p.claims {
		out[shardAt(p.claims[i].hash, len(z.in))] = true
	}
	for i := range p.pointers {
		out[shardAt(p.pointers[i].hash, len(z.in))] = true
	}
	return out
}

// part is what the services of one name say, apart from what others say: a name may
// have several meanings, of which shard chooses.
type part struct {
	name     string // folded
	services int    // that have it
	claims   []claim
	pointers []pointer
}

// claim says that a name means addresses, or that SRV questions for it have an offer.
type claim struct {
	hash    uint64
	name    string
	rank    rank
	ttl     uint32
	addrs   []netip.Addr
	offer   *offer // nil = none
	derived bool
	// isPublic is that of the offer.
	isPublic bool
}

// pointer says what an address is called. A service's virtual address is known by
// any later one, a task's by a ready one's.
type pointer struct {
	hash        uint64
	addr        netip.Addr
	target      string
	isVIP, wins bool
}

func (z *zoneBuilder) part(name string, services []*Service) *part {
	p := &part{name: name, services: len(services)}
	for _, s := range services {
		z.addService(p, s)
	}
	return p
}

func (z *zoneBuilder) addService(p *part, svc *Service) {
	ready := &rrset{}
	places := map[string][]netip.Addr{}
	o := &offer{ports: svc.Ports}
	for i := range svc.Tasks {
		t := &svc.Tasks[i]
		for i, name := range t.Names {
			// A hostname may be a name of the outside world, too.
			z.claim(p, claim{name: fold(name), rank: rankTask, ttl: taskTTL, addrs: t.Addrs, derived: i == 0})
		}
		addrs := readyAddrs(*t)
		if at := t.place(); at != "" {
			places[at] = append(places[at], addrs...)
		}
		for _, a := range addrs {
			ready.add(a)
		}
		if len(t.Names) > 0 && len(addrs) > 0 {
			o.tasks = append(o.tasks, &instance{name: qualified(t.Names[0], z.name), addrs: addrs})
		}
		for _, a := range t.Addrs {
			if len(t.Names) > 0 {
				z.point(p, pointer{addr: a.Unmap(), target: qualified(t.Names[0], z.name), wins: t.Ready})
			}
		}
	}
	all := append(slices.Clone(ready.v4), ready.v6...)
	own, ttl := svc.VIP, vipTTL
	if len(own) == 0 {
		own, ttl = all, taskTTL
	}
	z.claim(p, claim{name: p.name, rank: rankService, ttl: ttl, addrs: own, offer: o})
	for _, a := range svc.Aliases {
		z.claim(p, claim{name: fold(a), rank: rankAlias, ttl: ttl, addrs: own, offer: o})
	}
	z.claim(p, claim{name: "tasks." + p.name, rank: rankSlot, ttl: taskTTL, addrs: all, derived: true})
	for _, at := range slices.Sorted(maps.Keys(places)) {
		z.claim(p, claim{name: at + "." + p.name, rank: rankSlot, ttl: taskTTL, addrs: places[at], derived: true})
	}
	for _, a := range svc.VIP {
		z.point(p, pointer{addr: a.Unmap(), target: qualified(svc.Name, z.name), isVIP: true, wins: true})
	}
}

func (z *zoneBuilder) claim(p *part, c claim) {
	if c.name != "" {
		c.hash = maphash.String(z.seed, c.name)
		c.isPublic = c.offer != nil && isPublic(c.name)
		p.claims = append(p.claims, c)
	}
}

func (z *zoneBuilder) point(p *part, to pointer) {
	to.hash = hashAddr(z.seed, to.addr)
	p.pointers = append(p.pointers, to)
}

// shard joins what parts say of the names and addresses of the i-th shard.
func (z *zoneBuilder) shard(i int, parts []*part) shard {
	s := &sets{byName: map[string]*rrset{}, srv: map[string]*offer{}, byAddr: map[netip.Addr]string{}}
	for _, p := range parts {
		for k := range p.claims {
			if c := &p.claims[k]; shardAt(c.hash, len(z.in)) == i {
				s.claim(c)
			}
		}
	}
	// A task's own name goes before that of a service which has its address.
	for _, vips := range []bool{true, false} {
		for _, p := range parts {
			for k := range p.pointers {
				if to := &p.pointers[k]; to.isVIP == vips && shardAt(to.hash, len(z.in)) == i {
					if _, taken := s.byAddr[to.addr]; !taken || to.wins {
						s.byAddr[to.addr] = to.target
					}
				}
			}
		}
	}
	return shard{newTable(z.seed, s.byName), s}
}

func (s *sets) claim(c *claim) {
	set := s.byName[c.name]
	switch {
	case set == nil || c.rank < set.rank:
		set = &rrset{rank: c.rank, ttl: c.ttl, derived: set != nil && set.derived}
		s.byName[c.name] = set
		fallthrough
	case c.rank == set.rank:
		set.ttl = min(set.ttl, c.ttl)
		for _, a := range c.addrs {
			set.add(a)
		}
	}
	set.derived = set.derived || c.derived
	if c.offer != nil {
		s.offer(c)
	}
}

// offer adds what a service has to say about SRV questions for c's name; ranks are as
// with claim.
func (s *sets) offer(c *claim) {
	have := s.srv[c.name]
	switch {
	case have != nil && have.rank < c.rank:
		return
	case have == nil || c.rank < have.rank:
		have = &offer{rank: c.rank, isPublic: c.isPublic}
		s.srv[c.name] = have
	}
	have.ports = append(have.ports, c.offer.ports...)
	for _, t := range c.offer.tasks {
		if !slices.Contains(have.tasks, t) { // an alias given twice
			have.tasks = append(have.tasks, t)
		}
	}
}

func hashAddr(seed maphash.Seed, a netip.Addr) uint64 {
	b := a.As16()
	return maphash.Bytes(seed, b[:])
}

// shardAt is where among size shards a hash belongs: by bits that the table of a
// shard hardly uses.
func shardAt(hash uint64, size int) int { return int(hash>>12) & (size - 1) }

// sameService reports whether two services say the same. Slices that are shared are
// not read.
func sameService(a, b *Service) bool {
	return a.Name == b.Name && same(a.Aliases, b.Aliases, equal) && same(a.VIP, b.VIP, equal) && same(a.Ports, b.Ports, equal) && same(a.Tasks, b.Tasks, sameTask)
}

func sameTask(a, b Task) bool {
	return a.Slot == b.Slot && a.Host == b.Host && a.Ready == b.Ready && same(a.Names, b.Names, equal) && same(a.Addrs, b.Addrs, equal)
}

func same[T any](a, b []T, f func(a, b T) bool) bool {
	if len(a) != len(b) || len(a) == 0 || &a[0] == &b[0] {
		return len(a) == len(b)
	}
	return slices.EqualFunc(a, b, f)
}

func equal[T comparable](a, b T) bool { return a == b }
