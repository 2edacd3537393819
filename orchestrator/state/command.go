package state

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/weftnet/weft"
)

// EntryVersion is the first byte of every Raft log entry. Within a version
// fields may be added (an older build ignores them, so only where that is
// harmless), never renamed or given another meaning.
const EntryVersion byte = 1

// Command is one transaction: all of its changes are applied, or none.
// Everything that the state machine may not find out for itself, the time and
// new identifiers, is in it.
type Command struct {
	At      time.Time // the proposer's clock, UTC; becomes CreatedAt and UpdatedAt
	Changes []Change
}

// Change is a union: exactly one field is set.
type Change struct {
	// Whole objects. Meta.Index is the index that the proposer read and the
	// lock it holds: 0 creates, anything else must be the stored index.
	Cluster *weft.Cluster `cbor:",omitempty"`
	Node    *weft.Node    `cbor:",omitempty"`
	Network *weft.Network `cbor:",omitempty"`
	// Service also stores its Spec as a spec version when its SpecVersion
	// is new.
	Service *weft.Service `cbor:",omitempty"`
	// Task creates; tasks change only by the narrow changes below.
	Task *weft.Task `cbor:",omitempty"`

	// Narrow changes by the leader and the agents. They take no lock, do
	// not move Meta.Index of what people edit (node, service), and skip
	// an object that is gone, because they race with its removal by design.
	NodeStatus    *NodeStatus    `cbor:",omitempty"`
	ServiceUpdate *ServiceUpdate `cbor:",omitempty"`
	TaskStatus    *TaskStatus    `cbor:",omitempty"`
	TaskDesired   *TaskDesired   `cbor:",omitempty"`
	TaskAssign    *TaskAssign    `cbor:",omitempty"`
	TaskAttach    *TaskAttach    `cbor:",omitempty"`

	Delete *Ref `cbor:",omitempty"`

	// Release gives what has rested back to the allocator. Freed addresses
	// begin to rest by themselves, with the change that frees them.
	Release *Release `cbor:",omitempty"`
}

// Departed is the message of a node that is down because it left by itself. It
// does not come back under its id.
const Departed = "left the cluster"

// HasDeparted reports whether the node has left the cluster by itself: what is
// still listed of it is the past.
func HasDeparted(n *weft.Node) bool {
	return n.Status.State == weft.NodeDown && n.Status.Message == Departed
}

// NodeStatus is what sessions and liveness change of a node. Nil and invalid
// fields leave the stored value.
type NodeStatus struct {
	Node        weft.ID
	State       *weft.NodeState `cbor:",omitempty"`
	Message     string
	Listeners   *[]weft.Listener      `cbor:",omitempty"`
	Description *weft.NodeDescription `cbor:",omitempty"`
	Session     *NodeSession          `cbor:",omitempty"`
	Keys        *[]weft.NodeKey       `cbor:",omitempty"`
	// Manager replaces the manager's part: a node that leaves the Raft
	// group has none (DropManager).
	Manager     *weft.ManagerStatus `cbor:",omitempty"`
	DropManager bool                `cbor:",omitempty"`
}

// NodeSession is the addresses that a node gave when its session opened; an
// invalid one leaves the stored value, and so does port 0.
type NodeSession struct {
	Addr     netip.Addr
	DataPath netip.Addr
	Port     uint16 `cbor:",omitempty"` // of the cluster port at Addr
}

// ServiceUpdate is the progress of a rolling update.
type ServiceUpdate struct {
	Service weft.ID
	// SpecVersion is the version that the progress is about; skipped when
	// the service has a newer one by now.
	SpecVersion uint64
	Update      weft.UpdateStatus
}

// TaskStatus is a reported status. It is skipped when it would take the task
// back, or when the task is on another node. State TaskRemove means that the
// task's remains are gone: the record is deleted if its removal was desired.
type TaskStatus struct {
	Task   weft.ID
	Node   weft.ID // the reporter; "" = the leader, for tasks without a node or of a lost one
	Status weft.TaskStatus
}

// TaskDesired raises the desired state; it never lowers it.
type TaskDesired struct {
	Task    weft.ID
	Desired weft.TaskState
}

// TaskAssign gives a pending task its node, and its ports in mode host there.
type TaskAssign struct {
	Task  weft.ID
	Node  weft.ID
	Ports []weft.PortSpec `cbor:",omitempty"`
}

// TaskAttach gives a new task its addresses and makes it pending.
type TaskAttach struct {
	Task        weft.ID
	Attachments []weft.Attachment
}

// Kind names a table.
type Kind string

// The kinds of objects that Delete can remove. Spec versions are not among
// them: they go with the last service or task that refers to them.
const (
	KindNode    Kind = "node"
	KindService Kind = "service"
	KindNetwork Kind = "network"
	KindTask    Kind = "task"
)

// Ref names an object to delete. Index is the lock as in a Put; 0 deletes
// whatever is stored, and nothing when nothing is.
type Ref struct {
	Kind  Kind
	ID    weft.ID
	Index uint64 `cbor:",omitempty"`
}

// EncodeEntry encodes commands, each a transaction of its own, as one log
// entry.
func EncodeEntry(cmds []Command) ([]byte, error) {
	b, err := encMode.Marshal(cmds)
	if err != nil {
		return nil, fmt.Errorf("encode %d commands: %w", len(cmds), err)
	}
	return append([]byte{EntryVersion}, b...), nil
}

// DecodeEntry is the reverse of EncodeEntry. An unknown version is an error
// that names it.
func DecodeEntry(b []byte) ([]Command, error) {
	if len(b) == 0 {
		return nil, fmt.Errorf("decode log entry: it is empty")
	}
	if b[0] != EntryVersion {
		return nil, fmt.Errorf("decode log entry: version %d is not known to this build (it knows %d): run the weft that wrote it, or a newer one", b[0], EntryVersion)
	}
	var cmds []Command
	if err := decMode.Unmarshal(b[1:], &cmds); err != nil {
		return nil, fmt.Errorf("decode log entry of version %d: %w", b[0], err)
	}
	return cmds, nil
}

// encMode and decMode are immutable after their construction and safe for
// concurrent use.
var (
	encMode = mustEnc()
	decMode = mustDec()
)

func mustEnc() cbor.EncMode {
	// RFC 8949 section 4.2.1: maps in a fixed order, so that equal states
	// have equal snapshots.
	o := cbor.CoreDetEncOptions()
	o.Time = cbor.TimeRFC3339NanoUTC
	m, err := o.EncMode()
	if err != nil {
		panic(fmt.Sprintf("cbor encoder options: %v", err))
	}
	return m
}

func mustDec() cbor.DecMode {
	// A scheduling pass may place a million tasks in one command; the
	// library's default of 131,072 elements is a bound for strangers.
	m, err := cbor.DecOptions{MaxArrayElements: 1 << 26, MaxMapPairs: 1 << 20}.DecMode()
	if err != nil {
		panic(fmt.Sprintf("cbor decoder options: %v", err))
	}
	return m
}
