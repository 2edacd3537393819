// Package vxlan holds the desired state of a node's overlay networks and what
// can be computed from it without a kernel: differences, MTU arithmetic, names.
//
// It owns the vocabulary between whoever knows the cluster (agent/netstate) and
// whoever speaks to the kernel (vxlan/linux): full state in, full state out. It
// opens no socket, starts no goroutine and keeps nothing.
package vxlan

import (
	"context"
	"net"
	"net/netip"

	"github.com/weftnet/weft"
)

// State is everything weft wants of the overlay on one node.
type State struct {
	// Networks by VNI. A network that is absent is removed from the kernel.
	Networks map[uint32]Network
}

// Network is one overlay network on this node.
type Network struct {
	ID      weft.ID
	VNI     uint32
	Subnets []netip.Prefix
	// MTU of the tasks' ports in bytes (inner IP packet).
	MTU int
	// VTEP is this node's own tunnel address and Port the UDP port.
	VTEP netip.Addr
	Port uint16
	// Ports are the local tasks' ports.
	Ports []Port
	// Peers are the endpoints on other nodes: one static FDB and one
	// neighbour entry each.
	Peers []Peer
	// VIPs are service addresses: answered to ARP with their MAC, never
	// flooded. A balancer on the bridge rewrites the MAC to a backend's.
	VIPs []VIP
	// HostLeg, when set, is a port of the network in the host's own
	// namespace (the ingress network's way in).
	HostLeg *HostLeg
	// Fault and DeviceFault are set by Read alone and never compared: what
	// is wrong with the bridge, and with the VXLAN device, where no wish
	// would explain it. They are the reason of a Repair.
	Fault, DeviceFault string
}

// Port is a local task's port on a network.
type Port struct {
	Task  weft.ID
	NetNS string // path of the task's namespace
	// IfName inside the task, "eth0", "eth1", … stable for the task's life.
	IfName string
	Addr   netip.Prefix
	MAC    net.HardwareAddr
	// Fault is set by Read alone, as Network.Fault.
	Fault string
}

// Peer is an endpoint on another node.
type Peer struct {
	Addr netip.Addr
	MAC  net.HardwareAddr
	VTEP netip.Addr
}

// VIP is a service address on the network.
type VIP struct {
	Addr netip.Addr
	MAC  net.HardwareAddr
}

// HostLeg is a veth whose one end is in the host's namespace.
type HostLeg struct {
	Name string // weft.IngressLeg
	Addr netip.Prefix
	MAC  net.HardwareAddr
	// Fault is set by Read alone, as Network.Fault.
	Fault string
}

// Kernel is the seam to the kernel. Implementations are vxlan/linux (package
// linux) and vxlan/vxlantest. Both methods block; Apply is not called twice at
// the same time.
type Kernel interface {
	// Read returns what the kernel has now, of this node's objects only.
	Read(ctx context.Context) (State, error)
	// Apply makes the kernel equal to want: one minimal set of changes,
	// additions before removals, safe to repeat after a crash at any point.
	// It goes on past a failing object and returns all errors joined.
	Apply(ctx context.Context, want State) error
}
