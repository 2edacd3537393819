package wg

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// Our own choices.
const (
	// childLimit is how long the child may take to open its sockets, or to
	// end: it does nothing before that but make two devices.
	childLimit = 5 * time.Second
	// childPoll is fine because a dial of a unix socket costs microseconds.
	childPoll = 5 * time.Millisecond
	// askLimit bounds one question to the child.
	askLimit = 5 * time.Second
	// muteMost is how many questions in a row a device may leave unanswered
	// before the child is made anew: its sessions are lost then, but one that
	// answers nobody takes no new key and no new node, and makes no handshake.
	muteMost = 2
)

// userDriver has the devices in a child process that outlives the daemon, as
// the containers do. The child is known by who answers on its sockets, so there
// is no pid file to go stale.
type userDriver struct {
	dir string // of sockets and log
	exe string // of weft
	log *slog.Logger
	// child is the process that this daemon started; nil for one that an
	// earlier daemon did.
	child *exec.Cmd
	// mute counts the questions to each device, since its last answer, that
	// had none for patience.
	mute     [weft.KeySlots]int
	patience time.Duration
}

func newUserDriver(dir, exe string, log *slog.Logger) *userDriver {
	return &userDriver{dir: dir, exe: exe, log: log, patience: askLimit}
}

func (u *userDriver) socket(slot int) string {
	return filepath.Join(u.dir, weft.CryptLink(slot)+".sock")
}

func (u *userDriver) ensure(ctx context.Context, path string, port uint16) error {
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	pid, err := u.running()
	if err != nil {
		return err
	}
	if pid != 0 {
		isMute := slices.Max(u.mute[:]) >= muteMost
		if inside(pid, ns) && !isMute {
			return nil
		}
		if isMute {
			u.log.Warn("WireGuard process does not answer: it is made anew", "pid", pid)
		}
		// Else its namespace is one that was removed: so are its devices.
		if err := u.stop(ctx, pid); err != nil {
			return err
		}
	}
	for slot := range weft.KeySlots {
		if err := portFree(port + uint16(slot)); err != nil {
			return err
		}
	}
	return u.start(ctx, ns)
}

// running is the pid of who answers on the first socket, 0 if nobody does.
func (u *userDriver) running() (int, error) {
	c, err := net.DialTimeout("unix", u.socket(0), askLimit)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("dial WireGuard process: %w", err)
	}
	defer c.Close()
	rc, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("dial WireGuard process: %w", err)
	}
	var cred *unix.Ucred
	var cerr error
	if err := rc.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, fmt.Errorf("dial WireGuard process: %w", err)
	}
	if cerr != nil {
		return 0, fmt.Errorf("ask for the pid of the WireGuard process: %w", cerr)
	}
	return int(cred.Pid), nil
}

// inside reports whether a process lives in the namespace.
func inside(pid int, ns *netns.Handle) bool {
	var a, b unix.Stat_t
	return unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/net", &a) == nil && unix.Fstat(ns.FD(), &b) == nil &&
		a.Ino == b.Ino && a.Dev == b.Dev
}

// portFree reports that another program has the port of the host's namespace.
func portFree(port uint16) error {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{Port: int(port)})
	if errors.Is(err, unix.EADDRINUSE) {
		return portTaken(port)
	}
	if err != nil {
		return fmt.Errorf("open UDP port %d for encrypted networks: %w", port, err)
	}
	return c.Close()
}

// start runs the child inside the namespace, in a session of its own, with the
// host's namespace as its descriptor 3, and waits until it answers.
func (u *userDriver) start(ctx context.Context, ns *netns.Handle) error {
	if err := os.MkdirAll(u.dir, 0o700); err != nil {
		return fmt.Errorf("start WireGuard process: %w", err)
	}
	host, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("start WireGuard process: open the host's namespace: %w", err)
	}
	defer host.Close()
	out, err := os.OpenFile(u.logPath(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start WireGuard process: %w", err)
	}
	defer out.Close()
	cmd := exec.Command(u.exe, u.dir)
	cmd.Args[0] = childName
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{host}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// The child of a thread inside is inside altogether.
	if err := ns.Do(cmd.Start); err != nil {
		return fmt.Errorf("start WireGuard process: %w", err)
	}
	u.reap()
	u.child, u.mute = cmd, [weft.KeySlots]int{}
	for deadline := time.Now().Add(childLimit); ; {
		if pid, err := u.running(); err != nil || pid == cmd.Process.Pid {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(childPoll):
		}
		if time.Now().After(deadline) || u.ended() {
			b, _ := os.ReadFile(u.logPath())
			return fmt.Errorf("WireGuard process does not answer: %s: %w", strings.TrimSpace(string(b)), weft.ErrUnavailable)
		}
	}
}

func (u *userDriver) logPath() string { return filepath.Join(u.dir, "wg.log") }

// ended reports whether the child has, and then takes its remains.
func (u *userDriver) ended() bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, u.child.Process.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err != nil || info.Signo != 0
}

// reap takes the remains of an earlier child, which has ended: nobody answered.
func (u *userDriver) reap() {
	if u.child != nil && u.ended() {
		if err := u.child.Wait(); err != nil {
			u.log.Warn("WireGuard process ended", weft.KeyErr, err)
		}
	}
	u.child = nil
}

// stop ends the child and waits for its end.
func (u *userDriver) stop(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open WireGuard process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	// The descriptor was opened before this look: it is the same process.
	if args, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline"); err != nil || string(args) != childName+"\x00"+u.dir+"\x00" {
		return fmt.Errorf("process %d answers on %s and is not weft's: %w", pid, u.socket(0), weft.ErrConflict)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end WireGuard process %d: %w", pid, err)
	}
	wait := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(childLimit); ; {
		n, err := unix.Poll(wait, int(childPoll/time.Millisecond))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for WireGuard process %d: %w", pid, err)
		}
		if n > 0 {
			break
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("WireGuard process %d survives SIGKILL: %w", pid, weft.ErrUnavailable)
		}
	}
	if u.child != nil && u.child.Process.Pid == pid {
		if err := u.child.Wait(); err != nil {
			u.log.Debug("WireGuard process ended", weft.KeyErr, err)
		}
		u.child = nil
	}
	return nil
}

func (u *userDriver) remove(ctx context.Context) error {
	pid, err := u.running()
	if err != nil {
		return err
	}
	if pid != 0 {
		if err := u.stop(ctx, pid); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(u.dir); err != nil {
		return fmt.Errorf("remove sockets of the WireGuard process: %w", err)
	}
	return nil
}

func (u *userDriver) read(ctx context.Context, slot int) (device, error) {
	return u.ask(ctx, slot, "get=1\n\n")
}

func (u *userDriver) write(ctx context.Context, slot int, c change) error {
	_, err := u.ask(ctx, slot, c.encode())
	return err
}

// ask sends one request and counts those without an answer.
func (u *userDriver) ask(ctx context.Context, slot int, request string) (device, error) {
	bounded, cancel := context.WithTimeout(ctx, u.patience)
	defer cancel()
	d, err := u.exchange(bounded, slot, request)
	switch {
	case err == nil || errors.Is(err, errRefused):
		u.mute[slot] = 0
	case errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() == nil:
		u.mute[slot]++
	}
	return d, err
}

// exchange sends one request on a connection of its own.
func (u *userDriver) exchange(ctx context.Context, slot int, request string) (device, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", u.socket(slot))
	if err != nil {
		return device{}, fmt.Errorf("dial WireGuard process: %w", err)
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return device{}, fmt.Errorf("dial WireGuard process: %w", err)
		}
	}
	if _, err := io.WriteString(c, request); err != nil {
		return device{}, fmt.Errorf("ask WireGuard process: %w", err)
	}
	return decode(c)
}

// probeUser makes a TUN device in a scratch namespace and removes both.
func probeUser(scratch string) error {
	path, err := netns.Create(scratch, probeName)
	if err != nil {
		return fmt.Errorf("make probe namespace: %w", err)
	}
	err = netns.Do(path, func() error {
		t, err := tun.CreateTUN(weft.CryptLink(0), defaultMTU)
		if err != nil {
			return fmt.Errorf("%w: make a TUN device: %w", weft.ErrUnsupported, err)
		}
		// The device's own thread ends at the same pipe that Close writes to, and
		// may have closed it first.
		if err := t.Close(); err != nil && !errors.Is(err, os.ErrClosed) && !errors.Is(err, unix.EPIPE) {
			return fmt.Errorf("remove a TUN device: %w", err)
		}
		return nil
	})
	return errors.Join(err, netns.Remove(path))
}
