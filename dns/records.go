package dns

import (
	"hash/maphash"
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
	// Ports have names: _NAME._PROTOCOL.SERVICE is their SRV record. A port
	// needs none: _80._tcp.SERVICE is port 80 of every service.
	Ports []Port
}

// Port is a port of a service's tasks that has a name.
type Port struct {
	Name     string // in any case; none that is no label is asked for
	Protocol weft.Protocol
	Port     uint16
}

// Task is one task on one network.
type Task struct {
	// Slot makes the name SLOT.SERVICE. With 0 (global services) the name of
	// the task's node makes HOST.SERVICE, if it is known.
	Slot uint64
	Host string
	// Names are the names of this one container: container name first (PTR
	// answers with it), then id, short id, hostname.
	Names []string
	Addrs []netip.Addr
	// Ready tasks stand in tasks.SERVICE, SLOT.SERVICE, HOST.SERVICE, SRV
	// records and, with dnsrr, in the service's name. A container's own names answer in any case: who
	// asks for one container wants that one.
	Ready bool
}

// Snapshot is the lookup form of Records. It is immutable; one that is made of
// another shares what is the same.
type Snapshot struct {
	seed     maphash.Seed // of all zones
	networks map[weft.ID]*zone
	// subnets of all networks, also those a task is not on.
	subnets []netip.Prefix
}

// zone is a network's names and addresses, in shards by their hash: 2^n of them.
type zone struct {
	seed   maphash.Seed
	suffix string // "." and the network's name in lower case; "" = it has none
	// isPublic: names that end in suffix may be real ones, of the outside.
	isPublic bool
	shards   []shard
}

// shard has some of a zone's names and addresses. Its table says the same as byName.
type shard struct {
	table table
	*sets // the same as long as nothing in it has changed
}

type sets struct {
	byName map[string]*rrset
	byAddr map[netip.Addr]string // target of PTR, fully qualified
	// srv has an entry for each service and alias, as byName.
	srv map[string]*offer
}

func (z *zone) shard(hash uint64) *shard { return &z.shards[shardAt(hash, len(z.shards))] }

// name is what a name (folded) means; nil = nothing.
func (z *zone) name(name []byte) *rrset {
	return z.shard(maphash.Bytes(z.seed, name)).byName[string(name)]
}

func (z *zone) offered(name []byte) *offer {
	return z.shard(maphash.Bytes(z.seed, name)).srv[string(name)]
}

// target is what an address is called.
func (z *zone) target(a netip.Addr) (string, bool) {
	t, ok := z.shard(hashAddr(z.seed, a)).byAddr[a]
	return t, ok
}

// offer is what SRV questions about one name need.
type offer struct {
	rank rank
	// isPublic: names that end in this one may be real ones, of the outside.
	isPublic bool
	ports    []Port
	tasks    []*instance
}

// instance is a ready task that has a name.
type instance struct {
	name  string // fully qualified, as PTR has it
	addrs []netip.Addr
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
	ttl    uint32
	v4, v6 []netip.Addr
	// derived names are tasks.SERVICE, SLOT.SERVICE, HOST.SERVICE and container
	// names: they are of our making, so they never leave the node even when the
	// asking task may not see them.
	derived bool
}

func (r *rrset) isEmpty() bool { return len(r.v4)+len(r.v6) == 0 }

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

// Held reports whether there is a way to an address of a network.
type Held func(network weft.ID, a netip.Addr) bool

// Still is now as far as it may be answered while the way to the rest is being
// made: nothing new is in it that is not held, and nothing that has gone. A task
// that is not held is none; a virtual address is held if before has it. nil = what
// is held is in doubt: then tasks stay that before has. Both Records stay as they
// are; of what is whole, the result shares the slices of now.
func Still(before, now Records, held Held) Records {
	out := Records{Networks: map[weft.ID]Network{}}
	for id, n := range now.Networks {
		had, ok := before.Networks[id]
		if !ok {
			continue
		}
		services := make(map[string]*Service, len(had.Services))
		for i := range had.Services {
			services[had.Services[i].Name] = &had.Services[i]
		}
		var holds func(netip.Addr) bool
		if held != nil {
			holds = func(a netip.Addr) bool { return held(id, a.Unmap()) }
		}
		still := Network{Name: n.Name, Subnets: n.Subnets, Services: slices.Grow([]Service(nil), len(n.Services))}
		for _, s := range n.Services {
			old := services[s.Name]
			s := stillService(old, s, holds)
			if old != nil || s.isWhole {
				still.Services = append(still.Services, s.Service)
			}
		}
		out.Networks[id] = still
	}
	return out
}

// partly is a service as it may be answered. It is whole unless it lacks a virtual
// address, by which its name would mean something else.
type partly struct {
	Service
	isWhole bool
}

// stillService is now as far as it may be answered; before is nil when it was not
// there.
func stillService(before *Service, now Service, holds func(netip.Addr) bool) partly {
	if before == nil {
		before = &Service{}
	}
	out := partly{now, true}
	if out.VIP = keep(now.VIP, func(a netip.Addr) bool { return holds != nil && holds(a) || slices.Contains(before.VIP, a) }); len(out.VIP) < len(now.VIP) {
		out.isWhole = len(out.VIP) > 0
	}
	if holds != nil {
		out.Tasks = keep(now.Tasks, func(t Task) bool { return !slices.ContainsFunc(t.Addrs, func(a netip.Addr) bool { return !holds(a) }) })
		return out
	}
	out.Tasks = nil
	for _, t := range now.Tasks {
		i := slices.IndexFunc(before.Tasks, func(o Task) bool { return slices.Equal(o.Names, t.Names) && slices.Equal(o.Addrs, t.Addrs) })
		if i >= 0 {
			t.Ready = t.Ready && before.Tasks[i].Ready
			out.Tasks = append(out.Tasks, t)
		}
	}
	return out
}

// keep is what f holds for; all itself if that is all.
func keep[T any](all []T, f func(T) bool) []T {
	if !slices.ContainsFunc(all, func(v T) bool { return !f(v) }) {
		return all
	}
	var out []T
	for _, v := range all {
		if f(v) {
			out = append(out, v)
		}
	}
	return out
}

// fold is the form of a name in the tables: lower case (RFC 4343), without the
// dot at its end.
func fold(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// NewSnapshot computes the lookup tables of r, which must not be written any more.
func NewSnapshot(r Records) *Snapshot { return newBuilder().update(r) }

// place is what stands before the service in the name of the task's place; "" =
// it has none.
func (t *Task) place() string {
	if t.Slot != 0 {
		return strconv.FormatUint(t.Slot, 10)
	}
	return fold(t.Host)
}

func readyAddrs(t Task) []netip.Addr {
	if !t.Ready {
		return nil
	}
	return t.Addrs
}

func qualified(name, network string) string {
	if network == "" {
		return name + "."
	}
	return name + "." + network + "."
}
