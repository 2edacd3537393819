//go:build lab

package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// poor runs a command without the right to make namespaces (capabilities(7)).
var poor = []string{"setpriv", "--bounding-set=-sys_admin"}

// TestLabEngines forces engines: what a flag asks for serves and is said to, and
// what the host cannot have refuses the daemon's start by the flag's name.
func TestLabEngines(t *testing.T) {
	r := besideRig(t, "t-eng", "--hosts", "1", "--overlay-engine", "bridge", "--service-engine", "nft")
	out := r.must(r.on("h1", "info", "--format", "{{range .DriverStatus}}{{index . 0}}: {{index . 1}}\n{{end}}")...)
	for _, want := range []string{
		"overlay engine bridge: chosen: --overlay-engine asks for it, and its probe succeeded",
		"service engine nft: chosen: --service-engine asks for it, and its probe succeeded",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("info says %q, want %q in it", out, want)
		}
	}
	for _, c := range []struct {
		flag, name, want string
		less             []string // how the command is run with less than it needs
	}{
		{"--overlay-engine", "pigeon", "--overlay-engine pigeon: this build has ", nil},
		{"--service-engine", "pigeon", "--service-engine pigeon: this build has ", nil},
		{"--encryption-engine", "pigeon", "--encryption-engine pigeon: use kernel, user or none", nil},
		// No folder in which its probe could mount a bpffs.
		{"--overlay-engine", "ebpf", "--overlay-engine ebpf: its probe failed on this host: overlay engine ebpf: ", []string{"env", "TMPDIR=/nowhere"}},
		// No right to make the namespace in which they are probed.
		{"--overlay-engine", "bridge", "--overlay-engine bridge: its probe failed on this host: probe the bridge engine: ", poor},
		{"--service-engine", "nft", "--service-engine nft: its probe failed on this host: ", poor},
		{"--service-engine", "ebpf", "--service-engine ebpf: its probe failed on this host: ", poor},
	} {
		dir, err := os.MkdirTemp("/run", "wt") // short: sockets lie below it
		if err != nil {
			t.Fatal(err)
		}
		args := slices.Concat([]string{r.weft, "lab", "exec", "--name", r.name, "h1", "--"}, c.less,
			[]string{r.weft, "daemon", "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"), c.flag, c.name})
		_, err = r.run(t.Context(), args...)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: %v; want exit code 1 and %q", c.flag, c.name, err, c.want)
		}
	}
}

// TestLabEnginesStay: a node whose tasks run keeps the engines that they are on,
// whatever its build would choose; a flag for others is refused, and nothing
// stops serving by it. When its tasks have gone it changes, and leaves nothing of
// the former engine.
func TestLabEnginesStay(t *testing.T) {
	const port = 8098
	r := besideRig(t, "t-stay", "--hosts", "2", "--overlay-engine", "bridge", "--service-engine", "nft")
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "--publish", fmt.Sprintf("%d:80", port), "weft/whoami")...)
	serves := func(when string) {
		t.Helper()
		for _, h := range []string{"h1", "h2"} {
			r.eventually("both tasks answer at "+h+" "+when, func() error {
				seen := map[string]bool{}
				for range 20 {
					out, err := r.get(t.Context(), h, port)
					if err != nil {
						return err
					}
					seen[regexp.MustCompile(`"host": ?"[^"]+"`).FindString(out)] = true
				}
				if len(seen) != 2 {
					return fmt.Errorf("answers of %v", seen)
				}
				return nil
			})
		}
	}
	restart := func(flags ...string) (string, error) {
		r.killDaemon("h2")
		return r.run(t.Context(), slices.Concat([]string{r.weft, "lab", "start", "--name", r.name, "h2"}, flags)...)
	}
	chosen := func(want ...string) {
		t.Helper()
		out := r.must(r.on("h2", "info", "--format", "{{range .DriverStatus}}{{index . 0}}: {{index . 1}}\n{{end}}")...)
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("info says %q, want %q in it", out, w)
			}
		}
	}
	serves("at first")
	before := r.containers("h2", "web")

	_, err := restart("--overlay-engine", "ebpf", "--service-engine", "any")
	if want := "--overlay-engine ebpf: tasks that run on this node are on overlay engine bridge: leave the flag out, or drain the node"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("another engine while tasks run: %v, want %q", err, want)
	}
	if _, err := r.get(t.Context(), "h2", port); err != nil {
		t.Errorf("after the start was refused: %v", err)
	}
	if out, err := r.run(t.Context(), r.weft, "lab", "start", "--name", r.name, "h2", "--overlay-engine", "any"); err != nil {
		t.Fatalf("start without flags: %v\n%s", err, out)
	}
	chosen("overlay engine ebpf: refused: it works, but tasks that run on this node are on bridge: to change, drain the node",
		"overlay engine bridge: chosen: its probe succeeded, and tasks that run on this node are on it")
	if now := r.containers("h2", "web"); !slices.Equal(now, before) {
		t.Errorf("containers were %v, are %v", before, now)
	}
	serves("on the engine it had")

	drain := func(to string) {
		r.must(r.on("h1", "node", "update", "--availability", to, "h2")...)
	}
	drain("drain")
	namespaces := filepath.Join(r.host("h2").Paths.ExecRoot, "netns", "weft-*-")
	r.eventually("h2 is empty", func() error {
		left, err := filepath.Glob(namespaces + "t*")
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("it has %v", left)
		}
		return err
	})
	if out, err := restart(); err != nil {
		t.Fatalf("start of the drained node: %v\n%s", err, out)
	}
	chosen("overlay engine ebpf: chosen: its probe succeeded, and it is the best that does")
	drain("active")
	serves("with an engine of each kind")
	if left, err := filepath.Glob(namespaces + "n*"); err != nil || len(left) > 0 {
		t.Errorf("the former engine left %v, %v", left, err)
	}
}

// TestLabForeign: another program holds the VNI, or the UDP port, that a network
// needs on a host. The task says which and what to do, and comes to life when the
// other is gone.
func TestLabForeign(t *testing.T) {
	r := besideRig(t, "t-foreign", "--hosts", "1")
	ns := r.host("h1").Paths.NetNS
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	vni, err := strconv.Atoi(r.must(r.on("h1", "network", "inspect", "-f", `{{index .Options "com.docker.network.driver.overlay.vxlanid_list"}}`, "front")...))
	if err != nil {
		t.Fatal(err)
	}
	engine := r.must(r.on("h1", "info", "--format", "{{range .DriverStatus}}{{index . 0}}: {{index . 1}}\n{{end}}")...)
	shared := strings.Contains(engine, "overlay engine ebpf: chosen")
	want := fmt.Sprintf("another device of this host already uses VNI %d on UDP port 4789; remove it", vni)
	if shared {
		want = "UDP port 4789 is taken by .*; stop it"
	}
	r.foreign("device", want, func() func() error { return r.foreignDevice(ns, vni, shared) })
	if shared { // elsewhere the port is held by the networks that are there
		r.foreign("socket", `UDP port 4789 is taken by .* \(pid \d+\); stop it`, func() func() error { return r.foreignSocket(ns) })
	}
}

// foreign creates a service while take holds what its network needs.
func (r *rig) foreign(what, want string, take func() (release func() error)) {
	r.t.Helper()
	release := take()
	r.must(r.on("h1", "service", "create", "-d", "--name", what, "--network", "front", "weft/whoami")...)
	tasks := func(f string) string {
		return r.must(r.on("h1", "service", "ps", "--no-trunc", "--format", f, what)...)
	}
	r.eventually("the task says what is taken by a foreign "+what, func() error {
		if s := tasks("{{.Error}}"); !regexp.MustCompile(want).MatchString(s) {
			return fmt.Errorf("%q, want %q", s, want)
		}
		return nil
	})
	if err := release(); err != nil {
		r.t.Fatal(err)
	}
	r.eventually("the task runs without the foreign "+what, func() error {
		if s := tasks("{{.CurrentState}}"); !strings.HasPrefix(s, "Running") {
			return errors.New(s)
		}
		return nil
	})
	r.must(r.on("h1", "service", "rm", what)...)
}

// foreignDevice makes a VXLAN device of another program. An engine that has one
// device for all networks has it again at once, so it goes in the same moment.
func (r *rig) foreignDevice(ns string, vni int, shared bool) (release func() error) {
	r.t.Helper()
	foreign := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "foreign"}, VxlanId: vni, Port: 4789, UDP6ZeroCSumRx: true}
	r.eventually("foreign device", func() error {
		return withLinks(ns, func(h *netlink.Handle) error {
			if shared {
				if err := deleteShared(h); err != nil {
					return err
				}
			}
			err := h.LinkAdd(foreign)
			if err == nil {
				if err = h.LinkSetUp(foreign); err != nil {
					err = errors.Join(err, h.LinkDel(foreign))
				}
			}
			return err
		})
	})
	return func() error { return withLinks(ns, func(h *netlink.Handle) error { return h.LinkDel(foreign) }) }
}

// deleteShared takes away the VXLAN device that all networks of a host have.
func deleteShared(h *netlink.Handle) error {
	links, err := listLinks(h)
	for _, l := range links {
		if l.Type() == "vxlan" {
			err = errors.Join(err, h.LinkDel(l))
		}
	}
	return err
}

// foreignSocket takes the port while the engine's device is away.
func (r *rig) foreignSocket(ns string) (release func() error) {
	r.t.Helper()
	var c net.PacketConn
	r.eventually("foreign socket", func() error {
		return withLinks(ns, func(h *netlink.Handle) error {
			err := deleteShared(h)
			if err == nil {
				c, err = net.ListenPacket("udp4", "0.0.0.0:4789")
			}
			return err
		})
	})
	return c.Close
}
