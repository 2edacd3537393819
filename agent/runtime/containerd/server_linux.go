package containerd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/weftnet/weft"
)

const (
	// A dead server is started again at once, then with growing gaps: a
	// broken one must not eat the machine.
	minRestart = 50 * time.Millisecond
	maxRestart = 5 * time.Second
	// healthyAfter is the uptime after which the gap starts small again.
	healthyAfter = 10 * time.Second
	// bootLimit is how long a server may take to open its socket: its
	// database may be large and the disk slow.
	bootLimit = 30 * time.Second
	// probeEvery is fine because a dial of a unix socket costs microseconds,
	// and a gRPC client that dials too early would back off for a second.
	probeEvery = 5 * time.Millisecond
	// maxServerLog: a longer log is begun anew at the next start.
	maxServerLog = 4 << 20
)

// Run prepares the directories, adopts the server of an earlier daemon or
// starts one, and keeps one running until ctx ends (nil). It fails at once, in
// words for a person, when runc is missing or a directory cannot be made.
func (d *Driver) Run(ctx context.Context) (err error) {
	defer func() {
		d.setLink(func(l *link) {
			l.up = false
			if l.err = err; err == nil {
				l.err = errors.New("the daemon is stopping")
			}
			if l.client != nil {
				l.client.Close()
			}
		})
	}()
	runc, err := d.findRunc()
	if err != nil {
		return err
	}
	if err := d.prepare(); err != nil {
		return err
	}
	d.setLink(func(l *link) { l.runc = runc })
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.supervise(ctx) })
	g.Go(func() error { return d.importBuiltin(ctx) })
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		return err
	} else if err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// prepare makes directories, links and the server's configuration; all of it
// may exist already.
func (d *Driver) prepare() error {
	for _, dir := range []string{d.execDir("s"), d.execDir("runc"), d.execDir("exec"), d.dataDir("containerd"), d.dataDir("libexec"), d.dataDir("volumes"), d.dataDir("tasks")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
	}
	var err error
	if d.bootID, err = bootMark(d.execDir("boot")); err != nil {
		return err
	}
	exe, err := d.executable()
	if err != nil {
		return err
	}
	for _, name := range []string{serverName, shimName, loggerName} {
		if err := linkOrCopy(exe, d.libexec(name)); err != nil {
			return fmt.Errorf("install %s: %w", name, err)
		}
	}
	return writeFile(d.execDir("config.toml"), d.serverConfig())
}

// bootMark names the time since the host was last started. Containers bear it:
// one with another mark has lost its process, whatever its record says. The
// kernel's boot id alone would miss the power cut of a host that is a set of
// namespaces; such a cut takes ExecRoot away, as a real one does, and the file
// of the mark with it.
func bootMark(path string) (string, error) {
	kernel, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	boot := strings.TrimSpace(string(kernel))
	b, err := os.ReadFile(path)
	if mark := strings.TrimSpace(string(b)); err == nil && strings.HasPrefix(mark, boot+".") {
		return mark, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("read boot mark: %w", err)
	}
	mark := boot + "." + rand.Text()
	return mark, writeFile(path, mark+"\n")
}

// serverConfig is the server's configuration file. Values are quoted as TOML
// basic strings, which Go's quoting of printable paths is.
func (d *Driver) serverConfig() string {
	return fmt.Sprintf(`version = 4
root = %q
state = %q
[debug]
  level = "warn"
[plugins."io.containerd.server.v1.grpc"]
  address = %q
[plugins."io.containerd.server.v1.ttrpc"]
  address = %q
[plugins."io.containerd.shim.v1.manager"]
  socket_dir = %q
[plugins."io.containerd.metadata.v1.bolt"]
  no_sync = %t
`, d.dataDir("containerd"), d.execDir("state"), d.socket(), d.socket()+".ttrpc", d.execDir("s"), d.cfg.NoSync)
}

// supervise keeps a server running until ctx ends.
func (d *Driver) supervise(ctx context.Context) error {
	gap := minRestart
	for {
		began := time.Now()
		p, err := d.adopt()
		if err == nil && p == nil {
			p, err = d.startServer()
		}
		if err == nil {
			err = d.serve(ctx, p)
			p.close()
		}
		d.setLink(func(l *link) { l.up = false })
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > healthyAfter {
			gap = minRestart
		}
		d.log.Warn("container runtime ended, starting it again", weft.KeyErr, err, "after", gap)
		if err := sleep(ctx, gap); err != nil {
			return nil
		}
		gap = min(2*gap, maxRestart)
	}
}

// serve connects to a server and returns when it has died or ctx has ended.
func (d *Driver) serve(ctx context.Context, p *process) error {
	wctx, cancel := context.WithCancel(ctx)
	died := make(chan struct{}) // closed by the goroutine below; then end is set
	var end error
	go func() { defer close(died); end = p.wait(wctx) }()
	defer func() { cancel(); <-died }()
	if err := d.connect(ctx, died); err != nil {
		select {
		case <-died:
			return errors.Join(err, end)
		default:
		}
		if ctx.Err() == nil { // it lives and does not serve: only a new one helps
			err = errors.Join(err, p.signal(unix.SIGKILL))
			<-died
		}
		return err
	}
	<-died
	return end
}

// connect waits until the server answers and sets the link up.
func (d *Driver) connect(ctx context.Context, died <-chan struct{}) error {
	for deadline := time.Now().Add(bootLimit); ; {
		c, err := net.DialTimeout("unix", d.socket(), time.Second)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the container runtime does not answer on %s after %s: see %s", d.socket(), bootLimit, d.dataDir("containerd.log"))
		}
		select {
		case <-died:
			return fmt.Errorf("the container runtime did not start: see %s", d.dataDir("containerd.log"))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(probeEvery):
		}
	}
	c := d.current().client
	if c == nil {
		var err error
		if c, err = dial(d.socket()); err != nil {
			return err
		}
	} else if conn, ok := c.Conn().(*grpc.ClientConn); ok {
		conn.ResetConnectBackoff()
	}
	serving, err := waitServing(ctx, c)
	if !serving {
		return fmt.Errorf("the container runtime does not serve: %w", err)
	}
	d.setLink(func(l *link) { l.client, l.up = c, true })
	return nil
}

// waitServing asks until the server answers: the listener may accept before
// the services stand.
func waitServing(ctx context.Context, c *client.Client) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	for {
		_, err := c.Version(ctx)
		if err == nil {
			return true, nil
		}
		if serr := sleep(ctx, probeEvery); serr != nil {
			return false, err
		}
	}
}

func dial(socket string) (*client.Client, error) {
	params := grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, MaxDelay: 200 * time.Millisecond},
		MinConnectTimeout: time.Second,
	}
	conn, err := grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a socket in a directory that only root enters
		grpc.WithConnectParams(params),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		return nil, fmt.Errorf("dial the container runtime: %w", err)
	}
	c, err := client.NewWithConn(conn, client.WithDefaultRuntime(runtimeName), client.WithDefaultNamespace(namespace))
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("dial the container runtime: %w", err)
	}
	return c, nil
}

// startServer starts the child in a session of its own, so that no signal to
// the daemon's group reaches it.
func (d *Driver) startServer() (*process, error) {
	logPath := d.dataDir("containerd.log")
	if fi, err := os.Stat(logPath); err == nil && fi.Size() > maxServerLog {
		if err := os.Rename(logPath, logPath+".1"); err != nil {
			return nil, fmt.Errorf("rotate the container runtime's log: %w", err)
		}
	}
	out, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the container runtime's log: %w", err)
	}
	defer out.Close()
	path := d.dataDir("libexec") + ":" + filepath.Dir(d.current().runc) + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	cmd := exec.Command(d.libexec(serverName), "--config", d.execDir("config.toml"))
	cmd.Env = append(os.Environ(), "PATH="+path)
	cmd.Dir = d.execDir()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := os.Remove(d.socket()); err != nil && !errors.Is(err, os.ErrNotExist) { // a stale one would be dialled
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the container runtime: %w", err)
	}
	p, err := openProcess(cmd.Process.Pid)
	if err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	p.child = cmd.Process
	if err := writeFile(d.execDir("pid"), strconv.Itoa(p.pid)+"\n"); err != nil {
		p.close()
		return nil, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	return p, nil
}

// adopt finds the server that an earlier daemon started; nil when none runs.
func (d *Driver) adopt() (*process, error) {
	b, err := os.ReadFile(d.execDir("pid"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the container runtime's pid: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return nil, nil // torn write: the socket's next owner overwrites it
	}
	p, err := openProcess(pid)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// The pid may have been reused: it is ours only with our arguments. The
	// descriptor was opened first, so it is the same process.
	args, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	want := d.libexec(serverName) + "\x00--config\x00" + d.execDir("config.toml") + "\x00"
	if err != nil || string(args) != want {
		p.close()
		return nil, nil
	}
	return p, nil
}

// process is a held process: the descriptor stays valid when the pid is reused.
type process struct {
	pid   int
	fd    *os.File    // pidfd
	child *os.Process // set when it is ours to reap
}

func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &process{pid: pid, fd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

func (p *process) close() { p.fd.Close() }

var errDied = errors.New("process ended")

// wait blocks until the process has ended (an error that says how) or ctx has
// (its error). A pidfd becomes readable at the end of its process.
func (p *process) wait(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { p.fd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	rc, err := p.fd.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch process %d: %w", p.pid, err)
	}
	err = rc.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, _ := unix.Poll(fds, 0)
		return n > 0
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("watch process %d: %w", p.pid, err)
	}
	if p.child != nil {
		st, err := p.child.Wait()
		if err != nil {
			return fmt.Errorf("reap process %d: %w", p.pid, err)
		}
		return fmt.Errorf("process %d: %w: %s", p.pid, errDied, st)
	}
	return fmt.Errorf("process %d: %w", p.pid, errDied)
}

func (p *process) signal(s unix.Signal) error {
	var serr error
	rc, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	if err := rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), s, nil, 0) }); err != nil {
		return err
	}
	return serr
}

// linkOrCopy puts src at dst: a hard link, across file systems a copy. What is
// there and the same stays, so that running processes keep their name.
func linkOrCopy(src, dst string) error {
	a, err := os.Stat(src)
	if err != nil {
		return err
	}
	if b, err := os.Stat(dst); err == nil && (os.SameFile(a, b) || a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())) {
		return nil
	}
	tmp := dst + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Link(src, tmp); err != nil {
		if err := copyFile(src, tmp, a); err != nil {
			return err
		}
	}
	return os.Rename(tmp, dst)
}

func copyFile(src, dst string, fi os.FileInfo) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		return err
	}
	return os.Chtimes(dst, fi.ModTime(), fi.ModTime())
}

// writeFile replaces a file in one step.
func writeFile(path, text string) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
