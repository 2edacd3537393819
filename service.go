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
	Name         string            // a DNS label of at most 63 characters, unique
	Labels       map[string]string // those that begin with "weft." are obeyed; see labels.go
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
	// Rollback bounds the way back to the specification before this one: that
	// of the specification gone back to counts. Zero = DefaultUpdate.
	Rollback    UpdateConfig `json:",omitzero" cbor:",omitzero"`
	ForceUpdate uint64       // a counter; a change of it replaces all tasks
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
	Health     HealthCheck `json:",omitzero" cbor:",omitzero"`
	DNS        DNSConfig   `json:",omitzero" cbor:",omitzero"`
	Hosts      []HostEntry `json:",omitzero" cbor:",omitzero"`
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

// UpdateConfig bounds a rolling update.
type UpdateConfig struct {
	Parallelism uint64        // tasks replaced at a time; 0 = all; default 1
	Delay       time.Duration // between groups
	Monitor     time.Duration // a new task that fails this soon fails the update; default 5 s
	StartFirst  bool          // start the successor before the old task stops
	// OnFailure is what happens when more than MaxFailureRatio (0 to 1) of the
	// service's places have had a new task that failed.
	OnFailure       UpdateFailure `json:",omitzero" cbor:",omitzero"`
	MaxFailureRatio float64       `json:",omitzero" cbor:",omitzero"`
}

// UpdateFailure says what a failed update does.
type UpdateFailure uint8

const (
	UpdatePause    UpdateFailure = iota // leave the places as they are
	UpdateContinue                      // go on with the other places
	UpdateRollback                      // go back to the specification before; not in a rollback
)

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
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// Automatic published ports come from this closed range.
const (
	FirstPublishedPort uint16 = 30000
	LastPublishedPort  uint16 = 32767
)

// PortSpec publishes a port of a service, or a range of them: Published+i leads to
// Target+i. Compare two by Equal.
type PortSpec struct {
	Name      string // for people; any text without control characters
	Protocol  Protocol
	Target    uint16 // the port in the container, 1-65535
	Published uint16 // 0 = chosen from the automatic range; see Service.Ports
	// Count is the number of ports of a range; 0 and 1 are one port.
	Count uint16      `json:",omitzero" cbor:",omitzero"`
	Mode  PublishMode `json:",omitzero" cbor:",omitzero"`
	// IPs, or else Interface, bind the port to some addresses of the nodes; no
	// other address answers. Allow are the clients that may connect; none =
	// all. All three follow from the labels of the service (ServiceSpec.Defaults).
	IPs       []netip.Addr   `json:",omitzero" cbor:",omitzero"`
	Interface string         `json:",omitzero" cbor:",omitzero"`
	Allow     []netip.Prefix `json:",omitzero" cbor:",omitzero"`
}

// Service is a stored service.
type Service struct {
	ID   ID
	Meta Meta
	// Spec is the newest version, with network names resolved.
	Spec ServiceSpec
	// SpecVersion numbers Spec; tasks refer to (ID, SpecVersion).
	SpecVersion uint64
	// Previous is the version before it; nil for a service never updated, and
	// after it was rolled back because an update failed.
	Previous *ServiceSpec
	// VIPs has one entry per network of the service, in the order of
	// Spec.Networks, the ingress network first when ports are published.
	// Empty with EndpointDNSRR.
	VIPs []VIP
	// Ports are Spec.Ports, one by one, with every Published port chosen, but
	// for those in mode host: each task has its own (Task.Ports).
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
	UpdatePaused // more places failed than UpdateConfig.MaxFailureRatio allows
	UpdateDone
	// The same of the way back to the previous specification.
	RollbackRunning
	RollbackPaused
	RollbackDone
)

// IsRollback reports whether the specification is one that was gone back to.
func (s UpdateState) IsRollback() bool { return s >= RollbackRunning && s <= RollbackDone }

// IsRunning reports whether tasks are being replaced.
func (s UpdateState) IsRunning() bool { return s == UpdateRunning || s == RollbackRunning }

// IsPaused reports whether somebody has to say how to go on.
func (s UpdateState) IsPaused() bool { return s == UpdatePaused || s == RollbackPaused }

// Messages of UpdateStatus, Docker's words.
const (
	MessageUpdateRunning = "update in progress"
	MessageUpdateDone    = "update completed"
	MessageRollbackAsked = "manually requested rollback"
	MessageRollbackDone  = "rollback completed"
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
