package bpf

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

func TestChoiceOfPorts(t *testing.T) {
	for _, c := range []struct {
		name      string
		tried     error
		kind, why string
	}{
		{"it works", nil, PortsNetkit, ""},
		{"no such link", fmt.Errorf("add netkit: %w", unix.EOPNOTSUPP), PortsVeth, "add netkit: operation not supported"},
		{"nothing comes back", fmt.Errorf("get a packet back: %w", unix.EAGAIN), PortsVeth, "get a packet back: resource temporarily unavailable"},
		{"too many files", fmt.Errorf("add netkit: %w", unix.EMFILE), PortsVeth, "add netkit: too many open files"},
	} {
		t.Run(c.name, func(t *testing.T) {
			kind, why := choosePorts(func() error { return c.tried })
			if kind != c.kind || why != c.why {
				t.Errorf("got %q, %q", kind, why)
			}
			e := &Engine{build: func() (build, error) { return build{attach: AttachTCX, ports: kind, noNetkit: why}, nil }}
			if note := e.Note(); (note == "") != (why == "") || !strings.Contains(note, why) {
				t.Errorf("the note is %q", note)
			}
		})
	}
}

// noted is an attacher that only remembers.
type noted struct {
	name string
	has  map[string]hook
}

func (n *noted) isAttached(h hook) bool { return n.has[h.pin] == h }
func (n *noted) attach(h hook) error    { n.has[h.pin] = h; return nil }

func (n *noted) standing() (out []hook, err error) {
	for _, h := range n.has {
		out = append(out, h)
	}
	return out, nil
}

func (n *noted) sweep(keep map[string]hook) error {
	for pin := range n.has {
		if _, ok := keep[pin]; !ok {
			delete(n.has, pin)
		}
	}
	return nil
}

// TestHooksByKind: hooks of netkit pairs and others are attached, found and swept
// each by their own attacher.
func TestHooksByKind(t *testing.T) {
	a, b := &noted{"netkit", map[string]hook{}}, &noted{"others", map[string]hook{}}
	s := split{a, b}
	pair := portHook(&netlink.Netkit{LinkAttrs: netlink.LinkAttrs{Name: "wp1", Index: 1}})
	veth := portHook(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wp2", Index: 2}})
	for _, h := range []hook{pair, veth, underlayHook(3, false)} {
		must(t, s.attach(h))
		if !s.isAttached(h) {
			t.Errorf("%+v is not attached", h)
		}
	}
	if len(a.has) != 1 || !a.isAttached(pair) || len(b.has) != 2 {
		t.Fatalf("netkit has %v, the others %v", a.has, b.has)
	}
	all, err := s.standing()
	must(t, err)
	if len(all) != 3 || !slices.Contains(all, pair) || !slices.Contains(all, veth) {
		t.Errorf("standing are %v", all)
	}
	// One of netkit is no reason to keep what is attached otherwise under its name.
	must(t, b.attach(hook{pin: pair.pin, ifindex: 1, prog: pair.prog}))
	must(t, s.sweep(map[string]hook{pair.pin: pair}))
	if len(a.has) != 1 || len(b.has) != 0 {
		t.Errorf("left are %v and %v", a.has, b.has)
	}
}

// kindOf is what a port of a host is made of.
func (h *testHost) kindOf(p vxlan.Port) (kind string) {
	h.t.Helper()
	must(h.t, h.inHost(weft.PortVethName(p.Task, h.network()), func(l netlink.Link) error { kind = l.Type(); return nil }))
	return kind
}

func (h *testHost) network() weft.ID {
	h.t.Helper()
	return h.read().Networks[testVNI].ID
}

// TestPortsKeepTheirKind: a port stays what it is as long as its task, whatever the
// next daemon would make; ports of both kinds beside each other reach each other,
// other nodes and the host's leg; nothing of it is a repair.
func TestPortsKeepTheirKind(t *testing.T) {
	needWay(t, PortsNetkit)
	for _, c := range []struct{ first, then string }{{AttachTCX, PortsNetkit}, {PortsNetkit, AttachTCX}, {PortsNetkit, AttachClsact}} {
		t.Run(c.first+" then "+c.then, func(t *testing.T) {
			m := newMesh(t, plan{way: c.first, hosts: 2}, false)
			h, other := m.hosts[0], m.hosts[1]
			old := h.kindOf(m.ports[h][0])
			must(t, whileConnected(m.ports[other][0], m.ports[h][0], func() error {
				h.restart(c.then)
				return h.apply(m.want[h])
			}))
			next := h.task(3, false)
			m.ports[h] = append(m.ports[h], next)
			id := m.want[h].Networks[testVNI].ID
			for _, x := range m.hosts {
				n := network(x, id, m.want[x].Networks[testVNI].MTU, m.ports)
				if x == h {
					a := netip.AddrFrom4([4]byte{10, 100, 0, 240})
					n.HostLeg = &vxlan.HostLeg{Name: weft.IngressLeg, Addr: netip.PrefixFrom(a, 24), MAC: weft.NodeMAC(h.node, a)}
				}
				m.want[x] = state(n)
				must(t, x.apply(m.want[x]))
				expectEqual(t, x, m.want[x])
			}
			if kind := h.kindOf(m.ports[h][0]); kind != old {
				t.Errorf("the old port was a %s and is a %s", old, kind)
			}
			if kind := h.kindOf(next); kind == old {
				t.Errorf("the new port is a %s, too", kind)
			}
			if got := h.repairs(); len(got) > 0 {
				t.Errorf("repaired: %v", got)
			}
			m.all(t, overTCP)
			for _, p := range m.ports[h] {
				if err := tcpFrom(h.path, p); err != nil {
					t.Errorf("leg to %s: %v", p.Addr, err)
				}
			}
			for _, a := range h.attached() {
				if at, _, _ := strings.Cut(a, " "); at != PortsNetkit && at != inWay(Config{}, c.then).Attach {
					t.Errorf("attached is still %s", a)
				}
			}
		})
	}
}

// TestNothingPassesWithoutItsProgram: what a task sends by netkit is dropped while
// the program is gone.
func TestNothingPassesWithoutItsProgram(t *testing.T) {
	needWay(t, PortsNetkit)
	m := newMesh(t, plan{way: PortsNetkit, hosts: 1}, false)
	h := m.hosts[0]
	near := weft.PortVethName(m.ports[h][0].Task, h.network())
	came := func() (n uint64) {
		must(t, h.inHost(near, func(l netlink.Link) error { n = l.Attrs().Statistics.RxPackets; return nil }))
		return n
	}
	must(t, h.detach(near))
	frame := udpFrame(m.ports[h][0], m.ports[h][1], 7003, "x", 20)
	before := came()
	rawSend(t, m.ports[h][0].NetNS, "eth0", frame)
	if n := came(); n != before {
		t.Errorf("%d packets came to the host", n-before)
	}
	must(t, h.inHost(near, letThrough))
	rawSend(t, m.ports[h][0].NetNS, "eth0", frame)
	// At any time the kernel may speak for itself in the task's namespace (MLD, RFC 3810).
	if n := came(); n == before {
		t.Error("no packet came to the host that is let to have them: the drop shows nothing")
	}
}

// pinAnother puts a link of this build's program, but at another pair, where a
// port's link is pinned.
func (h *testHost) pinAnother(near string) error {
	progs, err := filepath.Glob(h.engine().path("progs", overlayProgFromTask+"-*"))
	if err != nil || len(progs) != 1 {
		return errors.Join(err, fmt.Errorf("programs %q", progs))
	}
	p, err := ebpf.LoadPinnedProgram(progs[0], nil)
	if err != nil {
		return err
	}
	defer p.Close()
	return h.ns.Do(func() error {
		other := &netlink.Netkit{LinkAttrs: netlink.LinkAttrs{Name: "other0"}, Mode: netlink.NETKIT_MODE_L2}
		if err := netlink.LinkAdd(other); err != nil {
			return err
		}
		h.t.Cleanup(func() { must(h.t, h.inHost("other0", netlink.LinkDel)) })
		l, err := attachNetkit(linkIndex(h.t.(*testing.T), "other0"), p)
		if err != nil {
			return err
		}
		return errors.Join(repin(l.Pin, h.engine().path(netkitDir, near)), l.Close())
	})
}

// letThrough makes the far end of a netkit pair send to the host what no program
// has taken (IFLA_NETKIT_PEER_POLICY, linux/if_link.h).
func letThrough(l netlink.Link) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(l.Attrs().Index)
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("netkit"))
	info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.IFLA_NETKIT_PEER_POLICY, nl.Uint32Attr(0))
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}
