package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// silence is how long a test waits for a packet that must not come.
const silence = 150 * time.Millisecond

func newLab(t *testing.T, name string) *Lab {
	t.Helper()
	needKernel(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l, err := New(Config{
		Name: name, RunDir: "/run/weft/lab", DataDir: filepath.Join(t.TempDir(), "weft/lab"), Binary: self,
		LogLevel: "info", Cluster: fakeCluster{}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The test's own context has ended.
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return l
}

func up(t *testing.T, l *Lab, s Spec) {
	t.Helper()
	if err := l.Up(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

func status(t *testing.T, l *Lab) []Status {
	t.Helper()
	ss, _, err := l.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range ss {
		if s.Err != "" {
			t.Fatalf("%s: %s", s.Name, s.Err)
		}
	}
	return ss
}

func noLeftovers(t *testing.T, trace Trace) {
	t.Helper()
	left, err := trace.Leftovers()
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// sendUDP tells whether a datagram from one namespace reaches an address in
// another.
func sendUDP(t *testing.T, from, to string, addr netip.Addr) bool {
	t.Helper()
	var pc net.PacketConn
	err := within(to, func() (err error) {
		pc, err = net.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	var c net.Conn
	if err := within(from, func() (err error) { c, err = net.Dial("udp", pc.LocalAddr().String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatalf("sending must never fail, packets just vanish: %v", err)
	}
	if err := pc.SetReadDeadline(time.Now().Add(silence)); err != nil {
		t.Fatal(err)
	}
	_, _, err = pc.ReadFrom(make([]byte, 10))
	return err == nil
}

func TestUpMakesConnectedHosts(t *testing.T) {
	l := newLab(t, "t-up")
	links := linkNames(t)
	up(t, l, Spec{Hosts: 3, Managers: 3})
	ss := status(t, l)
	for _, s := range ss {
		if s.Info.State != weft.LocalActive || !s.Info.Manager || s.PID == 0 || s.MTU != DefaultMTU {
			t.Errorf("%s: %+v", s.Name, s)
		}
		for _, o := range ss {
			if s.Index != o.Index && !sendUDP(t, s.Paths.NetNS, o.Paths.NetNS, o.Addr) {
				t.Errorf("%s does not reach %s", s.Name, o.Name)
			}
		}
		if !sendUDP(t, l.ClientNetNS(), s.Paths.NetNS, s.Addr) || !sendUDP(t, s.Paths.NetNS, l.ClientNetNS(), ClientAddr) {
			t.Errorf("the outside client and %s do not reach each other", s.Name)
		}
	}
	if now := linkNames(t); !slices.Equal(now, links) {
		t.Errorf("links of the machine were %v, are %v", links, now)
	}
}

func linkNames(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, link := range links {
		names = append(names, link.Attrs().Name)
	}
	return names
}

func TestUpIsRepeatable(t *testing.T) {
	l := newLab(t, "t-again")
	up(t, l, Spec{Hosts: 2})
	before := status(t, l)
	up(t, l, Spec{})
	for i, s := range status(t, l) {
		if s.PID != before[i].PID || s.Info != before[i].Info {
			t.Errorf("%s was %+v, is %+v", s.Name, before[i], s)
		}
	}
	up(t, l, Spec{Hosts: 3})
	after := status(t, l)
	if len(after) != 3 || after[2].Info.State != weft.LocalActive || after[0].PID != before[0].PID {
		t.Errorf("after growing: %+v", after)
	}
	if err := l.Up(t.Context(), Spec{Hosts: 1}); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("shrinking: %v, want ErrConflict", err)
	}
}

func TestDownLeavesNothing(t *testing.T) {
	for name, wreck := range map[string]func(*testing.T, *Lab){
		"whole":  func(*testing.T, *Lab) {},
		"daemon": func(t *testing.T, l *Lab) { killDaemons(t, l) },
		"no record": func(t *testing.T, l *Lab) {
			if err := os.Remove(l.plan.recordFile()); err != nil {
				t.Fatal(err)
			}
		},
		"no pid file": func(t *testing.T, l *Lab) {
			if err := os.Remove(l.plan.host(1).Paths.PIDFile); err != nil {
				t.Fatal(err)
			}
		},
		"no namespace files": func(t *testing.T, l *Lab) {
			for _, f := range []string{"h1", "h2", switchName, clientName} {
				if err := removeNetNS(l.plan.netnsFile(f)); err != nil {
					t.Fatal(err)
				}
			}
		},
		"no switch": func(t *testing.T, l *Lab) {
			if err := removeNetNS(l.plan.netnsFile(switchName)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, "t-down")
			up(t, l, Spec{Hosts: 2})
			trace, err := l.Observe()
			if err != nil {
				t.Fatal(err)
			}
			if left, err := trace.Leftovers(); err != nil || len(left) < 6 {
				t.Fatalf("a standing lab shows %q, %v: Leftovers would see nothing", left, err)
			}
			wreck(t, l)
			if err := l.Down(t.Context()); err != nil {
				t.Fatal(err)
			}
			noLeftovers(t, trace)
			for _, dir := range []string{"/run/weft", filepath.Dir(l.cfg.DataDir)} {
				if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is still there: %v", dir, err)
				}
			}
			if err := l.Down(t.Context()); err != nil {
				t.Errorf("a second time: %v", err)
			}
		})
	}
}

func killDaemons(t *testing.T, l *Lab) {
	t.Helper()
	for _, s := range status(t, l) {
		p, err := readProcess(s.PID)
		if err != nil {
			t.Fatal(err)
		}
		if err := kill(p); err != nil {
			t.Fatal(err)
		}
		for { // Up and Down must see it as dead
			if pid, err := daemonPID(s.Host); err != nil || pid == 0 {
				break
			}
			if err := pause(t.Context(), time.Millisecond); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestTwoLabsSideBySide(t *testing.T) {
	a := newLab(t, "t-one")
	cfg := a.cfg
	cfg.Name = "t-two"
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	up(t, a, Spec{Hosts: 2})
	up(t, b, Spec{Hosts: 2})
	before := status(t, a)
	trace, err := b.Observe()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	noLeftovers(t, trace)
	for i, s := range status(t, a) {
		if s.PID != before[i].PID || s.Info != before[i].Info {
			t.Errorf("removing t-two changed %s of t-one: %+v", s.Name, s)
		}
	}
}

func TestRebootKeepsState(t *testing.T) {
	l := newLab(t, "t-boot")
	up(t, l, Spec{Hosts: 2})
	before := status(t, l)
	if err := l.Kill(t.Context(), "h2"); err != nil {
		t.Fatal(err)
	}
	// What a reboot leaves: the data folders, and nothing of /run.
	r, err := l.load()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.powerOff(t.Context(), l.plan.host(1), r); err != nil {
		t.Fatal(err)
	}
	if err := l.endStrays(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := removeTree(l.plan.runDir); err != nil {
		t.Fatal(err)
	}
	up(t, l, Spec{})
	for i, s := range status(t, l) {
		if s.Info != before[i].Info || s.PID == before[i].PID {
			t.Errorf("%s was %+v, is %+v", s.Name, before[i], s)
		}
	}
}

func TestKillIsAPowerCut(t *testing.T) {
	l := newLab(t, "t-kill")
	up(t, l, Spec{Hosts: 2})
	before := status(t, l)
	h1, h2 := l.plan.host(1), l.plan.host(2)
	r, err := l.load()
	if err != nil {
		t.Fatal(err)
	}
	ids, err := h2.nodeIDs(r)
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.signs(h2, ids)
	if err != nil {
		t.Fatal(err)
	}
	if ps, err := find(s); err != nil || len(ps) < 3 {
		t.Fatalf("processes of h2: %v, %v; want daemon, containerd and container", ps, err)
	}
	if err := l.Kill(t.Context(), "h2"); err != nil {
		t.Fatal(err)
	}
	if ps, err := find(s); err != nil || len(ps) > 0 {
		t.Errorf("still alive: %v, %v", ps, err)
	}
	if groups, err := groupsOf(ids); err != nil || len(groups) > 0 {
		t.Errorf("cgroups left: %v, %v", groups, err)
	}
	if _, err := os.Lstat(h2.Paths.ExecRoot); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("runtime folder survived: %v", err)
	}
	var c net.Conn
	if err := within(h1.Paths.NetNS, func() (err error) { c, err = net.Dial("udp", netip.AddrPortFrom(h2.Addr, 9).String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Errorf("sending to a dead host: %v", err)
	}

	up(t, l, Spec{}) // must not bring it back
	if ss := status(t, l); !ss[1].Down || ss[1].PID != 0 || ss[0].PID != before[0].PID {
		t.Errorf("after up: %+v", ss)
	}
	if err := l.Start(t.Context(), "h2", HostEngines{}); err != nil {
		t.Fatal(err)
	}
	if ss := status(t, l); ss[1].Info != before[1].Info || ss[1].Down {
		t.Errorf("after start: %+v", ss[1])
	}
	if !sendUDP(t, h1.Paths.NetNS, h2.Paths.NetNS, h2.Addr) {
		t.Error("h1 does not reach h2 after start")
	}
}

func TestKillContainerdOnly(t *testing.T) {
	l := newLab(t, "t-ctd")
	up(t, l, Spec{Hosts: 1})
	before := status(t, l)
	if err := l.KillContainerd("h1"); err != nil {
		t.Fatal(err)
	}
	if ss := status(t, l); ss[0].PID != before[0].PID {
		t.Errorf("the daemon is gone, too: %+v", ss[0])
	}
	for { // its parent has not reaped it: only the death itself counts
		err := l.KillContainerd("h1")
		if errors.Is(err, weft.ErrNotFound) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := pause(t.Context(), time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCutAndHeal(t *testing.T) {
	l := newLab(t, "t-cut")
	up(t, l, Spec{Hosts: 3})
	h := []Host{l.plan.host(1), l.plan.host(2), l.plan.host(3)}
	reach := func(a, b int) bool { return sendUDP(t, h[a-1].Paths.NetNS, h[b-1].Paths.NetNS, h[b-1].Addr) }
	check := func(when string, cut ...[2]int) {
		t.Helper()
		for a := 1; a <= 3; a++ {
			for b := 1; b <= 3; b++ {
				if a == b {
					continue
				}
				if got, want := reach(a, b), !slices.Contains(cut, [2]int{a, b}); got != want {
					t.Errorf("%s: h%d reaches h%d = %v, want %v", when, a, b, got, want)
				}
			}
		}
	}
	check("whole")
	if err := l.Cut("h1", "h2", false); err != nil {
		t.Fatal(err)
	}
	check("cut", [2]int{1, 2}, [2]int{2, 1})
	if err := l.Cut("h1", "h2", false); err != nil {
		t.Errorf("cutting again: %v", err)
	}
	_, cuts, err := l.List(t.Context())
	if want := []Cut{{"h1", "h2"}, {"h2", "h1"}}; err != nil || !slices.Equal(cuts, want) {
		t.Errorf("listed %v, %v, want %v", cuts, err, want)
	}
	if err := l.Heal(); err != nil {
		t.Fatal(err)
	}
	check("healed")
	if err := l.Cut("h3", "h1", true); err != nil {
		t.Fatal(err)
	}
	check("one way", [2]int{3, 1})
	if err := l.Cut("h1", "h1", false); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("cut from itself: %v", err)
	}
	if err := l.Cut("h1", "h9", false); !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("unknown host: %v", err)
	}
}

func TestSetMTU(t *testing.T) {
	l := newLab(t, "t-mtu")
	up(t, l, Spec{Hosts: 2, MTU: 9000})
	if err := l.SetMTU("h2", 1400); err != nil {
		t.Fatal(err)
	}
	ss := status(t, l)
	if ss[0].MTU != 9000 || ss[1].MTU != 1400 {
		t.Errorf("MTUs %d and %d", ss[0].MTU, ss[1].MTU)
	}
	// The path tells: a datagram that does not fit is refused once the
	// switch has said so (path MTU discovery, RFC 1191).
	h1, h2 := l.plan.host(1), l.plan.host(2)
	var c net.Conn
	if err := within(h1.Paths.NetNS, func() (err error) { c, err = net.Dial("udp", netip.AddrPortFrom(h2.Addr, 9).String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; {
		if _, err := c.Write(make([]byte, 2000)); errors.Is(err, unix.EMSGSIZE) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no word of the smaller MTU")
		}
		if err := pause(t.Context(), time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Kill(t.Context(), "h2"); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(t.Context(), "h2", HostEngines{}); err != nil {
		t.Fatal(err)
	}
	if ss := status(t, l); ss[1].MTU != 1400 {
		t.Errorf("MTU after a power cut is %d", ss[1].MTU)
	}
	for _, bad := range []int{0, 1279, 65536} {
		if err := l.SetMTU("h1", bad); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("mtu %d: %v, want ErrInvalid", bad, err)
		}
	}
}

func TestRunIn(t *testing.T) {
	l := newLab(t, "t-run")
	up(t, l, Spec{Hosts: 1})
	h := l.plan.host(1)
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.CommandContext(t.Context(), "readlink", "/proc/self/ns/net")
	cmd.Stdout = out
	if err := l.RunIn(h.Paths.NetNS, cmd); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(h.Paths.NetNS, &st); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("net:[%d]\n", st.Ino); string(got) != want {
		t.Errorf("ran in %s, want %s", got, want)
	}
	var exit *exec.ExitError
	if err := l.RunIn(h.Paths.NetNS, exec.CommandContext(t.Context(), "false")); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("false: %v", err)
	}
	if err := l.RunIn(l.plan.netnsFile("h9"), exec.CommandContext(t.Context(), "true")); !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("no such namespace: %v", err)
	}
}

func TestFailedDaemonIsExplained(t *testing.T) {
	l := newLab(t, "t-fail")
	err := l.Up(t.Context(), Spec{Hosts: 1, OverlayEngine: "broken"})
	if err == nil || !strings.Contains(err.Error(), "overlay engine broken: not known here") || !strings.Contains(err.Error(), "h1.log") {
		t.Errorf("got %v, want the end of the log and its name", err)
	}
}

func TestNoLab(t *testing.T) {
	l := newLab(t, "t-none")
	for what, err := range map[string]error{
		"cut":  l.Cut("h1", "h2", false),
		"heal": l.Heal(),
		"kill": l.Kill(t.Context(), "h1"),
		"mtu":  l.SetMTU("h1", 1400), "impair": l.Impair("h1", Impairment{}),
	} {
		if !errors.Is(err, weft.ErrNotFound) || !strings.Contains(err.Error(), "weft lab up --name t-none") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := l.Down(t.Context()); err != nil {
		t.Errorf("down: %v", err)
	}
}

func TestRuinsAreNotBuiltOn(t *testing.T) {
	l := newLab(t, "t-ruin")
	if err := os.MkdirAll(l.plan.host(1).Paths.DataRoot, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := l.Up(t.Context(), Spec{}); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("got %v, want ErrConflict", err)
	}
}

// TestRemoveTreeUnmountsFirst guards a person's files: a mount that
// cannot be removed stops the removal.
func TestRemoveTreeUnmountsFirst(t *testing.T) {
	needKernel(t)
	mine := t.TempDir()
	if err := os.WriteFile(filepath.Join(mine, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := "/run/tree/a b"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 { // one on top of the other
		if err := unix.Mount(mine, dir, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeTree("/run/tree"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(mine, "precious")); err != nil {
		t.Errorf("deleted through the mount: %v", err)
	}
	if _, err := os.Lstat("/run/tree"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}
