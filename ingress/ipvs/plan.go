package ipvs

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// state is what one network's namespace holds for its services: a plain value,
// computed from ingress.Network and compared with what the kernel has.
type state struct {
	// local are the service addresses, each a local route.
	local map[netip.Addr]bool
	// near are the addresses of the node's own tasks, each a route by the balancer's
	// device: others may be led past the bridge (leg.out).
	near map[netip.Addr]bool
	// neigh are the backends' hardware addresses, each on the device that leads there.
	neigh map[netip.Addr]mac
	// services are the virtual services: those that have backends. What is
	// sent to another service address is refused by the namespace's own stack.
	services map[key][]dest
}

type mac [6]byte

// key is how IPVS knows a service: by the mark that the bridge's table gives to
// what is sent there (package nft, Diversion), one number for each family.
type key struct {
	is6  bool
	mark uint32
}

// keyOf is the key of a service address: its last four bytes, in the order in
// which they stand in a packet.
func keyOf(vip netip.Addr) key {
	b := vip.AsSlice()
	return key{vip.Is6(), binary.NativeEndian.Uint32(b[len(b)-4:])}
}

func (k key) String() string {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], k.mark)
	if k.is6 {
		return fmt.Sprintf("service ::%x:%x", binary.BigEndian.Uint16(b[:]), binary.BigEndian.Uint16(b[2:]))
	}
	return "service " + netip.AddrFrom4(b).String()
}

// dest is one backend of a service, by its address of the service's family.
type dest struct {
	addr   netip.Addr
	weight int // takes, or drains
}

const (
	takes  = 1
	drains = 0
)

// plan is the state that a network's services ask for. An error names what cannot
// be had; the rest is in the state.
func plan(n ingress.Network) (state, error) {
	s := state{local: make(map[netip.Addr]bool, len(n.Services)), near: map[netip.Addr]bool{}, neigh: map[netip.Addr]mac{}, services: make(map[key][]dest, len(n.Services))}
	for _, p := range n.Speakers {
		for _, a := range p.Addrs {
			if a.Is4() {
				s.near[a] = true
			}
		}
	}
	vips := make(map[key]netip.Addr, len(n.Services))
	for _, svc := range n.Services {
		k := keyOf(svc.VIP)
		if other, taken := vips[k]; taken || k.mark == 0 {
			return s, fmt.Errorf("service address %s: its last 32 bits are zero, or those of service address %s, by which IPVS would take the one for the other; give one of the services another address: %w",
				svc.VIP, other, weft.ErrConflict)
		}
		vips[k] = svc.VIP
		s.local[svc.VIP] = true
		dests, err := destsOf(svc)
		if err != nil {
			return s, err
		}
		for i, b := range svc.Backends {
			s.neigh[addrOf(b, k.is6)] = mac(svc.Backends[i].MAC)
		}
		if len(dests) > 0 {
			s.services[k] = dests
		}
	}
	return s, nil
}

// addrOf is the backend's address of a family; invalid without.
func addrOf(b ingress.Backend, is6 bool) netip.Addr {
	if b.Addr.Is6() == is6 {
		return b.Addr
	}
	return b.Addr6
}

// destsOf are the backends of a service in the order of their addresses.
func destsOf(s ingress.Service) ([]dest, error) {
	out := make([]dest, 0, len(s.Backends))
	for _, b := range s.Backends {
		a := addrOf(b, s.VIP.Is6())
		if !a.IsValid() || a.Is6() != s.VIP.Is6() || len(b.MAC) != 6 {
			return nil, fmt.Errorf("service address %s: backend %s has no address of that family, or no hardware address: %w", s.VIP, b.Task, weft.ErrInvalid)
		}
		d := dest{a, takes}
		if b.Draining {
			d.weight = drains
		}
		out = append(out, d)
	}
	slices.SortFunc(out, compareDests)
	return slices.CompactFunc(out, func(a, b dest) bool { return a.addr == b.addr }), nil
}

func compareDests(a, b dest) int {
	return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(b.weight, a.weight))
}

// verb is what is done with an object.
type verb uint8

const (
	add verb = iota
	change
	remove
)

// op is one change. What it is about is in the one field that is set, or in key.
type op struct {
	verb  verb
	local netip.Addr
	near  netip.Addr
	neigh netip.Addr
	mac   mac
	key   key
	dest  dest // zero: the service itself
}

// diff is the least that makes have equal to want: additions come before removals,
// and what a service stands on before and after it.
func diff(have, want state) []op {
	var ops, gone []op
	for _, a := range differing(want.local, have.local) {
		ops = append(ops, op{verb: add, local: a})
	}
	for _, a := range differing(want.near, have.near) {
		ops = append(ops, op{verb: add, near: a})
	}
	for _, a := range differing(want.neigh, have.neigh) {
		ops = append(ops, op{verb: add, neigh: a, mac: want.neigh[a]})
	}
	for _, k := range differingServices(want.services, have.services) {
		h, there := have.services[k]
		if !there {
			ops = append(ops, op{verb: add, key: k})
		}
		ops = append(ops, diffDests(k, h, want.services[k])...)
	}
	for _, k := range onlyIn(have.services, want.services, compareKeys) {
		gone = append(gone, op{verb: remove, key: k})
	}
	for _, a := range onlyIn(have.neigh, want.neigh, netip.Addr.Compare) {
		gone = append(gone, op{verb: remove, neigh: a})
	}
	for _, a := range onlyIn(have.near, want.near, netip.Addr.Compare) {
		gone = append(gone, op{verb: remove, near: a})
	}
	for _, a := range onlyIn(have.local, want.local, netip.Addr.Compare) {
		gone = append(gone, op{verb: remove, local: a})
	}
	return append(ops, gone...)
}

// differing are the keys of a that b lacks or has otherwise, sorted. Equal maps of
// a hundred thousand keys, as most are, are not sorted at all.
func differing[V comparable](a, b map[netip.Addr]V) []netip.Addr {
	var out []netip.Addr
	for k, v := range a {
		if w, ok := b[k]; !ok || w != v {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func differingServices(a, b map[key][]dest) []key {
	var out []key
	for k, v := range a {
		if w, ok := b[k]; !ok || !slices.Equal(v, w) {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, compareKeys)
	return out
}

// onlyIn are the keys of a that b lacks, sorted.
func onlyIn[K comparable, V any](a, b map[K]V, compare func(K, K) int) []K {
	var out []K
	for k := range a {
		if _, ok := b[k]; !ok {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, compare)
	return out
}

// diffDests merges two lists in the order of their addresses.
func diffDests(k key, have, want []dest) []op {
	var ops, gone []op
	for i, j := 0, 0; i < len(have) || j < len(want); {
		switch {
		case j == len(want) || i < len(have) && have[i].addr.Less(want[j].addr):
			gone = append(gone, op{verb: remove, key: k, dest: have[i]})
			i++
		case i == len(have) || want[j].addr.Less(have[i].addr):
			ops = append(ops, op{verb: add, key: k, dest: want[j]})
			j++
		default:
			if have[i].weight != want[j].weight {
				ops = append(ops, op{verb: change, key: k, dest: want[j]})
			}
			i, j = i+1, j+1
		}
	}
	return append(ops, gone...)
}

func compareKeys(a, b key) int {
	if a.is6 != b.is6 {
		if b.is6 {
			return -1
		}
		return 1
	}
	return cmp.Compare(a.mark, b.mark)
}

func sortDests(d []dest) { slices.SortFunc(d, compareDests) }
