package bpf

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/vxlan"
)

// expressFor is how long after a pass over everything changes may be made without
// another one. Longer saves work in a storm of changes; what somebody else breaks
// in the meantime is seen that much later. Our own choice: with the five seconds
// of the agent's timer it stays below the ten of the promise.
const expressFor = 2 * time.Second

// lastPass is what the last pass over everything found; with it a few entries
// can be changed alone.
type lastPass struct {
	at   time.Time // zero: it had a fault, or there was none
	maps map[string]ebpf.MapID
}

// note files a pass that had no fault.
func (e *Engine) note(o *objects) {
	e.last = lastPass{at: time.Now(), maps: map[string]ebpf.MapID{}}
	for _, name := range []string{overlayMapMacs, overlayMapEps, overlayMapEpoch} {
		info, err := o.maps[name].Info()
		if id, ok := infoID(info); err == nil && ok {
			e.last.maps[name] = id
		}
	}
}

// express makes a change of a few entries, which it reads first: if one is not as
// it was left, if the way to a node is not known, or if anything else speaks
// against it, it reports false and a pass over everything follows.
func (e *Engine) express(want vxlan.State) bool {
	if e.last.at.IsZero() || time.Since(e.last.at) > expressFor || e.cfg.fail != nil {
		return false
	}
	ops, was, ok := e.audit.Delta(want)
	if !ok {
		return false
	}
	x := expressway{e: e, maps: map[string]*ebpf.Map{}}
	defer x.close()
	if x.open() != nil || !x.plan(ops, was, want) {
		return false
	}
	if !x.make() {
		e.audit.Unsure(ops)
		return false
	}
	e.audit.Left(want)
	return true
}

// expressway is one express change. Used by one goroutine.
type expressway struct {
	e       *Engine
	maps    map[string]*ebpf.Map
	changes []change
}

// make makes the changes. If it reports false, some may be made, and no epoch has
// begun: the pass that follows begins one.
func (x *expressway) make() bool {
	if endEpoch(x.maps[overlayMapEpoch]) != nil {
		return false
	}
	for _, c := range x.changes {
		if c.make() != nil {
			return false
		}
	}
	return beginEpoch(x.maps[overlayMapEpoch]) == nil
}

// change is one entry; a nil value removes it.
type change struct {
	m          *ebpf.Map
	key, value any
}

func (c change) make() error {
	if c.value != nil {
		return c.m.Put(c.key, c.value)
	}
	return c.m.Delete(c.key)
}

func (x *expressway) close() {
	for _, m := range x.maps {
		m.Close()
	}
}

// open takes the maps of the last pass and no others.
func (x *expressway) open() error {
	for name, id := range x.e.last.maps {
		m, err := ebpf.LoadPinnedMap(x.e.path(name), nil)
		if err != nil {
			return err
		}
		x.maps[name] = m
		info, err := m.Info()
		if now, ok := infoID(info); err != nil || !ok || now != id {
			return fmt.Errorf("map %s is another one: %w", name, err)
		}
	}
	return nil
}

// plan turns operations into changes, if every entry is as it was left.
func (x *expressway) plan(ops []vxlan.Op, was, want vxlan.State) bool {
	tables := map[uint32]vxlan.Tables{}
	heads := map[uint32]netValue{}
	for vni, n := range was.Networks {
		head, err := encodeNet(want.Networks[vni])
		if err != nil {
			return false
		}
		heads[vni], tables[vni] = head, vxlan.Derive(n)
	}
	for _, op := range ops {
		ok := false
		switch op.Kind {
		case vxlan.OpSetFDB, vxlan.OpDelFDB:
			ok = x.planFDB(op, heads[op.VNI], tables[op.VNI])
		case vxlan.OpSetNeigh, vxlan.OpDelNeigh:
			ok = x.planNeigh(op, tables[op.VNI])
		}
		if !ok {
			return false
		}
	}
	return true
}

func (x *expressway) planFDB(op vxlan.Op, head netValue, left vxlan.Tables) bool {
	mac := vxlan.MACOf(op.MAC)
	c := change{m: x.maps[overlayMapMacs], key: macKey{VNI: op.VNI, MAC: mac}}
	way, there := left.FDB[mac]
	old, known := x.entry(head, way, left.MTU[mac])
	if !known || !isAsLeft(c, old, there) {
		return false
	}
	if there && op.Kind == vxlan.OpSetFDB && op.VTEP == way.VTEP {
		return false // the path has changed, so the route may have, too
	}
	if op.Kind == vxlan.OpSetFDB {
		now, known := x.entry(head, vxlan.Way{VTEP: op.VTEP, Native: op.Native}, op.MTU)
		if !known {
			return false
		}
		c.value = now
	}
	x.changes = append(x.changes, c)
	return true
}

// entry is that of a way by the routes of the last pass; false if they do not
// know it.
func (x *expressway) entry(head netValue, way vxlan.Way, mtu int) (destValue, bool) {
	if !way.VTEP.IsValid() {
		return destValue{Kind: destVIP}, true
	}
	hop, ok := x.e.ways[[2]netip.Addr{head.VTEP.Addr(), way.VTEP}]
	return remoteBy(head, way, uint16(mtu), hop), ok
}

func (x *expressway) planNeigh(op vxlan.Op, left vxlan.Tables) bool {
	c := change{m: x.maps[overlayMapEps], key: epKey{VNI: op.VNI, Addr: addrOf(op.Addr)}}
	mac, there := left.Neigh[op.Addr]
	if !isAsLeft(c, epValue{MAC: mac}, there) {
		return false
	}
	if op.Kind == vxlan.OpSetNeigh {
		c.value = epValue{MAC: vxlan.MACOf(op.MAC)}
	}
	x.changes = append(x.changes, c)
	return true
}

// isAsLeft reports whether the map has what was left there.
func isAsLeft[V comparable](c change, left V, there bool) bool {
	var now V
	err := c.m.Lookup(c.key, &now)
	if !there {
		return errors.Is(err, ebpf.ErrKeyNotExist)
	}
	return err == nil && now == left
}
