package weft

import (
	"crypto/rand"
	"fmt"
	"net/netip"
	"time"
)

// Ports of a node, all changeable.
const (
	ClusterPort uint16 = 2377
	GossipPort  uint16 = 7946
	VXLANPort   uint16 = 4789 // RFC 7348 section 5
)

// ClusterSpec is what a person may set of a cluster.
type ClusterSpec struct {
	Labels map[string]string
	// TaskHistory is how many ended tasks a slot keeps for `service ps`.
	TaskHistory int
	// NodeDownAfter is how long a node may be silent before its tasks are
	// replaced; one that gossip hears, twice as long. Shorter replaces sooner and more
	// often for nothing.
	NodeDownAfter time.Duration
}

// DefaultClusterSpec is what `swarm init` starts from.
func DefaultClusterSpec() ClusterSpec {
	return ClusterSpec{TaskHistory: 5, NodeDownAfter: 5 * time.Second}
}

// Cluster is the one object that describes the cluster itself.
type Cluster struct {
	ID   ID
	Meta Meta
	Spec ClusterSpec
	// AddrPools are cut into networks of MaskLength bits; fixed at init.
	AddrPools  []netip.Prefix
	MaskLength int
	// ULA is the random /48 that IPv6 subnets are cut from (RFC 4193
	// section 3.2); made at init, or by the first network that needs it in a
	// cluster that is older than it.
	ULA          netip.Prefix `json:",omitzero" cbor:",omitzero"`
	DataPathPort uint16
	// CACert (PEM) is the trust root; CAKey (PEM) stays on managers and is
	// empty in every answer of the API.
	CACert []byte
	CAKey  []byte
	// Tokens are secrets; only managers see them.
	Tokens JoinTokens
	// GossipKey encrypts what members send each other: GossipKeyBytes bytes,
	// handed to nodes over their authenticated session.
	GossipKey []byte
	// KeyEpoch counts the changes of the nodes' keys for encrypted networks;
	// KeyEpochAt is when the current one began, zero for the first.
	KeyEpoch   uint64    `cbor:",omitempty"`
	KeyEpochAt time.Time `cbor:",omitzero"`
	// GossipEpoch is that of GossipKey, GossipReads are further keys that are
	// read by; see GossipRing. GossipEpochAt is when any of the three last
	// changed, zero for a cluster whose first key was never changed.
	GossipEpoch   uint64      `cbor:",omitempty"`
	GossipReads   []GossipKey `cbor:",omitempty"`
	GossipEpochAt time.Time   `cbor:",omitzero"`
}

// GossipRing is what every node is to hold.
func (c *Cluster) GossipRing() GossipRing {
	return GossipRing{Sends: GossipKey{c.GossipEpoch, c.GossipKey}, Reads: c.GossipReads}
}

// NewULA draws the /48 of a cluster: fd and 40 random bits (RFC 4193 section
// 3.2.2). Called where NewID is.
func NewULA() netip.Prefix {
	var a [16]byte
	a[0] = 0xfd
	if _, err := rand.Read(a[1:6]); err != nil {
		panic(fmt.Sprintf("read random bytes: %v", err)) // the kernel's source cannot fail after boot
	}
	return netip.PrefixFrom(netip.AddrFrom16(a), 48)
}

// JoinTokens admit nodes: SWMTKN-1-<digest of the CA>-<secret>.
type JoinTokens struct {
	Worker  string
	Manager string
}

// DefaultAddrPools in order of preference.
func DefaultAddrPools() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("172.16.0.0/12"),
		netip.MustParsePrefix("100.64.0.0/10"),
	}
}

// DefaultMaskLength of a network cut from a pool: 4,096 addresses.
const DefaultMaskLength = 20

// LocalState is a node's own view of its membership.
type LocalState string

const (
	LocalInactive LocalState = "inactive"
	LocalPending  LocalState = "pending" // joining, or the cluster cannot be reached yet
	LocalActive   LocalState = "active"
	LocalError    LocalState = "error"
)

// InitRequest starts a cluster with this node as its first manager.
type InitRequest struct {
	// ListenAddr is where the cluster port listens; unspecified = all.
	ListenAddr netip.AddrPort
	// AdvertiseAddr is what other nodes dial; invalid = the only global
	// address of the host, else an error that lists the candidates.
	AdvertiseAddr netip.AddrPort
	// DataPathAddr is the VTEP; invalid = AdvertiseAddr.
	DataPathAddr netip.Addr
	DataPathPort uint16         // 0 = VXLANPort
	AddrPools    []netip.Prefix // empty = DefaultAddrPools
	MaskLength   int            // 0 = DefaultMaskLength
	Availability Availability
	// ForceNewCluster (recovery from a lost majority) is refused here.
	ForceNewCluster bool
}

// JoinRequest makes this node a member.
type JoinRequest struct {
	ListenAddr    netip.AddrPort
	AdvertiseAddr netip.AddrPort
	DataPathAddr  netip.Addr
	Remotes       []string // HOST[:PORT] of managers, tried in order
	Token         string
	Availability  Availability
}

// LocalInfo is what a node knows of itself without asking anyone.
type LocalInfo struct {
	Node        ID // "" when not in a cluster
	Addr        netip.Addr
	State       LocalState
	Error       string
	Manager     bool
	Managers    []netip.AddrPort // cluster ports, as last told
	Description NodeDescription
	// Engines: the reasons for and against each data-plane engine.
	Engines  []EngineChoice
	DataRoot string
}

// EngineChoice is the verdict on one engine.
type EngineChoice struct {
	Kind   string // "overlay" or "service"
	Engine string
	Chosen bool
	Reason string
}
