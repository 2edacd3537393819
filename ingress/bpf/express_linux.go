package bpf

import (
	"errors"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/ingress"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// expressFor is how long after a pass over everything changes may be made without
// another one: with the five seconds of the agent's timer, what somebody breaks is
// still mended in ten. Where a pass over everything takes long it is twice that, so
// that passes leave time for changes. Our own choice, as of the other engines.
const expressFor = 4 * time.Second

// wholePass is the last pass over everything.
type wholePass struct {
	*memory // nil: it had a fault, or there was none
	at      time.Time
	took    time.Duration
	// maps are those that it was about, prog what it found in the hook.
	maps map[string]ebpf.MapID
	prog ebpf.ProgramID
}

// expressMaps are what a change of a few services reads and writes.
func (e *Engine) expressMaps() []string {
	names := []string{overlay.MapHooks, overlay.MapNets, balanceMapServices, balanceMapSlots, balanceMapFlows, balanceMapPassing}
	if e.sockets.isOn() {
		names = append(names, socketMapTasks, socketMapBackends, socketMapConnected, socketMapAsked)
	}
	return names
}

// note files a pass that had no fault.
func (e *Engine) note(p *pinned, t ingress.Table, start time.Time) {
	w := wholePass{memory: remember(t.Networks, *e.left), at: time.Now(), took: time.Since(start), maps: map[string]ebpf.MapID{}}
	for _, name := range e.expressMaps() {
		if w.maps[name] = mapID(p.maps[name]); w.maps[name] == 0 {
			return
		}
	}
	info, err := p.prog.Info()
	if err != nil {
		return
	}
	w.prog, _ = info.ID()
	e.whole = w
}

// applyExpress makes a change of a few services, whose entries it reads first: if one
// is not as it was left, or anything else speaks against it, it reports false and a
// pass over everything follows, which also finishes what was begun.
func (e *Engine) applyExpress(t ingress.Table) bool {
	if e.whole.memory == nil || e.left == nil || time.Since(e.whole.at) > max(expressFor, 2*e.whole.took) {
		return false
	}
	if at := e.sockets.sweepAt; !at.IsZero() && !time.Now().Before(at) {
		return false // connections that were spared are looked at
	}
	s, ok := e.whole.plan(t.Networks, *e.left, e.kept)
	if !ok {
		return false
	}
	p := &pinned{maps: map[string]*ebpf.Map{}}
	defer p.close()
	if !e.openExpress(p, t.Networks) || !p.isAsLeft(s) || p.write(s.was, s.is) != nil {
		return false
	}
	e.whole.done(&s, t.Networks, e.left, e.kept)
	if !e.endFlows(p, s.lost, t.Networks) {
		e.kept = nil // nobody knows which have ended: all are asked
		return false
	}
	return true
}

// endFlows ends what leads to a backend that is gone.
func (e *Engine) endFlows(p *pinned, lost bool, networks []ingress.Network) bool {
	if lost && p.prune(e.kept) != nil {
		return false
	}
	release := e.sockets.isOn() && e.sockets.mayEnd(func() bool { return lost }, time.Now())
	return !release || p.release(e.kept, socketsOf(networks)) == nil
}

// openExpress opens the maps of the last pass and no others, if the program is
// still where it was, and the overlay has the networks.
func (e *Engine) openExpress(p *pinned, networks []ingress.Network) bool {
	for name, id := range e.whole.maps {
		path := filepath.Join(e.dir, "balance", name)
		if name == overlay.MapHooks || name == overlay.MapNets {
			path = filepath.Join(e.dir, name)
		}
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return false
		}
		if p.maps[name] = m; mapID(m) != id {
			return false
		}
	}
	for i := range networks {
		if raw, err := p.maps[overlay.MapNets].LookupBytes(networks[i].VNI); err != nil || raw == nil {
			return false
		}
	}
	var prog ebpf.ProgramID
	return p.maps[overlay.MapHooks].Lookup(overlay.HookBalance, &prog) == nil && prog == e.whole.prog
}

// isAsLeft reports whether the maps have what the step is to change.
func (p *pinned) isAsLeft(s step) bool {
	return allAsLeft(p.maps[balanceMapServices], s.was.services, s.is.services) &&
		allAsLeft(p.maps[balanceMapSlots], s.was.slots, s.is.slots) &&
		allAsLeft(p.maps[socketMapBackends], s.was.backends, s.is.backends)
}

func allAsLeft[K, V comparable](m *ebpf.Map, was, is map[K]V) bool {
	for k, w := range was {
		var now V
		if m.Lookup(k, &now) != nil || now != w {
			return false
		}
	}
	for k := range is {
		if _, ok := was[k]; ok {
			continue
		}
		if err := m.Lookup(k, new(V)); !errors.Is(err, ebpf.ErrKeyNotExist) {
			return false
		}
	}
	return true
}
