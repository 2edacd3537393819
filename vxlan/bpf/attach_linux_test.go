package bpf

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// qdiscOf is the kind of the qdisc at a link's ingress, "" for none.
func qdiscOf(t testing.TB, name string) string {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	qs, err := netlink.QdiscList(l)
	must(t, err)
	for _, q := range qs {
		if q.Attrs().Parent == netlink.HANDLE_CLSACT {
			return q.Type()
		}
	}
	return ""
}

// attached is what of the host's programs is attached, in either way: where, and
// which object it is.
func (h *testHost) attached() []string {
	h.t.Helper()
	var out []string
	for dir, way := range map[string]string{tcxDir: AttachTCX, netkitDir: PortsNetkit} {
		pins, err := h.engine().pinsIn(dir)
		must(h.t, err)
		for _, pin := range pins {
			l, err := link.LoadPinnedLink(h.engine().path(dir, pin), nil)
			must(h.t, err)
			info, err := l.Info()
			must(h.t, err)
			out = append(out, fmt.Sprintf("%s %s link %d program %d", way, pin, info.ID, info.Program))
			must(h.t, l.Close())
		}
	}
	must(h.t, h.ns.Do(func() error {
		ls, err := netlink.LinkList()
		for _, l := range ls {
			for _, f := range h.filtersOf(l) {
				out = append(out, fmt.Sprintf("clsact %s %s program %d", l.Attrs().Name, f.Name, f.Id))
			}
		}
		return err
	}))
	slices.Sort(out)
	return out
}

// filtersOf are this node's filters at a link of the calling thread's namespace.
func (h *testHost) filtersOf(l netlink.Link) []ownFilter {
	h.t.Helper()
	var out []ownFilter
	fs, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
	must(h.t, err)
	for _, f := range fs {
		if own, ok := h.engine().own(f); ok {
			out = append(out, own)
		}
	}
	return out
}

// detach takes the program of a link off, in the way in which it is attached.
func (h *testHost) detach(name string) error {
	return h.inHost(name, func(l netlink.Link) error {
		if h.way == AttachClsact {
			fs := h.filtersOf(l)
			if len(fs) != 1 {
				return fmt.Errorf("%s has %d filters, want 1", name, len(fs))
			}
			return netlink.FilterDel(fs[0].BpfFilter)
		}
		for _, pin := range []string{name, underlayHook(l.Attrs().Index, false).pin, tunnelHook(l.Attrs().Index).pin} {
			found, err := filepath.Glob(h.engine().path("*", pin)) // of either kind of link
			if err != nil || len(found) == 0 {
				continue
			}
			p, err := link.LoadPinnedLink(found[0], nil)
			if err != nil {
				return err
			}
			return errors.Join(p.Detach(), p.Close())
		}
		return fmt.Errorf("%s has no link", name)
	})
}

func (h *testHost) addQdisc(l netlink.Link) error { return netlink.QdiscAdd(clsactAt(l.Attrs().Index)) }
func (h *testHost) delQdisc(l netlink.Link) error { return netlink.QdiscDel(clsactAt(l.Attrs().Index)) }

// stranger is a program of somebody else that lets all pass.
func stranger(t testing.TB) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "from_underlay", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	must(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

// replaceFilter puts a stranger's program where ours is, under our name.
func (h *testHost) replaceFilter(l netlink.Link) error {
	f := h.engine().filter(hook{ifindex: l.Attrs().Index, prog: overlayProgFromUnderlay}, true, stranger(h.t).FD())
	return netlink.FilterReplace(f)
}

// foreignFilter puts a stranger's filter at a link.
func foreignFilter(t testing.TB, l netlink.Link, parent uint32, priority uint16) error {
	return netlink.FilterAdd(&netlink.BpfFilter{Name: "theirs", Fd: stranger(t).FD(), DirectAction: true,
		FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: parent, Priority: priority, Protocol: unix.ETH_P_ALL}})
}

// theirs counts the filters of strangers at a link, in one direction.
func theirs(t testing.TB, l netlink.Link, parent uint32) (n int) {
	t.Helper()
	fs, err := netlink.FilterList(l, parent)
	must(t, err)
	for _, f := range fs {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == "theirs" {
			n++
		}
	}
	return n
}

// TestOthersFiltersStay: a device that others have filters on keeps them and its
// qdisc, whoever made that, and their filters see what is not weft's.
func TestOthersFiltersStay(t *testing.T) {
	for _, c := range []struct {
		name   string
		before func(netlink.Link) error // Apply
		after  func(netlink.Link) error
		qdisc  string // that stays
		counts [2]int // filters of theirs, in and out
	}{
		{name: "none"},
		{name: "an empty qdisc of theirs", before: func(l netlink.Link) error {
			return netlink.QdiscAdd(clsactAt(l.Attrs().Index))
		}, qdisc: "clsact"},
		{name: "an ingress qdisc", before: func(l netlink.Link) error {
			return netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_INGRESS}})
		}, qdisc: "ingress"},
		{name: "filters before and after", before: func(l netlink.Link) error {
			return errors.Join(netlink.QdiscAdd(clsactAt(l.Attrs().Index)), foreignFilter(t, l, netlink.HANDLE_MIN_INGRESS, 1))
		}, after: func(l netlink.Link) error {
			return foreignFilter(t, l, netlink.HANDLE_MIN_INGRESS, 0) // the kernel chooses
		}, qdisc: "clsact", counts: [2]int{2, 0}},
		{name: "a filter for what goes out, on our qdisc", after: func(l netlink.Link) error {
			return foreignFilter(t, l, netlink.HANDLE_MIN_EGRESS, 0)
		}, qdisc: "clsact", counts: [2]int{0, 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			hosts := rig(t, plan{way: AttachClsact, hosts: 2})
			h, other := hosts[0], hosts[1]
			h.qdisc = c.qdisc
			if c.before != nil {
				must(t, h.inHost("under0", c.before))
			}
			m := meshOf(t, plan{way: AttachClsact}, hosts, false)
			if c.after != nil {
				must(t, h.inHost("under0", c.after))
			}
			must(t, h.apply(m.want[h]))
			expectEqual(t, h, m.want[h])
			must(t, overTCP(m.ports[h][0], m.ports[other][0]))
			check := func() {
				t.Helper()
				must(t, h.inHost("under0", func(l netlink.Link) error {
					in, out := theirs(t, l, netlink.HANDLE_MIN_INGRESS), 0
					if c.qdisc != "ingress" {
						out = theirs(t, l, netlink.HANDLE_MIN_EGRESS)
					}
					if got := [2]int{in, out}; got != c.counts {
						t.Errorf("they have %v filters in and out, want %v", got, c.counts)
					}
					return nil
				}))
			}
			check()
			must(t, h.apply(vxlan.State{}))
			check()
			must(t, h.inHost("under0", func(l netlink.Link) error {
				if fs := h.filtersOf(l); len(fs) > 0 {
					t.Errorf("%d filters of ours are left", len(fs))
				}
				return nil
			}))
		})
	}
}

// TestOneWayAtATime: after an upgrade to a kernel or a build that attaches in the
// other way, nothing is attached in both, an open connection goes on, and none of
// it is a repair.
func TestOneWayAtATime(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		if way == PortsNetkit {
			return // TestPortsKeepTheirKind has the ports that stay
		}
		from := map[string]string{AttachTCX: AttachClsact, AttachClsact: AttachTCX}[way]
		needWay(t, from)
		m := newMesh(t, plan{way: from, hosts: 2}, false)
		h, other := m.hosts[0], m.hosts[1]
		must(t, whileConnected(m.ports[other][0], m.ports[h][0], func() error {
			h.restart(way)
			return h.apply(m.want[h])
		}))
		expectEqual(t, h, m.want[h])
		if got := h.repairs(); len(got) > 0 {
			t.Errorf("repaired: %v", got)
		}
		for _, a := range h.attached() {
			if a[:len(way)] != way {
				t.Errorf("attached is still %s", a)
			}
		}
		if n := len(h.attached()); n != 4 {
			t.Errorf("%d programs are attached, want 4: %v", n, h.attached())
		}
		m.all(t, overTCP)
	})
}

// TestBrokenOffQdisc: a daemon that died between noting a qdisc and making it, or
// between making it and its filter, leaves nothing.
func TestBrokenOffQdisc(t *testing.T) {
	h := rig(t, plan{way: AttachClsact, hosts: 1})[0]
	for name, until := range map[string]func(netlink.Link) error{
		"noted": func(netlink.Link) error { return nil },
		"made":  h.addQdisc,
	} {
		t.Run(name, func(t *testing.T) {
			must(t, h.engine().mount())
			c := &clsact{e: h.engine()}
			must(t, h.inHost("under0", func(l netlink.Link) error {
				return errors.Join(c.file(l.Attrs().Index), until(l))
			}))
			must(t, h.apply(vxlan.State{}))
			must(t, h.ns.Do(func() error {
				if kind := qdiscOf(t, "under0"); kind != "" {
					t.Errorf("a qdisc %s is left", kind)
				}
				return nil
			}))
		})
	}
}

// TestFilterLost: a qdisc of ours is known as such without its filter.
func TestFilterLost(t *testing.T) {
	m := newMesh(t, plan{way: AttachClsact, hosts: 1}, false)
	must(t, m.hosts[0].detach("under0"))
	must(t, m.hosts[0].apply(vxlan.State{})) // the rig looks at what is left
}

// TestBpffsLost: who unmounts it and then removes the networks leaves nothing.
func TestBpffsLost(t *testing.T) {
	eachWay(t, func(t *testing.T, way string) {
		m := newMesh(t, plan{way: way, hosts: 1}, false)
		must(t, unix.Unmount(m.hosts[0].engine().cfg.Dir, unix.MNT_DETACH))
		must(t, m.hosts[0].apply(vxlan.State{})) // the rig looks at what is left
	})
}

// TestTakenPriorityIsNamed: a filter of another kind at weft's priority is not
// removed.
func TestTakenPriorityIsNamed(t *testing.T) {
	hosts := rig(t, plan{way: AttachClsact, hosts: 1})
	h := hosts[0]
	h.qdisc = "clsact"
	must(t, h.inHost("under0", func(l netlink.Link) error {
		return errors.Join(h.addQdisc(l), netlink.FilterAdd(&netlink.U32{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: filterPriority, Protocol: unix.ETH_P_ALL},
			RedirIndex:  l.Attrs().Index,
		}))
	}))
	n := network(h, "n", 1450, nil)
	err := h.apply(state(n))
	var one *vxlan.NetworkError
	if !errors.As(err, &one) || one.VNI != n.VNI || !errors.Is(err, weft.ErrConflict) {
		t.Errorf("got %v", err)
	}
	must(t, h.inHost("under0", func(l netlink.Link) error {
		fs, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
		if len(fs) == 0 {
			t.Error("their filter is gone")
		}
		return err
	}))
}
