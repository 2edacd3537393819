package bpf

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft/vxlan/linux"
)

// hook is a program at the ingress of a link of the host's namespace, or where the
// far end of a netkit pair sends.
type hook struct {
	pin     string // its name, of the link's pin where there is one
	ifindex int    // of the host's end
	prog    string
	netkit  bool
}

// portHook is that of a port, whose near end is l.
func portHook(l netlink.Link) hook {
	return hook{l.Attrs().Name, l.Attrs().Index, overlayProgFromTask, linux.IsNetkit(l)}
}

// Hooks at devices are named by index, as a device may be renamed; ports' by
// their link ("wp…").
func underlayHook(ifindex int, native bool) hook {
	h := hook{pin: "u" + strconv.Itoa(ifindex), ifindex: ifindex, prog: overlayProgFromUnderlay}
	if native {
		h.prog = overlayProgFromNative
	}
	return h
}

func tunnelHook(ifindex int) hook {
	return hook{pin: "t" + strconv.Itoa(ifindex), ifindex: ifindex, prog: overlayProgFromTunnel}
}

// The two ways in which the kernel runs a program at a link's ingress. Those of
// netkit pairs are attached in a third one, which is theirs alone.
const (
	// AttachTCX is a link of the BPF subsystem, pinned beside the maps (Linux
	// 6.6).
	AttachTCX = "tcx"
	// AttachClsact is a direct-action filter of a clsact qdisc.
	AttachClsact = "clsact"
)

// attacher attaches programs in one way. What is attached outlives
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
	t, c, n := &tcx{e: s.e, o: s.o}, &clsact{e: s.e, o: s.o, host: s.host}, &netkit{e: s.e, o: s.o, host: s.host}
	if way == AttachClsact {
		return split{n, c}, t
	}
	return split{n, t}, c
}

// split is one attacher for netkit pairs and another one for all else.
type split struct{ netkit, others attacher }

func (s split) of(h hook) attacher {
	if h.netkit {
		return s.netkit
	}
	return s.others
}

func (s split) isAttached(h hook) bool { return s.of(h).isAttached(h) }
func (s split) attach(h hook) error    { return s.of(h).attach(h) }

func (s split) standing() ([]hook, error) {
	a, err := s.netkit.standing()
	if err != nil {
		return nil, err
	}
	b, err := s.others.standing()
	return append(a, b...), err
}

func (s split) sweep(keep map[string]hook) error {
	each := map[bool]map[string]hook{true: {}, false: {}}
	for pin, h := range keep {
		each[h.netkit][pin] = h
	}
	return errors.Join(s.netkit.sweep(each[true]), s.others.sweep(each[false]))
}

// adopt makes what another build of weft attached, perhaps in the other way, run
// the programs of this one. That is an upgrade and no repair. A link may go
// meanwhile, as those of a task that ends do: then there is nothing to adopt.
func (s *snapshot) adopt() error {
	var errs []error
	for _, a := range []attacher{s.via, s.other} {
		hooks, err := a.standing()
		errs = append(errs, err)
		for _, h := range hooks {
			if s.via.isAttached(h) {
				continue
			}
			if err := s.via.attach(h); !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOLINK) {
				errs = append(errs, err)
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
