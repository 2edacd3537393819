// Package ingress holds the load-balancer table of a node and the seam to the
// engines that put it into the kernel.
//
// It owns service addresses (VIPs inside a network) and published ports; it
// does not own links, addresses or neighbours (vxlan) nor the backends' side,
// the VIP on the task's loopback (agent/sandbox). No goroutine, no state.
package ingress

import (
	"context"
	"net"
	"net/netip"

	"github.com/weftnet/weft"
)

// Table is everything weft wants of the balancers on one node.
type Table struct {
	// Networks that this node carries.
	Networks []Network
	// Published ports, answered on every node.
	Published []Published
	// Ingress is how requests to published ports enter the overlay.
	Ingress Entry
	// Ends are this node's tasks that stand for service addresses.
	Ends []End
	// Gateway is the tasks' way out of the host.
	Gateway Gateway
	// Router is the way of encrypted networks to other nodes.
	Router Router
	// Underlay is who may send overlay packets to this node.
	Underlay Underlay
}

// Network is one overlay network's balancing table.
type Network struct {
	VNI uint32
	// NetNS is the path of the network's hidden namespace, Bridge the name
	// of the bridge in it, where an L2 engine hooks in.
	NetNS  string
	Bridge string
	// IPv6 says that the network has IPv6 addresses, and may have VIPs of
	// that family.
	IPv6 bool
	// Ports are the local tasks' ports on the bridge, where an engine may
	// meet a task's packets before the bridge does.
	Ports []string
	// Tasks are the paths of the local tasks' namespaces, where an engine may
	// meet their sockets.
	Tasks []string
	// Speakers are the local tasks by the hardware addresses of their ports. An engine
	// on a bridge lets each speak of its own addresses alone (ARP, neighbour discovery).
	Speakers []Speaker
	Services []Service
}

// Speaker is a task's port: its hardware address and its own addresses.
type Speaker struct {
	MAC   net.HardwareAddr
	Addrs []netip.Addr
}

// Service is one VIP, of either family: a service with an address of each is
// here twice. A VIP forwards all ports and protocols.
type Service struct {
	ID       weft.ID
	VIP      netip.Addr
	MAC      net.HardwareAddr // weft.VIPMAC
	Backends []Backend
}

// Backend is one task that takes connections.
type Backend struct {
	Task weft.ID
	// Addr is the backend's first address on the network, Addr6 its second
	// one, of IPv6; invalid without. Engines that rewrite only the hardware
	// address need neither.
	Addr  netip.Addr
	Addr6 netip.Addr
	MAC   net.HardwareAddr
	// Draining backends keep their flows and get no new ones.
	Draining bool
}

// Published is one published port, or one range of them.
type Published struct {
	Service  weft.ID
	Protocol weft.Protocol
	Port     uint16 // on the host
	Target   uint16 // on the backend
	// Count is the number of ports of a range: Port+i leads to Target+i for
	// all i below it. 0 and 1 are one port.
	Count uint16
	// IPs bind the port to these addresses of this host; none = to all of
	// them. A loopback address is reached by this host's own clients only.
	IPs []netip.Addr
	// Allow are the clients that may connect, by address; none = all. Others
	// are answered as if nothing listened.
	Allow []netip.Prefix
	// HideClient sends requests on from Entry.Addr; otherwise a task sees
	// its client's address, through whichever node the client came.
	HideClient bool
	// Host is set on a port in mode host: its backends are tasks of this
	// node, by their address behind the gateway bridge, not on the ingress
	// network.
	Host bool
	// Backends by their address on the ingress network. Empty: answered
	// with a reset or ICMP port unreachable, never with silence.
	Backends []Backend
}

// Entry is the host's own leg on the ingress network.
type Entry struct {
	Link string       // weft.IngressLeg; "" = no ingress network on this node yet
	Addr netip.Prefix // requests whose client is hidden are sent on from this address
	// Addr6 is the same for IPv6; invalid = published ports are answered on
	// IPv4 only.
	Addr6 netip.Prefix
	// Nodes are all nodes with a leg, this one among them, and Tasks this
	// node's tasks on the ingress network.
	Nodes []EntryNode
	Tasks []EntryTask
	// MTU is that of the narrowest way from here to any of the nodes, in bytes,
	// for answers to clients kept; 0 = none is narrower than the tasks' ports.
	MTU int
}

// Underlay names the members of the cluster by the addresses of their tunnels.
// A VXLAN packet from any other address is dropped, whatever network it claims.
type Underlay struct {
	Port    uint16     // UDP port of VXLAN; 0 = not known yet, nothing is dropped
	Self    netip.Addr // this node's tunnel address; what it sends and gets there is in no table of connections
	Members []netip.Addr
}

// Router is the namespace through which packets of encrypted networks leave the
// node, routed by their address alone. One to a service address arrives there
// with the hardware address of the backend that was chosen for it; the engine
// gives it the backend's address, and the answer the service's.
type Router struct {
	NetNS string // path; "" = no encrypted network on this node
	// VNIs of the networks; their packets come in by weft.RouterName.
	VNIs []uint32
	// Backends are those on other nodes, of all encrypted networks.
	Backends []Backend
}

// Gateway is the per-host bridge for traffic to the outside.
type Gateway struct {
	Bridge string       // weft.GatewayBridge; "" = none yet
	Subnet netip.Prefix // masqueraded when it leaves by another link
	// Protect are the overlay's own ranges and nodes' bridges that tasks
	// must not reach through the gateway.
	Protect []netip.Prefix
	// Addr6 is the host's IPv6 address there, by which ports in mode host are answered
	// on IPv6, too; invalid = on IPv4 only. Legs are those of the tasks that have such
	// ports: Link and Addr6 of each.
	Addr6 netip.Prefix
	Legs  []EntryTask
}

// Engine is the seam to the kernel. Probe may be called at any time; Apply and
// Close are not called at the same time as each other.
type Engine interface {
	// Name is "ebpf", "ipvs" or "nft".
	Name() string
	// Probe builds a scratch instance for real and removes it. An error
	// that wraps weft.ErrUnsupported says what the kernel lacks.
	Probe(ctx context.Context) error
	// Apply makes the kernel equal to the table: full state in, one
	// transaction per namespace out. Repeating it is free of effect.
	Apply(ctx context.Context, t Table) error
	// Stats reads the engine's counters.
	Stats(ctx context.Context) (Stats, error)
	// Close removes everything the engine has made on this host.
	Close(ctx context.Context) error
}

// Stats are counters since the engine's tables were made.
type Stats struct {
	// Published by (protocol, port): new connections taken.
	Published map[PortKey]uint64
}

// PortKey names a published port.
type PortKey struct {
	Protocol weft.Protocol
	Port     uint16
}
