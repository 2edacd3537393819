package wire

import (
	"context"
	"net/netip"
	"time"

	"github.com/weftnet/weft"
)

// Messages between nodes. They are encoded as CBOR with field names; a field
// is never renamed or given another meaning, new ones are added. Golden files
// in testdata hold one encoding of each per protocol version.

// ProtocolVersion is spoken by this build and checked when a session opens.
const ProtocolVersion = 1

// Control is what any node may ask of the leader: the API's cluster-wide
// calls. The orchestrator implements it on the leader; Client implements it
// everywhere else by asking the leader. Errors keep their sentinel and text
// across the wire. A call that finds no leader within its bound answers
// weft.ErrUnavailable with weft.NoLeader.
type Control interface {
	Services
	Tasks
	Nodes
	Networks
	Clusters
}

// Services are calls on services; see api.ServiceStore.
type Services interface {
	Services(ctx context.Context) ([]weft.Service, error)
	Service(ctx context.Context, ref string) (weft.Service, error)
	CreateService(ctx context.Context, spec weft.ServiceSpec) (weft.Service, error)
	UpdateService(ctx context.Context, id weft.ID, index uint64, spec weft.ServiceSpec) (weft.Service, error)
	// RollbackService gives a service its previous specification back; the two
	// change places. Without one it is weft.ErrInvalid.
	RollbackService(ctx context.Context, id weft.ID, index uint64) (weft.Service, error)
	RemoveService(ctx context.Context, id weft.ID) error
}

// Tasks are calls on tasks; see api.TaskStore.
type Tasks interface {
	Tasks(ctx context.Context, f weft.TaskFilter) (weft.TaskList, error)
	TaskLogs(ctx context.Context, tasks []weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error
}

// Nodes are calls on nodes; see api.NodeStore.
type Nodes interface {
	Nodes(ctx context.Context) ([]weft.Node, error)
	UpdateNode(ctx context.Context, id weft.ID, index uint64, spec weft.NodeSpec) error
	RemoveNode(ctx context.Context, id weft.ID, force bool) error
}

// Networks are calls on networks; see api.NetworkStore.
type Networks interface {
	Networks(ctx context.Context) ([]weft.Network, error)
	CreateNetwork(ctx context.Context, spec weft.NetworkSpec) (weft.Network, error)
	RemoveNetwork(ctx context.Context, id weft.ID) error
}

// Clusters are calls on the cluster object. Cluster never carries CAKey; it
// carries join tokens only to managers.
type Clusters interface {
	Cluster(ctx context.Context) (weft.Cluster, error)
	UpdateCluster(ctx context.Context, index uint64, u weft.ClusterUpdate) error
}

// Dispatcher is the leader's side of the agents' sessions. node is proven by
// the caller's certificate.
type Dispatcher interface {
	// Session registers the node as ready and sends its full assignment
	// set, then increments, until ctx ends or leadership is lost
	// (weft.ErrUnavailable: dial again).
	Session(ctx context.Context, node weft.ID, r SessionRequest, send func(Assignments) error) error
	// Report takes task states and counts as a sign of life; agents send
	// one at least every ReportEvery, empty or not.
	Report(ctx context.Context, node weft.ID, r Report) error
}

// Membership admits and releases nodes; on the leader.
type Membership interface {
	// Admit checks the token and signs the request. remote is the address
	// the request came from, used when the joiner gave none.
	Admit(ctx context.Context, r AdmitRequest, remote netip.Addr) (AdmitResponse, error)
	// Renew signs a new certificate for a member with an unchanged role.
	Renew(ctx context.Context, node weft.ID, csr []byte) (cert []byte, err error)
	// Depart marks a leaving node down at once and, for a manager, takes
	// it out of the Raft group first.
	Depart(ctx context.Context, node weft.ID) error
}

// Agent is what other nodes may ask of any node.
type Agent interface {
	// Logs streams the logs of one local task; only managers may ask.
	Logs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error
	// Drain tells that a task of owner is about to stop, and returns when no
	// balancer and no name of the asked node leads to it any more. owner is
	// proven by the caller's certificate.
	Drain(ctx context.Context, owner, task weft.ID) error
	// Arrive tells that a task of owner can serve, and returns when balancers
	// and names of the asked node lead to it, on those of its networks that the
	// asked node has. owner is proven likewise. A node that does not know the
	// call (of an older version) is weft.ErrUnsupported.
	Arrive(ctx context.Context, owner, task weft.ID, networks []weft.ID) error
}

// SessionRequest opens a session.
type SessionRequest struct {
	Version     int
	Description weft.NodeDescription
	DataPath    netip.Addr
	Addr        netip.Addr
	// Port is the advertised cluster port at Addr; 0 = not told (an older
	// node): what the leader has stays.
	Port uint16 `cbor:",omitempty"`
}

// Assignments is all (Full) or the changes of what one node must know. Seq
// grows by one; a gap means the receiver must open a new session.
type Assignments struct {
	Seq  uint64
	Full bool
	// Index is the log index of the state that the set is made of; Report
	// names it when it is carried out. Confirm asks to report that at once:
	// an address waits for it.
	Index   uint64 `cbor:",omitempty"`
	Confirm bool   `cbor:",omitempty"`

	// Upserts.
	Tasks    []weft.Task        // assigned to this node, until Desired=remove is carried out
	Specs    []weft.SpecVersion // that Tasks refer to
	Networks []weft.Network     // that Tasks use, and the ingress network
	Services []ServiceView      // on those networks, all that the routing mesh answers for, and those of Tasks with ports in mode host
	Nodes    []NodeView         // all

	// Removed ids by kind; spec versions go with the last task that uses
	// them, without a notice.
	GoneTasks, GoneNetworks, GoneServices, GoneNodes []weft.ID

	// Ended are tasks, anywhere, whose addresses on Networks are about to be
	// given to others: whatever else is still said of them does not count.
	Ended     []weft.ID `cbor:",omitempty"`
	GoneEnded []weft.ID `cbor:",omitempty"`

	// Cluster is set when Full or when it changed.
	Cluster *ClusterView
}

// ServiceView is what balancers and resolvers need of a service.
type ServiceView struct {
	ID           weft.ID
	Name         string
	EndpointMode weft.EndpointMode
	VIPs         []weft.VIP
	Ports        []weft.PortSpec
	Networks     []weft.NetworkTarget
	// HideClient: see weft.LabelSource.
	HideClient bool `json:",omitzero" cbor:",omitzero"`
	// Drain is how long tasks that leave may finish what they have begun.
	Drain time.Duration `cbor:",omitempty" json:",omitempty"`
}

// NodeView is what a node knows of another.
type NodeView struct {
	ID          weft.ID
	Hostname    string
	Addr        netip.Addr
	DataPath    netip.Addr
	IngressAddr netip.Prefix
	// Keys for encrypted networks; see weft.NodeStatus.
	Keys []weft.NodeKey `cbor:",omitempty" json:",omitempty"`
	// IngressAddr6 is invalid where the ingress network has no IPv6.
	IngressAddr6 netip.Prefix   `json:",omitzero" cbor:",omitzero"`
	Manager      netip.AddrPort // cluster port; invalid on workers
	// ClusterPort is the port of any node; 0 = not told (an older leader).
	ClusterPort uint16 `json:",omitempty" cbor:",omitempty"`
}

// ClusterAddr is where the node's cluster port is reached.
func (n *NodeView) ClusterAddr() netip.AddrPort {
	switch {
	case n.ClusterPort != 0:
		return netip.AddrPortFrom(n.Addr, n.ClusterPort)
	case n.Manager.IsValid():
		return n.Manager
	}
	return netip.AddrPortFrom(n.Addr, weft.ClusterPort)
}

// ClusterView is what every node knows of the cluster.
type ClusterView struct {
	ID           weft.ID
	DataPathPort uint16
	GossipKey    []byte
	AddrPools    []netip.Prefix
	// KeyEpoch: see weft.Cluster.
	KeyEpoch uint64 `cbor:",omitempty" json:",omitempty"`
	// GossipEpoch and GossipReads: see weft.Cluster.
	GossipEpoch uint64           `cbor:",omitempty" json:",omitempty"`
	GossipReads []weft.GossipKey `cbor:",omitempty" json:",omitempty"`
}

// GossipRing is what the node is to hold.
func (c *ClusterView) GossipRing() weft.GossipRing {
	return weft.GossipRing{Sends: weft.GossipKey{Epoch: c.GossipEpoch, Key: c.GossipKey}, Reads: c.GossipReads}
}

// Report is a batch of task states and what the node has carried out.
type Report struct {
	Tasks     []TaskReport
	Listeners []weft.Listener // nil: as last reported
	// Keys of this node for encrypted networks; nil: as reported before.
	Keys []weft.NodeKey `cbor:",omitempty"`
	// Gossip are the keys of gossip that the node has taken up; nil: as last
	// reported in this session, or a node of an older version, which cannot
	// change them.
	Gossip *weft.GossipEpochs `cbor:",omitempty"`
	// Prefixes are the ranges in use on the host; nil: as last reported.
	Prefixes []netip.Prefix `cbor:",omitzero"`
	// Addrs are those of the host; nil: as last reported.
	Addrs []weft.HostAddr `cbor:",omitzero"`
	// InputRules of the host's firewall; nil: as last reported.
	InputRules []weft.InputRule `cbor:",omitzero"`
	// Applied is the Index of the newest assignments that the node's data
	// plane is equal to, but for the networks in Behind: their last pass
	// failed, or they were removed and local tasks are on them yet. A peer
	// that does not report it never confirms.
	Applied uint64    `cbor:",omitempty"`
	Behind  []weft.ID `cbor:",omitempty"`
}

// TaskReport is the newest status of one task. Reporting TaskRemove means the
// task's remains are gone and its record may be deleted.
type TaskReport struct {
	Task   weft.ID
	Status weft.TaskStatus
}

// AdmitRequest is a joining node's wish, sent over ALPN "weft-join".
type AdmitRequest struct {
	Version      int
	Token        string
	CSR          []byte // PEM
	Hostname     string
	Advertise    netip.AddrPort // of the joiner's cluster port; an unspecified address = the one the request comes from; invalid = that at weft.ClusterPort
	DataPath     netip.Addr
	Availability weft.Availability
}

// AdmitResponse makes a member.
type AdmitResponse struct {
	Node     weft.ID
	Role     weft.Role
	Cert     []byte // PEM chain of the node
	CACert   []byte // PEM
	Addr     netip.Addr
	Managers []NodeView
	Cluster  ClusterView
}
