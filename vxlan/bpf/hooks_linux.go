package bpf

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
)

// hook is a program at the ingress of a link of the host's namespace.
type hook struct {
	pin     string // its name, of the link's pin where there is one
	ifindex int
	prog    string
}

func portHook(name string, ifindex int) hook { return hook{name, ifindex, overlayProgFromTask} }

// Hooks at devices are named by index, as a device may be renamed; ports' by
// their link ("wp…").
func underlayHook(ifindex int, native bool) hook {
	h := hook{"u" + strconv.Itoa(ifindex), ifindex, overlayProgFromUnderlay}
	if native {
		h.prog = overlayProgFromNative
	}
	return h
}

func tunnelHook(ifindex int) hook {
	return hook{"t" + strconv.Itoa(ifindex), ifindex, overlayProgFromTunnel}
}

// The two ways in which the kernel runs a program at a link's ingress.
const (
	// AttachTCX is a link of the BPF subsystem, pinned beside the maps (Linux
	// 6.6).
	AttachTCX = "tcx"
	// AttachClsact is a direct-action filter of a clsact qdisc.
	AttachClsact = "clsact"
)

// attacher attaches programs in one of the two ways. What is attached outlives
// the process. It belongs to one snapshot and is used by one goroutine.
type attacher interface {
	// isAttached reports whether the hook is there and runs the program of
	// this build.
	isAttached(h hook) bool
	// attach makes the hook as isAttached wants it. Where one stands, it runs
	// the old program until the moment it runs the new one.
	attach(h hook) error
	// standing is the hooks of this node that run a program on this node's
	// maps, of whichever build.
	standing() ([]hook, error)
	// sweep takes off everything of this node but the hooks to keep. Nothing of
	// anybody else is touched.
	sweep(keep map[string]hook) error
}

// attachers are the way of this build and kernel, and the other one, of which
// nothing may stay.
func (s *snapshot) attachers(way string) (via, other attacher) {
	t, c := &tcx{e: s.e, o: s.o}, &clsact{e: s.e, o: s.o, host: s.host}
	if way == AttachClsact {
		return c, t
	}
	return t, c
}

// adopt makes what another build of weft attached, perhaps in the other way, run
// the programs of this one. That is an upgrade and no repair.
func (s *snapshot) adopt() error {
	var errs []error
	for _, a := range []attacher{s.via, s.other} {
		hooks, err := a.standing()
		errs = append(errs, err)
		for _, h := range hooks {
			if !s.via.isAttached(h) {
				errs = append(errs, s.via.attach(h))
			}
		}
	}
	return errors.Join(errs...)
}

// ours is which of our programs has this id, of whichever build: one of that
// name on this node's maps. "" is a stranger.
func (o *objects) ours(id ebpf.ProgramID) string {
	for name, is := range o.ids {
		if id == is {
			return name
		}
	}
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil || !slices.Contains(progNames, info.Name) {
		return ""
	}
	used, _ := info.MapIDs()
	for _, m := range o.maps {
		mi, err := m.Info()
		if err != nil {
			continue
		}
		if id, ok := mi.ID(); ok && slices.Contains(used, id) {
			return info.Name
		}
	}
	return ""
}

// dump reads a whole map. Entries that change meanwhile may be seen or not. A
// nil map is empty.
func dump[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	out := make(map[K]V)
	if m == nil {
		return out, nil
	}
	keys, values := make([]K, dumpBatch), make([]V, dumpBatch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			out[keys[i]] = values[i]
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read map %s: %w", m, err)
		}
	}
}

// dumpBatch is how many entries one call reads. It must hold the fullest
// bucket of a hash table, which has a handful; larger ones cost more to clear
// than they save in calls.
const dumpBatch = 512
