package bpf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// Probe makes one of everything in a scratch namespace, sends one packet
// through the program in each direction, and removes it all. An error wraps
// weft.ErrUnsupported and names what is missing.
func (e *Engine) Probe(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return inScratch(func(dir string) error {
		if err := probeMount(dir); err != nil {
			return err
		}
		return e.probeInside()
	})
}

// inScratch calls f with a folder in a network namespace, both of which go
// with its return.
func inScratch(f func(dir string) error) error {
	dir, err := os.MkdirTemp("", "weft-probe")
	if err != nil {
		return fmt.Errorf("overlay engine ebpf: make scratch folder: %w", err)
	}
	defer os.RemoveAll(dir)
	path, err := netns.Create(dir, "probe")
	if err != nil {
		return unsupported("make a network namespace", err)
	}
	err = netns.Do(path, func() error { return f(dir) })
	return errors.Join(err, netns.Remove(path))
}

// chooseAttach is the first way that takes a program to a link. One that failed
// for want of memory, files or rights might do it another time: that is an
// error, so that a host does not change its way with its load.
func chooseAttach(p *ebpf.Program) (string, error) {
	var way string
	err := inScratch(func(string) error {
		const loopback = 1 // of every namespace
		var errs []error
		for _, way = range []string{AttachTCX, AttachClsact} {
			err := tryAttach(way, p, loopback)
			if err == nil || isScarce(err) {
				return err
			}
			errs = append(errs, fmt.Errorf("by %s: %w", way, err))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return "", unsupported("attach a program to a link", err)
	}
	return way, nil
}

// tryAttach attaches a program in a scratch namespace.
func tryAttach(way string, p *ebpf.Program, ifindex int) error {
	if way == AttachTCX {
		l, err := attachTCX(ifindex, p)
		if err != nil {
			return err
		}
		return l.Close()
	}
	if err := netlink.QdiscAdd(clsactAt(ifindex)); err != nil {
		return fmt.Errorf("add a clsact qdisc: %w", err)
	}
	e := &Engine{cfg: Config{Node: "probe"}}
	if err := netlink.FilterReplace(e.filter(hook{ifindex: ifindex}, false, p.FD())); err != nil {
		return fmt.Errorf("add a bpf filter: %w", err)
	}
	return nil
}

func probeMount(dir string) error {
	at := dir + "/bpf"
	if err := os.Mkdir(at, 0o700); err != nil {
		return fmt.Errorf("overlay engine ebpf: make scratch folder: %w", err)
	}
	if err := unix.Mount("bpf", at, "bpf", 0, "mode=0700"); err != nil {
		return unsupported("mount a bpffs", err)
	}
	if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("overlay engine ebpf: unmount scratch bpffs: %w", err)
	}
	return nil
}

// probeInside runs in the scratch namespace.
func (e *Engine) probeInside() error {
	b, err := e.build()
	if err != nil {
		return err
	}
	coll, err := ebpf.NewCollection(b.spec)
	if err != nil {
		return unsupported("load the overlay programs", err)
	}
	defer coll.Close()
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "probe0"}, PeerName: "probe1"}
	if err := netlink.LinkAdd(v); err != nil {
		return unsupported("make a veth", err)
	}
	if err := tryAttach(b.attach, coll.Programs[overlayProgFromTask], v.Index); err != nil {
		return unsupported("attach a program to a link by "+b.attach, err)
	}
	vx := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "probe2"}, FlowBased: true, Port: 4789}
	if err := netlink.LinkAdd(vx); err != nil {
		return unsupported("make a VXLAN device", err)
	}
	return probePackets(coll, uint32(v.Index))
}

// redirected is what a program returns that has sent a packet on
// (TC_ACT_REDIRECT, linux/pkt_cls.h).
const redirected = 7

// probePackets sends an IPv4 packet of a task out, and what comes of it in.
func probePackets(coll *ebpf.Collection, ifindex uint32) error {
	const vni = 1
	mine, other := vxlan.MAC{2, 0, 0, 0, 0, 1}, vxlan.MAC{2, 0, 0, 0, 0, 2}
	here, there := addrOf(netip.MustParseAddr("192.0.2.1")), addrOf(netip.MustParseAddr("192.0.2.2"))
	remote := destValue{Kind: destDirect, NHFamily: unix.AF_INET, MTU: 1450, IfIndex: ifindex, UDP: be(4789), VTEP: there}
	copy(remote.NextHop[:], there[12:])
	for _, w := range []struct {
		name       string
		key, value any
	}{
		{overlayMapPorts, ifindex, portValue{VNI: vni, UDP: be(4789), MAC: mine, VTEP: here}},
		{overlayMapMacs, macKey{VNI: vni, MAC: other}, remote},
	} {
		if err := coll.Maps[w.name].Put(w.key, w.value); err != nil {
			return unsupported("write map "+w.name, err)
		}
	}
	inner := ipv4Frame(mine, other, 60)
	ret, out, err := runAt(coll.Programs[overlayProgFromTask], ifindex, inner)
	if err != nil {
		return unsupported("run the program of a task's port", err)
	}
	const outer = 50
	if ret != redirected || len(out) != len(inner)+outer {
		return fmt.Errorf("overlay engine ebpf: encapsulate a packet (bpf_skb_adjust_room): result %d, %d bytes of %d: %w", ret, len(out), len(inner)+outer, weft.ErrUnsupported)
	}
	// The same packet as the other side would see it: we are there now.
	local := destValue{Kind: destTask, MTU: 1450, IfIndex: ifindex, UDP: be(4789), VTEP: there}
	remote.VTEP = here
	if err := errors.Join(
		coll.Maps[overlayMapMacs].Put(macKey{VNI: vni, MAC: other}, local),
		coll.Maps[overlayMapMacs].Put(macKey{VNI: vni, MAC: mine}, remote)); err != nil {
		return unsupported("write map "+overlayMapMacs, err)
	}
	clear(out[:6]) // addressed to the loopback, where a test run begins
	ret, back, err := runAt(coll.Programs[overlayProgFromUnderlay], 0, out)
	if err != nil {
		return unsupported("run the program of the underlay", err)
	}
	if ret != redirected || len(back) != len(inner) {
		return fmt.Errorf("overlay engine ebpf: decapsulate a packet (bpf_skb_adjust_room): result %d, %d bytes of %d: %w", ret, len(back), len(inner), weft.ErrUnsupported)
	}
	return nil
}

// ipv4Frame is a UDP packet of size bytes in an Ethernet frame.
func ipv4Frame(src, dst vxlan.MAC, size int) []byte {
	f := make([]byte, 14, 14+size)
	copy(f, dst[:])
	copy(f[6:], src[:])
	f[12] = 0x08
	ip := make([]byte, size)
	ip[0], ip[3], ip[8], ip[9] = 0x45, byte(size), 64, unix.IPPROTO_UDP
	copy(ip[12:], net.IPv4(10, 0, 0, 1).To4())
	copy(ip[16:], net.IPv4(10, 0, 0, 2).To4())
	return append(f, ip...)
}

// skbuff is struct __sk_buff (linux/bpf.h) up to what a test run may set.
type skbuff struct {
	_       [9]uint32
	Ingress uint32
	IfIndex uint32
	_       [37]uint32
}

// runAt runs a classifier once as if packet had come in at a link of the
// calling thread's namespace, 0 for none in particular.
func runAt(p *ebpf.Program, ifindex uint32, packet []byte) (uint32, []byte, error) {
	return runFrom(p, ifindex, false, packet)
}

// runFrom is runAt for a packet that the far end of that link has just sent, if
// it is a netkit pair: no device has received it yet.
func runFrom(p *ebpf.Program, ifindex uint32, isNetkit bool, packet []byte) (uint32, []byte, error) {
	opts := &ebpf.RunOptions{Data: packet, DataOut: make([]byte, len(packet)+512)}
	if ifindex != 0 {
		c := &skbuff{Ingress: ifindex, IfIndex: ifindex}
		if isNetkit {
			c.Ingress = 0
		}
		opts.Context = c
	}
	ret, err := p.Run(opts)
	return ret, opts.DataOut, err
}
