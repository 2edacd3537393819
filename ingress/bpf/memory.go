package bpf

import (
	"bytes"

	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// memory is what a pass over everything left behind that found no fault: with it a
// few services can be changed alone.
type memory struct {
	networks []ingress.Network
	// rings and backends are how many services use each: what nobody uses any more
	// is removed. backends is nil without programs of sockets.
	rings    map[uint64]int
	backends map[backendKey]int
}

// remember is the memory of what was just left; nil where a service address stands
// twice, or a backend with two addresses: such an entry has more than one wish.
func remember(networks []ingress.Network, left tables) *memory {
	m := &memory{networks: networks, rings: make(map[uint64]int, len(left.services))}
	for _, n := range networks {
		if !ingress.Unique(n.Services) {
			return nil
		}
	}
	for _, v := range left.services {
		m.rings[v.Ring]++
	}
	if left.backends != nil {
		m.backends = make(map[backendKey]int, len(left.backends))
		same := true
		for _, n := range networks {
			for i := range n.Services {
				countBackends(n.VNI, &n.Services[i], func(k backendKey, b *ingress.Backend) {
					m.backends[k]++
					same = same && addressesOf(b) == left.backends[k]
				})
			}
		}
		if !same {
			return nil
		}
	}
	return m
}

// countBackends calls f for each backend of a service, once where it stands twice.
func countBackends(vni uint32, s *ingress.Service, f func(backendKey, *ingress.Backend)) {
	if s == nil {
		return
	}
	for i := range s.Backends {
		b := &s.Backends[i]
		twice := false
		for j := i + 1; j < len(s.Backends); j++ {
			twice = twice || bytes.Equal(s.Backends[j].MAC, b.MAC) // the last one counts, as in planSockets
		}
		if !twice {
			f(backendKey{VNI: vni, MAC: vxlan.MACOf(b.MAC)}, b)
		}
	}
}

// expressMost is how many services may change without a pass over everything:
// beyond it that costs little more for each.
const expressMost = 64

// step is a change of a few entries: was is what they must be before, without what
// must not be there; is what they will be. Keys of either are all that is touched.
type step struct {
	was, is tables
	// rings and backends are what to add to the memory's counts, keep what flows
	// may lead to by service address afterwards; nil = the service is gone.
	rings    map[uint64]int
	backends map[backendKey]int
	keep     keep
	// lost: flows may lead to a backend that is not there any more.
	lost bool
}

// plan is the step from what was left to networks, if it is one of a few services of
// the same networks; false leaves it to a pass over everything.
func (m *memory) plan(networks []ingress.Network, left tables, kept keep) (step, bool) {
	if m == nil || len(networks) != len(m.networks) {
		return step{}, false
	}
	s := step{was: newTables(), is: newTables(), rings: map[uint64]int{}, backends: map[backendKey]int{}, keep: keep{}}
	many := 0
	for i := range networks {
		was, is := &m.networks[i], &networks[i]
		// By its first service and its last one a network comes to its tasks' sockets.
		if !is.SameBut(was) || (len(was.Services) == 0) != (len(is.Services) == 0) {
			return step{}, false
		}
		edits, ok := ingress.Changes(was.Services, is.Services, expressMost)
		if many += len(edits); !ok || many > expressMost || !m.planNetwork(&s, i, edits, left, kept) {
			return step{}, false
		}
	}
	if many == 0 {
		return step{}, false // somebody wants to know that all is well
	}
	return s, m.drop(&s, left)
}

func newTables() tables {
	return tables{services: map[overlay.AddrKey]serviceValue{}, slots: map[slotKey]chunkValue{}, socketTables: socketTables{backends: map[backendKey]backendValue{}}}
}

// planNetwork adds the edits of one network.
func (m *memory) planNetwork(s *step, network int, edits []ingress.Edit, left tables, kept keep) bool {
	vni := m.networks[network].VNI
	var now []ingress.Service
	for _, e := range edits {
		vip := e.Is
		if e.Is == nil {
			vip = e.Was
		} else {
			now = append(now, *e.Is)
		}
		if (e.Was == nil || e.Is == nil) && m.elsewhere(network, vip, left) {
			return false // which of its networks are a task's at its sockets may change
		}
		key := overlay.KeyOf(vni, vip.VIP)
		old, there := left.services[key]
		if there != (e.Was != nil) {
			return false
		}
		if there {
			s.was.services[key] = old
			s.rings[old.Ring]--
		}
		if m.backends != nil {
			countBackends(vni, e.Was, func(k backendKey, _ *ingress.Backend) { s.backends[k]-- })
			countBackends(vni, e.Is, func(k backendKey, _ *ingress.Backend) { s.backends[k]++ })
		}
		s.keep[key] = nil
	}
	one := []ingress.Network{{VNI: vni, Services: now}}
	want, allowed := plan(one)
	for k, v := range want.services {
		s.is.services[k] = v
		s.rings[v.Ring]++
		s.keep[k] = allowed[k]
	}
	for k, v := range want.slots {
		s.is.slots[k] = v
	}
	for k, now := range s.keep {
		s.lost = s.lost || keep{k: now}.lost(keep{k: kept[k]})
	}
	if m.backends == nil {
		return true
	}
	same := true
	for i := range now {
		countBackends(vni, &now[i], func(k backendKey, b *ingress.Backend) {
			v := addressesOf(b)
			other, ok := s.is.backends[k]
			same = same && (!ok || other == v) // one backend has one wish
			s.is.backends[k] = v
		})
	}
	return same
}

// elsewhere reports whether a service address is one in another network, too.
func (m *memory) elsewhere(network int, s *ingress.Service, left tables) bool {
	for i := range m.networks {
		if _, ok := left.services[overlay.KeyOf(m.networks[i].VNI, s.VIP)]; ok && i != network {
			return true
		}
	}
	return false
}

// drop completes the step by what was there of what it touches, and by what nobody
// uses afterwards.
func (m *memory) drop(s *step, left tables) bool {
	for k, by := range s.backends {
		old, there := left.backends[k]
		now, wanted := s.is.backends[k]
		rest := m.backends[k] + by
		switch {
		case rest < 0 || there != (m.backends[k] > 0):
			return false
		case wanted && there && old != now && rest > s.users(k):
			return false // the others want it as it was
		case !wanted && rest > 0:
			continue // not touched
		case there:
			s.was.backends[k] = old
		}
	}
	for k := range s.is.slots {
		if old, ok := left.slots[k]; ok {
			s.was.slots[k] = old
		}
	}
	for ring, by := range s.rings {
		if rest := m.rings[ring] + by; ring == 0 || rest > 0 {
			continue
		} else if rest < 0 {
			return false
		}
		for c := uint32(0); ; c++ {
			k := slotKey{Ring: ring, Chunk: c}
			old, ok := left.slots[k]
			if !ok {
				break
			}
			s.was.slots[k] = old
		}
	}
	return true
}

// users is how many services of the step use a backend afterwards.
func (s *step) users(k backendKey) int {
	n := 0
	for service, macs := range s.keep {
		if service.VNI == k.VNI && macs[k.MAC] {
			n++
		}
	}
	return n
}

// done files a step that was made: left and kept become what they are now.
func (m *memory) done(s *step, networks []ingress.Network, left *tables, kept keep) {
	m.networks = networks
	for ring, by := range s.rings {
		addCount(m.rings, ring, by)
	}
	for k, by := range s.backends {
		addCount(m.backends, k, by)
	}
	replaceKeys(left.services, s.was.services, s.is.services)
	replaceKeys(left.slots, s.was.slots, s.is.slots)
	replaceKeys(left.backends, s.was.backends, s.is.backends)
	for k, macs := range s.keep {
		if macs == nil {
			delete(kept, k)
		} else {
			kept[k] = macs
		}
	}
}

func addCount[K comparable](counts map[K]int, k K, by int) {
	if counts[k] += by; counts[k] == 0 {
		delete(counts, k)
	}
}

func replaceKeys[K, V comparable](m, was, is map[K]V) {
	for k := range was {
		delete(m, k)
	}
	for k, v := range is {
		m[k] = v
	}
}
