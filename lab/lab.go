package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Config of a Lab.
type Config struct {
	// Name tells labs apart: 1 to 10 characters of a-z, 0-9 and inner '-'.
	Name string
	// RunDir holds what a power cut takes (sockets, namespaces, process
	// ids), DataDir what it leaves, each in a folder per lab. Absolute.
	RunDir, DataDir string
	// Binary is the weft executable that the hosts run: absolute.
	Binary string
	// LogLevel of the daemons: debug, info, warn or error.
	LogLevel string
	// Cluster speaks to the daemons.
	Cluster Cluster
	// Log gets what a person would want to know tomorrow. Never nil.
	Log *slog.Logger
}

// DefaultConfig is what `weft lab` uses; Binary, Cluster and Log are the
// caller's.
func DefaultConfig() Config {
	return Config{Name: DefaultName, RunDir: "/run/weft/lab", DataDir: "/var/lib/weft/lab", LogLevel: "info"}
}

// Cluster is what a lab needs of the daemons' API. All methods take the path
// of a daemon's socket, block until the daemon has answered, and must be safe
// for concurrent use.
type Cluster interface {
	// Ping succeeds once the daemon serves its API.
	Ping(ctx context.Context, socket string) error
	// Info tells the node's id and state ("" and LocalInactive outside a
	// cluster).
	Info(ctx context.Context, socket string) (NodeInfo, error)
	// Init makes the daemon the first manager of a new cluster.
	Init(ctx context.Context, socket string, advertise netip.Addr) error
	// Tokens asks a manager for the join tokens.
	Tokens(ctx context.Context, socket string) (weft.JoinTokens, error)
	// Join makes the daemon a member; advertise is its own address, remote
	// a manager's.
	Join(ctx context.Context, socket string, j Join) error
}

// Join is a request to join.
type Join struct {
	Advertise netip.Addr
	Remote    netip.Addr
	Token     string
}

// NodeInfo is a daemon's view of itself.
type NodeInfo struct {
	Node    weft.ID
	State   weft.LocalState
	Manager bool
}

// Lab is one lab, made or not.
type Lab struct {
	cfg  Config
	plan plan
}

// New checks the configuration. It does no I/O.
func New(cfg Config) (*Lab, error) {
	p, err := newPlan(cfg.Name, cfg.RunDir, cfg.DataDir)
	if err != nil {
		return nil, err
	}
	switch {
	case !filepath.IsAbs(cfg.Binary):
		return nil, fmt.Errorf("lab binary %q: want an absolute path: %w", cfg.Binary, weft.ErrInvalid)
	case cfg.Cluster == nil || cfg.Log == nil:
		return nil, fmt.Errorf("lab %s: Cluster and Log must be set: %w", cfg.Name, weft.ErrInvalid)
	}
	return &Lab{cfg: cfg, plan: p}, nil
}

// Host names the parts of one host, "h1" …; ErrInvalid or ErrNotFound.
func (l *Lab) Host(name string) (Host, error) {
	r, err := l.load()
	if err != nil {
		return Host{}, err
	}
	i, err := parseHost(name, r.Hosts)
	if err != nil {
		return Host{}, err
	}
	return r.hosts(l.plan)[i-1], nil
}

// Hosts lists all hosts of the lab; ErrNotFound when there is no lab.
func (l *Lab) Hosts() ([]Host, error) {
	r, err := l.load()
	if err != nil {
		return nil, err
	}
	return r.hosts(l.plan), nil
}

// ClientNetNS is the namespace file of the outside client.
func (l *Lab) ClientNetNS() string { return l.plan.netnsFile(clientName) }

// load reads the record; ErrNotFound when the lab was never made.
func (l *Lab) load() (record, error) {
	b, err := os.ReadFile(l.plan.recordFile())
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, fmt.Errorf("lab %s does not exist; make it with 'weft lab up --name %s': %w", l.plan.name, l.plan.name, weft.ErrNotFound)
	}
	if err != nil {
		return record{}, fmt.Errorf("read lab record: %w", err)
	}
	return decodeRecord(b)
}

func (l *Lab) save(r record) error {
	b, err := r.encode()
	if err != nil {
		return fmt.Errorf("encode lab record: %w", err)
	}
	tmp := l.plan.recordFile() + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write lab record: %w", err)
	}
	_, werr := f.Write(b)
	// It must be whole after the power cut that the VM test makes.
	if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write lab record: %w", err)
	}
	if err := os.Rename(tmp, l.plan.recordFile()); err != nil {
		return fmt.Errorf("write lab record: %w", err)
	}
	return nil
}

// locked runs f while no other process changes the lab.
func (l *Lab) locked(f func() error) error {
	if err := needRoot(); err != nil {
		return err
	}
	for {
		if err := os.MkdirAll(l.plan.runDir, 0o755); err != nil {
			return fmt.Errorf("make lab folder: %w", err)
		}
		fd, err := unix.Open(l.plan.runDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open lab folder %s: %w", l.plan.runDir, err)
		}
		if err := flock(fd); err != nil {
			return errors.Join(fmt.Errorf("lock lab %s: %w", l.plan.name, err), unix.Close(fd))
		}
		// `down` of another process may have removed the folder meanwhile.
		if !sameFile(fd, l.plan.runDir) {
			unix.Close(fd)
			continue
		}
		err = f()
		return errors.Join(err, unix.Close(fd)) // closing unlocks
	}
}

func flock(fd int) error {
	for {
		if err := unix.Flock(fd, unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func sameFile(fd int, path string) bool {
	var a, b unix.Stat_t
	return unix.Fstat(fd, &a) == nil && unix.Stat(path, &b) == nil && a.Ino == b.Ino && a.Dev == b.Dev
}

func needRoot() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("a lab makes network namespaces: run it as root (sudo): %w", weft.ErrForbidden)
	}
	return nil
}

// Up makes the lab, or completes it: what is there and right is kept, so it
// also brings a lab back after a reboot of the machine, with its hosts' state.
// Hosts that were killed stay down. It returns when every running host is a
// member of the cluster.
func (l *Lab) Up(ctx context.Context, s Spec) error {
	return l.locked(func() error {
		var old *record
		r, err := l.load()
		switch {
		case err == nil:
			old = &r
		case !errors.Is(err, weft.ErrNotFound):
			return err
		}
		if r, err = merge(old, s); err != nil {
			return err
		}
		if old == nil {
			if err := l.checkFresh(); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(l.plan.dataDir, 0o700); err != nil {
			return fmt.Errorf("make lab folder: %w", err)
		}
		if err := l.save(r); err != nil {
			return err
		}
		if err := l.makeFabric(r); err != nil {
			return err
		}
		return l.bringUp(ctx, &r)
	})
}

// checkFresh refuses to build on the ruins of a lab whose record is lost.
func (l *Lab) checkFresh() error {
	entries, err := os.ReadDir(l.plan.dataDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read lab folder: %w", err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s holds %s but no record of a lab; run 'weft lab down --name %s' first: %w",
			l.plan.dataDir, entries[0].Name(), l.plan.name, weft.ErrConflict)
	}
	return nil
}

// resolvConf of the hosts: the outside client's address. Nothing answers there
// until a test puts a resolver there, and the refusal comes at once.
const resolvConf = "# Written by weft lab: the machine's own resolver is out of reach of the lab.\nnameserver 198.51.100.7\n"

func (l *Lab) makeFabric(r record) error {
	if err := os.WriteFile(l.plan.resolvConf(), []byte(resolvConf), 0o644); err != nil {
		return fmt.Errorf("write resolv.conf of the lab: %w", err)
	}
	if err := l.plan.makeSwitch(); err != nil {
		return err
	}
	if err := l.plan.connect(l.plan.clientWire(max(r.MTU, DefaultMTU))); err != nil {
		return err
	}
	for _, h := range l.plan.hosts(r.Hosts) {
		if isDown(h) {
			continue
		}
		if err := l.plan.connect(l.plan.hostWire(h, r)); err != nil {
			return err
		}
	}
	return nil
}

// hostsAtOnce is how many hosts start, join and are waited for at a time. Both are the
// processor's work, and each has a limit of its own: with more at once than the processors can
// do the first would not be done before that of the last had passed.
var hostsAtOnce = 2 * runtime.NumCPU()

// joinsAtOnce is how many of so many hosts join at a time. Those that have joined are work,
// too, above all for the manager, which gets no more of the processors than each of them:
// among many one for each processor.
func joinsAtOnce(hosts int) int {
	if hosts <= 16 {
		return hostsAtOnce
	}
	return runtime.NumCPU()
}

// bringUp starts the daemons that do not run, hostsAtOnce, then forms or completes the
// cluster.
func (l *Lab) bringUp(ctx context.Context, r *record) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(hostsAtOnce)
	infos := make([]NodeInfo, r.Hosts)
	hosts := r.hosts(l.plan)
	for i, h := range hosts {
		if isDown(h) {
			continue
		}
		g.Go(func() error {
			if err := l.startDaemon(gctx, h, *r); err != nil {
				return err
			}
			var err error
			infos[i], err = l.awaitState(gctx, h, r.Nodes[h.Name] != "")
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := l.form(ctx, *r, hosts, infos); err != nil {
		return err
	}
	return l.learnNodes(ctx, r, hosts)
}

// awaitState asks a daemon for its state until it is settled: pending turns
// into active once its managers answer. One that was a member says so as soon as
// it has read its own state; only if it does not for recallTimeout has it left.
func (l *Lab) awaitState(ctx context.Context, h Host, wasMember bool) (NodeInfo, error) {
	recall, stop := context.WithTimeout(ctx, recallTimeout)
	defer stop()
	settle, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	for {
		info, err := l.cfg.Cluster.Info(ctx, h.Paths.Socket)
		if err != nil {
			return NodeInfo{}, fmt.Errorf("ask %s for its state: %w", h.Name, err)
		}
		wait := settle
		switch {
		case info.State == weft.LocalInactive && wasMember:
			wait = recall
		case info.State != weft.LocalPending:
			return info, nil
		}
		if pause(wait, pollEvery) != nil {
			return info, ctx.Err()
		}
	}
}

// form initialises a cluster if no host has one, and joins the hosts that are
// in none, in parallel.
func (l *Lab) form(ctx context.Context, r record, hosts []Host, infos []NodeInfo) error {
	inactive := func(h Host) bool { return !isDown(h) && infos[h.Index-1].State == weft.LocalInactive }
	if !slices.ContainsFunc(hosts, inactive) {
		return nil
	}
	manager := slices.IndexFunc(infos, func(i NodeInfo) bool { return i.Manager && i.State == weft.LocalActive })
	if manager < 0 {
		if slices.ContainsFunc(infos, func(i NodeInfo) bool { return i.State != "" && i.State != weft.LocalInactive }) || len(r.Nodes) > 0 {
			return fmt.Errorf("lab %s: no manager of its cluster is up, so no host can join; start one with 'weft lab start': %w", l.plan.name, weft.ErrUnavailable)
		}
		if isDown(hosts[0]) {
			return fmt.Errorf("lab %s: h1 is down and there is no cluster yet; run 'weft lab start h1': %w", l.plan.name, weft.ErrUnavailable)
		}
		manager = 0
		if err := l.cfg.Cluster.Init(ctx, hosts[0].Paths.Socket, hosts[0].Addr); err != nil {
			return fmt.Errorf("initialise the cluster on h1: %w", err)
		}
		infos[0].State = weft.LocalActive
	}
	tokens, err := l.cfg.Cluster.Tokens(ctx, hosts[manager].Paths.Socket)
	if err != nil {
		return fmt.Errorf("ask %s for the join tokens: %w", hosts[manager].Name, err)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(joinsAtOnce(r.Hosts))
	for _, h := range hosts {
		if !inactive(h) {
			continue
		}
		j := Join{Advertise: h.Addr, Remote: hosts[manager].Addr, Token: tokens.Worker}
		if h.Index <= r.Managers {
			j.Token = tokens.Manager
		}
		g.Go(func() error {
			if err := l.cfg.Cluster.Join(gctx, h.Paths.Socket, j); err != nil {
				return fmt.Errorf("join %s to the cluster: %w", h.Name, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// learnNodes waits until every running host is an active member and notes the
// node ids: cleaning up after a kill needs them when nobody is left to ask.
func (l *Lab) learnNodes(ctx context.Context, r *record, hosts []Host) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(hostsAtOnce)
	nodes := make([]weft.ID, len(hosts))
	for i, h := range hosts {
		if isDown(h) {
			nodes[i] = r.Nodes[h.Name]
			continue
		}
		g.Go(func() error {
			var err error
			nodes[i], err = l.awaitMember(gctx, h)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	r.Nodes = map[string]weft.ID{}
	for i, h := range hosts {
		if nodes[i] != "" {
			r.Nodes[h.Name] = nodes[i]
		}
	}
	return l.save(*r)
}

func (l *Lab) awaitMember(ctx context.Context, h Host) (weft.ID, error) {
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	for began := time.Now(); ; {
		info, err := l.cfg.Cluster.Info(ctx, h.Paths.Socket)
		if err == nil && info.State == weft.LocalActive && info.Node != "" {
			return info.Node, nil
		}
		if waitErr := pause(ctx, pollPause(time.Since(began))); waitErr != nil {
			if err == nil {
				err = fmt.Errorf("its state is %q: %w", info.State, waitErr)
			}
			return "", fmt.Errorf("wait for %s to be a member of the cluster (see %s): %w", h.Name, h.Paths.Log, err)
		}
	}
}

// Command prepares a command inside the namespace of file (of a host or of the
// client). The caller runs it with RunIn.
func (l *Lab) Command(ctx context.Context, args []string) (*exec.Cmd, error) {
	if len(args) == 0 {
		return nil, fmt.Errorf("no command given: %w", weft.ErrInvalid)
	}
	return exec.CommandContext(ctx, args[0], args[1:]...), nil
}

// RunIn runs cmd inside the network namespace of file and waits for it. Only
// the network differs from the machine: folders and processes are the same.
func (l *Lab) RunIn(file string, cmd *exec.Cmd) error {
	if err := needRoot(); err != nil {
		return err
	}
	if !isNetNS(file) {
		return fmt.Errorf("%s of lab %s is not up; see 'weft lab ls': %w", filepath.Base(file), l.plan.name, weft.ErrNotFound)
	}
	// The namespace belongs to the thread that forks; waiting needs none.
	if err := within(file, cmd.Start); err != nil {
		return fmt.Errorf("run %s: %w", strings.Join(cmd.Args, " "), err)
	}
	return cmd.Wait()
}

// Cut stops all packets from one host to another, without a word, and unless
// oneWay also back.
func (l *Lab) Cut(from, to string, oneWay bool) error {
	a, err := l.Host(from)
	if err != nil {
		return err
	}
	b, err := l.Host(to)
	if err != nil {
		return err
	}
	if a.Index == b.Index {
		return fmt.Errorf("cut %s from itself: %w", from, weft.ErrInvalid)
	}
	return l.locked(func() error {
		if err := l.plan.cut(a, b); err != nil || oneWay {
			return err
		}
		return l.plan.cut(b, a)
	})
}

// Heal removes all cuts.
func (l *Lab) Heal() error {
	if _, err := l.load(); err != nil {
		return err
	}
	return l.locked(l.plan.heal)
}

// SetMTU changes the MTU of one host's link, in bytes.
func (l *Lab) SetMTU(name string, mtu int) error {
	h, err := l.Host(name)
	if err != nil {
		return err
	}
	if mtu < minMTU || mtu > maxMTU {
		return fmt.Errorf("mtu %d: want %d to %d bytes: %w", mtu, minMTU, maxMTU, weft.ErrInvalid)
	}
	return l.locked(func() error {
		r, err := l.load()
		if err != nil {
			return err
		}
		if err := l.plan.setMTU(h, mtu); err != nil {
			return err
		}
		if r.HostMTU == nil {
			r.HostMTU = map[string]int{}
		}
		r.HostMTU[name] = mtu
		return l.save(r)
	})
}
