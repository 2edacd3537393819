package weft

import (
	"net/netip"
	"time"
)

// Meta is what every replicated object carries.
type Meta struct {
	// Index is the Raft log index of the last change: the version of the
	// optimistic lock that clients send back with an update.
	Index     uint64
	CreatedAt time.Time
	UpdatedAt time.Time
}

// ServiceMode says how many tasks a service has.
type ServiceMode uint8

const (
	// ModeReplicated runs Replicas tasks, numbered by slot from 1.
	ModeReplicated ServiceMode = iota
	// ModeGlobal runs one task on every eligible node; slots are 0.
	ModeGlobal
)

// EndpointMode says how the name of a service resolves.
type EndpointMode uint8

const (
	// EndpointVIP: the name resolves to one virtual address per network.
	EndpointVIP EndpointMode = iota
	// EndpointDNSRR: the name resolves to the addresses of the ready tasks.
	EndpointDNSRR
)

// ServiceSpec is what a person asks for. It is immutable once stored: each
// update makes a new SpecVersion.
type ServiceSpec struct {
	Name         string // a DNS label of at most 63 characters, unique
	Labels       map[string]string
	Mode         ServiceMode
	Replicas     uint64 // only with ModeReplicated
	Container    ContainerSpec
	Limits       Resources // enforced by the kernel; zero = unlimited
	Reservations Resources // subtracted from the node when scheduling; so far the API takes none
	Restart      RestartPolicy
	Constraints  []string // "node.hostname==h1", "node.labels.disk!=ssd", ...
	Networks     []NetworkTarget
	EndpointMode EndpointMode
	Ports        []PortSpec
	Update       UpdateConfig
	ForceUpdate  uint64 // a counter; a change of it replaces all tasks
}

// ContainerSpec says what runs in each task. So far the API refuses
// Entrypoint, Labels, StopSignal, TTY and ReadOnly; stored formats and the node
// know them.
type ContainerSpec struct {
	Image      string // as typed, or pinned: name[:tag][@sha256:…]
	Entrypoint []string
	Args       []string
	Env        []string // KEY=value
	Dir        string
	User       string // name or uid[:gid], looked up in the image
	Hostname   string // templates {{.Node.Hostname}}, {{.Task.Slot}} … are not supported: refused
	Labels     map[string]string
	Mounts     []Mount
	StopSignal string
	StopGrace  time.Duration // SIGTERM to SIGKILL; 0 = at once
	TTY        bool
	ReadOnly   bool
}

// DefaultStopGrace is Docker's time between the stop signal and SIGKILL.
const DefaultStopGrace = 10 * time.Second

// MountType is the kind of a mount.
type MountType string

const (
	MountBind   MountType = "bind"
	MountVolume MountType = "volume"
	MountTmpfs  MountType = "tmpfs"
)

// Mount is one mount of a container.
type Mount struct {
	Type      MountType
	Source    string // bind: absolute host path; volume: its name, "" = anonymous; tmpfs: ""
	Target    string // absolute path in the container
	ReadOnly  bool
	TmpfsSize int64 // bytes, 0 = the kernel's default
}

// Resources are amounts of a node. Zero means none (reservation) or no limit.
type Resources struct {
	NanoCPUs    int64 // 1e9 = one core
	MemoryBytes int64
}

// RestartCondition says after which exits a task is replaced.
type RestartCondition uint8

const (
	RestartAny RestartCondition = iota
	RestartOnFailure
	RestartNone
)

// RestartPolicy says whether and when an ended task is replaced. So far the
// API takes other conditions only; the rest stays at its default.
type RestartPolicy struct {
	Condition   RestartCondition
	Delay       time.Duration // default DefaultRestartDelay
	MaxAttempts uint64        // 0 = no limit
	Window      time.Duration // attempts older than this do not count; 0 = all count
}

// DefaultRestartDelay is Docker's delay before a replacement starts.
const DefaultRestartDelay = 5 * time.Second

// UpdateConfig bounds a rolling update. Only the defaults can be had yet.
type UpdateConfig struct {
	Parallelism uint64        // tasks replaced at a time; 0 = all; default 1
	Delay       time.Duration // between groups
	Monitor     time.Duration // a new task that fails this soon fails the update; default 5 s
	StartFirst  bool          // start the successor before the old task stops
}

// DefaultUpdate is Docker's default: one task at a time, stop first.
var DefaultUpdate = UpdateConfig{Parallelism: 1, Monitor: 5 * time.Second}

// NetworkTarget attaches the tasks of a service to a network.
type NetworkTarget struct {
	Network ID       // resolved; requests may carry a name until the leader has stored the service
	Aliases []string // further names of the service on this network
}

// Protocol of a published port.
type Protocol string

const (
	TCP Protocol = "tcp"
	UDP Protocol = "udp"
)

// Automatic published ports come from this closed range.
const (
	FirstPublishedPort uint16 = 30000
	LastPublishedPort  uint16 = 32767
)

// PortSpec publishes a port of a service on every node of the cluster.
type PortSpec struct {
	Name      string // so far the API takes none
	Protocol  Protocol
	Target    uint16 // the port in the container, 1-65535
	Published uint16 // 0 in a spec = chosen from the automatic range; never 0 in Service.Ports
}

// Service is a stored service.
type Service struct {
	ID   ID
	Meta Meta
	// Spec is the newest version, with network names resolved.
	Spec ServiceSpec
	// SpecVersion numbers Spec; tasks refer to (ID, SpecVersion).
	SpecVersion uint64
	// Previous is the version before it; nil for a service never updated.
	Previous *ServiceSpec
	// VIPs has one entry per network of the service, in the order of
	// Spec.Networks, the ingress network first when ports are published.
	// Empty with EndpointDNSRR.
	VIPs []VIP
	// Ports are Spec.Ports with every Published port chosen.
	Ports  []PortSpec
	Update UpdateStatus
}

// VIP is the virtual address of a service on one network.
type VIP struct {
	Network ID
	Addr    netip.Prefix // the first address with its subnet's length, as Attachment.Addr
	Addr6   netip.Prefix `json:",omitzero" cbor:",omitzero"` // as Attachment.Addr6
}

// Addrs are the addresses of the service, the first one first.
func (v *VIP) Addrs() []netip.Prefix { return valid(v.Addr, v.Addr6) }

// UpdateState is the state of a rolling update.
type UpdateState uint8

const (
	UpdateNone UpdateState = iota // never updated
	UpdateRunning
	UpdatePaused // a new task failed within UpdateConfig.Monitor
	UpdateDone
)

// UpdateStatus tells how far the newest rolling update is.
type UpdateStatus struct {
	State     UpdateState
	StartedAt time.Time
	EndedAt   time.Time
	Message   string
}

// SpecVersion is one immutable version of a service's specification. It lives
// as long as the service or a task that refers to it.
type SpecVersion struct {
	Service ID
	Version uint64
	Spec    ServiceSpec
}
