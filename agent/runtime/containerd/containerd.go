// Package containerd runs containers by a private containerd, linked into the
// executable and run as a supervised child process, with runc as the only
// outside program.
//
// It owns the child, its state, the OCI specification of a container, named
// volumes, image storage and (through agent/runtime) json-file logs. It does
// not know networks: a container gets the namespace it is told.
//
// Main must be called first thing by the program's main: by the base name of
// argv[0] the same executable is server, shim or logger. The daemon makes one
// Driver with New and calls Run; all other methods may be called at the same
// time from any goroutine. They answer weft.ErrUnavailable while the server is
// restarting. When Run's context ends, containers and the server go on; the
// next daemon adopts them. Shutdown ends them.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

const (
	// namespace in containerd; one is enough, as the server is private.
	namespace   = "weft"
	runtimeName = "io.containerd.runc.v2"
	snapshotter = "overlayfs"
)

// Config of a Driver. Node, ExecRoot and DataRoot are required.
type Config struct {
	// Node labels containers and names cgroups; several nodes may share one
	// machine.
	Node weft.ID
	// ExecRoot holds sockets, pids and runc's state: lost at reboot
	// ("/run/weft"). Absolute; at most 29 bytes, since sockets lie below it
	// (sun_path is 108 bytes, unix(7)).
	ExecRoot string
	// DataRoot holds images, snapshots, volumes and logs ("/var/lib/weft").
	// Absolute.
	DataRoot string
	// Runc is the path of runc; "" = looked up in PATH when Run starts.
	Runc string
	// Executable is the path of the program that calls Main; "" = the
	// running one.
	Executable string
	// Grouped puts all containers of the node into one shim process: far
	// less memory, but a crash of that shim kills them all. For the lab.
	Grouped bool
	// NoSync lets the metadata database skip fsync: faster starts, and a
	// power loss may cost the image store. For the lab.
	NoSync bool
	// Log; nil = discard.
	Log *slog.Logger
}

// Validate names the field that is wrong (weft.ErrInvalid).
func (c *Config) Validate() error {
	if c.Node == "" {
		return fmt.Errorf("containerd config: Node is empty: %w", weft.ErrInvalid)
	}
	// containerd 2.4 refuses a socket_dir of more than 42 bytes, quietly: it
	// then serves everything but tasks. Ours is ExecRoot/containerd/s.
	if !filepath.IsAbs(c.ExecRoot) || len(c.ExecRoot) > 29 {
		return fmt.Errorf("containerd config: ExecRoot %q must be an absolute path of at most 29 bytes, since sockets lie below it: choose a shorter --exec-root (or lab name): %w", c.ExecRoot, weft.ErrInvalid)
	}
	if !filepath.IsAbs(c.DataRoot) {
		return fmt.Errorf("containerd config: DataRoot %q must be an absolute path: %w", c.DataRoot, weft.ErrInvalid)
	}
	return nil
}

// Driver implements runtime.Runtime, runtime.Execer, runtime.Logs and
// runtime.Images.
type Driver struct {
	cfg    Config
	log    *slog.Logger
	bootID string
	notes  notes

	// mu guards: everything below. It is never held during a call.
	mu      sync.Mutex
	link    link
	tasks   map[weft.ID]*taskLock
	starts  map[weft.ID]*startGate
	builtin chan struct{} // holds one token: the right to make the built-in image
}

// link is the connection to the server at one moment.
type link struct {
	client *client.Client // nil before the server was first up
	up     bool
	runc   string
	err    error         // why Run ended; nil while it runs
	change chan struct{} // closed and replaced whenever link changes
}

var (
	_ runtime.Runtime = (*Driver)(nil)
	_ runtime.Execer  = (*Driver)(nil)
	_ runtime.Logs    = (*Driver)(nil)
	_ runtime.Images  = (*Driver)(nil)
)

// New checks the configuration; it does no I/O and starts nothing.
func New(cfg Config) (*Driver, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.ExecRoot, cfg.DataRoot = filepath.Clean(cfg.ExecRoot), filepath.Clean(cfg.DataRoot)
	return &Driver{
		cfg: cfg, log: cfg.Log, notes: notes{dir: filepath.Join(cfg.ExecRoot, "containerd", "exec")},
		link:    link{change: make(chan struct{})},
		tasks:   make(map[weft.ID]*taskLock),
		starts:  make(map[weft.ID]*startGate),
		builtin: make(chan struct{}, 1),
	}, nil
}

// Paths. Everything of a task is below one directory in each root.
func (d *Driver) execDir(elem ...string) string {
	return filepath.Join(append([]string{d.cfg.ExecRoot, "containerd"}, elem...)...)
}
func (d *Driver) dataDir(elem ...string) string {
	return filepath.Join(append([]string{d.cfg.DataRoot}, elem...)...)
}
func (d *Driver) socket() string             { return d.execDir("c.sock") }
func (d *Driver) libexec(name string) string { return d.dataDir("libexec", name) }
func (d *Driver) logDir(task weft.ID) string { return d.dataDir("tasks", string(task), "log") }

// Ready blocks until the server answers; the error of ctx, or why Run ended.
func (d *Driver) Ready(ctx context.Context) error {
	for {
		l := d.current()
		switch {
		case l.err != nil:
			return l.err
		case l.up:
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the container runtime: %w", ctx.Err())
		case <-l.change:
		}
	}
}

func (d *Driver) current() link {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.link
}

// setLink changes the link and wakes all who wait for a change.
func (d *Driver) setLink(f func(*link)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f(&d.link)
	close(d.link.change)
	d.link.change = make(chan struct{})
}

// conn returns the client and a context that carries containerd's namespace.
func (d *Driver) conn(ctx context.Context) (context.Context, *client.Client, error) {
	l := d.current()
	if !l.up {
		if l.err != nil {
			return ctx, nil, fmt.Errorf("the container runtime has stopped (%w): %w", l.err, weft.ErrUnavailable)
		}
		return ctx, nil, fmt.Errorf("the container runtime is starting; try again: %w", weft.ErrUnavailable)
	}
	return namespaces.WithNamespace(ctx, namespace), l.client, nil
}

// findRunc returns the path of runc.
func (d *Driver) findRunc() (string, error) {
	name := d.cfg.Runc
	if name == "" {
		name = "runc"
	}
	path, err := exec.LookPath(name)
	if err != nil && d.cfg.Runc == "" {
		for _, dir := range []string{"/usr/sbin", "/usr/local/sbin", "/sbin"} { // often not in an ordinary user's PATH
			if p, serr := exec.LookPath(filepath.Join(dir, "runc")); serr == nil {
				return p, nil
			}
		}
	}
	if err != nil {
		return "", fmt.Errorf("find runc (%w): weft needs it to start containers; install it with: apt-get install runc: %w", err, weft.ErrUnavailable)
	}
	return filepath.Abs(path)
}

func (d *Driver) executable() (string, error) {
	if d.cfg.Executable != "" {
		return d.cfg.Executable, nil
	}
	exe, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find own executable: %w", err)
	}
	return exe, nil
}

// wrap gives an error of containerd its place among the sentinels of the root.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	text := fmt.Sprintf(format, args...)
	for _, s := range []error{weft.ErrNotFound, weft.ErrConflict, weft.ErrInvalid, weft.ErrUnavailable, weft.ErrUnsupported, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, s) {
			return fmt.Errorf("%s: %w", text, err)
		}
	}
	var kind error
	switch {
	case errdefs.IsNotFound(err):
		kind = weft.ErrNotFound
	case errdefs.IsAlreadyExists(err), errdefs.IsFailedPrecondition(err):
		kind = weft.ErrConflict
	case errdefs.IsInvalidArgument(err):
		kind = weft.ErrInvalid
	case errdefs.IsUnavailable(err):
		kind = weft.ErrUnavailable
	default:
		return fmt.Errorf("%s: %w", text, err)
	}
	return fmt.Errorf("%s: %w: %w", text, kind, err)
}
