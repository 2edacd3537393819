package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime/containerd"
	"github.com/weftnet/weft/api"
	"github.com/weftnet/weft/vxlan/wg"
)

// daemonConfig is what `weft daemon` is told by flags.
type daemonConfig struct {
	DataRoot      string // state that outlives a reboot
	ExecRoot      string // sockets and namespaces: gone at reboot
	Socket        string // of the API; "" = ExecRoot/weft.sock
	Group         string // owner group of the socket
	Hostname      string // "" = the kernel's
	ResolvConf    string // upstream resolvers of the host
	OverlayEngine string // "" = by probe
	ServiceEngine string
	// CryptEngine and CryptPort are for encrypted networks.
	CryptEngine string // "" = by probe
	CryptPort   uint16
	LogLevel    string
	GroupShims  bool // one shim for all containers: less memory, one fate
	NoSync      bool // the image store may be lost with the power: for labs
}

func newDaemonCommand() *cobra.Command {
	var cfg daemonConfig
	cmd := &cobra.Command{
		Use: "daemon", Short: "Run the node: API, cluster membership, networks, containers", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDaemon(cmd.Context(), cfg) },
	}
	f := cmd.Flags()
	f.StringVar(&cfg.DataRoot, "data-root", "/var/lib/weft", "folder of state")
	f.StringVar(&cfg.ExecRoot, "exec-root", "/run/weft", "folder of sockets and namespaces")
	f.StringVar(&cfg.Socket, "api-socket", "", "path of the API socket (default EXEC-ROOT/weft.sock)")
	f.StringVar(&cfg.Group, "group", "weft", "group that may use the API socket, if it exists")
	f.StringVar(&cfg.Hostname, "hostname", "", "name of this node (default: the host's)")
	f.StringVar(&cfg.ResolvConf, "resolv-conf", "/etc/resolv.conf", "resolvers for names outside the cluster")
	f.StringVar(&cfg.OverlayEngine, "overlay-engine", "", "force an overlay engine: ebpf, bridge (default: what running tasks are on, else the best that this host can run)")
	f.StringVar(&cfg.ServiceEngine, "service-engine", "", "force a service engine: ebpf, ipvs, nft (default: what running tasks are on, else the best that this host can run)")
	f.StringVar(&cfg.CryptEngine, "encryption-engine", "", "force an engine of encrypted networks: kernel, user or none")
	f.Uint16Var(&cfg.CryptPort, "encryption-port", weft.WireGuardPort, "UDP port of encrypted networks on this node; the next one is used, too")
	f.StringVar(&cfg.LogLevel, "log-level", "info", "debug, info, warn or error")
	f.BoolVar(&cfg.GroupShims, "group-shims", false, "one supervisor process for all containers (labs)")
	f.BoolVar(&cfg.NoSync, "no-sync", false, "do not force the image store to disk (labs)")
	return cmd
}

// runDaemon serves until ctx ends. Containers and networks go on without it.
func runDaemon(ctx context.Context, cfg daemonConfig) error {
	log, err := newLogger(cfg.LogLevel)
	if err != nil {
		return err
	}
	if err := cfg.check(); err != nil {
		return err
	}
	unlock, err := lockDataRoot(ctx, cfg.DataRoot)
	if err != nil {
		return err
	}
	defer unlock()
	release, err := lockExecRoot(cfg.ExecRoot)
	if err != nil {
		return err
	}
	defer release()
	local, err := localID(cfg.DataRoot)
	if err != nil {
		return err
	}
	eng := newEngines(cfg, local, log)
	driver, err := containerd.New(containerd.Config{
		Node: local, ExecRoot: cfg.ExecRoot, DataRoot: cfg.DataRoot, Grouped: cfg.GroupShims, NoSync: cfg.NoSync, Log: log,
	})
	if err != nil {
		return err
	}
	m, err := newMembership(cfg, eng, driver, log)
	if err != nil {
		return err
	}
	server, err := api.New(apiConfig(m, driver, log))
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.run(ctx) })
	// Names pause while no daemon runs, so they come back before anything that
	// takes long.
	m.awaitNames(ctx)
	g.Go(func() error {
		if err := eng.choose(ctx); err != nil {
			if cfg.OverlayEngine != "" || cfg.ServiceEngine != "" || ctx.Err() != nil {
				return err
			}
			// The containers are there all the same, and the API says what is
			// wrong; whoever takes part in a cluster tries again.
			log.Error("no networks on this host", weft.KeyErr, err)
		}
		ln, err := listenAPI(cfg)
		if err != nil {
			return err
		}
		g.Go(func() error { return driver.Run(ctx) })
		g.Go(func() error { return server.Serve(ctx, ln) })
		if err := driver.Ready(ctx); err != nil {
			return err
		}
		log.Info("daemon is ready", "socket", cfg.Socket)
		notify(log, daemon.SdNotifyReady)
		return nil
	})
	<-ctx.Done()
	notify(log, daemon.SdNotifyStopping)
	err = g.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// notify tells systemd (sd_notify(3)); without systemd it does nothing.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("notify service manager", weft.KeyErr, err)
	}
}

func newLogger(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level %q: use debug, info, warn or error", level)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}

// check completes the configuration, refuses what cannot work and makes the
// folders.
func (c *daemonConfig) check() error {
	if os.Geteuid() != 0 {
		return errors.New("weft daemon makes network namespaces and containers: run it as root")
	}
	switch c.CryptEngine { // the others are judged with what this build has
	case "", wg.EngineKernel, wg.EngineUser, wg.EngineNone:
	default:
		return fmt.Errorf("--encryption-engine %s: use %s, %s or %s, or leave the flag out to let the host decide", c.CryptEngine, wg.EngineKernel, wg.EngineUser, wg.EngineNone)
	}
	for _, p := range []*string{&c.DataRoot, &c.ExecRoot} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return fmt.Errorf("resolve folder %s: %w", *p, err)
		}
		*p = abs
	}
	if c.Socket == "" {
		c.Socket = filepath.Join(c.ExecRoot, "weft.sock")
	}
	if err := os.MkdirAll(c.DataRoot, 0o700); err != nil {
		return fmt.Errorf("make data root: %w", err)
	}
	if err := os.MkdirAll(c.ExecRoot, 0o711); err != nil {
		return fmt.Errorf("make exec root: %w", err)
	}
	return nil
}

// lockWait is how long a daemon waits for the lock of one that was killed: its
// threads, and a child that it was just starting, hold it for some milliseconds
// longer than its pid is seen.
const lockWait = time.Second

// lockDataRoot keeps a second daemon off the same state. The lock goes with
// the process, however it ends.
func lockDataRoot(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for deadline := time.Now().Add(lockWait); errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(deadline) && ctx.Err() == nil; {
		select {
		case <-ctx.Done():
		case <-time.After(lockWait / 50):
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		pid, _ := os.ReadFile(f.Name())
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another weft daemon (pid %s) uses the data root %s: stop it, or give this one its own --data-root and --exec-root", strings.TrimSpace(string(pid)), dir)
		}
		return nil, fmt.Errorf("lock data root: %w", err)
	}
	if err := f.Truncate(0); err != nil {
		return nil, fmt.Errorf("write lock: %w", err)
	}
	if _, err := fmt.Fprintln(f, os.Getpid()); err != nil {
		return nil, fmt.Errorf("write lock: %w", err)
	}
	return func() { f.Close() }, nil
}

// lockExecRoot keeps a daemon with another data root from taking the socket and
// the container supervisor of a running one. The folder itself is locked, so
// that no file stays.
func lockExecRoot(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open exec root: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another weft daemon uses the exec root %s: stop it, or give this one its own --exec-root", dir)
		}
		return nil, fmt.Errorf("lock exec root: %w", err)
	}
	return func() { f.Close() }, nil
}

// localID names this installation, in a cluster or not: containers carry it.
func localID(dir string) (weft.ID, error) {
	path := filepath.Join(dir, "local-id")
	b, err := os.ReadFile(path)
	if err == nil {
		if id := weft.ID(strings.TrimSpace(string(b))); id.Valid() {
			return id, nil
		}
		return "", fmt.Errorf("%s holds no id; restore it or remove it together with the containers made under it", path)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read local id: %w", err)
	}
	id := weft.NewID()
	if err := os.WriteFile(path, []byte(id+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("write local id: %w", err)
	}
	return id, nil
}

// listenAPI opens the API socket: mode 0660, owned by the group if there is
// one. A socket that a killed daemon left is replaced: the locks say
// that nobody serves it.
func listenAPI(cfg daemonConfig) (net.Listener, error) {
	if err := freeSocket(cfg.Socket); err != nil {
		return nil, err
	}
	ln, err := net.Listen("unix", cfg.Socket)
	if err != nil {
		return nil, fmt.Errorf("open API socket: %w", err)
	}
	if err := os.Chmod(cfg.Socket, 0o660); err != nil {
		return nil, errors.Join(fmt.Errorf("protect API socket: %w", err), ln.Close())
	}
	if g, err := user.LookupGroup(cfg.Group); err == nil {
		gid, err := strconv.Atoi(g.Gid)
		if err == nil {
			err = os.Chown(cfg.Socket, 0, gid)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("give API socket to group %s: %w", cfg.Group, err), ln.Close())
		}
	}
	return ln, nil
}

// freeSocket removes the socket that an ended daemon has left at path. A file of
// another kind, and a socket at which somebody answers, are not ours to remove.
func freeSocket(path string) error {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("look at API socket: %w", err)
	case fi.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%w: API socket %s: a file is there that is no socket; move it away or name another path", weft.ErrConflict, path)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return fmt.Errorf("%w: API socket %s: another program answers there; end it or name another path", weft.ErrConflict, path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove old API socket: %w", err)
	}
	return nil
}
