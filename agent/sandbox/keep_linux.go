package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// box is what the maker remembers of one sandbox while somebody may ask for it.
type box struct {
	mu     sync.Mutex // held by whoever works on the sandbox; guards: memory, netNS, isGone
	memory memory
	netNS  uint64 // inode of the namespace that the memory is about; 0 = not read yet
	isGone bool   // destroyed: the map has no such box any more
}

// hold waits for the sandbox of a task and gives it to the caller until done.
func (m *Linux) hold(task weft.ID) (b *box, done func()) {
	for {
		m.boxesMu.Lock()
		b = m.boxes[task]
		if b == nil {
			b = &box{}
			m.boxes[task] = b
		}
		m.boxesMu.Unlock()
		b.mu.Lock()
		if !b.isGone {
			break
		}
		b.mu.Unlock()
	}
	return b, func() {
		if b.isGone = b.isGone || b.netNS == 0; b.isGone { // nothing is remembered of it
			m.boxesMu.Lock()
			delete(m.boxes, task)
			m.boxesMu.Unlock()
		}
		b.mu.Unlock()
	}
}

// forget lets the map lose the box when its holder is done.
func (b *box) forget() { b.isGone = true }

// Keep implements Maker.
func (m *Linux) Keep(ctx context.Context, specs []Spec) error {
	var errs []error
	g, err := m.keepGateway()
	if err != nil {
		errs = append(errs, err)
	}
	for _, s := range specs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if s.Gateway && !g.isThere() {
			continue // the cause is told once
		}
		if err := m.keepOne(ctx, s, g); err != nil {
			errs = append(errs, fmt.Errorf("keep sandbox of task %s: %w", s.Task.Short(), err))
		}
	}
	return errors.Join(errs...)
}

// keepOne leaves alone what is not there: only Make makes a namespace.
func (m *Linux) keepOne(ctx context.Context, s Spec, g gateway) error {
	if err := s.Validate(); err != nil {
		return err
	}
	b, done := m.hold(s.Task)
	defer done()
	_, err := m.converge(ctx, b, s, g, false)
	if errors.Is(err, errNoNamespace) {
		b.forget()
		return nil
	}
	return err
}

// errNoNamespace is a sandbox whose namespace file is not there.
var errNoNamespace = fmt.Errorf("its network namespace is gone: %w", weft.ErrNotFound)

// converge reads the sandbox and makes what differs; with all set also away what
// nobody wants, as before a container may have made it. It returns the address of
// the leg. The box is held.
func (m *Linux) converge(ctx context.Context, b *box, s Spec, g gateway, all bool) (netip.Prefix, error) {
	if err := ctx.Err(); err != nil {
		return netip.Prefix{}, err
	}
	path := m.describe(s.Task).NetNS
	if err := m.recall(b, s.Task, path); err != nil {
		return netip.Prefix{}, err
	}
	n, err := m.readNear(s.Task)
	if err != nil {
		return netip.Prefix{}, err
	}
	if s.Gateway && !g.fits(n.recorded) {
		m.mu.Lock()
		defer m.mu.Unlock()
	}
	plan, err := m.plan(b, s, g, path, n)
	if err != nil {
		return netip.Prefix{}, err
	}
	index := 0
	if s.Gateway {
		index = g.link.Attrs().Index
	}
	ops := Diff(plan.have, plan.want, b.memory.left, all)
	found := b.memory.findings(plan.have, ops, index)
	failed, err := m.carryOut(s.Task, path, plan, ops)
	m.remember(&b.memory, b.memory.after(plan.want, ops, found, failed, index), m.about(b), m.boxRecord(s.Task))
	m.report(ops, found, failed, " of task "+s.Task.Short())
	return plan.leg, err
}

func (m *Linux) boxRecord(task weft.ID) string {
	return filepath.Join(filepath.Dir(m.describe(task).HostsPath), recordName)
}

func (m *Linux) about(b *box) record {
	return record{Boot: m.boot(), Node: m.cfg.Node, NetNS: b.netNS}
}

// recall reads, once for each namespace, what was last left in it.
func (m *Linux) recall(b *box, task weft.ID, path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); errors.Is(err, unix.ENOENT) {
		return errNoNamespace
	} else if err != nil {
		return fmt.Errorf("look at network namespace %s: %w", path, err)
	}
	if b.netNS != st.Ino {
		b.netNS = st.Ino
		b.memory = readRecord(m.boxRecord(task)).memory(m.about(b))
	}
	return nil
}

// plan is one sandbox as it is and as it should be.
type plan struct {
	have, want State
	gateway    gateway // of the host, for a leg
	leg        netip.Prefix
}

// plan reads. While a leg has no address yet, the caller holds m.mu.
func (m *Linux) plan(b *box, s Spec, g gateway, path string, n near) (p plan, err error) {
	groups, err := m.groups()
	if err != nil {
		return p, err
	}
	if p.gateway = g; s.Gateway {
		if p.leg, err = m.chooseLeg(s.Task, g, n, b.memory.left); err != nil {
			return p, err
		}
	}
	p.want = s.wanted(groups, p.leg, g.addr.Addr())
	var in inside
	err = netns.Do(path, func() (err error) { in, err = readInside(p.want); return err })
	if errors.Is(err, weft.ErrNotFound) {
		return p, errNoNamespace
	}
	p.have = in.state
	if err == nil && n.link != nil {
		if s.Gateway {
			n.shortcut, err = m.shortcuts.faultOf(n.link, g.link)
		}
		p.have[Object{Leg, LegName}] = n.fault(in.far, g, p.leg)
	}
	return p, err
}

// carryOut makes the changes in order and goes on past failures, but for what
// stands on a leg that could not be made: the cause is told once.
func (m *Linux) carryOut(task weft.ID, path string, p plan, ops []Op) (failed map[Object]bool, err error) {
	failed = map[Object]bool{}
	var errs []error
	note := func(op Op, err error) {
		if err != nil {
			failed[op.Object] = true
			errs = append(errs, fmt.Errorf("%s: %w", op, err))
		}
	}
	hasNoLeg := false
	for len(ops) > 0 {
		if op := ops[0]; op.Class == Leg {
			ops = ops[1:]
			if op.Away {
				// Its address and route go with it.
				note(op, m.delLeg(task, path))
				ops = slices.DeleteFunc(slices.Clone(ops), func(o Op) bool { return o.Class == LegAddress || o.Class == Route })
				continue
			}
			note(op, m.makeLeg(task, path, p.gateway, p.leg))
			hasNoLeg = failed[op.Object]
			continue
		}
		// All in a row inside are made in one visit.
		n := 0
		for n < len(ops) && ops[n].Class != Leg {
			n++
		}
		visit := ops[:n]
		ops = ops[n:]
		err := netns.Do(path, func() error {
			for _, op := range visit {
				if hasNoLeg && op.Class > Leg {
					failed[op.Object] = true
					continue
				}
				note(op, makeInside(op, p.gateway.addr.Addr()))
			}
			return nil
		})
		if err != nil {
			for _, op := range visit {
				failed[op.Object] = true
			}
			errs = append(errs, err)
		}
	}
	return failed, errors.Join(errs...)
}

// remember replaces a memory, in its file, too, if it has changed. A full disk is no
// reason to hold up networks: then there is no record, or the next daemon would count
// by an old one.
func (m *Linux) remember(old *memory, next memory, about record, path string) {
	if next.equal(*old) {
		return
	}
	*old = next
	if err := next.record(about).write(path); err != nil {
		m.cfg.Log.Warn("what is left of a sandbox is not recorded: the next daemon does not count what is damaged before it starts",
			weft.KeyErr, errors.Join(err, os.RemoveAll(path)))
	}
}

// report tells the repairs that succeeded.
func (m *Linux) report(ops []Op, found []*weft.Repair, failed map[Object]bool, of string) {
	for i, r := range found {
		if r == nil || failed[ops[i].Object] || m.cfg.Repaired == nil {
			continue
		}
		r.Object += of
		m.cfg.Repaired(*r)
	}
}
