package weft

import (
	"net/netip"
	"slices"
	"time"
)

// Role of a node in the cluster.
type Role uint8

const (
	RoleWorker Role = iota
	RoleManager
)

func (r Role) String() string {
	if r == RoleManager {
		return "manager"
	}
	return "worker"
}

// Availability says whether tasks may run on a node.
type Availability uint8

const (
	// AvailabilityActive: new tasks may be placed.
	AvailabilityActive Availability = iota
	// AvailabilityPause: tasks stay, no new ones come.
	AvailabilityPause
	// AvailabilityDrain: tasks are moved away.
	AvailabilityDrain
)

func (a Availability) String() string {
	return [...]string{"active", "pause", "drain"}[a%3]
}

// NodeState is the leader's view of a node.
type NodeState uint8

const (
	NodeUnknown NodeState = iota
	NodeReady             // its session is open
	NodeDown              // no sign of life for longer than the limit
	NodeDisconnected
)

func (s NodeState) String() string {
	return [...]string{"unknown", "ready", "down", "disconnected"}[s%4]
}

// NodeSpec is what a person may change of a node.
type NodeSpec struct {
	Labels       map[string]string
	Role         Role
	Availability Availability
}

// NodeDescription is what a node says of itself when its session opens.
type NodeDescription struct {
	Hostname      string
	OS            string // "linux"
	Arch          string // "x86_64", "aarch64": uname's word, as Docker prints it
	Kernel        string // uname -r
	EngineVersion string // of weft
	NanoCPUs      int64
	MemoryBytes   int64
	OverlayEngine string // chosen by probe
	ServiceEngine string
	// Addrs and Routes in use on the host, so that no pool overlaps them.
	UsedPrefixes []netip.Prefix
	// Addrs are the addresses of the host, without its loopback's own, those
	// of one link only and those of weft's links: what a published port can be
	// bound to. Sorted.
	Addrs []HostAddr `json:",omitzero" cbor:",omitzero"`
	// InputRules of the host's firewall name ports, at most ListenerReportInterval
	// old. What comes to a published port does not pass there.
	InputRules []InputRule `json:",omitzero" cbor:",omitzero"`
}

// NodeStatus is the changing part.
type NodeStatus struct {
	State   NodeState
	Message string
	// Addr is where the node's cluster port, gossip and (unless DataPath is
	// set) VXLAN are reached.
	Addr netip.Addr
	// ClusterPort is the port beside Addr that others dial; see ClusterAddr.
	// 0 = not told, as in records older than this field, which keep their
	// bytes by leaving it out.
	ClusterPort uint16 `cbor:",omitempty"`
	// Listeners are sockets of host processes outside weft, at most
	// ListenerReportInterval old: a published port must not clash with one.
	Listeners []Listener
	// Keys are the public halves of the keys for encrypted networks, at most
	// one of a slot; none on a node that cannot encrypt.
	Keys []NodeKey `cbor:",omitempty"`
	// Seen is when the leader last heard of the node.
	Seen time.Time
}

// Listener is a port that a process of the host holds.
type Listener struct {
	Protocol Protocol
	Port     uint16
	// Addr is where it listens; unspecified = on all addresses, as is invalid
	// (an older node does not tell).
	Addr netip.Addr `json:",omitzero" cbor:",omitzero"`
}

// InputRule is a rule of the host's firewall for what the host itself takes, which
// names the ports from First to Last.
type InputRule struct {
	Protocol    Protocol
	First, Last uint16
	Chain       string // and its table, for people
}

// Ports are where the rule would hold, as a spec of published ports that is on all
// addresses.
func (r InputRule) Ports() PortSpec {
	return PortSpec{Protocol: r.Protocol, Published: r.First, Count: r.Last - r.First + 1}
}

// HostPorts are the ports that the node's host needs for itself.
func (n *Node) HostPorts() []HeldPort {
	out := []HeldPort{{PortSpec{Protocol: TCP, Published: n.ClusterAddr().Port()}, "the cluster port"}}
	for _, k := range n.Status.Keys {
		out = append(out, HeldPort{PortSpec{Protocol: UDP, Published: k.Port}, "the encryption"})
	}
	for _, l := range n.Status.Listeners {
		h := HeldPort{PortSpec{Protocol: l.Protocol, Published: l.Port}, "a listening socket"}
		if l.Addr.IsValid() {
			h.By = "the socket " + netip.AddrPortFrom(l.Addr, l.Port).String()
			if !l.Addr.IsUnspecified() {
				h.Port.IPs = []netip.Addr{l.Addr}
			}
		}
		out = append(out, h)
	}
	return out
}

// HasAddr reports whether the host can answer at an address. At ::1 none can: no packet from
// there leaves its device.
func (n *Node) HasAddr(a netip.Addr) bool {
	return a.Is4() && a.IsLoopback() || slices.ContainsFunc(n.Description.Addrs, func(h HostAddr) bool { return h.Addr == a })
}

// Publishes reports whether the host has an address on which a port is published.
func (n *Node) Publishes(p *PortSpec) bool {
	return !p.IsBound() || slices.ContainsFunc(p.IPs, n.HasAddr) || p.Interface != "" && n.HasLink(p.Interface)
}

// HasLink reports whether the host has an address on an interface.
func (n *Node) HasLink(name string) bool {
	return name == "lo" || slices.ContainsFunc(n.Description.Addrs, func(h HostAddr) bool { return h.Interface == name })
}

// Node is a stored member of the cluster.
type Node struct {
	ID          ID
	Meta        Meta
	Spec        NodeSpec
	Description NodeDescription
	Status      NodeStatus
	// DataPath is the node's VTEP address.
	DataPath netip.Addr
	// IngressAddr is the node's own address on the ingress network, by
	// which requests to published ports enter the overlay; unset until the
	// leader has allocated it.
	IngressAddr netip.Prefix
	// IngressAddr6 is its IPv6 twin; invalid where the ingress network has
	// no IPv6 (clusters made before it had, until somebody adds it).
	IngressAddr6 netip.Prefix `json:",omitzero" cbor:",omitzero"`
	// Manager is nil on workers.
	Manager *ManagerStatus
}

// Conflict returns a range in use on the node's host that overlaps a subnet of
// net. Then the network is refused on this node: its tasks are not placed here,
// and the ingress network is not set up.
func (n *Node) Conflict(net *Network) (netip.Prefix, bool) {
	for _, used := range n.Description.UsedPrefixes {
		for _, s := range net.Spec.Subnets {
			if used.IsValid() && used.Masked().Overlaps(s.Prefix) {
				return used.Masked(), true
			}
		}
	}
	return netip.Prefix{}, false
}

// ClusterAddr is where others dial the node's cluster port: the port it told, a
// manager's own, or the constant ClusterPort. It is invalid while the node has no
// address.
func (n *Node) ClusterAddr() netip.AddrPort {
	port := n.Status.ClusterPort
	if port == 0 && n.Manager != nil {
		port = n.Manager.Addr.Port()
	}
	if port == 0 {
		port = ClusterPort
	}
	return netip.AddrPortFrom(n.Status.Addr, port)
}

// ManagerStatus is a manager's part in the Raft group.
type ManagerStatus struct {
	Addr      netip.AddrPort // of the cluster port
	Leader    bool
	Reachable bool
}
