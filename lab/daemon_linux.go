package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Our own choices. The limits are for a machine without hardware
// virtualisation under load; all waits end as soon as they can.
const (
	pollEvery     = 10 * time.Millisecond
	daemonTimeout = 60 * time.Second // from its start to its first answer
	memberTimeout = 60 * time.Second // from the join to an active member
	recallTimeout = 3 * time.Second  // from its first answer to knowing that it is a member
	logTailBytes  = 2000
)

// pollPause is the pause before the next look at what has been waited for so long: a
// twentieth of that. What is soon ready is soon seen, and a host that takes a minute
// on a slow processor is not asked thousands of times on the same one.
func pollPause(waited time.Duration) time.Duration { return max(pollEvery, waited/20) }

// pidRecord is a process in a file: the start time tells it from a later
// process with the same number.
type pidRecord struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
}

// daemonPID is the running daemon of a host, or 0.
func daemonPID(h Host) (int, error) {
	b, err := os.ReadFile(h.Paths.PIDFile)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read pid of %s: %w", h.Name, err)
	}
	var r pidRecord
	if json.Unmarshal(b, &r) != nil {
		return 0, nil // torn by a kill: the process is found by its namespace
	}
	p, err := readProcess(r.PID)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	if p.Zombie || p.Start != r.Start {
		reap(r.PID)
		return 0, nil
	}
	return r.PID, nil
}

// reap collects a dead child of this process; others' children are no concern.
func reap(pid int) {
	var ws unix.WaitStatus
	unix.Wait4(pid, &ws, unix.WNOHANG, nil) // ECHILD: not ours
}

// daemonArgs is the command line of a host's daemon.
func (l *Lab) daemonArgs(h Host, r record) []string {
	args := []string{
		"daemon", "--data-root", h.Paths.DataRoot, "--exec-root", h.Paths.ExecRoot, "--hostname", h.Name,
		// One shim for all containers of a host: many hosts share one memory.
		// No forced writes: they are most of a start's time, and a killed host
		// loses nothing by it, as the machine under it goes on.
		"--group-shims", "--no-sync", "--resolv-conf", l.plan.resolvConf(), "--log-level", l.cfg.LogLevel,
	}
	overlay, service := r.engines(h.Name)
	if overlay != "" {
		args = append(args, "--overlay-engine", overlay)
	}
	if service != "" {
		args = append(args, "--service-engine", service)
	}
	if r.CryptEngine != "" {
		args = append(args, "--encryption-engine", r.CryptEngine)
	}
	return args
}

// startDaemon starts the daemon of h unless it runs, and waits until it
// answers.
func (l *Lab) startDaemon(ctx context.Context, h Host, r record) error {
	pid, err := daemonPID(h)
	if err != nil {
		return err
	}
	if pid == 0 {
		if pid, err = l.spawn(h, r); err != nil {
			return fmt.Errorf("start daemon of %s: %w", h.Name, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	for began := time.Now(); ; {
		pingErr := l.cfg.Cluster.Ping(ctx, h.Paths.Socket)
		if pingErr == nil {
			return nil
		}
		if now, err := daemonPID(h); err != nil || now != pid {
			return errors.Join(fmt.Errorf("daemon of %s ended; the end of %s:\n%s", h.Name, h.Paths.Log, tail(h.Paths.Log)), err)
		}
		if pause(ctx, pollPause(time.Since(began))) != nil {
			return fmt.Errorf("daemon of %s does not answer on %s: %w; the end of %s:\n%s", h.Name, h.Paths.Socket, pingErr, h.Paths.Log, tail(h.Paths.Log))
		}
	}
}

// spawn starts the daemon as a child inside the host's network namespace, in a
// session of its own so that it outlives the terminal. It is entered with
// setns, in the machine's mount namespace: `ip netns exec` would make a private
// one, in which the namespace files that the daemon mounts are seen by no one
// else.
func (l *Lab) spawn(h Host, r record) (int, error) {
	for _, dir := range []string{h.Paths.DataRoot, h.Paths.ExecRoot} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return 0, err
		}
	}
	log, err := os.OpenFile(h.Paths.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd := exec.Command(l.cfg.Binary, l.daemonArgs(h, r)...) // no context: it outlives this process
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	cmd.Env = slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return bytes.HasPrefix([]byte(kv), []byte("DOCKER_")) || bytes.HasPrefix([]byte(kv), []byte("NOTIFY_SOCKET="))
	})
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := within(h.Paths.NetNS, cmd.Start); err != nil {
		return 0, err
	}
	pid := cmd.Process.Pid
	p, err := readProcess(pid)
	if err == nil {
		var b []byte
		if b, err = json.Marshal(pidRecord{PID: pid, Start: p.Start}); err == nil {
			err = os.WriteFile(h.Paths.PIDFile, b, 0o644)
		}
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("note pid %d: %w", pid, err), cmd.Process.Kill(), cmd.Wait())
	}
	return pid, cmd.Process.Release()
}

// tail is the end of a log, for an error message.
func tail(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > logTailBytes {
		if _, err := f.Seek(-logTailBytes, io.SeekEnd); err != nil {
			return err.Error()
		}
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(b))
}

func isDown(h Host) bool {
	_, err := os.Lstat(h.Paths.Down)
	return err == nil
}

// namespaces are the inodes of the network namespaces of a host: its own and
// those that its daemon made below its runtime folder.
func (h Host) namespaces() ([]uint64, error) {
	files := []string{h.Paths.NetNS}
	below, err := mountsBelow(h.Paths.ExecRoot)
	if err != nil {
		return nil, err
	}
	var inodes []uint64
	for _, f := range append(files, below...) {
		var st unix.Stat_t
		if isNetNS(f) && unix.Stat(f, &st) == nil {
			inodes = append(inodes, st.Ino)
		}
	}
	return inodes, nil
}

// localIDFile is where a daemon keeps the id under which it runs containers,
// in a cluster or not, below its data root.
const localIDFile = "local-id"

// nodeIDs are the ids under which a host's cgroups and links go: the node's, if
// it is known, the daemon's own, and the first 8 characters that its namespace
// files carry.
func (h Host) nodeIDs(r record) ([]string, error) {
	var ids []string
	if id := r.Nodes[h.Name]; id != "" {
		ids = append(ids, string(id))
	}
	b, err := os.ReadFile(filepath.Join(h.Paths.DataRoot, localIDFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read id of the daemon of %s: %w", h.Name, err)
	}
	if id := weft.ID(bytes.TrimSpace(b)); id.Valid() && !slices.Contains(ids, string(id)) {
		ids = append(ids, string(id))
	}
	files, err := filepath.Glob(filepath.Join(h.Paths.ExecRoot, "netns", "weft-????????-*"))
	if err != nil {
		return nil, fmt.Errorf("list namespaces of %s: %w", h.Name, err)
	}
	for _, f := range files {
		if id := filepath.Base(f)[len("weft-"):][:8]; !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// signs of everything that runs on behalf of h.
func (l *Lab) signs(h Host, ids []string) (signs, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &st); err != nil {
		return signs{}, fmt.Errorf("read own network namespace: %w", err)
	}
	s := signs{Own: st.Ino, Dirs: []string{h.Paths.ExecRoot, h.Paths.DataRoot}}
	var err error
	if s.Spare, err = self(); err != nil {
		return signs{}, err
	}
	if s.NetNS, err = h.namespaces(); err != nil {
		return signs{}, err
	}
	if s.At, err = ticks(); err != nil {
		return signs{}, err
	}
	for _, id := range ids {
		if weft.ID(id).Valid() {
			s.Groups = append(s.Groups, "/"+groupRoot+"/"+id)
		}
	}
	return s, nil
}

// powerOff ends everything of a host as a power cut does: no process gets a
// chance to tidy up, and what lived in memory is gone. DataRoot stays.
func (l *Lab) powerOff(ctx context.Context, h Host, r record) error {
	ids, err := h.nodeIDs(r)
	if err != nil {
		return err
	}
	s, err := l.signs(h, ids)
	if err != nil {
		return err
	}
	daemon, err := daemonPID(h)
	if err != nil {
		return err
	}
	if err := killAll(ctx, s, daemon); err != nil {
		return fmt.Errorf("kill the processes of %s: %w", h.Name, err)
	}
	if daemon != 0 {
		reap(daemon)
	}
	groups, err := groupsOf(ids)
	if err != nil {
		return err
	}
	if err := removeGroups(ctx, groups); err != nil {
		return err
	}
	if err := l.plan.unplug(portName(h.Index)); err != nil {
		return err
	}
	if err := removeTree(h.Paths.ExecRoot); err != nil {
		return err
	}
	if err := unmountBelow(h.Paths.DataRoot); err != nil {
		return err
	}
	if err := removeNetNS(h.Paths.NetNS); err != nil {
		return err
	}
	if err := os.Remove(h.Paths.PIDFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pid of %s: %w", h.Name, err)
	}
	return nil
}

// Kill cuts the power of a host. It stays down until Start.
func (l *Lab) Kill(ctx context.Context, name string) error {
	h, err := l.Host(name)
	if err != nil {
		return err
	}
	return l.locked(func() error {
		r, err := l.load()
		if err != nil {
			return err
		}
		// First: a crash of ours in between must not bring it back.
		if err := os.WriteFile(h.Paths.Down, nil, 0o644); err != nil {
			return fmt.Errorf("note that %s is down: %w", name, err)
		}
		return l.powerOff(ctx, h, r)
	})
}

// KillContainerd sends SIGKILL to the container supervisor of a host and to
// nothing else. ErrNotFound when none runs.
func (l *Lab) KillContainerd(name string) error {
	h, err := l.Host(name)
	if err != nil {
		return err
	}
	return l.locked(func() error {
		s, err := l.signs(h, nil)
		if err != nil {
			return err
		}
		ps, err := find(s)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(ps, func(p process) bool { return isContainerd(p.Args) })
		if i < 0 {
			return fmt.Errorf("no containerd runs on %s: %w", name, weft.ErrNotFound)
		}
		return kill(ps[i])
	})
}

// isContainerd knows the supervisor by its program's name, "containerd" or weft's
// own "weft-containerd"; shims have other names.
func isContainerd(args []string) bool {
	name := filepath.Base(args[0])
	return name == "containerd" || name == "weft-containerd"
}

// Start brings a killed host back with the state it had, or starts a daemon
// that ended by itself. e is remembered for the host's next starts, too. It
// returns when the host is a member again.
func (l *Lab) Start(ctx context.Context, name string, e HostEngines) error {
	h, err := l.Host(name)
	if err != nil {
		return err
	}
	err = l.locked(func() error {
		r, err := l.load()
		if err != nil {
			return err
		}
		if err := os.Remove(h.Paths.Down); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("note that %s is up: %w", name, err)
		}
		r = r.withEngines(name, e)
		if err := l.save(r); err != nil {
			return err
		}
		if err := l.makeFabric(r); err != nil {
			return err
		}
		return l.startDaemon(ctx, h, r)
	})
	if err != nil {
		return err
	}
	// Without the lock: it may wait for a manager that has to be started yet.
	_, err = l.awaitMember(ctx, h)
	return err
}
