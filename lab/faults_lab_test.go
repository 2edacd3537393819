//go:build lab

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Faults, with counts: what must go on while a part is dead, and what must be
// the same afterwards. Labs are named "flt-…", published ports are 8091 and up.

// soak skips the long forms where they were not asked for: make soak.
func soak(t *testing.T) {
	t.Helper()
	if os.Getenv("WEFT_SOAK") == "" {
		netnstest.Missing(t, "soak", errors.New("set WEFT_SOAK=1 for the long form"))
	}
}

var three = []string{"h1", "h2", "h3"}

// traffic is the traffic of a test.
type traffic struct {
	began                   time.Time
	tasks, vip, port, names *flow
	stop                    func() error
}

// flows sends 200 requests a second: to the task on the next host, to the VIP,
// and to the published port of every host. It asks 30 times for the name of all tasks,
// which has to have all of their addresses: those of other hosts come by gossip, and not
// from what the leader has told.
func (r *rig) flows(web []replica, network, vip string, port int) *traffic {
	r.t.Helper()
	tr := &traffic{
		began: time.Now(), tasks: &flow{name: "task on another host", rate: 70}, vip: &flow{name: "VIP", rate: 70},
		port: &flow{name: "published port", rate: 60}, names: &flow{name: "name", rate: 30},
	}
	var tasks, vips, ports, names []place
	addrs := addressesOn(network, web)
	for i, p := range web {
		next := web[(i+1)%len(web)]
		tasks = append(tasks, place{p.ns(), ask(next.addrs[network] + ":80")})
		vips = append(vips, place{p.ns(), ask(vip + ":80")})
		ports = append(ports, place{r.clientNS(), ask(fmt.Sprintf("%s:%d", r.host(p.host).Addr, port))})
		names = append(names, place{p.ns(), lookupAll("tasks.web", addrs)})
	}
	ctx, cancel := context.WithCancel(r.t.Context())
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return tr.tasks.run(ctx, tasks) })
	g.Go(func() error { return tr.vip.run(ctx, vips) })
	g.Go(func() error { return tr.port.run(ctx, ports) })
	g.Go(func() error { return tr.names.run(ctx, names) })
	tr.stop = func() error { cancel(); return g.Wait() }
	return tr
}

// web makes a service of one task per host and waits until it is whole.
func (r *rig) web(port int) (web []replica, vip string) {
	r.t.Helper()
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "--publish", fmt.Sprintf("%d:80", port), "weft/whoami")...)
	r.eventually("one task on every host", func() error {
		var err error
		if web, err = r.replicas("web", three...); err == nil && len(web) != 3 {
			err = fmt.Errorf("%d run", len(web))
		}
		return err
	})
	r.eventually("VIP of web", func() (err error) { vip, err = r.vip("web"); return err })
	for _, p := range web {
		for _, addr := range []string{vip + ":80", p.addrs["front"] + ":80"} {
			for _, from := range web {
				r.eventually("first answer of "+addr, func() error { return askOnce(r.t.Context(), from.ns(), ask(addr)) })
			}
		}
		r.eventually("names of all tasks on "+p.host, func() error {
			return askOnce(r.t.Context(), p.ns(), lookupAll("tasks.web", addressesOn("front", web)))
		})
		r.eventually("port of "+p.host, func() error {
			return askOnce(r.t.Context(), r.clientNS(), ask(fmt.Sprintf("%s:%d", r.host(p.host).Addr, port)))
		})
	}
	return web, vip
}

// vip is a service's address on network front.
func (r *rig) vip(service string) (string, error) {
	front, err := r.run(r.t.Context(), r.on("h1", "network", "inspect", "-f", "{{.ID}}", "front")...)
	if err != nil {
		return "", err
	}
	out, err := r.run(r.t.Context(), r.on("h1", "service", "inspect", "-f", "{{range .Endpoint.VirtualIPs}}{{.NetworkID}}={{.Addr}} {{end}}", service)...)
	for f := range strings.FieldsSeq(out) {
		if a, ok := strings.CutPrefix(f, strings.TrimSpace(front)+"="); ok {
			addr, _, _ := strings.Cut(a, "/")
			return addr, nil
		}
	}
	return "", errors.Join(fmt.Errorf("service %s has no address on front", service), err)
}

func askOnce(ctx context.Context, ns string, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	return within(ns, func() error { return ask(ctx) })
}

// blow is one way to hurt a host. The daemon is away for the time given when
// it is hit at all.
type blow struct {
	name               string
	daemon, containerd bool
	away               time.Duration
}

// TestFaultsAdoption kills daemons and container supervisors under 200 requests
// a second: 3 rounds of 3 hosts; soak: 20 rounds.
func TestFaultsAdoption(t *testing.T) { adoption(t, "flt-adopt", 3) }

// TestSoakAdoption is TestFaultsAdoption in its long form.
func TestSoakAdoption(t *testing.T) {
	soak(t)
	adoption(t, "flt-adop-s", 20)
}

func adoption(t *testing.T, lab string, n int) {
	result := newSoakResult(t)
	r := newRig(t, lab)
	web, vip := r.web(8091)
	before, belongings := identities(web), r.inventories(three...)
	tasks, err := r.tasks("h1", "web")
	if err != nil {
		t.Fatal(err)
	}
	tr := r.flows(web, "front", vip, 8091)
	var worst time.Duration
	count := 0
	for round := range n {
		// The longer absence is beyond gossip's detector (3 s) and within
		// NodeDownAfter (5 s).
		away := []time.Duration{time.Second, 3500 * time.Millisecond}[round%2]
		b := []blow{{"daemon", true, false, away}, {"containerd", false, true, 0}, {"daemon and containerd", true, true, away}}[round%3]
		for i, h := range three {
			count++
			worst = max(worst, r.strike(b, h, i, tr))
			r.eventually(fmt.Sprintf("round %d: containers after the death of the %s of %s", round, b.name, h), func() error {
				web, err := r.replicas("web", three...)
				if now := identities(web); err == nil && !slices.Equal(now, before) {
					err = fmt.Errorf("they were %q, are %q", before, now)
				}
				return err
			})
		}
	}
	if err := tr.stop(); err != nil {
		t.Fatal(err)
	}
	if now, err := r.tasks("h1", "web"); err != nil || !slices.Equal(now, tasks) {
		t.Errorf("tasks were %q, are %q, %v", tasks, now, err)
	}
	r.sameInventories("nothing has come and nothing has gone", belongings)
	for _, h := range three {
		if c := r.repairCounts(h); len(c) > 0 {
			t.Errorf("the last daemon of %s has repaired %v, and nobody has broken anything", h, c)
		}
	}
	result.printf("%d deaths in %d rounds; names of the host itself were back at most %s after the start", count, n, worst.Round(time.Millisecond))
	for _, f := range []*flow{tr.tasks, tr.vip, tr.port, tr.names} {
		result.printf("%s", f)
	}
	for _, f := range []*flow{tr.tasks, tr.vip, tr.port} {
		f.mustNotHaveFailed(t, tr.began, always)
	}
}

// daemonStart is when the process of a host's daemon began: a hundredth of a
// second is its unit, rounded down.
func (r *rig) daemonStart(host string) time.Time {
	r.t.Helper()
	pid, err := daemonPID(r.host(host))
	if err != nil || pid == 0 {
		r.t.Fatalf("daemon of %s: pid %d, %v", host, pid, err)
	}
	p, err := readProcess(pid)
	if err != nil {
		r.t.Fatal(err)
	}
	now, err := ticks()
	if err != nil {
		r.t.Fatal(err)
	}
	return time.Now().Add(-time.Duration(now-p.Start) * time.Second / userHZ)
}

// strike deals one blow and brings the daemon back. It returns how long the
// names of that host needed after the start; other hosts' names must not fail.
func (r *rig) strike(b blow, host string, index int, tr *traffic) time.Duration {
	r.t.Helper()
	hit := time.Now()
	if b.containerd {
		r.must(r.weft, "lab", "kill", "--name", r.name, "--containerd", host)
	}
	start := hit
	if b.daemon {
		r.killDaemon(host)
		if err := pause(r.t.Context(), b.away); err != nil {
			r.t.Fatal(err)
		}
		r.must(r.weft, "lab", "start", "--name", r.name, host)
		start = r.daemonStart(host)
	}
	// A question that began within a second has its answer, or the lack of it, by now.
	if err := pause(r.t.Context(), time.Until(start.Add(1500*time.Millisecond))); err != nil {
		r.t.Fatal(err)
	}
	var back time.Duration
	if last := tr.names.lastFailure(index, hit); !last.IsZero() {
		back = last.Sub(start)
		if !b.daemon {
			r.t.Errorf("names of %s failed, and its daemon lived", host)
		}
	}
	if back > time.Second {
		r.t.Errorf("names of %s were back %s after the start of its daemon", host, back)
	}
	tr.names.mustNotHaveFailed(r.t, tr.began, func(o outcome) bool { return o.host != index && o.at.After(hit) })
	return back
}
