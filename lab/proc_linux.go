package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// killTimeout bounds the wait for processes that got SIGKILL: only one stuck in
// the kernel (a dead network file system) takes longer.
const killTimeout = 20 * time.Second

// process is what /proc tells of one process.
type process struct {
	PID     int
	Start   uint64 // clock ticks after boot, proc(5) stat field 22: PID and Start name a process for ever
	Zombie  bool
	NetNS   uint64 // inode of its network namespace; 0 = not readable
	Args    []string
	Cgroups []string // paths, one per hierarchy
}

// readProcess reads /proc/PID. A process that ended meanwhile is ErrNotExist.
func readProcess(pid int) (process, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return process{}, gone(err)
	}
	p := process{PID: pid}
	if p.Zombie, p.Start, err = parseStat(stat); err != nil {
		return process{}, fmt.Errorf("read %s/stat: %w", dir, err)
	}
	if p.Zombie {
		return p, nil
	}
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return process{}, gone(err)
	}
	p.Args = strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
	groups, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	if err != nil {
		return process{}, gone(err)
	}
	p.Cgroups = parseCgroup(groups)
	// Unreadable for kernel threads in some sandboxes and for processes of
	// foreign users: those are never ours.
	var st unix.Stat_t
	if unix.Stat(filepath.Join(dir, "ns/net"), &st) == nil {
		p.NetNS = st.Ino
	}
	return p, nil
}

func gone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return os.ErrNotExist
	}
	return err
}

// parseStat takes state and start time from proc(5) stat; the name in
// parentheses may itself hold parentheses and spaces.
func parseStat(b []byte) (zombie bool, start uint64, err error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return false, 0, errors.New("no name in parentheses")
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 {
		return false, 0, fmt.Errorf("%d fields after the name, want at least 20", len(f))
	}
	start, err = strconv.ParseUint(f[19], 10, 64) // field 22, the first here is 3
	return f[0] == "Z" || f[0] == "X", start, err
}

// parseCgroup takes the paths from proc(5) cgroup: "id:controllers:path".
func parseCgroup(b []byte) []string {
	var paths []string
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(f) == 3 && !slices.Contains(paths, f[2]) {
			paths = append(paths, f[2])
		}
	}
	return paths
}

// userHZ is the unit of process.Start (USER_HZ, proc(5); 100 on all of Linux's
// architectures that weft runs on).
const userHZ = 100

// ticks is now as process.Start counts.
func ticks() (uint64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("read the time since boot: %w", err)
	}
	return uint64(ts.Nano()) / uint64(time.Second/userHZ), nil
}

// processes lists all processes that this one can see, but for zombies.
func processes() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var ps []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := readProcess(pid)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if !p.Zombie {
			ps = append(ps, p)
		}
	}
	return ps, nil
}

// signs are the marks by which the processes of a host are known, also after
// its daemon, or the weft that started it, was killed.
type signs struct {
	// NetNS: inodes of the host's namespace and of the namespaces below its
	// ExecRoot, as they were At (clock ticks after boot, as in process.Start).
	// Everything that ran in them then belongs to the host; what started
	// later may be anybody's, for the kernel gives inode numbers again.
	NetNS []uint64
	At    uint64
	// Groups: cgroup paths "/weft/<node id>"; everything below them too.
	Groups []string
	// Dirs: folders of the host. A command line that names one is a sign
	// only outside the caller's network namespace: a person's
	// `docker -H unix:///run/weft/lab/…` is not part of the lab.
	Dirs []string
	// Own is the caller's network namespace, whose processes are never
	// known by NetNS or Dirs.
	Own uint64
	// Spare: the caller itself and its ancestors.
	Spare []int
}

// match tells why p belongs to the host; "" = it does not.
func (s signs) match(p process) string {
	if p.PID == 1 || slices.Contains(s.Spare, p.PID) {
		return ""
	}
	for _, g := range s.Groups {
		for _, c := range p.Cgroups {
			if below(c, g) {
				return "cgroup " + c
			}
		}
	}
	if p.NetNS == s.Own || p.NetNS == 0 {
		return ""
	}
	if p.Start <= s.At && slices.Contains(s.NetNS, p.NetNS) {
		return "network namespace"
	}
	for _, d := range s.Dirs {
		if slices.ContainsFunc(p.Args, func(a string) bool { return mentions(a, d) }) {
			return "command line names " + d
		}
	}
	return ""
}

// below reports whether path is dir or lies under it.
func below(path, dir string) bool {
	rest, ok := strings.CutPrefix(path, dir)
	return ok && (rest == "" || rest[0] == '/')
}

// mentions reports whether a command line argument names dir or a path below
// it: "/d", "/d/x", "--root=/d", "unix:///d/x", but not "/de".
func mentions(arg, dir string) bool {
	for {
		i := strings.Index(arg, dir)
		if i < 0 {
			return false
		}
		rest := arg[i+len(dir):]
		if rest == "" || strings.ContainsRune("/:,;=&?", rune(rest[0])) {
			return true
		}
		arg = rest
	}
}

// self is the caller and its ancestors.
func self() ([]int, error) {
	var pids []int
	for pid := os.Getpid(); pid > 1; {
		pids = append(pids, pid)
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return nil, fmt.Errorf("read parent of %d: %w", pid, err)
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 2 {
			return nil, fmt.Errorf("read parent of %d: short stat", pid)
		}
		if pid, err = strconv.Atoi(f[1]); err != nil {
			return nil, fmt.Errorf("read parent of %d: %w", pid, err)
		}
	}
	return pids, nil
}

func find(s signs) ([]process, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(p process) bool { return s.match(p) == "" }), nil
}

// killAll sends SIGKILL to everything that s matches, first to the process
// first, again and again until nothing is left: a dying supervisor may have
// started one more.
func killAll(ctx context.Context, s signs, first int) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	for {
		ps, err := find(s)
		if err != nil {
			return err
		}
		if len(ps) == 0 {
			return nil
		}
		slices.SortFunc(ps, func(a, b process) int {
			if (a.PID == first) != (b.PID == first) {
				return map[bool]int{true: -1, false: 1}[a.PID == first]
			}
			return a.PID - b.PID
		})
		for _, p := range ps {
			if err := kill(p); err != nil {
				return err
			}
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return fmt.Errorf("processes survive SIGKILL, first %d %q: %w", ps[0].PID, ps[0].Args, err)
		}
	}
}

// kill sends SIGKILL to exactly this process: a pidfd cannot come to mean
// another one that got the same number.
func kill(p process) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if now, err := readProcess(p.PID); err != nil || now.Start != p.Start {
		return nil // ended meanwhile
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return nil
}

// pause waits, or returns early with the context's error.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
