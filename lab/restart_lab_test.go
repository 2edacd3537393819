//go:build lab

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stopLimit is how long a daemon may take to end when it is asked to: systemd
// waits 90 s, an operator does not.
const stopLimit = 5 * time.Second

// TestFaultsStop stops a daemon as systemd does, under traffic: it says that it
// is ready and that it stops, ends within seconds with code 0, its containers
// run on, a second daemon is refused, and the next one adopts.
func TestFaultsStop(t *testing.T) {
	r := newRig(t, "flt-stop")
	web, vip := r.web(8095)
	before := identities(web)
	tr := r.flows(web, "front", vip, 8095)
	for i, h := range three {
		args := r.commandLine(h)
		took := r.terminate(h)
		// Beyond gossip's detector, within NodeDownAfter.
		if err := pause(t.Context(), 3*time.Second-took); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		d := r.startNotified(h, args)
		d.await("READY=1")
		ready := time.Since(began)
		out, err := runWithin(r.host(h).Paths.NetNS, exec.CommandContext(t.Context(), args[0], args[1:]...))
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, "another weft daemon (pid "+fmt.Sprint(d.cmd.Process.Pid)) {
			t.Errorf("second daemon on %s: %v: %s", h, err, out)
		}
		r.eventually("same containers on "+h, func() error {
			web, err := r.replicas("web", three...)
			if now := identities(web); err == nil && !slices.Equal(now, before) {
				err = fmt.Errorf("they were %q, are %q", before, now)
			}
			return err
		})
		r.eventually("names on "+h, func() error { return askOnce(t.Context(), web[i].ns(), lookup("web")) })
		began = time.Now()
		if err := d.cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		d.await("STOPPING=1")
		if err := d.cmd.Wait(); err != nil || time.Since(began) > stopLimit {
			t.Errorf("daemon of %s: %v %s after SIGTERM, want exit code 0 within %s", h, err, time.Since(began), stopLimit)
		}
		t.Logf("%s: stopped in %s, ready %s after its start, stopped again in %s", h, took.Round(time.Millisecond), ready.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
		r.must(r.weft, "lab", "start", "--name", r.name, h)
		r.eventually("names on "+h, func() error { return askOnce(t.Context(), web[i].ns(), lookup("web")) })
	}
	if err := tr.stop(); err != nil {
		t.Fatal(err)
	}
	for _, f := range []*flow{tr.tasks, tr.vip, tr.port} {
		t.Log(f)
		f.mustNotHaveFailed(t, tr.began, always)
	}
}

// commandLine is how the daemon of a host was started.
func (r *rig) commandLine(host string) []string {
	r.t.Helper()
	pid, err := daemonPID(r.host(host))
	if err != nil || pid == 0 {
		r.t.Fatalf("daemon of %s: pid %d, %v", host, pid, err)
	}
	p, err := readProcess(pid)
	if err != nil {
		r.t.Fatal(err)
	}
	return append([]string{r.weft}, p.Args[1:]...)
}

// terminate sends SIGTERM to a host's daemon and waits for its end.
func (r *rig) terminate(host string) time.Duration {
	r.t.Helper()
	h := r.host(host)
	pid, err := daemonPID(h)
	if err != nil || pid == 0 {
		r.t.Fatalf("daemon of %s: pid %d, %v", host, pid, err)
	}
	began := time.Now()
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		r.t.Fatal(err)
	}
	for {
		if now, err := daemonPID(h); err == nil && now == 0 {
			return time.Since(began)
		}
		if time.Since(began) > stopLimit {
			r.t.Fatalf("daemon of %s did not end within %s of SIGTERM", host, stopLimit)
		}
		if err := pause(r.t.Context(), 5*time.Millisecond); err != nil {
			r.t.Fatal(err)
		}
	}
}

// notified is a daemon that was given a NOTIFY_SOCKET (sd_notify(3)).
type notified struct {
	r    *rig
	cmd  *exec.Cmd
	sock *net.UnixConn
}

func (r *rig) startNotified(host string, args []string) *notified {
	r.t.Helper()
	path := filepath.Join(r.t.TempDir(), "notify")
	sock, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { sock.Close() })
	cmd := exec.CommandContext(r.t.Context(), args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+path)
	log, err := os.OpenFile(r.host(host).Paths.Log, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := within(r.host(host).Paths.NetNS, cmd.Start); err != nil {
		r.t.Fatal(err)
	}
	return &notified{r, cmd, sock}
}

func (d *notified) await(want string) {
	d.r.t.Helper()
	if err := d.sock.SetReadDeadline(time.Now().Add(settle)); err != nil {
		d.r.t.Fatal(err)
	}
	b := make([]byte, 4096)
	for {
		n, err := d.sock.Read(b)
		if err != nil {
			d.r.t.Fatalf("wait for %s: %v", want, err)
		}
		if bytes.Contains(b[:n], []byte(want)) {
			return
		}
	}
}

// runWithin runs a command in a namespace and gives what it wrote.
func runWithin(ns string, cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := within(ns, cmd.Start); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// TestFaultsKillWhileBusy kills a daemon while it prepares ten tasks, and while
// it removes them, at another moment each round: 3 rounds; soak: 20.
func TestFaultsKillWhileBusy(t *testing.T) { killWhileBusy(t, "flt-busy", 3) }

// TestSoakKillWhileBusy is TestFaultsKillWhileBusy in its long form.
func TestSoakKillWhileBusy(t *testing.T) {
	soak(t)
	killWhileBusy(t, "flt-busy-s", 20)
}

func killWhileBusy(t *testing.T, lab string, n int) {
	r := newRig(t, lab, "--hosts", "2")
	hosts := []string{"h1", "h2"}
	// The first task makes what stays: bridges, folders, the shim.
	r.ten("h1")
	r.must(r.on("h1", "service", "rm", "ten")...)
	r.eventually("first service removed", func() error {
		_, err := r.run(t.Context(), r.on("h1", "network", "rm", "busy")...)
		return err
	})
	before := map[string][]string{}
	r.eventually("no task left", func() error {
		for _, h := range hosts {
			inv, err := r.inventory(h)
			if err != nil { // something goes while it is listed
				return err
			}
			before[h] = inv
			if i := slices.IndexFunc(inv, func(s string) bool {
				// What is left of the host's gateway bridge is remembered while it is there.
				return slices.Contains([]string{"container", "file", "cgroup"}, strings.Fields(s)[0]) && !strings.HasSuffix(s, "/sandbox/gateway.json")
			}); i >= 0 {
				return fmt.Errorf("%s has %s", h, inv[i])
			}
		}
		return nil
	})
	for round := range n {
		strikeAfter := func(what string, d time.Duration) {
			if err := pause(t.Context(), d); err != nil {
				t.Fatal(err)
			}
			r.killDaemon("h2")
			r.must(r.weft, "lab", "start", "--name", r.name, "h2")
			t.Logf("round %d: daemon killed %s after the %s", round, d, what)
		}
		delay := time.Duration(20+round*97%500) * time.Millisecond
		r.createTen("h1")
		strikeAfter("creation", delay)
		began := time.Now()
		r.awaitTen("h1")
		t.Logf("round %d: ten tasks run %s after the restart", round, time.Since(began).Round(time.Millisecond))
		// A task that ended was not adopted; its replacement waits for the
		// restart delay. The last words tell which step could not be repeated.
		out := r.must(r.on("h1", "service", "ps", "--no-trunc", "--format", "{{.Name}} {{.CurrentState}} {{.Error}}", "ten")...)
		for line := range strings.Lines(out) {
			if !strings.Contains(line, " Running ") {
				t.Logf("round %d: not adopted: %s", round, line)
			}
		}
		r.must(r.on("h1", "service", "rm", "ten")...)
		strikeAfter("removal", delay)
		r.eventually("network removed", func() error {
			_, err := r.run(t.Context(), r.on("h1", "network", "rm", "busy")...)
			return err
		})
		r.sameInventories(fmt.Sprintf("round %d: everything of the tasks is gone", round), before)
	}
}

func (r *rig) ten(ask string) {
	r.t.Helper()
	r.createTen(ask)
	r.awaitTen(ask)
}

// createTen makes a network and a service of ten tasks on h2.
func (r *rig) createTen(ask string) {
	r.t.Helper()
	r.must(r.on(ask, "network", "create", "--driver", "overlay", "busy")...)
	r.must(r.on(ask, "service", "create", "-d", "--name", "ten", "--replicas", "10", "--constraint", "node.hostname==h2", "--network", "busy", "--publish", "8096:80", "weft/whoami")...)
}

func (r *rig) awaitTen(ask string) {
	r.t.Helper()
	r.eventually("ten tasks", func() error {
		out, err := r.run(r.t.Context(), r.on(ask, "service", "ls", "--format", "{{.Replicas}}")...)
		if err == nil && !strings.HasPrefix(out, "10/10") {
			err = errors.New(out)
		}
		return err
	})
}
