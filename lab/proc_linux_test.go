package lab

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestTicksAreThoseOfProcesses: a process that runs has started at a tick that
// is not later than now, and not long before this test.
func TestTicksAreThoseOfProcesses(t *testing.T) {
	before, err1 := ticks()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^$")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err2 := readProcess(cmd.Process.Pid)
	after, err3 := ticks()
	if err := errors.Join(err1, err2, err3, cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	if p.Start < before || p.Start > after {
		t.Errorf("a process started at %d, not from %d to %d", p.Start, before, after)
	}
}

func TestParseStat(t *testing.T) {
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20"
	for _, tc := range []struct {
		in     string
		zombie bool
		start  uint64
		ok     bool
	}{
		{"7 (weft)" + tail, false, 4711, true},
		{"7 (a) b (c))" + tail, false, 4711, true},
		{"7 (weft) Z" + tail[2:], true, 4711, true},
		{"7 (weft) S 1", false, 0, false},
		{"", false, 0, false},
	} {
		z, s, err := parseStat([]byte(tc.in))
		if (err == nil) != tc.ok || err == nil && (z != tc.zombie || s != tc.start) {
			t.Errorf("parseStat(%q) = %v, %d, %v", tc.in, z, s, err)
		}
	}
}

func TestParseCgroup(t *testing.T) {
	got := parseCgroup([]byte("3:cpu,cpuacct:/weft/n/t\n1:name=systemd:/a:b\n0::/weft/n/t\n"))
	if want := []string{"/weft/n/t", "/a:b"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSignsMatch(t *testing.T) {
	s := signs{NetNS: []uint64{10, 11}, At: 1000, Groups: []string{"/weft/node1"}, Dirs: []string{"/run/weft/lab/lab/h1"}, Own: 1, Spare: []int{50}}
	for _, tc := range []struct {
		name string
		p    process
		want bool
	}{
		{"in the host's namespace", process{PID: 5, NetNS: 10}, true},
		{"in a task's namespace", process{PID: 5, NetNS: 11}, true},
		{"as the signs were read", process{PID: 5, NetNS: 10, Start: 1000}, true},
		{"in a namespace that got the number later", process{PID: 5, NetNS: 10, Start: 1001, Args: []string{"runc", "init"}}, false},
		{"by cgroup, started later", process{PID: 5, NetNS: 10, Start: 1001, Cgroups: []string{"/weft/node1/task"}}, true},
		{"elsewhere", process{PID: 5, NetNS: 12, Args: []string{"sleep"}}, false},
		{"by cgroup", process{PID: 5, NetNS: 1, Cgroups: []string{"/weft/node1/task"}}, true},
		{"cgroup of another node", process{PID: 5, NetNS: 12, Cgroups: []string{"/weft/node10/task"}}, false},
		{"by command line", process{PID: 5, NetNS: 12, Args: []string{"shim", "-address", "/run/weft/lab/lab/h1/c.sock"}}, true},
		{"another lab's host", process{PID: 5, NetNS: 12, Args: []string{"shim", "/run/weft/lab/lab/h10/c.sock"}}, false},
		{"a person's docker", process{PID: 5, NetNS: 1, Args: []string{"docker", "-H", "unix:///run/weft/lab/lab/h1/weft.sock"}}, false},
		{"namespace unknown", process{PID: 5, NetNS: 0, Args: []string{"/run/weft/lab/lab/h1"}}, false},
		{"the caller", process{PID: 50, NetNS: 10}, false},
		{"init", process{PID: 1, NetNS: 10}, false},
	} {
		if got := s.match(tc.p); (got != "") != tc.want {
			t.Errorf("%s: match = %q, want %v", tc.name, got, tc.want)
		}
	}
}

// TestMentions compares with a slow twin that tries every position.
func TestMentions(t *testing.T) {
	slow := func(arg, dir string) bool {
		for i := 0; i+len(dir) <= len(arg); i++ {
			if arg[i:i+len(dir)] != dir {
				continue
			}
			end := i + len(dir)
			if end == len(arg) || slices.Contains([]byte("/:,;=&?"), arg[end]) {
				return true
			}
		}
		return false
	}
	rapid.Check(t, func(t *rapid.T) {
		dir := "/" + rapid.StringMatching(`[ab]{1,3}`).Draw(t, "dir")
		arg := rapid.StringMatching(`[ab/=c]{0,12}`).Draw(t, "arg")
		if got, want := mentions(arg, dir), slow(arg, dir); got != want {
			t.Fatalf("mentions(%q, %q) = %v, want %v", arg, dir, got, want)
		}
	})
}

func TestKillIsExact(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := readProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	other := p
	other.Start++ // another process that once had this number
	if err := kill(other); err != nil {
		t.Fatal(err)
	}
	if now, err := readProcess(p.PID); err != nil || now.Zombie {
		t.Fatalf("the wrong process was killed: %+v, %v", now, err)
	}
	if err := kill(p); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the process ended by itself")
	}
	if err := kill(p); err != nil {
		t.Errorf("killing a dead process: %v", err)
	}
}

func TestSelfHoldsParents(t *testing.T) {
	pids, err := self()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(pids, os.Getpid()) || len(pids) > 1 && !slices.Contains(pids, os.Getppid()) {
		t.Errorf("self() = %v, pid %d, parent %d", pids, os.Getpid(), os.Getppid())
	}
}

func TestParseMounts(t *testing.T) {
	ms, err := parseMounts([]byte(`22 27 0:21 / /proc rw,relatime - proc proc rw
40 27 0:50 / /a\040b/rootfs rw shared:1 master:2 - overlay overlay rw,lowerdir=/run/weft/lab/lab/x,upperdir=/y - z
41 27 0:4 net:[1] /run/ns rw - nsfs nsfs rw
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []mount{{"/proc", "proc"}, {"/a b/rootfs", "overlay"}, {"/run/ns", "nsfs"}}
	if !slices.Equal(ms, want) {
		t.Errorf("got %v, want %v", ms, want)
	}
	if _, err := parseMounts([]byte("22 27 0:21 / /proc rw\n")); err == nil {
		t.Error("a line without separator passed")
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add([]byte("22 27 0:21 / /proc rw,relatime - proc proc rw\n"))
	f.Add([]byte(`1 1 0:1 / /\04 rw - a b c`))
	f.Fuzz(func(_ *testing.T, b []byte) { parseMounts(b) })
}
