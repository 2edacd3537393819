package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/netns"
)

// What tasks' ports can be made of.
const (
	PortsNetkit = string(linux.PairNetkit)
	PortsVeth   = string(linux.PairVeth)
)

// netkit is the attacher of pinned links where the far ends of netkit pairs send.
// The pins are in a folder of their own: builds that know no netkit leave it alone.
type netkit struct {
	e    *Engine
	o    *objects
	host *host
}

// isAttached wants the link to be there, pinned, and to run the program.
func (n *netkit) isAttached(h hook) bool {
	prog := n.look(h.pin, h.ifindex)
	return prog != 0 && prog == n.o.ids[h.prog]
}

// look says which program a pinned link runs for the near end at ifindex, 0 for
// none. The link itself tells the index of the far end, which is a number of the
// task's namespace, so the near end is asked whether it has that very link.
func (n *netkit) look(pin string, ifindex int) ebpf.ProgramID {
	l, err := link.LoadPinnedLink(n.e.path(netkitDir, pin), nil)
	if err != nil {
		return 0
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil || info.Netkit() == nil {
		return 0
	}
	has, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachNetkitPeer})
	if err != nil {
		return 0
	}
	for _, p := range has.Programs {
		if id, ok := p.LinkID(); ok && id == info.ID && p.ID == info.Program {
			return p.ID
		}
	}
	return 0
}

func (n *netkit) attach(h hook) error {
	path := n.e.path(netkitDir, h.pin)
	switch n.look(h.pin, h.ifindex) {
	case 0:
	case n.o.ids[h.prog]:
		return nil
	default:
		return n.update(path, h)
	}
	l, err := attachNetkit(h.ifindex, n.o.progs[h.prog])
	if err != nil {
		return fmt.Errorf("attach program %s to netkit %s: %w", h.prog, h.pin, err)
	}
	defer l.Close()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make folder of pins: %w", err)
	}
	if err := repin(l.Pin, path); err != nil {
		return fmt.Errorf("pin link of program %s at netkit %s: %w", h.prog, h.pin, err)
	}
	return nil
}

func (n *netkit) update(path string, h hook) error {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return fmt.Errorf("open link of netkit %s: %w", h.pin, err)
	}
	defer l.Close()
	if err := l.Update(n.o.progs[h.prog]); err != nil {
		return fmt.Errorf("replace program %s at netkit %s: %w", h.prog, h.pin, err)
	}
	return nil
}

func attachNetkit(ifindex int, p *ebpf.Program) (link.Link, error) {
	return patiently(func() (link.Link, error) {
		return link.AttachNetkit(link.NetkitOptions{Interface: ifindex, Program: p, Attach: ebpf.AttachNetkitPeer})
	})
}

func (n *netkit) standing() ([]hook, error) {
	pins, err := n.e.pinsIn(netkitDir)
	if err != nil {
		return nil, err
	}
	var out []hook
	for _, pin := range pins {
		near := n.host.byName[pin]
		if near == nil || !linux.IsNetkit(near) {
			continue
		}
		h := portHook(near)
		if h.prog = n.o.ours(n.look(pin, h.ifindex)); h.prog != "" {
			out = append(out, h)
		}
	}
	return out, nil
}

func (n *netkit) sweep(keep map[string]hook) error { return n.e.unpin(netkitDir, keep) }

// choosePorts says of what new ports are made: of netkit if one that is tried
// carries a packet, else of veth, and why. Whatever the reason: ports of both kinds
// go together, and a slower one is no reason to refuse the engine.
func choosePorts(try func() error) (kind, why string) {
	if err := try(); err != nil {
		return PortsVeth, err.Error()
	}
	return PortsNetkit, ""
}

// tryNetkit makes a port of netkit in a scratch namespace, with a program that
// sends back what the far end sends, and wants a packet back.
func tryNetkit(p *ebpf.Program) error {
	return inScratch(func(dir string) error {
		path, err := netns.Create(dir, "far")
		if err != nil {
			return err
		}
		return errors.Join(trySendBack(p, path), netns.Remove(path))
	})
}

func trySendBack(p *ebpf.Program, path string) error {
	pair := linux.Pair{Kind: linux.PairNetkit, Name: "probe0", MTU: 1500, NetNS: path, FarName: "probe1", FarMAC: []byte{2, 0, 0, 0, 0, 1}}
	near, err := pair.Set()
	if err != nil {
		return err
	}
	l, err := attachNetkit(near.Attrs().Index, p)
	if err != nil {
		return err
	}
	defer l.Close()
	return netns.Do(path, func() error { return sendBack(pair.FarName) })
}

// Our own choices: a protocol for experiments (IEEE 802, clause 9.2.4), and how
// long a loaded machine may take for one packet.
const (
	probeProtocol = 0x88b5
	probeLimit    = 5 * time.Second
)

// sendBack sends a frame from a link and waits for it to come in there.
func sendBack(name string) error {
	far, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	proto := be(probeProtocol)
	wire := uint16(proto[0]) | uint16(proto[1])<<8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a packet socket: %w", err)
	}
	defer unix.Close(fd)
	at := &unix.SockaddrLinklayer{Protocol: wire, Ifindex: far.Attrs().Index}
	tv := unix.NsecToTimeval(probeLimit.Nanoseconds())
	if err := errors.Join(unix.Bind(fd, at), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)); err != nil {
		return fmt.Errorf("open a packet socket: %w", err)
	}
	frame := make([]byte, 60)
	copy(frame, far.Attrs().HardwareAddr)
	copy(frame[6:], far.Attrs().HardwareAddr)
	copy(frame[12:], proto[:])
	if err := unix.Sendto(fd, frame, 0, at); err != nil {
		return fmt.Errorf("send a packet by netkit: %w", err)
	}
	for {
		_, from, err := unix.Recvfrom(fd, make([]byte, len(frame)), 0)
		if err != nil {
			return fmt.Errorf("get a packet back by netkit: %w", err)
		}
		if a, ok := from.(*unix.SockaddrLinklayer); ok && a.Pkttype != unix.PACKET_OUTGOING {
			return nil
		}
	}
}
