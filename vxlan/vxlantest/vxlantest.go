// Package vxlantest has a vxlan.Kernel without a kernel, for tests without
// privileges, and the conformance suite that it and the real one must pass.
package vxlantest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Kernel is an overlay in memory. The zero value is empty and ready. Safe for
// concurrent use.
type Kernel struct {
	// Repaired, when set, gets every repair before Apply returns; set it
	// before use.
	Repaired func(weft.Repair)
	// Express has changes of a few entries made without reading everything, as
	// real engines do right after a whole pass; set it before use. A second Apply
	// of the same state is a whole pass.
	Express bool

	// guards: all below.
	mu    sync.Mutex
	audit vxlan.Audit
	nets  map[uint32]*network
	done  int
	quick int
	fails map[int]error
}

var _ vxlan.Kernel = (*Kernel)(nil)

// network is what a kernel keeps: tables, not peers.
type network struct {
	head   vxlan.Network
	tables vxlan.Tables
	ports  map[weft.ID]vxlan.Port
	leg    *vxlan.HostLeg
}

// unforward removes the entry of a hardware address.
func (n *network) unforward(mac net.HardwareAddr) {
	delete(n.tables.FDB, vxlan.MACOf(mac))
	delete(n.tables.MTU, vxlan.MACOf(mac))
}

// FailAt makes the n-th operation from now on (1 is the next) fail once with
// err, e.g. unix.EBUSY, without any effect.
func (k *Kernel) FailAt(n int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fails == nil {
		k.fails = make(map[int]error)
	}
	k.fails[k.done+n] = err
}

// Operations is how many operations were asked of the kernel so far.
func (k *Kernel) Operations() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.done
}

// Read implements vxlan.Kernel.
func (k *Kernel) Read(ctx context.Context) (vxlan.State, error) {
	if err := ctx.Err(); err != nil {
		return vxlan.State{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.readLocked(), nil
}

func (k *Kernel) readLocked() vxlan.State {
	st := vxlan.State{Networks: make(map[uint32]vxlan.Network, len(k.nets))}
	for vni, n := range k.nets {
		out := n.head
		out.Ways = true
		out.Peers, out.VIPs = vxlan.Observed(n.tables)
		for _, task := range slices.Sorted(maps.Keys(n.ports)) {
			out.Ports = append(out.Ports, n.ports[task])
		}
		out.HostLeg = n.leg
		if !out.VTEP.IsValid() {
			out.DeviceFault = weft.VXLANName(vni) + " is broken"
		}
		st.Networks[vni] = out
	}
	return st
}

// Quick is how many changes were made without reading everything.
func (k *Kernel) Quick() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.quick
}

// Apply implements vxlan.Kernel.
func (k *Kernel) Apply(ctx context.Context, want vxlan.State) error {
	k.mu.Lock()
	if k.Express && ctx.Err() == nil && k.expressLocked(want) {
		k.quick++
		k.mu.Unlock()
		return nil
	}
	repairs, err := k.audit.Apply(ctx, k.readLocked(), want, k.tryLocked)
	k.mu.Unlock()
	for _, r := range repairs {
		if k.Repaired != nil {
			k.Repaired(r)
		}
	}
	return err
}

// tryLocked does an operation unless it is to fail.
func (k *Kernel) tryLocked(op vxlan.Op) error {
	k.done++
	if err := k.fails[k.done]; err != nil {
		delete(k.fails, k.done)
		return err
	}
	return k.doLocked(op)
}

// expressLocked makes a change of a few entries if they are as they were left. It
// says false if it did not, or not wholly.
func (k *Kernel) expressLocked(want vxlan.State) bool {
	ops, was, ok := k.audit.Delta(want)
	if !ok {
		return false
	}
	for vni, left := range was.Networks {
		n := k.nets[vni]
		if n == nil || !n.isAsLeft(ops, left) {
			return false
		}
	}
	for _, op := range ops {
		if k.tryLocked(op) != nil {
			k.audit.Unsure(ops)
			return false
		}
	}
	k.audit.Left(want)
	return true
}

// isAsLeft reports whether what the operations on a network change is as it was
// left, and its device is whole.
func (n *network) isAsLeft(ops []vxlan.Op, left vxlan.Network) bool {
	tables := vxlan.Derive(left)
	for _, op := range ops {
		if op.VNI != left.VNI {
			continue
		}
		switch op.Kind {
		case vxlan.OpSetFDB, vxlan.OpDelFDB:
			mac := vxlan.MACOf(op.MAC)
			was, there := tables.FDB[mac]
			if now, is := n.tables.FDB[mac]; is != there || now != was || n.tables.MTU[mac] != tables.MTU[mac] {
				return false
			}
		case vxlan.OpSetNeigh, vxlan.OpDelNeigh:
			was, there := tables.Neigh[op.Addr]
			if now, is := n.tables.Neigh[op.Addr]; is != there || now != was {
				return false
			}
		default:
			return false
		}
	}
	return n.head.VTEP.IsValid()
}

// Behind does one operation behind weft's back. OpSetDevice without a VTEP
// breaks the device and leaves its entries.
func (k *Kernel) Behind(op vxlan.Op) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if n := k.nets[op.VNI]; n != nil && op.Kind == vxlan.OpSetDevice && !op.Network.VTEP.IsValid() {
		n.head.VTEP, n.head.Port = netip.Addr{}, 0
		return nil
	}
	return k.doLocked(op)
}

// Restart forgets what a daemon forgets when it ends; the kernel stays.
func (k *Kernel) Restart() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.audit = vxlan.Audit{}
}

func (k *Kernel) doLocked(op vxlan.Op) error {
	n := k.nets[op.VNI]
	if n == nil && op.Kind != vxlan.OpAddNetwork {
		return weft.ErrNotFound
	}
	switch op.Kind {
	case vxlan.OpDelStale, vxlan.OpDelNetwork:
		delete(k.nets, op.VNI)
	case vxlan.OpAddNetwork:
		if n != nil {
			return weft.ErrConflict
		}
		if k.nets == nil {
			k.nets = make(map[uint32]*network)
		}
		k.nets[op.VNI] = &network{head: *op.Network, ports: map[weft.ID]vxlan.Port{},
			tables: vxlan.Tables{Neigh: map[netip.Addr]vxlan.MAC{}, FDB: map[vxlan.MAC]vxlan.Way{}, MTU: map[vxlan.MAC]int{}}}
	case vxlan.OpSetNetwork:
		n.head.MTU, n.head.Subnets, n.head.Native = op.Network.MTU, op.Network.Subnets, op.Network.Native
	case vxlan.OpSetDevice:
		n.head.VTEP, n.head.Port, n.head.Encrypted = op.Network.VTEP, op.Network.Port, op.Network.Encrypted
		clear(n.tables.FDB)
		clear(n.tables.MTU)
	case vxlan.OpSetFDB:
		n.unforward(op.MAC)
		n.tables.FDB[vxlan.MACOf(op.MAC)] = vxlan.Way{VTEP: op.VTEP, Native: op.Native}
		if op.MTU != 0 {
			n.tables.MTU[vxlan.MACOf(op.MAC)] = op.MTU
		}
	case vxlan.OpDelFDB:
		n.unforward(op.MAC)
	case vxlan.OpSetNeigh:
		n.tables.Neigh[op.Addr] = vxlan.MACOf(op.MAC)
	case vxlan.OpDelNeigh:
		delete(n.tables.Neigh, op.Addr)
	case vxlan.OpSetPort:
		n.ports[op.Port.Task] = *op.Port
		n.unforward(op.Port.MAC)
	case vxlan.OpDelPort:
		delete(n.ports, op.Port.Task)
	case vxlan.OpSetHostLeg:
		leg := *op.HostLeg
		n.leg = &leg
		n.unforward(leg.MAC)
	case vxlan.OpDelHostLeg:
		n.leg = nil
	}
	return nil
}

// String prints the state as the lines of ip(8) and bridge(8) that would make
// it, sorted by network.
func (k *Kernel) String() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var b strings.Builder
	for _, vni := range slices.Sorted(maps.Keys(k.nets)) {
		n := k.nets[vni]
		br, vx := weft.BridgeName(vni), weft.VXLANName(vni)
		fmt.Fprintf(&b, "ip link add %s mtu %d type bridge mcast_snooping 0\n", br, n.head.MTU)
		if n.head.Encrypted {
			vx = weft.UplinkName(vni)
			fmt.Fprintf(&b, "ip link add %s mtu %d master %s type veth peer %s address %s netns crypt\n", vx, n.head.MTU, br, weft.RouterName(vni), weft.RouterMAC(vni))
		} else {
			fmt.Fprintf(&b, "ip link add %s mtu %d master %s type vxlan id %d local %s dstport %d nolearning\n", vx, n.head.MTU, br, vni, n.head.VTEP, n.head.Port)
		}
		fmt.Fprintf(&b, "bridge link set dev %s learning off flood off mcast_flood off bcast_flood off neigh_suppress on\n", vx)
		peers, vips := vxlan.Observed(n.tables)
		for _, p := range peers {
			fmt.Fprintf(&b, "bridge fdb replace %s dev %s self master static dst %s\nip neigh replace %s lladdr %s dev %s nud permanent\n", p.MAC, vx, p.VTEP, p.Addr, p.MAC, br)
		}
		for _, v := range vips {
			fmt.Fprintf(&b, "bridge fdb replace %s dev %s master static\nip neigh replace %s lladdr %s dev %s nud permanent\n", v.MAC, vx, v.Addr, v.MAC, br)
		}
		for _, task := range slices.Sorted(maps.Keys(n.ports)) {
			p := n.ports[task]
			name := weft.PortVethName(task, n.head.ID)
			fmt.Fprintf(&b, "ip link add %s mtu %d master %s type veth peer %s mtu %d address %s netns %s\n", name, n.head.MTU, br, p.IfName, n.head.MTU, p.MAC, p.NetNS)
			for _, a := range p.Addrs() {
				fmt.Fprintf(&b, "ip -n %s addr add %s dev %s\n", p.NetNS, a, p.IfName)
			}
		}
		if n.leg != nil {
			fmt.Fprintf(&b, "ip link add %s address %s type veth peer on %s\n", n.leg.Name, n.leg.MAC, br)
			for _, a := range n.leg.Addrs() {
				fmt.Fprintf(&b, "ip addr add %s dev %s\n", a, n.leg.Name)
			}
		}
	}
	return b.String()
}

// Conformance drives a kernel that starts empty through a story of states. n
// is a valid network with at least one port, one peer and one VIP.
func Conformance(t *testing.T, k vxlan.Kernel, n vxlan.Network) {
	t.Helper()
	ctx := context.Background()
	of := func(n vxlan.Network) vxlan.State {
		return vxlan.State{Networks: map[uint32]vxlan.Network{n.VNI: n}}
	}
	bare := n
	bare.Ports, bare.Peers, bare.VIPs, bare.HostLeg = nil, nil, nil, nil
	moved := n
	moved.MTU, moved.Port, moved.Peers = n.MTU-100, n.Port+1, slices.Clone(n.Peers)
	next := n.Peers[0].VTEP.Next()
	for i, p := range n.Peers {
		if bytes.Equal(p.MAC, n.Peers[0].MAC) { // of one endpoint: they move together
			moved.Peers[i].VTEP = next
		}
	}
	other := n
	other.ID = "another-network-same-vni"
	for _, s := range []struct {
		name string
		want vxlan.State
	}{
		{"empty", vxlan.State{}}, {"bare", of(bare)}, {"full", of(n)}, {"again", of(n)}, {"moved", of(moved)},
		{"back to bare", of(bare)}, {"full once more", of(n)}, {"VNI of another network", of(other)}, {"gone", vxlan.State{}},
	} {
		if err := k.Apply(ctx, s.want); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		have, err := k.Read(ctx)
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if ops := vxlan.Diff(have, s.want); len(ops) > 0 {
			t.Fatalf("%s: still to do: %v", s.name, ops)
		}
	}
	bad := n
	bad.MTU = 1
	if err := k.Apply(ctx, of(bad)); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("an MTU of 1 byte: got %v, want ErrInvalid", err)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if err := k.Apply(gone, of(n)); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled context: got %v", err)
	}
}
