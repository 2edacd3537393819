package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/ingress"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// converge makes the maps equal to want: backends before the rings that lead to
// them, rings before the services that name them, services before the rings that
// nobody names go. A packet sees a service
// with its old ring or with its new one. It returns what the maps held.
func (p *pinned) converge(want tables) (have tables, err error) {
	slots, err := overlay.Dump[slotKey, chunkValue](p.maps[balanceMapSlots])
	if err != nil {
		return have, err
	}
	services, err := overlay.Dump[overlay.AddrKey, serviceValue](p.maps[balanceMapServices])
	if err != nil {
		return have, err
	}
	have = tables{services: services, slots: slots}
	if p.maps[socketMapTasks] != nil {
		if have.tasks, err = overlay.Dump[uint64, taskValue](p.maps[socketMapTasks]); err != nil {
			return have, err
		}
		if have.backends, err = overlay.Dump[backendKey, backendValue](p.maps[socketMapBackends]); err != nil {
			return have, err
		}
	}
	return have, p.write(have, want)
}

func (p *pinned) write(have, want tables) error {
	services, slots := have.services, have.slots
	tasks, backends := p.maps[socketMapTasks], p.maps[socketMapBackends]
	if tasks != nil {
		if err := add(backends, have.backends, want.backends); err != nil {
			return err
		}
	}
	if err := add(p.maps[balanceMapSlots], slots, want.slots); err != nil {
		return err
	}
	if err := add(p.maps[balanceMapServices], services, want.services); err != nil {
		return err
	}
	if err := del(p.maps[balanceMapServices], services, want.services); err != nil {
		return err
	}
	if err := del(p.maps[balanceMapSlots], slots, want.slots); err != nil || tasks == nil {
		return err
	}
	return errors.Join(add(tasks, have.tasks, want.tasks), del(tasks, have.tasks, want.tasks), del(backends, have.backends, want.backends))
}

// prune ends the flows that lead to what takes no packets any more.
func (p *pinned) prune(k keep) error {
	return ingress.EndFlows(ingress.PacketsPass, func() (ended int, err error) {
		for _, name := range []string{balanceMapFlows, balanceMapPassing} {
			n, err := endFlows(p.maps[name], func(f flowKey, v overlay.MACValue) bool { return k.allows(f, v.MAC) })
			if ended += n; err != nil {
				return ended, err
			}
		}
		return ended, nil
	}, 1)
}

// endFlows deletes the flows of a map that may not stay, and says how many those were.
func endFlows[K, V comparable](m *ebpf.Map, mayStay func(K, V) bool) (ended int, err error) {
	flows, err := overlay.Dump[K, V](m)
	if err != nil {
		return 0, err
	}
	for k, v := range flows {
		if mayStay(k, v) {
			continue
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return ended, fmt.Errorf("delete a flow: %w", err)
		}
		ended++
	}
	return ended, nil
}

// add writes what is missing or differs, in one call.
func add[K, V comparable](m *ebpf.Map, have, want map[K]V) error {
	room := max(len(want)-len(have), 0)
	keys, values := make([]K, 0, room), make([]V, 0, room)
	for k, v := range want {
		if old, ok := have[k]; !ok || old != v {
			keys, values = append(keys, k), append(values, v)
		}
	}
	if len(keys) == 0 {
		return nil
	}
	if n, err := m.BatchUpdate(keys, values, nil); err != nil {
		return fmt.Errorf("write map %s (of at most %d entries), %d of %d done: %w", m, m.MaxEntries(), n, len(keys), err)
	}
	return nil
}

// del removes what is not wanted.
func del[K comparable, V any](m *ebpf.Map, have, want map[K]V) error {
	for k := range have {
		if _, ok := want[k]; ok {
			continue
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete from map %s: %w", m, err)
		}
	}
	return nil
}
