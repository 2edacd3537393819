package containerd_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime/containerd"
	"github.com/weftnet/weft/agent/runtime/imagetest"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// The test binary is server, shim and logger as well, as weft's executable is.
func TestMain(m *testing.M) {
	if handled, code := containerd.Main(context.Background(), os.Args); handled {
		os.Exit(code)
	}
	if len(os.Args) > 1 && os.Args[1] == "whoami" { // what the built-in image runs
		os.Stdout.WriteString("ready\n")
		<-time.After(time.Hour)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// needRoot skips where the machine cannot run containers at all.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		netnstest.Missing(t, "root", errors.New("not root"))
	}
	if _, err := exec.LookPath("runc"); err != nil {
		if _, err := os.Stat("/usr/sbin/runc"); err != nil {
			netnstest.Missing(t, "root", errors.New("no runc: apt-get install runc"))
		}
	}
}

// needBusybox fails for the error of making a busybox image, or skips where the
// machine has no busybox to make it of.
func needBusybox(t testing.TB, err error) {
	t.Helper()
	switch {
	case errors.Is(err, weft.ErrUnsupported):
		netnstest.Missing(t, "root", err)
	case err != nil:
		t.Fatal(err)
	}
}

// host is a driver with its directories, run until the test ends.
type host struct {
	*containerd.Driver
	cfg    containerd.Config
	cancel context.CancelFunc
	ended  chan error
}

func newHost(t testing.TB, change ...func(*containerd.Config)) *host {
	t.Helper()
	needRoot(t)
	dir, err := os.MkdirTemp("/tmp", "wrt") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	cfg := containerd.Config{Node: weft.NewID(), ExecRoot: dir + "/run", DataRoot: dir + "/lib"}
	for _, f := range change {
		f(&cfg)
	}
	h := &host{cfg: cfg}
	t.Cleanup(func() {
		h.stop(t)
		d, err := containerd.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := d.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if t.Failed() {
			b, _ := os.ReadFile(cfg.DataRoot + "/containerd.log")
			t.Logf("server log:\n%s", b)
		}
		checkTrace(t, cfg)
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove directories: %v", err)
		}
	})
	h.run(t)
	return h
}

// run starts a daemon's life; stop ends it as kill -9 would leave things.
func (h *host) run(t testing.TB) {
	t.Helper()
	d, err := containerd.New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.Driver, h.cancel, h.ended = d, cancel, make(chan error, 1)
	go func() { h.ended <- d.Run(ctx) }()
	began := time.Now()
	defer func() { t.Logf("ready after %s", time.Since(began)) }()
	rctx, rcancel := context.WithTimeout(ctx, time.Minute)
	defer rcancel()
	if err := d.Ready(rctx); err != nil {
		t.Fatalf("ready: %v", err)
	}
}

func (h *host) stop(t testing.TB) {
	if h.cancel == nil {
		return
	}
	h.cancel()
	if err := <-h.ended; err != nil {
		t.Errorf("run: %v", err)
	}
	h.cancel = nil
}

// checkTrace fails the test for anything that is left of the host.
func checkTrace(t testing.TB, cfg containerd.Config) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(cfg.ExecRoot)
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, dir) || strings.Contains(line, string(cfg.Node)) {
			t.Errorf("mount left: %s", line)
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/weft/" + string(cfg.Node))
	unified, _ := filepath.Glob("/sys/fs/cgroup/weft/" + string(cfg.Node))
	if all := append(groups, unified...); len(all) > 0 {
		t.Errorf("cgroups left: %v", all)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(dir)) {
			if st, err := os.ReadFile(filepath.Dir(p) + "/stat"); err == nil && !bytes.Contains(st, []byte(") Z ")) {
				t.Errorf("process left: %s %q", p, b)
			}
		}
	}
	if _, err := os.Stat(cfg.ExecRoot + "/containerd"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("files left below ExecRoot: %v", err)
	}
}

var busyboxTar = sync.OnceValues(func() ([]byte, error) {
	var b bytes.Buffer
	err := imagetest.Busybox(&b)
	return b.Bytes(), err
})

// loadBusybox loads the busybox image.
func (h *host) loadBusybox(t testing.TB) {
	t.Helper()
	b, err := busyboxTar()
	needBusybox(t, err)
	names, err := h.Load(t.Context(), bytes.NewReader(b))
	if err != nil || !slices.Equal(names, []string{"busybox:latest"}) {
		t.Fatalf("load: %v, %v", names, err)
	}
}

func isInvalid(err error) bool { return errors.Is(err, weft.ErrInvalid) }

// logMemory logs the private memory of the host's server, shims and loggers.
func (h *host) logMemory(t *testing.T) {
	t.Helper()
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err != nil || !bytes.Contains(b, []byte(filepath.Dir(h.cfg.ExecRoot))) {
			continue
		}
		roll, err := os.ReadFile(filepath.Dir(p) + "/smaps_rollup")
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(roll)) {
			if strings.HasPrefix(line, "Private_Dirty") {
				name, _, _ := strings.Cut(string(b), "\x00")
				t.Logf("%s: %s", filepath.Base(name), strings.Join(strings.Fields(line), " "))
			}
		}
	}
}
