// Package runtime is the seam between the agent and whatever runs containers.
//
// It owns the interfaces and their meaning, an in-memory implementation and one
// that runs plain processes (for tests without root); containerd is in the
// package below. All methods are keyed by task id, idempotent, and safe to
// repeat after a crash; they may be called concurrently for different tasks.
package runtime

import (
	"context"
	"io"
	"time"

	"github.com/weftnet/weft"
)

// Spec is a container to be made: the service's wish joined with what the node
// has prepared.
type Spec struct {
	Task       weft.ID
	Name       string
	Node       weft.ID
	Service    weft.ID
	Image      string // resolved on this node by Images.Ensure
	Entrypoint []string
	Args       []string
	Env        []string
	Dir        string
	User       string
	Hostname   string
	Labels     map[string]string
	Mounts     []weft.Mount // volumes already resolved to bind mounts by the runtime's volume store
	StopSignal string
	TTY        bool
	ReadOnly   bool
	Limits     weft.Resources
	NetNS      string // path; "" = a fresh empty namespace
	// Files by their path in the container ("/etc/hosts"), bound from the host.
	Files  map[string]string
	Cgroup string // weft.CgroupPath
	// Health is the check, with nothing left open; without a Test there is
	// none. Shell runs the line of weft.HealthShell. The runtime only keeps them.
	Health weft.HealthCheck `json:",omitzero"`
	Shell  []string         `json:",omitempty"`
}

// State of a container.
type State uint8

const (
	Created State = iota
	Running
	Exited
	// Lost: the record exists, the process does not, its exit is unknown.
	Lost
)

// Status of one container.
type Status struct {
	Task      weft.ID
	State     State
	PID       int
	Exit      Exit
	StartedAt time.Time
	CreatedAt time.Time
	// Spec as created; its Args may be the whole command line, what the
	// image brings included, and its Entrypoint then empty.
	Spec    Spec
	LogPath string
}

// Exit of a container's first process.
type Exit struct {
	Code  int
	Known bool
	OOM   bool
	At    time.Time
}

// Runtime runs containers. Errors wrap weft.ErrNotFound, ErrInvalid (never
// retry) or ErrUnavailable (the runtime is restarting: retry).
type Runtime interface {
	// Create makes container, snapshot and log; no process.
	Create(ctx context.Context, s Spec) error
	// Start starts the process and returns its pid. Starting a running
	// container returns its pid.
	Start(ctx context.Context, task weft.ID) (pid int, err error)
	// Wait blocks until the process has ended; a lost connection to the
	// runtime is not an exit. A container that is gone: ErrNotFound.
	Wait(ctx context.Context, task weft.ID) (Exit, error)
	// Stop sends the signal, waits up to grace, kills the whole cgroup.
	Stop(ctx context.Context, task weft.ID, grace time.Duration) (Exit, error)
	// Signal sends one signal by name ("SIGHUP").
	Signal(ctx context.Context, task weft.ID, signal string) error
	// Remove kills if needed and removes everything but the log; what is
	// not there is success.
	Remove(ctx context.Context, task weft.ID) error
	// List returns every container of this node.
	List(ctx context.Context) ([]Status, error)
}

// Execer runs further processes in a container.
type Execer interface {
	// Exec runs until the process ends or ctx does (then it is killed).
	Exec(ctx context.Context, task weft.ID, s ExecSpec, io Streams) (code int, err error)
}

// ExecSpec is one process.
type ExecSpec struct {
	ID         string // unique
	Cmd        []string
	Env        []string
	Dir        string
	User       string
	TTY        bool
	Privileged bool
	// Resize delivers terminal sizes; nil without a terminal. The caller
	// closes it.
	Resize <-chan Size
	// Started is called once with the pid, before output is copied.
	Started func(pid int)
}

// Size of a terminal in characters.
type Size struct{ Width, Height uint16 }

// Streams of an exec; nil means none. With TTY, Stderr is unused.
type Streams struct {
	Stdin          io.Reader // EOF closes the process's stdin
	Stdout, Stderr io.Writer
}

// Logs reads what containers have written.
type Logs interface {
	// Logs calls f for each record in order until the end (or, following,
	// until the container is gone or ctx ends). The error of f ends it.
	Logs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error
	// RemoveLogs deletes a task's logs.
	RemoveLogs(ctx context.Context, task weft.ID) error
}

// Images is the image store of the node.
type Images interface {
	// Ensure makes the image usable here: local store first, then its
	// registry. It returns the digest-pinned reference it used and the
	// image's configuration. Pull progress goes to report when not nil.
	Ensure(ctx context.Context, ref string, report func(Progress)) (weft.Image, error)
	Images(ctx context.Context) ([]weft.Image, error)
	// Load imports a `docker save` or OCI layout tar, compressed or not, and
	// returns the names of what it held. A broken archive: ErrInvalid, and
	// nothing is kept.
	Load(ctx context.Context, r io.Reader) ([]string, error)
	// RemoveImage by name, digest or id prefix; in use: ErrConflict.
	RemoveImage(ctx context.Context, ref string, force bool) (untagged, deleted []string, err error)
	// Pull fetches from the registry even when a local image has the name.
	Pull(ctx context.Context, ref string, auth string, report func(Progress)) error
	// Tag gives a second name.
	Tag(ctx context.Context, ref, name string) error
}

// Progress of a pull.
type Progress struct {
	ID      string // of the layer
	Status  string // "Downloading", "Download complete", "Pull complete"
	Current int64
	Total   int64
}
