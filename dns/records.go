package dns

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weftnet/weft"
)

// Records are all names of the networks that this node takes part in.
type Records struct {
	Networks map[weft.ID]Network
}

// Network is one network's names. Names of one network are invisible from
// another.
type Network struct {
	Name string
	// Subnets are the network's ranges: reverse questions about their
	// addresses are answered here and never forwarded.
	Subnets  []netip.Prefix
	Services []Service
}

// Service is one service on one network.
type Service struct {
	Name    string
	Aliases []string
	// VIP are the service's virtual addresses here, at most one per family.
	// Empty means endpoint mode dnsrr: the name answers with the ready
	// tasks.
	VIP   []netip.Addr
	Tasks []Task
}

// Task is one task on one network.
type Task struct {
	// Slot makes the name SLOT.SERVICE; 0 (global services) makes none.
	Slot uint64
	// Names are the names of this one container: container name first (PTR
	// answers with it), then id, short id, hostname.
	Names []string
	Addrs []netip.Addr
	// Ready tasks stand in tasks.SERVICE, SLOT.SERVICE and, with dnsrr, in
	// the service's name. A container's own names answer in any case: who
	// asks for one container wants that one.
	Ready bool
}

// Snapshot is the lookup form of Records. It is immutable.
type Snapshot struct {
	networks map[weft.ID]*zone
	// subnets of all networks, also those a task is not on.
	subnets []netip.Prefix
	// derived holds every tasks.SERVICE, SLOT.SERVICE and container name of
	// any network: they are of our making, so they never leave the node
	// even when the asking task may not see them.
	derived map[string]struct{}
}

type zone struct {
	name   string // lower case
	byName map[string]*rrset
	byAddr map[netip.Addr]string // target of PTR, fully qualified
}

// rank orders the claims on a name: a smaller one wins, equal ones unite.
type rank uint8

const (
	rankService rank = iota
	rankAlias
	rankSlot
	rankTask
)

// rrset is what one name means on one network. A name whose set is empty
// exists (NODATA).
type rrset struct {
	rank   rank
	v4, v6 []netip.Addr
	ttl    uint32
}

func (r *rrset) add(a netip.Addr) {
	a = a.Unmap()
	set := &r.v4
	if a.Is6() {
		set = &r.v6
	}
	if a.IsValid() && !slices.Contains(*set, a) {
		*set = append(*set, a)
	}
}

// Still is now without what before does not have: nothing new is in it, and
// nothing that has gone. It is what may be answered while the way to the new is
// being made. Both stay as they are.
func Still(before, now Records) Records {
	out := Records{Networks: map[weft.ID]Network{}}
	for id, n := range now.Networks {
		had, ok := before.Networks[id]
		if !ok {
			continue
		}
		services := map[string]Service{}
		for _, s := range had.Services {
			services[s.Name] = s
		}
		still := Network{Name: n.Name, Subnets: n.Subnets}
		for _, s := range n.Services {
			if old, ok := services[s.Name]; ok {
				still.Services = append(still.Services, stillService(old, s))
			}
		}
		out.Networks[id] = still
	}
	return out
}

func stillService(before, now Service) Service {
	out := Service{Name: now.Name, Aliases: now.Aliases}
	for _, a := range now.VIP {
		if slices.Contains(before.VIP, a) {
			out.VIP = append(out.VIP, a)
		}
	}
	for _, t := range now.Tasks {
		i := slices.IndexFunc(before.Tasks, func(o Task) bool { return slices.Equal(o.Names, t.Names) && slices.Equal(o.Addrs, t.Addrs) })
		if i >= 0 {
			t.Ready = t.Ready && before.Tasks[i].Ready
			out.Tasks = append(out.Tasks, t)
		}
	}
	return out
}

// fold is the form of a name in the tables: lower case (RFC 4343), without the
// dot at its end.
func fold(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// NewSnapshot computes the lookup tables of r. It keeps nothing of r.
func NewSnapshot(r Records) *Snapshot {
	s := &Snapshot{networks: make(map[weft.ID]*zone, len(r.Networks)), derived: map[string]struct{}{}}
	for id, n := range r.Networks {
		s.subnets = append(s.subnets, n.Subnets...)
		s.networks[id] = s.zone(n)
	}
	return s
}

func (s *Snapshot) zone(n Network) *zone {
	z := &zone{name: fold(n.Name), byName: map[string]*rrset{}, byAddr: map[netip.Addr]string{}}
	for _, svc := range n.Services {
		ready := &rrset{ttl: taskTTL}
		slots := map[uint64][]netip.Addr{}
		for _, t := range svc.Tasks {
			s.addTask(z, t)
			if t.Slot != 0 {
				slots[t.Slot] = append(slots[t.Slot], readyAddrs(t)...)
			}
			for _, a := range readyAddrs(t) {
				ready.add(a)
			}
		}
		all := append(slices.Clone(ready.v4), ready.v6...)
		own, ttl := svc.VIP, uint32(vipTTL)
		if len(own) == 0 {
			own, ttl = all, taskTTL
		}
		name := fold(svc.Name)
		z.claim(name, rankService, ttl, own)
		for _, a := range svc.Aliases {
			z.claim(fold(a), rankAlias, ttl, own)
		}
		s.derive(z, "tasks."+name, all)
		for slot, addrs := range slots {
			s.derive(z, strconv.FormatUint(slot, 10)+"."+name, addrs)
		}
		for _, a := range svc.VIP {
			z.byAddr[a.Unmap()] = qualified(svc.Name, n.Name)
		}
	}
	for _, svc := range n.Services {
		for _, t := range svc.Tasks {
			z.pointTo(t, n.Name)
		}
	}
	return z
}

func readyAddrs(t Task) []netip.Addr {
	if !t.Ready {
		return nil
	}
	return t.Addrs
}

func (s *Snapshot) addTask(z *zone, t Task) {
	for i, name := range t.Names {
		name = fold(name)
		z.claim(name, rankTask, taskTTL, t.Addrs)
		if i == 0 { // a hostname may be a name of the outside world too
			s.derived[name] = struct{}{}
		}
	}
}

func (s *Snapshot) derive(z *zone, name string, addrs []netip.Addr) {
	z.claim(name, rankSlot, taskTTL, addrs)
	s.derived[name] = struct{}{}
}

// pointTo adds the PTR of a task's addresses. A ready task wins over one that
// is on its way out, in case both are said to hold the address.
func (z *zone) pointTo(t Task, network string) {
	if len(t.Names) == 0 {
		return
	}
	for _, a := range t.Addrs {
		a = a.Unmap()
		if _, taken := z.byAddr[a]; !taken || t.Ready {
			z.byAddr[a] = qualified(t.Names[0], network)
		}
	}
}

func qualified(name, network string) string {
	if network == "" {
		return name + "."
	}
	return name + "." + network + "."
}

func (z *zone) claim(name string, rk rank, ttl uint32, addrs []netip.Addr) {
	if name == "" {
		return
	}
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
