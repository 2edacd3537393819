package bpf

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Folders of the pins of links.
const (
	tcxDir    = "links"
	netkitDir = "netkit"
)

// tcx is the attacher of pinned links at the ingress of devices.
type tcx struct {
	e *Engine
	o *objects
}

// isAttached wants the link to be there, pinned, and to run the program.
func (t *tcx) isAttached(h hook) bool {
	at, prog := t.look(h.pin)
	return at == h.ifindex && prog != 0 && prog == t.o.ids[h.prog]
}

func (t *tcx) look(pin string) (ifindex int, prog ebpf.ProgramID) {
	l, err := link.LoadPinnedLink(t.e.path(tcxDir, pin), nil)
	if err != nil {
		return 0, 0
	}
	defer l.Close()
	return attachment(l)
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

func (t *tcx) attach(h hook) error {
	path := t.e.path(tcxDir, h.pin)
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		defer l.Close()
		at, prog := attachment(l)
		if at == h.ifindex && prog == t.o.ids[h.prog] {
			return nil
		}
		if at == h.ifindex {
			if err := l.Update(t.o.progs[h.prog]); err != nil {
				return fmt.Errorf("replace program %s at link %d: %w", h.prog, h.ifindex, err)
			}
			return nil
		}
	}
	l, err := attachTCX(h.ifindex, t.o.progs[h.prog])
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

func attachTCX(ifindex int, p *ebpf.Program) (link.Link, error) {
	return patiently(func() (link.Link, error) {
		return link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: ebpf.AttachTCXIngress})
	})
}

func patiently(attach func() (link.Link, error)) (link.Link, error) {
	for try := 1; ; try++ {
		l, err := attach()
		if !errors.Is(err, unix.EEXIST) || try == attachTries {
			return l, err
		}
		time.Sleep(attachPause)
	}
}

func (t *tcx) standing() ([]hook, error) {
	pins, err := t.e.pinsIn(tcxDir)
	if err != nil {
		return nil, err
	}
	var out []hook
	for _, pin := range pins {
		at, id := t.look(pin)
		if prog := t.o.ours(id); at != 0 && prog != "" {
			out = append(out, hook{pin: pin, ifindex: at, prog: prog})
		}
	}
	return out, nil
}

func (t *tcx) sweep(keep map[string]hook) error { return t.e.unpin(tcxDir, keep) }

// unpin removes the pins of links in a folder but those to keep: a link without a
// pin goes.
func (e *Engine) unpin(dir string, keep map[string]hook) error {
	pins, err := e.pinsIn(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, pin := range pins {
		if _, ok := keep[pin]; ok {
			continue
		}
		if err := os.Remove(e.path(dir, pin)); err != nil && !isAbsent(err) {
			errs = append(errs, fmt.Errorf("remove link %s: %w", pin, err))
		}
	}
	return errors.Join(errs...)
}

// pinsIn lists the pins of links in a folder.
func (e *Engine) pinsIn(dir string) ([]string, error) {
	entries, err := os.ReadDir(e.path(dir))
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
