//go:build lab

package lab

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// TestLabThousands: three more services with a published port among 200 others;
// soak: six among 2,000.
func TestLabThousands(t *testing.T) { thousands(t, "t-many", manySize{200, 3}) }

// TestSoakThousands is its long form.
func TestSoakThousands(t *testing.T) {
	soak(t)
	thousands(t, "t-many", manySize{2000, 6})
}

type manySize struct{ services, more int }

const (
	// manyFirst is the port of the first of many services, manyFew and manyMore of
	// those that are timed.
	manyFirst, manyFew, manyMore = 20_000, 8170, 8180
	// manyWork is what the processor time of the three daemons may grow by, for one
	// more service, because of the others. All of it together is a quarter of manyReady.
	manyWork = 250 * time.Millisecond
	// manyReady is within what one more is to be ready. The long form holds the median
	// to it; the short one, beside which others run, only tells.
	manyReady = time.Second
	// manyWindow is for how long the daemons are watched: all of them look at their
	// kernels once in it, whatever happens.
	manyWindow = planeLooks + time.Second
	planeLooks = 5 * time.Second // planeMaxGap of agent
)

// thousands makes services one at a time, first alone, then among many others with a
// port each, and compares what they cost. The others have no tasks: a machine that
// holds three hosts has no room for thousands of containers. What their endpoints
// cost is measured with fakes (BenchmarkLookOneMore in agent).
func thousands(t *testing.T, lab string, size manySize) {
	r := newRig(t, lab)
	result := newSoakResult(t)
	r.oneMore("image", manyFew-1, 0) // it comes with the first
	var few, many []readyCost
	calm := r.atRest()
	for i := range size.more {
		few = append(few, r.oneMore(fmt.Sprintf("few-%d", i), manyFew+i, calm))
	}
	began, cpu := time.Now(), r.daemonsCPU()
	g, ctx := errgroup.WithContext(t.Context())
	g.SetLimit(8)
	for i := range size.services {
		g.Go(func() error { return r.createPublished(ctx, fmt.Sprintf("s-%d", i), manyFirst+i, 0) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	made := time.Since(began)
	busy := r.atRest()
	result.printf("%d services with a published port, made by 8 callers at a time: %s, %s of processor time of three daemons for each", size.services,
		made.Round(time.Second), ((r.daemonsCPU() - cpu) / time.Duration(size.services)).Round(10*time.Microsecond))
	result.printf("processor time of three daemons at rest: %.1f%% of one processor among %d services, %.1f%% among %d", 100*calm, size.more, 100*busy, size.services)
	for i := range size.more {
		many = append(many, r.oneMore(fmt.Sprintf("many-%d", i), manyMore+i, busy))
	}
	before, after := summary(few), summary(many)
	result.printf("one more among %d: ready by %s (%s to %s), processor time of three daemons %s (%s at least); among %d: ready by %s (%s to %s), processor time %s (%s at least); medians of %d",
		size.more, before.ready, before.fastest, before.slowest, before.cpu, before.least, size.services, after.ready, after.fastest, after.slowest, after.cpu, after.least, size.more)
	if strings.HasPrefix(t.Name(), "TestSoak") && after.ready > manyReady {
		t.Errorf("one more among %d is ready after %s, want %s at most", size.services, after.ready, manyReady)
	}
	// What else the machine does makes the same work take more, never less.
	if grown := after.least - before.least; grown > manyWork {
		t.Errorf("one more service takes %s more of the processors among %d others, want at most %s", grown, size.services, manyWork)
	}
}

// readyCost is what it took until a service answered by every node.
type readyCost struct{ ready, cpu time.Duration }

type costs struct{ ready, fastest, slowest, cpu, least time.Duration }

func summary(all []readyCost) costs {
	var ready, cpu []time.Duration
	for _, c := range all {
		ready, cpu = append(ready, c.ready.Round(time.Millisecond)), append(cpu, c.cpu.Round(time.Millisecond))
	}
	slices.Sort(ready)
	slices.Sort(cpu)
	return costs{ready[len(ready)/2], ready[0], ready[len(ready)-1], cpu[len(cpu)/2], cpu[0]}
}

// atRest is the share of a processor that the three daemons take while nothing
// happens, once all that has happened is done.
func (r *rig) atRest() float64 {
	r.t.Helper()
	least := 0.0
	for range 4 {
		cpu, began := r.daemonsCPU(), time.Now()
		if err := pause(r.t.Context(), manyWindow); err != nil {
			r.t.Fatal(err)
		}
		share := float64(r.daemonsCPU()-cpu) / float64(time.Since(began))
		if least == 0 || share < least {
			least = share
		}
	}
	return least
}

// oneMore makes a service of one task and waits until its port answers by all three
// nodes. What the daemons take within manyWindow, or until then, counts, but for the
// share that they take at rest.
func (r *rig) oneMore(name string, port int, rest float64) (c readyCost) {
	r.t.Helper()
	cpu, began := r.daemonsCPU(), time.Now()
	if err := r.createPublished(r.t.Context(), name, port, 1); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), settle)
	defer cancel()
	var g errgroup.Group
	for _, h := range three {
		to := netip.AddrPortFrom(r.host(h).Addr, uint16(port))
		g.Go(func() error { return within(r.clientNS(), func() error { return untilAnswered(ctx, to) }) })
	}
	if err := g.Wait(); err != nil {
		r.t.Fatalf("%s: %v", name, err)
	}
	c.ready = time.Since(began)
	if err := pause(ctx, manyWindow-c.ready); err != nil {
		r.t.Fatal(err)
	}
	c.cpu = r.daemonsCPU() - cpu - time.Duration(rest*float64(time.Since(began)))
	return c
}

// untilAnswered asks every 10 ms. It needs the calling thread's namespace, so it
// starts no goroutine.
func untilAnswered(ctx context.Context, to netip.AddrPort) error {
	for {
		err := answeredOnce(to)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if pause(ctx, pollEvery) != nil {
			return err
		}
	}
}

func answeredOnce(to netip.AddrPort) error {
	c, err := net.DialTimeout("tcp4", to.String(), time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	_, err = bufio.NewReader(c).ReadString('\n')
	return err
}

func (r *rig) createPublished(ctx context.Context, name string, port, replicas int) error {
	spec := map[string]any{
		"Name": name, "TaskTemplate": map[string]any{"ContainerSpec": map[string]any{"Image": "weft/whoami"}},
		"Mode":         map[string]any{"Replicated": map[string]any{"Replicas": replicas}},
		"EndpointSpec": map[string]any{"Ports": []any{map[string]any{"Protocol": "tcp", "TargetPort": 80, "PublishedPort": port}}},
	}
	a, err := r.call(ctx, "h1", http.MethodPost, "/services/create", spec)
	if err == nil && a.status != http.StatusCreated {
		err = fmt.Errorf("create service %s: %d %s", name, a.status, a.message())
	}
	return err
}

// daemonsCPU is the processor time that the daemons of the three hosts have had.
func (r *rig) daemonsCPU() (sum time.Duration) {
	r.t.Helper()
	for _, h := range three {
		pid, err := daemonPID(r.host(h))
		if err != nil || pid == 0 {
			r.t.Fatalf("daemon of %s: process %d, %v", h, pid, err)
		}
		b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
		if err != nil {
			r.t.Fatal(err)
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:])) // proc_pid_stat(5), from field 3 on
		for _, s := range f[11:13] {
			n, err := strconv.Atoi(s)
			if err != nil {
				r.t.Fatal(err)
			}
			sum += time.Duration(n) * time.Second / userHZ
		}
	}
	return sum
}
