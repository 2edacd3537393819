package api

import (
	"context"
	"io"
	"time"

	"github.com/weftnet/weft"
)

// What the server needs of the rest of weft. cmd passes implementations: the
// cluster-wide ones forward to the leader, the node's own act here. All are
// safe for concurrent use, block until done or ctx ends, and return errors by
// the sentinels of package weft.

// Swarm is this node's membership and the cluster object.
type Swarm interface {
	// Local never touches Raft or the network: ping and info stand on it.
	Local() weft.LocalInfo
	Init(ctx context.Context, r weft.InitRequest) (weft.ID, error)
	Join(ctx context.Context, r weft.JoinRequest) error
	// Leave gives up membership; without force a manager answers
	// ErrUnavailable with what would be lost.
	Leave(ctx context.Context, force bool) error
	Cluster(ctx context.Context) (weft.Cluster, error)
	// UpdateCluster changes the spec and rotates what is asked for.
	UpdateCluster(ctx context.Context, index uint64, u ClusterUpdate) error
}

// ClusterUpdate is a change of the cluster object.
type ClusterUpdate = weft.ClusterUpdate

// ServiceStore is the cluster's services. ref is an id, a name or a unique
// prefix of an id, in that order of precedence.
type ServiceStore interface {
	Services(ctx context.Context) ([]weft.Service, error)
	Service(ctx context.Context, ref string) (weft.Service, error)
	// CreateService resolves network names, allocates VIPs and ports, and
	// answers the stored service. The spec arrives with every default filled
	// in: a zero StopGrace in it was asked for. A name that is taken is
	// ErrConflict, a network that does not exist ErrNotFound.
	CreateService(ctx context.Context, spec weft.ServiceSpec) (weft.Service, error)
	UpdateService(ctx context.Context, id weft.ID, index uint64, spec weft.ServiceSpec) (weft.Service, error)
	// RollbackService gives a service its previous specification back; the two
	// change places. Without one it is ErrInvalid.
	RollbackService(ctx context.Context, id weft.ID, index uint64) (weft.Service, error)
	RemoveService(ctx context.Context, id weft.ID) error
}

// TaskStore is the cluster's tasks.
type TaskStore interface {
	// Tasks returns all tasks that f selects, with the spec versions they
	// refer to.
	Tasks(ctx context.Context, f weft.TaskFilter) (weft.TaskList, error)
	// TaskLogs reads the logs of tasks wherever they run; records of one
	// task are in order. follow ends with ctx.
	TaskLogs(ctx context.Context, tasks []weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error
}

// NodeStore is the cluster's nodes.
type NodeStore interface {
	Nodes(ctx context.Context) ([]weft.Node, error)
	UpdateNode(ctx context.Context, id weft.ID, index uint64, spec weft.NodeSpec) error
	RemoveNode(ctx context.Context, id weft.ID, force bool) error
}

// NetworkStore is the cluster's networks.
type NetworkStore interface {
	Networks(ctx context.Context) ([]weft.Network, error)
	CreateNetwork(ctx context.Context, spec weft.NetworkSpec) (weft.Network, error)
	RemoveNetwork(ctx context.Context, id weft.ID) error
}

// ContainerStore is the containers of this node.
type ContainerStore interface {
	Containers(ctx context.Context) ([]weft.Container, error)
	ContainerLogs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error
	StopContainer(ctx context.Context, task weft.ID, grace time.Duration) error
	KillContainer(ctx context.Context, task weft.ID, signal string) error
	RemoveContainer(ctx context.Context, task weft.ID, force bool) error
	WaitContainer(ctx context.Context, task weft.ID) (exitCode int, err error)
	Exec(ctx context.Context, task weft.ID, e Exec) (exitCode int, err error)
}

// Exec is one process to run in a container. Stdin comes from the client's
// connection, where a read may block after the process has ended: the
// implementation must not wait for it. A program that does not exist is an
// error whose text contains "not found" or "no such file" (exit code 127).
// Resize is nil without a terminal; it is never closed. Started, when not nil,
// is called once, when the process runs.
type Exec struct {
	ID             string
	Cmd, Env       []string
	Dir, User      string
	TTY            bool
	Privileged     bool
	Stdin          io.Reader // nil = none
	Stdout, Stderr io.Writer
	Resize         <-chan TermSize
	Started        func(pid int)
}

// TermSize is the size of a terminal in characters.
type TermSize struct{ Width, Height uint16 }

// RepairLog counts what this node has put right in its kernel.
type RepairLog interface {
	// Repairs returns the counts by kind, sorted, and since when.
	Repairs() (since time.Time, counts []weft.RepairCount)
}

// WayLog tells how packets leave this node.
type WayLog interface {
	// Ways are those of networks that may go without encapsulation, in order.
	Ways() []weft.Way
}

// ImageStore is the images of this node.
type ImageStore interface {
	Images(ctx context.Context) ([]weft.Image, error)
	LoadImage(ctx context.Context, r io.Reader) ([]string, error)
	RemoveImage(ctx context.Context, ref string, force bool) (untagged, deleted []string, err error)
	PullImage(ctx context.Context, ref, auth string, report func(id, status string, current, total int64)) error
	TagImage(ctx context.Context, ref, name string) error
}
