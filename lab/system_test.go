//go:build lab

package lab

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Tier 2: the real daemon, the stock docker command. Labs are named "t-…";
// published ports are 8081 and up, one per test.

// settle bounds the wait for something that the cluster does by itself.
const settle = 60 * time.Second

// overlayEnv, when set, forces the overlay engine of every lab: the same tests on
// another engine.
const overlayEnv = "WEFT_TEST_OVERLAY"

// serviceEnv forces the engine of service addresses likewise.
const serviceEnv = "WEFT_TEST_SERVICE"

// binaryEnv, when set, is the weft to test, where there is nothing to build it with.
const binaryEnv = "WEFT_TEST_BINARY"

// rig is a lab of the real binary, driven from outside like a person would.
type rig struct {
	t      *testing.T
	weft   string
	name   string
	docker string
}

// newRig builds weft and makes a lab that the test's end removes, checking that
// nothing stays. No other lab is there.
func newRig(t *testing.T, name string, upArgs ...string) *rig {
	t.Helper()
	needKernel(t)
	return makeRig(t, name, upArgs...)
}

// besideRig is newRig for a test that mostly waits, and holds no time against
// anyone that another test could lengthen: it comes after the tests that want the
// machine for themselves, and as many run at once as -parallel says.
func besideRig(t *testing.T, name string, upArgs ...string) *rig {
	t.Helper()
	t.Parallel()
	if os.Getenv(innerEnv) == "" {
		needKernel(t) // says what is missing
	}
	if err := sharedRun(); err != nil {
		t.Fatal(err)
	}
	return makeRig(t, name, upArgs...)
}

// sharedRun gives the tests that run at once one empty /run, for as long as the
// process and its mount namespace live.
var sharedRun = sync.OnceValue(func() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts to this process: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount an empty /run: %w", err)
	}
	return nil
})

func makeRig(t *testing.T, name string, upArgs ...string) *rig {
	t.Helper()
	r := &rig{t: t, name: name, weft: binary(t)}
	var err error
	if r.docker, err = exec.LookPath("docker"); err != nil {
		netnstest.Missing(t, "docker", err)
	}
	if _, err := exec.LookPath("runc"); err != nil {
		netnstest.Missing(t, "root", err)
	}
	if err := oneRun(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			r.dump()
		}
		if out, err := exec.Command(r.weft, "lab", "down", "--name", name).CombinedOutput(); err != nil {
			t.Errorf("lab down: %v\n%s", err, out)
		}
	})
	if !slices.Contains(upArgs, "--overlay-engine") {
		upArgs = append(upArgs, engineArgs()...)
	}
	start := time.Now()
	r.must(append([]string{r.weft, "lab", "up", "--name", name}, upArgs...)...)
	t.Logf("lab up %v took %.2f s", upArgs, time.Since(start).Seconds())
	return r
}

// engineArgs forces the engines that overlayEnv and serviceEnv name.
func engineArgs() (args []string) {
	if e := os.Getenv(overlayEnv); e != "" {
		args = append(args, "--overlay-engine", e)
	}
	if e := os.Getenv(serviceEnv); e != "" {
		args = append(args, "--service-engine", e)
	}
	return args
}

// oneRun waits until no other run of these tests is on this machine, of another
// checkout too: labs of the same names would share their data folders. The lock
// ends with the process.
var oneRun = sync.OnceValue(func() error {
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "weft-lab-tests.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	heldLock = f
	return unix.Flock(int(f.Fd()), unix.LOCK_EX)
})

var heldLock *os.File // kept open, so that it is not collected

func binary(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		netnstest.Missing(t, "root", errors.New("not root"))
	}
	if path := os.Getenv(binaryEnv); path != "" {
		return path
	}
	path, err := filepath.Abs("../bin/weft")
	if err == nil {
		err = makeBuild()
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// makeBuild builds weft, once for all tests.
var makeBuild = sync.OnceValue(func() error {
	cmd := exec.Command("make", "-s", "build")
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make build: %w\n%s", err, out)
	}
	return nil
})

// dump shows the daemons' last words, what their tasks wait for, and what all
// goroutines of the daemons and container supervisors were doing.
func (r *rig) dump() {
	ctx, cancel := context.WithTimeout(context.Background(), dumpLimit)
	defer cancel()
	logs, _ := filepath.Glob(filepath.Join(DefaultConfig().DataDir, r.name, "*.log"))
	for _, f := range logs {
		r.t.Logf("%s:\n%s", f, tail(f))
		host := strings.TrimSuffix(filepath.Base(f), ".log")
		out, err := r.run(ctx, "sh", "-c", strings.Join(r.on(host, "service", "ls", "-q"), " ")+" | xargs -r "+
			strings.Join(r.on(host, "service", "ps", "--no-trunc", "--format", "'{{.Name}} {{.Node}} {{.DesiredState}} {{.CurrentState}} {{.Error}}'"), " "))
		r.t.Logf("tasks by %s: %v\n%s", host, err, out)
	}
	for _, f := range logs {
		r.dumpHost(ctx, strings.TrimSuffix(filepath.Base(f), ".log"))
	}
}

// dumpLimit bounds the questions to daemons that may hang.
const dumpLimit = 20 * time.Second

// dumpHost ends a host's daemon, then its container supervisor, with SIGQUIT,
// which has the Go runtime write all goroutines to their logs.
func (r *rig) dumpHost(ctx context.Context, host string) {
	h := r.host(host)
	ps, err := processes()
	if err != nil {
		r.t.Error(err)
		return
	}
	for _, log := range []string{h.Paths.Log, filepath.Join(h.Paths.DataRoot, "containerd.log")} {
		before, err := os.ReadFile(log)
		if err != nil {
			r.t.Logf("%s: %v", log, err)
			continue
		}
		for _, p := range ps {
			daemon := log == h.Paths.Log && slices.Contains(p.Args, "daemon") && slices.Contains(p.Args, h.Paths.DataRoot)
			server := log != h.Paths.Log && isContainerd(p.Args) && strings.HasPrefix(p.Args[len(p.Args)-1], h.Paths.ExecRoot+"/")
			if !daemon && !server {
				continue
			}
			if err := unix.Kill(p.PID, unix.SIGQUIT); err != nil {
				r.t.Logf("ask process %d for its goroutines: %v", p.PID, err)
				continue
			}
			for now, err := readProcess(p.PID); err == nil && now.Start == p.Start && !now.Zombie; now, err = readProcess(p.PID) {
				if pause(ctx, 10*time.Millisecond) != nil {
					break
				}
			}
			after, err := os.ReadFile(log)
			r.t.Logf("%s, process %d at its end: %v\n%s", log, p.PID, err, after[min(len(before), len(after)):])
		}
	}
}

// run gives stdout, and an error that holds stderr.
func (r *rig) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

func (r *rig) must(args ...string) string {
	r.t.Helper()
	out, err := r.run(r.t.Context(), args...)
	if err != nil {
		r.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// named is a filter for the containers of a service. It is a regular expression that is
// sought anywhere, and ids are in names: "db." fits one node in fifty.
func named(service string) string { return "name=^/?" + service + "[.]" }

// on is the docker command of a host.
func (r *rig) on(host string, args ...string) []string {
	sock := filepath.Join(DefaultConfig().RunDir, r.name, host, "weft.sock")
	return append([]string{r.docker, "-H", "unix://" + sock}, args...)
}

// get asks a URL from the outside client.
func (r *rig) get(ctx context.Context, host string, port int) (string, error) {
	i, err := parseHost(host, MaxHosts)
	if err != nil {
		return "", err
	}
	p, err := newPlan(r.name, "/run/x", "/run/x")
	if err != nil {
		return "", err
	}
	url := fmt.Sprintf("http://%s:%d/", p.host(i).Addr, port)
	return r.run(ctx, r.weft, "lab", "client", "--name", r.name, "--", r.weft, "whoami", "get", "--timeout", "2s", url)
}

// eventually repeats f until it succeeds.
func (r *rig) eventually(what string, f func() error) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), settle)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		if pause(ctx, 100*time.Millisecond) != nil {
			r.t.Fatalf("%s: %v", what, err)
		}
	}
}

// containers are the ids of the running containers of a service on a host.
func (r *rig) containers(host, service string) []string {
	r.t.Helper()
	return strings.Fields(r.must(r.on(host, "ps", "-q", "--no-trunc", "--filter", named(service))...))
}

func TestLabDemo(t *testing.T) {
	bin := binary(t)
	needKernel(t)
	t.Cleanup(func() {
		if out, err := exec.Command(bin, "lab", "down", "--name", "t-demo").CombinedOutput(); err != nil {
			t.Errorf("lab down: %v\n%s", err, out)
		}
	})
	out, err := exec.CommandContext(t.Context(), bin, append([]string{"lab", "demo", "--name", "t-demo"}, engineArgs()...)...).CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
}

// TestLabDocker tells the demo's story with the stock docker command and real
// shells in containers.
func TestLabDocker(t *testing.T) {
	r := besideRig(t, "t-docker")
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	archive := busyboxImage(t)
	for _, h := range []string{"h1", "h2", "h3"} {
		r.must(r.on(h, "image", "load", "-q", "-i", archive)...)
	}
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--replicas", "3", "--network", "front", "--publish", "8081:80", "weft/whoami")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "shell", "--mode", "global", "--network", "front", "test/busybox", "sleep", "1000000")...)
	r.eventually("web 3/3 and shell 3/3", func() error {
		out := r.must(r.on("h1", "service", "ls", "--format", "{{.Name}} {{.Replicas}}")...)
		if !strings.Contains(out, "web 3/3") || !strings.Contains(out, "shell 3/3") {
			return errors.New(out)
		}
		return nil
	})
	for _, h := range []string{"h1", "h2", "h3"} {
		r.eventually("published port of "+h, func() error { _, err := r.get(t.Context(), h, 8081); return err })
		c := r.containers(h, "shell")
		if len(c) != 1 {
			t.Fatalf("%d containers of shell on %s", len(c), h)
		}
		for _, cmd := range []string{
			"nslookup web", "test $(nslookup tasks.web | grep -c '^Address.*10\\.') -ge 3",
			"wget -q -O - http://web/ | grep -q client", "ping -c 1 -w 5 $(nslookup tasks.web | awk '/^Address.*: 10\\./ {print $NF; exit}')",
		} {
			r.must(r.on(h, "exec", c[0], "sh", "-c", cmd)...)
		}
	}
	if out := r.must(r.on("h1", "node", "ls", "--format", "{{.Hostname}} {{.Status}}")...); strings.Count(out, "Ready") != 3 {
		t.Errorf("node ls:\n%s", out)
	}
	if out := r.must(r.on("h1", "service", "ps", "web", "--format", "{{.CurrentState}}")...); strings.Count(out, "Running") != 3 {
		t.Errorf("service ps:\n%s", out)
	}
	r.must(r.on("h1", "service", "scale", "-d", "web=1")...)
	r.eventually("scaled to 1", func() error {
		out := r.must(r.on("h1", "service", "ls", "--format", "{{.Name}} {{.Replicas}}")...)
		if !strings.Contains(out, "web 1/1") {
			return errors.New(out)
		}
		return nil
	})
	r.must(r.on("h1", "service", "rm", "web", "shell")...)
	r.eventually("network removed", func() error {
		_, err := r.run(t.Context(), r.on("h1", "network", "rm", "front")...)
		return err
	})
}

// busyboxImage writes a `docker save` archive around Debian's static busybox.
func busyboxImage(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		netnstest.Missing(t, "root", err)
	}
	body, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	links := map[string]string{}
	for _, a := range []string{"sh", "ping", "nslookup", "wget", "sleep", "grep", "awk", "test"} {
		links["bin/"+a] = "busybox"
	}
	layer := tarOf(t, map[string][]byte{"bin/busybox": body}, links)
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Env": []string{"PATH=/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal([]map[string]any{{"Config": "config.json", "RepoTags": []string{"test/busybox:latest"}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "busybox.tar")
	if err := os.WriteFile(file, tarOf(t, map[string][]byte{"config.json": config, "manifest.json": manifest, "layer.tar": layer}, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func tarOf(t *testing.T, files map[string][]byte, links map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, body := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(body)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(w, bytes.NewReader(body)); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range links {
		if err := w.WriteHeader(&tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeSymlink}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestLabAdoption kills a daemon, then its container supervisor, while requests
// run: none fails, and the same containers are there afterwards.
func TestLabAdoption(t *testing.T) {
	r := newRig(t, "t-adopt")
	// How soon a silent host's tasks are replaced is not the question: on a slow machine
	// the thirty requests alone, each two processes, take most of the usual five seconds.
	r.must(r.on("h1", "swarm", "update", "--dispatcher-heartbeat", "1m")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--replicas", "3", "--publish", "8082:80", "weft/whoami")...)
	for _, h := range three {
		r.eventually("one container on "+h, func() error {
			if n := len(r.containers(h, "web")); n != 1 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
	}
	for _, h := range three {
		r.eventually("port of "+h, func() error { _, err := r.get(t.Context(), h, 8082); return err })
	}
	// Without a health check a task counts as ready when its process has begun, which is
	// before it listens: until then the task itself refuses connections.
	seen := map[string]bool{}
	r.eventually("all three tasks answer", func() error {
		var by struct{ Host string }
		body, err := r.get(t.Context(), "h1", 8082)
		if err == nil {
			err = json.Unmarshal([]byte(body), &by)
		}
		if err != nil {
			return err
		}
		if seen[by.Host] = true; len(seen) < 3 {
			return fmt.Errorf("%d have", len(seen))
		}
		return nil
	})
	before := r.containers("h2", "web")
	for name, strike := range map[string]func(){
		"daemon":     func() { r.killDaemon("h2") },
		"containerd": func() { r.must(r.weft, "lab", "kill", "--name", r.name, "--containerd", "h2") },
	} {
		strike()
		for range 30 {
			if _, err := r.get(t.Context(), "h2", 8082); err != nil {
				t.Errorf("request after the death of the %s: %v", name, err)
			}
		}
		r.must(r.weft, "lab", "start", "--name", r.name, "h2")
		r.eventually("containers of h2 after the death of the "+name, func() error {
			if now := r.containers("h2", "web"); !slices.Equal(now, before) {
				return fmt.Errorf("they were %v, are %v", before, now)
			}
			return nil
		})
	}
}

// killDaemon sends SIGKILL to a host's daemon alone.
func (r *rig) killDaemon(host string) {
	r.t.Helper()
	p, err := newPlan(r.name, DefaultConfig().RunDir, DefaultConfig().DataDir)
	if err != nil {
		r.t.Fatal(err)
	}
	i, err := parseHost(host, MaxHosts)
	if err != nil {
		r.t.Fatal(err)
	}
	pid, err := daemonPID(p.host(i))
	if err != nil || pid == 0 {
		r.t.Fatalf("daemon of %s: pid %d, %v", host, pid, err)
	}
	proc, err := readProcess(pid)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := kill(proc); err != nil {
		r.t.Fatal(err)
	}
	for pid != 0 { // a start that still finds it would take it for running
		if err := pause(r.t.Context(), time.Millisecond); err != nil {
			r.t.Fatal(err)
		}
		if pid, err = daemonPID(p.host(i)); err != nil {
			r.t.Fatal(err)
		}
	}
}

// TestLabManagersSurviveALoss cuts the first of three managers off, works
// without it, and heals.
func TestLabManagersSurviveALoss(t *testing.T) {
	r := newRig(t, "t-quorum", "--managers", "3")
	for _, h := range []string{"h2", "h3"} {
		r.must(r.weft, "lab", "cut", "--name", r.name, "h1", h)
	}
	r.eventually("the majority works", func() error {
		_, err := r.run(t.Context(), r.on("h2", "network", "create", "--driver", "overlay", "made-without-h1")...)
		if err != nil && strings.Contains(err.Error(), "made-without-h1 already exists") {
			return nil
		}
		return err
	})
	r.must(r.weft, "lab", "heal", "--name", r.name)
	r.eventually("h1 has caught up", func() error {
		out, err := r.run(t.Context(), r.on("h1", "network", "ls", "--format", "{{.Name}}")...)
		if err == nil && !strings.Contains(out, "made-without-h1") {
			err = fmt.Errorf("networks on h1: %s", out)
		}
		return err
	})
}

// TestLabStateSurvivesPowerCut pulls the plug of the only manager.
func TestLabStateSurvivesPowerCut(t *testing.T) {
	r := besideRig(t, "t-power", "--hosts", "2")
	nodes := r.must(r.on("h1", "node", "ls", "-q")...)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "kept")...)
	r.must(r.weft, "lab", "kill", "--name", r.name, "h1")
	r.must(r.weft, "lab", "start", "--name", r.name, "h1")
	r.eventually("the manager is back", func() error {
		now, err := r.run(t.Context(), r.on("h1", "node", "ls", "-q")...)
		if err == nil && !sameLines(nodes, now) {
			err = fmt.Errorf("nodes were %q, are %q", nodes, now)
		}
		return err
	})
	if out := r.must(r.on("h1", "network", "ls", "--format", "{{.Name}}")...); !strings.Contains(out, "kept") {
		t.Errorf("networks: %s", out)
	}
}

func sameLines(a, b string) bool {
	x, y := strings.Fields(a), strings.Fields(b)
	slices.Sort(x)
	slices.Sort(y)
	return slices.Equal(x, y)
}

// TestLabBadInput: a clear error that names the thing, exit code 1, and nothing
// half-made.
func TestLabBadInput(t *testing.T) {
	r := besideRig(t, "t-bad", "--hosts", "2")
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "taken")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "first", "--publish", "8083:80", "weft/whoami")...)
	services := r.must(r.on("h1", "service", "ls", "-q")...)
	networks := r.must(r.on("h1", "network", "ls", "-q")...)
	for _, tc := range []struct {
		args []string
		want string // in the message
	}{
		{[]string{"network", "create", "--driver", "overlay", "taken"}, "taken"},
		{[]string{"network", "create", "--driver", "overlay", "--subnet", "10.99.0.0/16", "overlap"}, "10.99."},
		{[]string{"network", "rm", "no-such-network"}, "no-such-network"},
		{[]string{"service", "create", "-d", "--name", "first", "weft/whoami"}, "first"},
		{[]string{"service", "create", "-d", "--name", "second", "--publish", "8083:80", "weft/whoami"}, "8083"},
		{[]string{"service", "create", "-d", "--name", "second", "--network", "no-such-network", "weft/whoami"}, "no-such-network"},
		{[]string{"service", "inspect", "no-such-service"}, "no-such-service"},
		{[]string{"service", "rm", "no-such-service"}, "no-such-service"},
		{[]string{"node", "inspect", "no-such-node"}, "no-such-node"},
		{[]string{"swarm", "init"}, "already part of a swarm"},
		{[]string{"image", "rm", "no-such-image"}, "no-such-image"},
	} {
		_, err := r.run(t.Context(), r.on("h1", tc.args...)...)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v; want exit code 1 and %q", strings.Join(tc.args, " "), err, tc.want)
		}
	}
	if now := r.must(r.on("h1", "service", "ls", "-q")...); now != services {
		t.Errorf("services were %q, are %q", services, now)
	}
	if now := r.must(r.on("h1", "network", "ls", "-q")...); now != networks {
		t.Errorf("networks were %q, are %q", networks, now)
	}
}
