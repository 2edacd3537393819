package linux

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

var _ vxlan.Engine = (*Kernel)(nil)

// Name implements vxlan.Engine.
func (k *Kernel) Name() string { return "bridge" }

// The probe's own node, host and network; nothing of them is seen outside the
// scratch namespace. Addresses are of RFC 5737.
const (
	probeNode = "probebr"
	probeHost = "weft-probe-bridge"
	probeVNI  = weft.LastVNI
)

// Probe implements vxlan.Engine: it makes a whole network, with a remote task, a
// service address and a host leg, in a scratch namespace, reads it back, and
// removes it again, and sees what Note is to say. Blocks for some tens of milliseconds.
func (k *Kernel) Probe(ctx context.Context) error {
	p := &Kernel{cfg: Config{Node: probeNode, NetNSDir: k.cfg.NetNSDir, Log: k.cfg.Log}}
	host := k.cfg.NetNSDir + "/" + probeHost
	// What a killed daemon may have left of its probe.
	if err := errors.Join(netns.Remove(p.path(probeVNI)), netns.Remove(host)); err != nil {
		return fmt.Errorf("probe the bridge engine: %w", err)
	}
	if _, err := netns.Create(k.cfg.NetNSDir, probeHost); err != nil {
		return fmt.Errorf("probe the bridge engine: %w", err)
	}
	err := netns.Do(host, func() error { return p.rehearse(ctx) })
	k.lockless.Store(p.lockless.Load())
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("this kernel lacks the vxlan, bridge or veth module, or a part of it: %w: %w", err, weft.ErrUnsupported)
	}
	if err = errors.Join(err, netns.Remove(p.path(probeVNI)), netns.Remove(host)); err != nil {
		return fmt.Errorf("probe the bridge engine: %w", err)
	}
	return nil
}

// rehearse runs in the scratch namespace.
func (k *Kernel) rehearse(ctx context.Context) error {
	subnet := netip.MustParsePrefix("192.0.2.0/24")
	task, vip, leg := netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3"), netip.MustParseAddr("192.0.2.4")
	n := vxlan.Network{
		ID: "probe", VNI: probeVNI, Subnets: []netip.Prefix{subnet}, MTU: 1450, VTEP: netip.MustParseAddr("198.51.100.1"), Port: weft.VXLANPort,
		Peers:   []vxlan.Peer{{Addr: task, MAC: weft.EndpointMAC("probe", task), VTEP: netip.MustParseAddr("198.51.100.2")}},
		VIPs:    []vxlan.VIP{{Addr: vip, MAC: weft.VIPMAC("probe", vip)}},
		HostLeg: &vxlan.HostLeg{Name: weft.IngressLeg, Addr: netip.PrefixFrom(leg, subnet.Bits()), MAC: weft.NodeMAC("probe", leg)},
	}
	want := vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: n}}
	if err := k.Apply(ctx, want); err != nil {
		return err
	}
	have, err := k.Read(ctx)
	if err != nil {
		return err
	}
	if ops := vxlan.Diff(have, want); len(ops) > 0 {
		return fmt.Errorf("the kernel took all of a network and does not have it: still to do is %s (%s%s): %w",
			ops[0], have.Networks[n.VNI].Fault, have.Networks[n.VNI].DeviceFault, weft.ErrUnsupported)
	}
	if err := k.seeLocks(); err != nil {
		return err
	}
	return k.Apply(ctx, vxlan.State{})
}

// seeLocks finds out whether the ports of the probe's network are locked.
func (k *Kernel) seeLocks() error {
	h, err := k.open(probeVNI)
	if err != nil {
		return err
	}
	defer h.close()
	flags, err := h.conn.allPortFlags()
	if err != nil {
		return err
	}
	for _, f := range flags {
		if f.lock == lockless {
			k.lockless.Store(true)
		}
	}
	return nil
}

// Note says what this host's kernel lacks that the engine would use; "" = nothing, or
// not probed yet. Safe for concurrent use.
func (k *Kernel) Note() string {
	if !k.lockless.Load() {
		return ""
	}
	return "this kernel cannot lock ports of a bridge (Linux 5.18), so a task with packet sockets may send in the name of another task of its network"
}
