package bpf

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// The following are the structs of c/socket.c, without holes.

// maxTaskNets is how many networks of a task are balanced at its sockets.
const maxTaskNets = 8

type taskValue struct {
	Count uint32
	VNI   [maxTaskNets]uint32
	Zero  uint32
}

type backendKey struct {
	VNI  uint32
	MAC  vxlan.MAC
	Zero uint16
}

type backendValue struct {
	V4, V6 [16]byte
}

type partnerKey struct {
	Cookie uint64
	Addr   [16]byte
	Port   uint32 // network order, as the kernel gives it
	Zero   uint32
}

type standIn struct {
	Addr [16]byte
	VNI  uint32
	MAC  vxlan.MAC
	Zero uint16
}

type joinedValue struct {
	Addr [16]byte
	Port uint32 // as in partnerKey
	Is   standIn
}

// socketTables are what the programs of sockets read besides rings.
type socketTables struct {
	tasks    map[uint64]taskValue // by network-namespace cookie
	backends map[backendKey]backendValue
}

// planSockets computes them. cookie says by which number the kernel knows a task's
// namespace; false leaves the task to its veth.
func planSockets(networks []ingress.Network, cookie func(path string) (uint64, bool)) socketTables {
	count := 0
	for _, n := range networks {
		for _, s := range n.Services {
			count += len(s.Backends)
		}
	}
	t := socketTables{tasks: map[uint64]taskValue{}, backends: make(map[backendKey]backendValue, count)}
	networks = slices.SortedFunc(slices.Values(networks), func(a, b ingress.Network) int { return cmp.Compare(a.VNI, b.VNI) })
	for _, n := range networks {
		for _, s := range n.Services {
			for _, b := range s.Backends {
				t.backends[backendKey{VNI: n.VNI, MAC: vxlan.MACOf(b.MAC)}] = addressesOf(&b)
			}
		}
	}
	for path, on := range networksOf(networks) {
		c, ok := cookie(path)
		if !ok || len(on) == 0 {
			continue
		}
		v := taskValue{Count: uint32(min(len(on), maxTaskNets))}
		copy(v.VNI[:], on)
		t.tasks[c] = v
	}
	return t
}

// addressesOf are a backend's addresses, one of each family.
func addressesOf(b *ingress.Backend) backendValue {
	var v backendValue
	for _, a := range []*[16]byte{&v.V4, &v.V6} {
		addr := b.Addr
		if (a == &v.V6) == (!b.Addr.IsValid() || b.Addr.Is4()) {
			addr = b.Addr6
		}
		if addr.IsValid() && addr.Is4() == (a == &v.V4) {
			*a = addr.As16()
		}
	}
	return v
}

// networksOf are, by task, those that have services, in their order. Two of one
// task in which the same address is a service's are left to the veth: only the
// way that a packet takes says which is meant.
func networksOf(networks []ingress.Network) map[string][]uint32 {
	has, same := map[netip.Addr][]uint32{}, map[[2]uint32]bool{}
	for _, n := range networks {
		for _, s := range n.Services {
			for _, other := range has[s.VIP] {
				if other != n.VNI {
					same[[2]uint32{other, n.VNI}], same[[2]uint32{n.VNI, other}] = true, true
				}
			}
			has[s.VIP] = append(has[s.VIP], n.VNI)
		}
	}
	all := map[string][]uint32{}
	for _, n := range networks {
		for _, path := range n.Tasks {
			if len(n.Services) > 0 && !slices.Contains(all[path], n.VNI) {
				all[path] = append(all[path], n.VNI)
			}
		}
	}
	for path, on := range all {
		all[path] = slices.DeleteFunc(slices.Clone(on), func(vni uint32) bool {
			return slices.ContainsFunc(on, func(other uint32) bool { return same[[2]uint32{vni, other}] })
		})
	}
	return all
}

// socketDamage is damage for these tables: a task and a backend are one object each.
func socketDamage(left, have, want socketTables) []weft.Repair {
	out := entryDamage("task sockets", left.tasks, have.tasks, want.tasks, func(c uint64) string { return fmt.Sprintf("network namespace %d", c) })
	return append(out, entryDamage("backend", left.backends, have.backends, want.backends, func(k backendKey) string {
		return fmt.Sprintf("backend %s of network %d", k.MAC.HardwareAddr(), k.VNI)
	})...)
}

// entryDamage tells what others have done to the entries of one map since they were
// left, as far as no wish explains it.
func entryDamage[K, V comparable](what string, left, have, want map[K]V, words func(K) string) []weft.Repair {
	var out []weft.Repair
	for k, l := range left {
		h, there := have[k]
		w, wanted := want[k]
		switch {
		case !wanted, there && (h == l || h == w):
		case !there:
			out = append(out, weft.Repair{Kind: what + " " + missing, Object: words(k), Reason: reasonGone})
		default:
			out = append(out, weft.Repair{Kind: what + " " + wrong, Object: words(k), Reason: "it was changed"})
		}
	}
	for k := range have {
		_, inLeft := left[k]
		if _, wanted := want[k]; !inLeft && !wanted {
			out = append(out, weft.Repair{Kind: what + " " + stray, Object: words(k), Reason: "weft did not write it"})
		}
	}
	slices.SortFunc(out, func(a, b weft.Repair) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Object, b.Object))
	})
	return out
}

// service is the key under which a flow to a stand-in's address is allowed.
func (s standIn) service() flowKey { return flowKey{VNI: s.VNI, Dst: s.Addr} }
