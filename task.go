package weft

import (
	"fmt"
	"net/netip"
	"time"
)

// TaskState is the observed or desired state of a task. States only grow: a
// task never goes back to a smaller one.
//
//	          leader                      agent of the node
//	new ─► pending ─► assigned ─► accepted ─► preparing ─► ready ─► starting ─► running
//	                                   │           │                    │          │
//	                                   └───────────┴── rejected         └─ failed ─┤
//	                                                                    complete ──┤
//	                                                                    shutdown ──┘
//	                                   remove (desired only) ─► record deleted
//	                                   orphaned: its node was lost for good
type TaskState uint8

// The order is the order of the life cycle and part of the stored format: new
// states go at the end of a gap.
const (
	TaskNew       TaskState = 0
	TaskPending   TaskState = 64  // addresses allocated, no node yet
	TaskAssigned  TaskState = 192 // a node is chosen
	TaskAccepted  TaskState = 193 // the agent has it on disk
	TaskPreparing TaskState = 194 // image, sandbox, network
	TaskReady     TaskState = 195 // could start now
	TaskStarting  TaskState = 196
	TaskRunning   TaskState = 197
	TaskComplete  TaskState = 208 // ended by itself with 0
	TaskShutdown  TaskState = 209 // ended because it was asked to
	TaskFailed    TaskState = 210 // ended by itself, not with 0
	TaskRejected  TaskState = 211 // could not be prepared on its node
	TaskRemove    TaskState = 212 // desired only: stop, then forget the record
	TaskOrphaned  TaskState = 213 // its node is gone
)

var taskStateNames = map[TaskState]string{
	TaskNew: "new", TaskPending: "pending", TaskAssigned: "assigned",
	TaskAccepted: "accepted", TaskPreparing: "preparing", TaskReady: "ready",
	TaskStarting: "starting", TaskRunning: "running", TaskComplete: "complete",
	TaskShutdown: "shutdown", TaskFailed: "failed", TaskRejected: "rejected",
	TaskRemove: "remove", TaskOrphaned: "orphaned",
}

// String is the name that Docker's API gives the state.
func (s TaskState) String() string {
	if n, ok := taskStateNames[s]; ok {
		return n
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// Ended reports whether a task in this observed state will never run again.
func (s TaskState) Ended() bool { return s >= TaskComplete }

// Task is one run of a service's container on one node. It is slim: what it
// runs is the SpecVersion (Service, SpecVersion).
type Task struct {
	ID          ID
	Meta        Meta
	Service     ID
	Slot        uint64 // 1…Replicas; 0 in a global service
	SpecVersion uint64
	Node        ID // "" until assigned
	// Attachments are the task's addresses, one per network.
	Attachments []Attachment
	// Ports are the service's ports in mode host as this task has them on its
	// node, every Published port chosen; set together with Node's assignment.
	Ports []PortSpec `json:",omitzero" cbor:",omitzero"`
	// Desired is TaskReady, TaskRunning, TaskShutdown or TaskRemove.
	Desired TaskState
	Status  TaskStatus
	// NotBefore holds a replacement back (restart delay). The scheduler
	// leaves the task pending until then. Zero = at once.
	NotBefore time.Time
}

// Name is the name of the task's container: service.slot.id, as Docker's; in a
// global service the node's id stands in place of the slot.
func (t *Task) Name(serviceName string) string {
	if t.Slot == 0 {
		return fmt.Sprintf("%s.%s.%s", serviceName, t.Node, t.ID)
	}
	return fmt.Sprintf("%s.%d.%s", serviceName, t.Slot, t.ID)
}

// Attachment is a task's place on one network. It has one hardware address,
// which is derived from Addr.
type Attachment struct {
	Network ID
	// Addr is the task's first address with its subnet's length: IPv4, or
	// IPv6 on a network without IPv4.
	Addr netip.Prefix
	// Addr6 is its IPv6 address beside an IPv4 one; invalid otherwise.
	Addr6 netip.Prefix `json:",omitzero" cbor:",omitzero"`
}

// Addrs are the addresses of the attachment, the first one first.
func (a *Attachment) Addrs() []netip.Prefix { return valid(a.Addr, a.Addr6) }

// valid leaves out what is unset.
func valid[T interface{ IsValid() bool }](all ...T) []T {
	out := all[:0:0]
	for _, a := range all {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

// TaskStatus is what the owner of the current phase last reported: the leader
// up to assigned, the agent afterwards.
type TaskStatus struct {
	State   TaskState
	At      time.Time // when the state was entered, by the reporter's clock
	Message string    // constant text, e.g. "started"
	Err     string    // why it is pending, failed or rejected; "" otherwise
	// ExitCode of the container's first process; meaningful in complete,
	// failed and shutdown when ExitKnown.
	ExitCode  int32
	ExitKnown bool
	PID       int32 // of the first process, in running
	// Ran is when the task entered running, also when it has ended since; zero
	// = it never did, or its node's version did not tell.
	Ran time.Time `json:",omitzero" cbor:",omitzero"`
	// Unhealthy: its check has failed for good, as Err says; it is being
	// stopped.
	Unhealthy bool `json:",omitzero" cbor:",omitzero"`
}
