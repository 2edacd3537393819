package bpf

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// hook is a program at the ingress of a link of the host's namespace.
type hook struct {
	pin     string // name of the link's pin
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

// isAttached reports whether the hook's link is there, pinned, and runs the
// program of this build.
func (e *Engine) isAttached(o *objects, h hook) bool {
	l, err := link.LoadPinnedLink(e.path("links", h.pin), nil)
	if err != nil {
		return false
	}
	defer l.Close()
	at, prog := attachment(l)
	return at == h.ifindex && prog != 0 && prog == o.ids[h.prog]
}

// attachment is where a link is attached, 0 for nowhere any more: its device is
// gone, or somebody detached it.
func attachment(l link.Link) (ifindex int, prog ebpf.ProgramID) {
	info, err := l.Info()
	if err != nil {
		return 0, 0
	}
	tcx := info.TCX()
	if tcx == nil {
		return 0, 0
	}
	return int(tcx.Ifindex), info.Program
}

// attach makes the hook as isAttached wants it. A link that stands runs the old
// program until the moment it runs the new one.
func (e *Engine) attach(o *objects, h hook) error {
	path := e.path("links", h.pin)
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		defer l.Close()
		at, prog := attachment(l)
		if at == h.ifindex && prog == o.ids[h.prog] {
			return nil
		}
		if at == h.ifindex {
			if err := l.Update(o.progs[h.prog]); err != nil {
				return fmt.Errorf("replace program %s at link %d: %w", h.prog, h.ifindex, err)
			}
			return nil
		}
	}
	l, err := attachNew(h.ifindex, o.progs[h.prog])
	if err != nil {
		return fmt.Errorf("attach program %s to link %d: %w", h.prog, h.ifindex, err)
	}
	defer l.Close()
	if err := repin(l.Pin, path); err != nil {
		return fmt.Errorf("pin link of program %s at link %d: %w", h.prog, h.ifindex, err)
	}
	return nil
}

// Our own choices. A link that nobody holds any more is taken off by a worker
// of the kernel, within a millisecond on an idle machine; until then the same
// program cannot be attached to the same device.
const (
	attachTries = 100
	attachPause = 2 * time.Millisecond
)

func attachNew(ifindex int, p *ebpf.Program) (link.Link, error) {
	for try := 1; ; try++ {
		l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: ebpf.AttachTCXIngress})
		if !errors.Is(err, unix.EEXIST) || try == attachTries {
			return l, err
		}
		time.Sleep(attachPause)
	}
}

// detach removes a hook by its pin; one that is not there is success.
func (e *Engine) detach(pin string) error {
	if err := os.Remove(e.path("links", pin)); err != nil && !isAbsent(err) {
		return fmt.Errorf("remove link %s: %w", pin, err)
	}
	return nil
}

// hooks lists the pins of links.
func (e *Engine) hooks() ([]string, error) {
	entries, err := os.ReadDir(e.path("links"))
	if isAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list pinned links: %w", err)
	}
	names := make([]string, len(entries))
	for i, f := range entries {
		names[i] = f.Name()
	}
	return names, nil
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
