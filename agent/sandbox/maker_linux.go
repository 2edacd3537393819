package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// LegName is the gateway leg inside a task. Overlay ports are eth0, eth1, ….
const LegName = weft.GatewayLeg

// Config of a Linux maker.
type Config struct {
	// Node owns all objects; it is part of their names and aliases.
	Node weft.ID
	// NetNSDir is the folder of namespace files, FilesDir that of the tasks'
	// files (one folder per task). Both must stay the same over the life of
	// the tasks.
	NetNSDir, FilesDir string
	// Pool is the wanted subnet of the gateway bridge, IPv4, /8 to /29.
	// Default 172.31.240.0/20; the next free one is taken if the host uses it.
	Pool netip.Prefix
	// Repaired, when set, gets every repair before the call returns that made
	// it. It must not block.
	Repaired func(weft.Repair)
	// Log gets what was changed on the host itself. Required.
	Log *slog.Logger
}

// Linux is the Maker for the kernel's namespaces. The kernel is its state; what it
// remembers only tells repairs from changes.
type Linux struct {
	cfg Config
	// guards: host, the gateway bridge and the choice of addresses on it, from
	// reading what is used until the choice is recorded. A box is taken before it.
	mu   sync.Mutex
	host memory

	shortcuts shortcuts

	// boot and groups are asked for once: neither changes while a process lives.
	boot   func() string
	groups func() (string, error)

	boxesMu sync.Mutex // guards: boxes
	boxes   map[weft.ID]*box
}

var _ Maker = (*Linux)(nil)

// New checks the configuration. It does no I/O.
func New(cfg Config) (*Linux, error) {
	if cfg.Node == "" || cfg.NetNSDir == "" || cfg.FilesDir == "" || cfg.Log == nil {
		return nil, fmt.Errorf("configure sandboxes: node, both folders and log are needed: %w", weft.ErrInvalid)
	}
	if !cfg.Pool.IsValid() {
		cfg.Pool = weft.GatewayPool()
	}
	if !cfg.Pool.Addr().Is4() || cfg.Pool.Masked() != cfg.Pool || cfg.Pool.Bits() < 8 || cfg.Pool.Bits() > 29 {
		return nil, fmt.Errorf("configure sandboxes: gateway pool %s must be an IPv4 prefix from /8 to /29 without host bits: %w", cfg.Pool, weft.ErrInvalid)
	}
	return &Linux{cfg: cfg, boxes: map[weft.ID]*box{}, boot: sync.OnceValue(bootID), groups: sync.OnceValues(pingGroups)}, nil
}

// Make implements Maker.
func (m *Linux) Make(ctx context.Context, s Spec) (Sandbox, error) {
	if err := s.Validate(); err != nil {
		return Sandbox{}, err
	}
	if err := ctx.Err(); err != nil {
		return Sandbox{}, err
	}
	b, done := m.hold(s.Task)
	defer done()
	sb := m.describe(s.Task)
	// The folder comes first: it bears the whole task id, by which List
	// finds what a crash leaves.
	if err := os.MkdirAll(filepath.Dir(sb.HostsPath), 0o755); err != nil {
		return Sandbox{}, fmt.Errorf("make folder of task %s: %w", s.Task.Short(), err)
	}
	isNew, err := isGone(sb.NetNS)
	if err != nil {
		return Sandbox{}, err
	}
	if _, err := netns.Create(m.cfg.NetNSDir, weft.TaskNetNS(m.cfg.Node, s.Task)); err != nil {
		return Sandbox{}, err
	}
	if err := m.writeNames(&sb, &s, isNew); err != nil {
		return Sandbox{}, err
	}
	var g gateway
	if s.Gateway {
		if g, err = m.keepGateway(); err != nil {
			return Sandbox{}, err
		}
	}
	if sb.GatewayAddr, err = m.converge(ctx, b, s, g, true); err != nil {
		return Sandbox{}, fmt.Errorf("set up sandbox of task %s: %w", s.Task.Short(), err)
	}
	return sb, nil
}

// isGone reports whether there is no namespace at path.
func isGone(path string) (bool, error) {
	h, err := netns.Open(path)
	if errors.Is(err, weft.ErrNotFound) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, h.Close()
}

// writeNames writes the three files. In a namespace that was there before, a container
// may go by its domains already, and the task's resolver does: those stay, whatever the
// host's are by now.
func (m *Linux) writeNames(sb *Sandbox, s *Spec, isNew bool) error {
	path := m.namesRecord(s.Task)
	had, ok := readNames(path)
	if ok = ok && !isNew; ok {
		s.Search = had.Search
	} else if err := writeJSON(path, names{Version: recordVersion, Search: s.Search}); err != nil {
		return fmt.Errorf("names of task %s: %w", s.Task.Short(), err)
	}
	sb.Search, sb.IsSearchKnown = s.Search, true
	return writeFiles(*sb, *s)
}

func (m *Linux) namesRecord(task weft.ID) string {
	return filepath.Join(filepath.Dir(m.describe(task).HostsPath), namesName)
}

// Destroy implements Maker. Deleting the links first spares the kernel a slow
// end of the namespace.
func (m *Linux) Destroy(ctx context.Context, task weft.ID) error {
	if !task.Valid() {
		return fmt.Errorf("destroy sandbox of task %q: not a task id: %w", task, weft.ErrInvalid)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	b, done := m.hold(task)
	defer done()
	sb := m.describe(task)
	err := errors.Join(m.delLeg(task, sb.NetNS), netns.Remove(sb.NetNS))
	if err == nil {
		err = os.RemoveAll(filepath.Dir(sb.HostsPath))
	}
	if err != nil {
		return fmt.Errorf("destroy sandbox of task %s: %w", task.Short(), err)
	}
	b.forget()
	return nil
}

// List implements Maker. It goes by the tasks' folders, which Make writes first
// and Destroy removes last; a namespace's name holds only part of the task id.
func (m *Linux) List(ctx context.Context) ([]Sandbox, error) {
	entries, err := os.ReadDir(m.cfg.FilesDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var out []Sandbox
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		task := weft.ID(e.Name())
		if !task.Valid() || !e.IsDir() {
			continue
		}
		sb := m.describe(task)
		sb.GatewayAddr, err = m.legAddr(task)
		if err != nil {
			return nil, err
		}
		switch gone, err := isGone(sb.NetNS); {
		case err != nil:
			return nil, err
		case gone:
			// The folder outlives a power cut, the namespace does not.
			sb.NetNS = ""
		}
		n, known := readNames(m.namesRecord(task))
		sb.Search, sb.IsSearchKnown = n.Search, known
		out = append(out, sb)
	}
	return out, nil
}

// describe derives all names of a task's sandbox.
func (m *Linux) describe(task weft.ID) Sandbox {
	dir := filepath.Join(m.cfg.FilesDir, string(task))
	return Sandbox{
		Task: task, NetNS: filepath.Join(m.cfg.NetNSDir, weft.TaskNetNS(m.cfg.Node, task)),
		HostsPath: filepath.Join(dir, "hosts"), ResolvConfPath: filepath.Join(dir, "resolv.conf"), HostnamePath: filepath.Join(dir, "hostname"),
	}
}

// A leg's address is recorded in its host end's ifalias before it is used:
// "weft:<node> v1 gw <task> <address>".
func (m *Linux) legAlias(task weft.ID, p netip.Prefix) string {
	return fmt.Sprintf("%s v1 gw %s %s", weft.LinkAlias(m.cfg.Node), task, p)
}

func (m *Linux) parseLegAlias(s string) (task weft.ID, p netip.Prefix, ok bool) {
	f := strings.Split(s, " ")
	if len(f) != 5 || f[0] != weft.LinkAlias(m.cfg.Node) || f[1] != "v1" || f[2] != "gw" {
		return "", p, false
	}
	p, err := netip.ParsePrefix(f[4])
	return weft.ID(f[3]), p, err == nil && p.Addr().Is4()
}
