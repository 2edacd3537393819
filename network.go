package weft

import "net/netip"

// Names and numbers of the overlay.
const (
	DriverOverlay = "overlay"
	IngressName   = "ingress"
	// IngressVNI and FirstVNI: VXLAN network identifiers are 24 bits (RFC
	// 7348 section 5); 1-4095 are left to others, as Docker does.
	IngressVNI uint32 = 4096
	FirstVNI   uint32 = 4097
	LastVNI    uint32 = 1<<24 - 1
)

// NetworkSpec is what a person asks for.
type NetworkSpec struct {
	Name       string
	Labels     map[string]string
	Driver     string // DriverOverlay
	Internal   bool   // no way out: tasks get no gateway leg for it
	Attachable bool   // stored and shown; containers outside services cannot use it yet
	Ingress    bool   // the routing mesh's own network; made by the cluster
	Subnets    []Subnet
	Options    map[string]string
	// IPv6 asks for IPv6 addresses; NoIPv4 for no IPv4 ones (then IPv6 must
	// be set). A stored network says by them what its Subnets hold.
	IPv6   bool `json:",omitzero" cbor:",omitzero"`
	NoIPv4 bool `json:",omitzero" cbor:",omitzero"`
}

// Subnet is one address range of a network.
type Subnet struct {
	Prefix  netip.Prefix // host bits zero
	Gateway netip.Addr   // the first address unless given; reserved, nothing answers there on an overlay
}

// Subnet returns the network's subnet of a family; ok is false when it has none,
// or when it is still to be chosen.
func (n *NetworkSpec) Subnet(is6 bool) (s Subnet, ok bool) {
	for _, s := range n.Subnets {
		if s.Prefix.IsValid() && s.Prefix.Addr().Is6() == is6 {
			return s, true
		}
	}
	return Subnet{}, false
}

// Network is a stored network.
type Network struct {
	ID   ID
	Meta Meta
	// Spec as asked, except that Subnets is filled in by the allocator.
	Spec NetworkSpec
	VNI  uint32
}

// EndpointState is how far an endpoint may be used.
type EndpointState uint8

const (
	// EndpointStarting: reachable by address, in no balancer and no name.
	EndpointStarting EndpointState = iota
	// EndpointReady: in balancers and names.
	EndpointReady
	// EndpointDraining: keeps its flows, gets no new ones.
	EndpointDraining
)

// Endpoint is one task on one network, as its node publishes it by gossip. The
// VTEP is that of the owner; the MAC is derived from the first address and the
// task (EndpointMAC), so neither is carried.
type Endpoint struct {
	Network ID
	Task    ID
	Service ID
	Slot    uint64
	Addr    netip.Addr // as Attachment.Addr
	Addr6   netip.Addr `json:",omitzero"` // as Attachment.Addr6; invalid without
	State   EndpointState
}

// Addrs are the endpoint's addresses, the first one first.
func (e *Endpoint) Addrs() []netip.Addr { return valid(e.Addr, e.Addr6) }

// OwnedEndpoint is an endpoint with the node that published it.
type OwnedEndpoint struct {
	Endpoint
	Owner ID
	VTEP  netip.Addr
}
