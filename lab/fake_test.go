package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// fakePrograms are what the test binary is besides a test binary.
var fakePrograms = map[string]func([]string) error{
	"daemon": fakeDaemon, "containerd": fakeIdle, "container": fakeIdle, "burn": burnForever,
}

// burnForever keeps one core busy, until it is killed or the process that began it
// has ended.
func burnForever([]string) error {
	for parent := os.Getppid(); os.Getppid() == parent; {
		for range 100_000_000 {
		}
	}
	return nil
}

// fakeIdle waits to be killed.
func fakeIdle([]string) error {
	for {
		unix.Pause()
	}
}

// fakeState is what the fake daemon keeps in its data root.
type fakeState struct {
	Node    weft.ID
	Manager bool
}

// fakeDaemon leaves the same traces as a real one: a supervisor child, a
// container in a namespace and cgroup of its own that outlives it, a mount.
func fakeDaemon(args []string) error {
	fs := flag.NewFlagSet("daemon", flag.ContinueOnError)
	data, run, host := fs.String("data-root", "", ""), fs.String("exec-root", "", ""), fs.String("hostname", "", "")
	resolv, overlay := fs.String("resolv-conf", "", ""), fs.String("overlay-engine", "", "")
	fs.String("service-engine", "", "")
	fs.String("log-level", "", "")
	fs.Bool("group-shims", false, "")
	fs.Bool("no-sync", false, "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *overlay == "broken" {
		return errors.New("overlay engine broken: not known here")
	}
	if _, err := os.Stat(*resolv); err != nil || *host == "" {
		return fmt.Errorf("flags incomplete: %v: %w", args, err)
	}
	f := &fakeServer{file: filepath.Join(*data, "state.json"), run: *run}
	if b, err := os.ReadFile(f.file); err == nil {
		if err := json.Unmarshal(b, &f.state); err != nil {
			return err
		}
	}
	if err := f.start(); err != nil {
		return err
	}
	sock := filepath.Join(*run, "weft.sock")
	os.Remove(sock)
	l, err := net.Listen("unix", sock)
	if err != nil {
		return err
	}
	return http.Serve(l, f)
}

type fakeServer struct {
	file, run string
	state     fakeState
}

func (f *fakeServer) start() error {
	supervisor := exec.Command("/proc/self/exe", "containerd", filepath.Join(f.run, "config.toml"))
	supervisor.Args[0] = filepath.Join(f.run, "libexec/weft-containerd")
	supervisor.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := supervisor.Start(); err != nil {
		return err
	}
	if f.state.Node == "" {
		return nil
	}
	return f.startContainer()
}

func (f *fakeServer) startContainer() error {
	netns := filepath.Join(f.run, "netns", weft.TaskNetNS(f.state.Node, "task"))
	if err := makeNetNS(netns); err != nil {
		return err
	}
	c := exec.Command("/proc/self/exe", "container")
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := within(netns, c.Start); err != nil {
		return err
	}
	// Only real root may make cgroups; the rest is checked without, too.
	if roots, err := hierarchies(); err == nil && len(roots) > 0 {
		dir := filepath.Join(roots[len(roots)-1], weft.CgroupPath(f.state.Node, "task"))
		if os.MkdirAll(dir, 0o755) == nil {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, c.Process.Pid), 0o644); err != nil {
				return err
			}
		}
	}
	root := filepath.Join(f.run, "tasks", "rootfs")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, ""); err != nil {
		return err
	}
	return nil
}

func (f *fakeServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer := func(v any, err error) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		json.NewEncoder(w).Encode(v)
	}
	switch r.URL.Path {
	case "/ping":
	case "/info":
		n := NodeInfo{Node: f.state.Node, State: weft.LocalInactive, Manager: f.state.Manager}
		if n.Node != "" {
			n.State = weft.LocalActive
		}
		answer(n, nil)
	case "/init":
		answer("ok", f.become(true))
	case "/tokens":
		answer(weft.JoinTokens{Worker: "w", Manager: "m"}, nil)
	case "/join":
		var j Join
		if err := json.NewDecoder(r.Body).Decode(&j); err != nil {
			answer(nil, err)
			return
		}
		answer("ok", f.become(j.Token == "m"))
	default:
		http.NotFound(w, r)
	}
}

func (f *fakeServer) become(manager bool) error {
	if f.state.Node != "" {
		return errors.New("already a member")
	}
	f.state = fakeState{Node: weft.NewID(), Manager: manager}
	b, err := json.Marshal(f.state)
	if err != nil {
		return err
	}
	if err := os.WriteFile(f.file, b, 0o600); err != nil {
		return err
	}
	return f.startContainer()
}

// fakeCluster speaks to fake daemons.
type fakeCluster struct{}

func (fakeCluster) call(ctx context.Context, socket, path string, in, out any) error {
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://d"+path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	r, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	if r.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", r.Status, body)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(body, out)
}

func (f fakeCluster) Ping(ctx context.Context, socket string) error {
	return f.call(ctx, socket, "/ping", nil, nil)
}

func (f fakeCluster) Info(ctx context.Context, socket string) (n NodeInfo, err error) {
	err = f.call(ctx, socket, "/info", nil, &n)
	return n, err
}

func (f fakeCluster) Init(ctx context.Context, socket string, _ netip.Addr) error {
	return f.call(ctx, socket, "/init", nil, nil)
}

func (f fakeCluster) Tokens(ctx context.Context, socket string) (t weft.JoinTokens, err error) {
	err = f.call(ctx, socket, "/tokens", nil, &t)
	return t, err
}

func (f fakeCluster) Join(ctx context.Context, socket string, j Join) error {
	return f.call(ctx, socket, "/join", j, nil)
}
