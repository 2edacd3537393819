package weft

import (
	"time"
)

// Container is a container of this node, as the node-local part of the API
// shows it. Containers of services are named by Task.Name.
type Container struct {
	ID      string // 64 hexadecimal digits, derived from the task (ContainerID)
	Name    string
	Task    ID
	Service ID
	Node    ID
	Image   string
	Command []string
	Labels  map[string]string
	Created time.Time
	State   ContainerState
	Spec    ContainerSpec
	Limits  Resources // as the kernel enforces them
	// Networks maps a network's name to the container's address there.
	Networks map[string]Attachment
	// Ports in mode host that its task has on this node.
	Ports   []PortSpec
	LogPath string
}

// ContainerState is what runs now.
type ContainerState struct {
	Status     string // "created", "running", "exited", "lost"
	PID        int
	ExitCode   int
	OOMKilled  bool
	Error      string
	StartedAt  time.Time
	FinishedAt time.Time
	Health     Health // of a running one; the check itself is in Spec.Health
}

// LogOptions select lines of a log.
type LogOptions struct {
	Stdout, Stderr bool
	Follow         bool
	Since, Until   time.Time // zero = no bound
	Tail           int       // last n lines; -1 = all
}

// LogRecord is one line.
type LogRecord struct {
	Task   ID
	Node   ID
	Stderr bool
	Time   time.Time
	Line   []byte // with its newline, if it had one
}

// Image is an image of this node.
type Image struct {
	ID      string // digest of its configuration, "sha256:…"
	Tags    []string
	Digests []string // name@sha256:… of its manifest
	Created time.Time
	Size    int64 // bytes of its blobs
	Labels  map[string]string
	Arch    string
	OS      string
	Config  ImageConfig
}

// ImageConfig is what an image brings for its containers.
type ImageConfig struct {
	Entrypoint, Cmd, Env []string
	User, Dir            string
	StopSignal           string
	Health               HealthCheck
	Shell                []string // that runs HealthShell; none = /bin/sh -c
	ExposedPorts         []string
}
