// Package vxlan holds the desired state of a node's overlay networks and what
// can be computed from it without a kernel: differences, MTU arithmetic, names.
//
// It owns the vocabulary between whoever knows the cluster (agent/netstate) and
// whoever speaks to the kernel (vxlan/linux): full state in, full state out. It
// opens no socket, starts no goroutine and keeps nothing.
package vxlan

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/weftnet/weft"
)

// State is everything weft wants of the overlay on one node.
type State struct {
	// Networks by VNI. A network that is absent is removed from the kernel.
	Networks map[uint32]Network
	// Encryption is used by the encrypted networks among them.
	Encryption Encryption
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
	// Encrypted networks have no VXLAN device: packets to Peers leave by an
	// uplink (weft.UplinkName) to a router, which encrypts them.
	Encrypted bool
	// Native networks take packets for their tasks without encapsulation,
	// too. It is set only for an engine that can (vxlan/bpf), never with
	// Encrypted, and no other native network may have an address of this one.
	Native bool
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
	// Ways is set by Read alone: the engine keeps the MTU of each Peer in its
	// tables, so that it is compared and repaired. It does not keep those of
	// VIPs: what counts is the way to the backend.
	Ways bool
	// Fault and DeviceFault are set by Read alone and never compared: what
	// is wrong with the bridge, and with the VXLAN device, where no wish
	// would explain it. They are the reason of a Repair. Device names the
	// device that DeviceFault speaks of where several networks share it.
	Fault, DeviceFault, Device string
}

// Port is a local task's port on a network.
type Port struct {
	Task  weft.ID
	NetNS string // path of the task's namespace
	// IfName inside the task, "eth0", "eth1", … stable for the task's life.
	IfName string
	Addr   netip.Prefix
	Addr6  netip.Prefix // the second address, of IPv6; invalid without
	MAC    net.HardwareAddr
	// Fault is set by Read alone, as Network.Fault.
	Fault string
}

// Addrs are the port's addresses, the first one first.
func (p *Port) Addrs() []netip.Prefix { return addrs(p.Addr, p.Addr6) }

// Peer is one address of an endpoint on another node. The two addresses of an
// endpoint are two peers with the same MAC and VTEP.
type Peer struct {
	Addr netip.Addr
	MAC  net.HardwareAddr
	VTEP netip.Addr
	// MTU of the way there in bytes (inner IP packet) where it is narrower
	// than the network's; 0 = the network's. Senders know it by their routes
	// (see Router), and an engine may also answer "too big" by it (Ways).
	MTU int
	// Native: packets between its own address and a port's go there without
	// encapsulation, as it was proven that they arrive. Peers of one MAC are
	// native together or not at all; one that is not has the others wait.
	Native bool
}

// VIP is a service address on the network.
type VIP struct {
	Addr netip.Addr
	MAC  net.HardwareAddr
	MTU  int // as a Peer's: of the narrowest way to a backend
}

// HostLeg is a veth whose one end is in the host's namespace.
type HostLeg struct {
	Name  string // weft.IngressLeg
	Addr  netip.Prefix
	Addr6 netip.Prefix // the second address, of IPv6; invalid without
	MAC   net.HardwareAddr
	// Fault is set by Read alone, as Network.Fault.
	Fault string
}

// Addrs are the leg's addresses, the first one first.
func (l *HostLeg) Addrs() []netip.Prefix { return addrs(l.Addr, l.Addr6) }

// addrs leaves out the second address where there is none. A missing first one
// stays: it is the fault that Validate names.
func addrs(first, second netip.Prefix) []netip.Prefix {
	if !second.IsValid() {
		return []netip.Prefix{first}
	}
	return []netip.Prefix{first, second}
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

// Router is the seam to the routing tables at the far ends of ports: in the
// tasks' namespaces and, for a host leg, in the host's own. It serves every
// engine. Implementations are linux.Router and vxlantest.Router.
type Router interface {
	// ApplyRoutes makes the far end of each port have Routes(network), and
	// none that it made before for another state. It is called after
	// Kernel.Apply of the same state, never twice at the same time, and is
	// safe to repeat. It blocks on the kernel, goes on past a failing port and
	// returns all errors joined, each a NetworkError.
	ApplyRoutes(ctx context.Context, want State) error
}

// Routed is a Kernel that sets routes, too.
type Routed struct {
	Kernel
	Router Router
}

// Apply makes ports and tables, then what the senders behind the ports know of
// narrow ways.
func (r Routed) Apply(ctx context.Context, want State) error {
	err := r.Kernel.Apply(ctx, want)
	return errors.Join(err, r.Router.ApplyRoutes(ctx, want))
}
