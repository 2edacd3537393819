//go:build lab

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// Many daemons that get little of the processor: nobody is taken for dead, no task
// moves, every name answers.

const (
	// crowdLook is the time between two looks at all of it.
	crowdLook = 5 * time.Second
	// crowdSettle bounds the wait for a task on every host.
	crowdSettle = 5 * time.Minute
	// crowdAsk bounds one question to a daemon: who waits for the processor is
	// slow, not dead.
	crowdAsk = 30 * time.Second
	// burnersPerCore busy loops at the daemons' own priority load each core.
	burnersPerCore = 2
)

// TestFaultsCrowd has 10 hosts with every core loaded for 45 s: 2 busy loops a
// core. Soak: 50 hosts, 10 minutes.
func TestFaultsCrowd(t *testing.T) { crowded(t, "flt-crowd", 10, 45*time.Second) }

// TestSoakCrowd is TestFaultsCrowd in its long form.
func TestSoakCrowd(t *testing.T) {
	soak(t)
	crowded(t, "flt-crow-s", 50, 10*time.Minute)
}

// crowd is a lab with a task of web on every host.
type crowd struct {
	*rig
	hosts []string
	web   []replica
	tasks []string
	read  map[string]int64 // of each host's log
	looks int
	names int // answers
	found []string
}

func crowded(t *testing.T, lab string, hosts int, length time.Duration) {
	result := newSoakResult(t)
	began := time.Now()
	c := &crowd{rig: newRig(t, lab, "--hosts", fmt.Sprint(hosts)), read: map[string]int64{}}
	result.printf("%d hosts were up after %s", hosts, time.Since(began).Round(100*time.Millisecond))
	for i := range hosts {
		c.hosts = append(c.hosts, fmt.Sprintf("h%d", i+1))
	}
	c.settle()
	result.printf("a task on each of %d hosts, and names on all, after %s", hosts, time.Since(began).Round(100*time.Millisecond))
	for _, h := range c.hosts {
		c.news(h) // what was said while they met is not asked
	}
	stop := burn(t, burnersPerCore*runtime.NumCPU())
	idle := idleTime(t)
	loaded := time.Now()
	for time.Since(loaded) < length {
		c.look()
		if err := pause(t.Context(), crowdLook); err != nil {
			t.Fatal(err)
		}
	}
	lasted := time.Since(loaded)
	share := float64(idleTime(t)-idle) / float64(lasted) / float64(runtime.NumCPU())
	result.printf("every core loaded for %s by %d busy loops a core, which got %s of processor time; idle %.1f %%", lasted.Round(time.Second), burnersPerCore, stop().Round(time.Second), 100*share)
	if share > 0.02 {
		t.Errorf("the cores were idle for %.1f %% of the time: they were not loaded", 100*share)
	}
	c.look()
	for _, h := range c.hosts {
		c.found = append(c.found, c.news(h)...)
	}
	c.sameTasks()
	for _, f := range c.found[:min(20, len(c.found))] {
		t.Error(f)
	}
	result.printf("%d looks at the states of %d nodes, each by another daemon, %d answers to names on all hosts: %d nodes seen as not ready or taken for dead by gossip or leader, or names without an answer",
		c.looks, hosts, c.names, len(c.found))
}

// settle makes web and waits until it is whole.
func (c *crowd) settle() {
	c.t.Helper()
	c.must(c.on("h1", "network", "create", "--driver", "overlay", "front")...)
	c.must(c.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "weft/whoami")...)
	ctx, cancel := context.WithTimeout(c.t.Context(), crowdSettle)
	defer cancel()
	for {
		err := c.whole()
		if err == nil {
			break
		}
		if pause(ctx, time.Second) != nil {
			c.t.Fatalf("a task on each of %d hosts: %v", len(c.hosts), err)
		}
	}
	var err error
	if c.tasks, err = c.rig.tasks("h1", "web"); err != nil || len(c.tasks) != len(c.hosts) {
		c.t.Fatalf("%d tasks on %d hosts, %v", len(c.tasks), len(c.hosts), err)
	}
}

// whole reports whether every host runs one task, and all find them all by name.
func (c *crowd) whole() error {
	out, err := c.run(c.t.Context(), c.on("h1", "service", "ls", "--format", "{{.Replicas}}")...)
	if want := fmt.Sprintf("%d/%d", len(c.hosts), len(c.hosts)); err != nil || strings.TrimSpace(out) != want {
		return errors.Join(fmt.Errorf("%s of %s run", strings.TrimSpace(out), want), err)
	}
	if c.web, err = c.replicas("web", c.hosts...); err != nil || len(c.web) != len(c.hosts) {
		return errors.Join(fmt.Errorf("%d containers run on %d hosts", len(c.web), len(c.hosts)), err)
	}
	return c.resolve()
}

// resolve asks on every host for the names of web.
func (c *crowd) resolve() error {
	g, ctx := errgroup.WithContext(c.t.Context())
	g.SetLimit(8)
	for _, p := range c.web {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, crowdAsk)
			defer cancel()
			return within(p.ns(), func() error {
				for name, want := range map[string]int{"web": 1, "tasks.web": len(c.hosts)} {
					addrs, err := resolve(ctx, name)
					if err == nil && len(addrs) != want {
						err = fmt.Errorf("%d addresses, want %d", len(addrs), want)
					}
					if err != nil {
						return fmt.Errorf("name %s on %s: %w", name, p.host, err)
					}
				}
				return nil
			})
		})
	}
	return g.Wait()
}

// look asks one daemon for the states of all nodes, and all for the names.
func (c *crowd) look() {
	c.t.Helper()
	host := c.hosts[c.looks%len(c.hosts)]
	c.looks++
	ctx, cancel := context.WithTimeout(c.t.Context(), crowdAsk)
	defer cancel()
	note := func(format string, args ...any) { c.found = append(c.found, fmt.Sprintf(format, args...)) }
	a, err := c.call(ctx, host, http.MethodGet, "/nodes", nil)
	var nodes []struct {
		Description struct{ Hostname string }
		Status      struct{ State string }
	}
	switch {
	case err != nil:
		note("look %d: %s does not tell of the nodes: %v", c.looks, host, err)
	case a.status != http.StatusOK:
		note("look %d: %s does not tell of the nodes: %d %s", c.looks, host, a.status, a.message())
	default:
		if err := json.Unmarshal(a.body, &nodes); err != nil || len(nodes) != len(c.hosts) {
			note("look %d: %s tells of %d nodes, %v", c.looks, host, len(nodes), err)
		}
	}
	for _, n := range nodes {
		if n.Status.State != "ready" {
			note("look %d: by %s, %s is %s", c.looks, host, n.Description.Hostname, n.Status.State)
		}
	}
	if err := c.resolve(); err != nil {
		note("look %d: %v", c.looks, err)
	} else {
		c.names += 2 * len(c.web)
	}
}

// dead are what a daemon's log says when gossip or the leader takes a node for dead.
var dead = []string{"member is gone", "taken for down"}

// news reads what a host's daemon has logged since the last call and returns the
// lines that take a node for dead.
func (c *crowd) news(host string) (out []string) {
	c.t.Helper()
	b, err := os.ReadFile(c.host(host).Paths.Log)
	if err != nil {
		c.t.Fatal(err)
	}
	for line := range bytes.Lines(b[c.read[host]:]) {
		if slices.ContainsFunc(dead, func(s string) bool { return bytes.Contains(line, []byte(s)) }) {
			out = append(out, host+": "+string(bytes.TrimSpace(line)))
		}
	}
	c.read[host] = int64(len(b))
	return out
}

// sameTasks wants the tasks of before, none more, in the same containers.
func (c *crowd) sameTasks() {
	c.t.Helper()
	tasks, err := c.rig.tasks("h1", "web")
	if err != nil || !slices.Equal(tasks, c.tasks) {
		c.t.Errorf("tasks were %q, are %q, %v", c.tasks, tasks, err)
	}
	web, err := c.replicas("web", c.hosts...)
	if was, is := identities(c.web), identities(web); err != nil || !slices.Equal(was, is) {
		c.t.Errorf("containers were %q, are %q, %v", was, is, err)
	}
}

// burn starts busy loops. Each is a session of its own, as each daemon is: a kernel that
// shares the processor by session gives a loop as much as a host. The function that it
// returns ends them and tells how much processor time they got.
func burn(t *testing.T, n int) func() time.Duration {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	t.Cleanup(stop)
	var burners []*exec.Cmd
	for range n {
		cmd := exec.CommandContext(ctx, "/proc/self/exe", "burn")
		cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		burners = append(burners, cmd)
	}
	return func() (got time.Duration) {
		stop()
		for _, cmd := range burners {
			cmd.Wait() // its end is ours
			got += cmd.ProcessState.UserTime()
		}
		return got
	}
}

// idleTime is how long the machine's cores have idled, in sum (proc(5), /proc/stat:
// the fourth number, in hundredths of a second).
func idleTime(t *testing.T) time.Duration {
	t.Helper()
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	var user, nice, system, idle int64
	if _, err := fmt.Sscanf(string(b), "cpu %d %d %d %d", &user, &nice, &system, &idle); err != nil {
		t.Fatalf("/proc/stat: %v", err)
	}
	return time.Duration(idle) * time.Second / userHZ
}
