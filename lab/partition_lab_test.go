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
)

// healLimit is when everything must answer again after a cut has healed.
const healLimit = 3 * time.Second

// tooShort is how long a cut may really last that must move no task: a silent
// node's tasks are replaced after 5 s (weft.DefaultClusterSpec), and a connection
// that has lost packets for 4 s takes up to a second to be heard again.
const tooShort = 4 * time.Second

var five = []string{"h1", "h2", "h3", "h4", "h5"}

// way is how a host is cut off from the others.
type way string

const (
	bothWays    way = "both ways"
	isNotHeard  way = "it is not heard"
	doesNotHear way = "it does not hear"
)

// TestFaultsCutAndHeal cuts one of five hosts off: for 3 s both ways, not heard and
// not hearing, and for 8 s, longer than tasks wait, both ways; a worker, then the
// manager of a cluster of one; each once. Soak: 3, 20 and 120 s, each of the three
// ways, 5 times for a worker and 5 for a manager of three. Everything answers within
// healLimit.
func TestFaultsCutAndHeal(t *testing.T) {
	c := newCuts(besideRig(t, "flt-cut", "--hosts", "5"), newSoakResult(t))
	for _, w := range []way{bothWays, isNotHeard, doesNotHear} {
		c.cut("h5", 3*time.Second, w)
	}
	c.cut("h5", 8*time.Second, bothWays)
	c.cut("h1", 3*time.Second, bothWays)
	c.tell()
}

// TestSoakCutAndHeal is TestFaultsCutAndHeal in its long form. Each way and each victim has
// a cluster of its own, side by side as far as -parallel lets them: most of an hour and
// more is waiting.
func TestSoakCutAndHeal(t *testing.T) {
	soak(t)
	result := newSoakResult(t)
	for i, w := range []way{bothWays, isNotHeard, doesNotHear} {
		for _, victim := range []string{"h5", "h1"} { // a worker, a manager
			name := fmt.Sprintf("flt-cut%d%s", i, victim)
			t.Run(fmt.Sprintf("%s: %s", victim, w), func(t *testing.T) {
				c := newCuts(besideRig(t, name, "--hosts", "5", "--managers", "3"), result)
				for _, length := range []time.Duration{3 * time.Second, 20 * time.Second, 120 * time.Second} {
					for range 5 {
						c.cut(victim, length, w)
					}
				}
				c.tell()
			})
		}
	}
}

// cuts are a lab of five hosts with a service of one task per host, web, and one
// whose tasks move, moving.
type cuts struct {
	*rig
	result *soakResult
	web    []replica
	vips   map[string]string // by service
	kind   string            // of the cuts in took
	took   []time.Duration
	kept   int // of these, tooShort
}

// cutPort is published by web.
const cutPort = 8094

func newCuts(r *rig, result *soakResult) *cuts {
	c := &cuts{rig: r, result: result, vips: map[string]string{}}
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "--publish", fmt.Sprintf("%d:80", cutPort), "weft/whoami")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "moving", "--replicas", "5", "--network", "front", "weft/whoami")...)
	for _, s := range []string{"web", "moving"} {
		r.eventually("tasks of "+s, func() error { return c.whole(s) })
		r.eventually("VIP of "+s, func() (err error) { c.vips[s], err = r.vip(s); return err })
	}
	r.eventually("web and moving answer", c.allAnswer)
	return c
}

// whole reports whether a service runs as often as it should, no more.
func (c *cuts) whole(service string) error {
	rs, err := c.replicas(service, five...)
	if err == nil && len(rs) != len(five) {
		err = fmt.Errorf("%d containers of %s run, want %d: %q", len(rs), service, len(five), identities(rs))
	}
	if err == nil && service == "web" {
		c.web = rs
	}
	return err
}

func (c *cuts) identities() (out []string) {
	c.t.Helper()
	for _, s := range []string{"web", "moving"} {
		rs, err := c.replicas(s, five...)
		if err != nil {
			c.t.Fatal(err)
		}
		out = append(out, identities(rs)...)
	}
	return out
}

// cut cuts victim off from all others, heals that, and nothing else is commanded.
func (c *cuts) cut(victim string, length time.Duration, w way) {
	t := c.t
	t.Helper()
	before := c.identities()
	began := time.Now()
	for _, other := range five {
		args := []string{c.weft, "lab", "cut", "--name", c.name}
		switch {
		case other == victim:
			continue
		case w == bothWays:
			args = append(args, victim, other)
		case w == isNotHeard:
			args = append(args, "--one-way", victim, other)
		default:
			args = append(args, "--one-way", other, victim)
		}
		c.must(args...)
	}
	if err := pause(t.Context(), length); err != nil {
		t.Fatal(err)
	}
	c.must(c.weft, "lab", "heal", "--name", c.name)
	healed := time.Now()
	lasted := healed.Sub(began) // cutting and healing take time on a loaded machine
	if len(c.web) > 0 && slices.ContainsFunc(c.web, replica.isGone) {
		c.eventually("web on every host", func() error { return c.whole("web") })
	}
	what := fmt.Sprintf("%s cut off for %s, %s", victim, length, w)
	missed := "nothing was missed"
	c.eventually(what, func() error {
		err := c.allAnswer()
		if err != nil {
			missed = fmt.Sprintf("the last that did not, at %s: %s", time.Since(healed).Round(10*time.Millisecond), strings.ReplaceAll(err.Error(), "\n", "; "))
		}
		if err != nil && slices.ContainsFunc(c.web, replica.isGone) {
			err = errors.Join(err, c.whole("web")) // a task was replaced
		}
		return err
	})
	took := time.Since(healed)
	t.Logf("%s, really %s: everything answers %s after it healed; %s", what, lasted.Round(10*time.Millisecond), took.Round(10*time.Millisecond), missed)
	if took > healLimit {
		t.Errorf("%s: everything answered only %s after it healed, want %s", what, took, healLimit)
	}
	if kind := fmt.Sprintf("%s cut off for %s, %s", victim, length, w); kind != c.kind {
		c.tell()
		c.kind = kind
	}
	c.took = append(c.took, took)
	if lasted < tooShort {
		c.kept++
		if after := c.identities(); !slices.Equal(before, after) {
			t.Errorf("%s: tasks were %q, are %q", what, before, after)
		}
	}
	for _, s := range []string{"web", "moving"} {
		c.eventually(what+", then "+s, func() error { return c.whole(s) })
	}
}

// tell writes what the cuts of one kind have given.
func (c *cuts) tell() {
	if len(c.took) == 0 {
		return
	}
	slices.Sort(c.took)
	c.result.printf("%s, %d times: everything answered %s after the heal (median), %s (worst); %d of them, shorter than %s, to move no task", c.kind, len(c.took),
		c.took[len(c.took)/2].Round(10*time.Millisecond), c.took[len(c.took)-1].Round(10*time.Millisecond), c.kept, tooShort)
	c.took, c.kept = nil, 0
}

// isGone reports whether the container has ended.
func (p replica) isGone() bool {
	_, err := os.Stat(p.ns())
	return err != nil
}

// allAnswer asks from every host for each name, at each VIP, at each task of web and at
// the published port of every host, all hosts at once. The tasks of web do not move, so
// their name has exactly their addresses: a host that has not merged again lacks some. It
// asks no daemon.
func (c *cuts) allAnswer() error {
	g, ctx := errgroup.WithContext(c.t.Context())
	tasks := addressesOn("front", c.web)
	for i, from := range c.web {
		g.Go(func() error {
			var failed error // the first that did; what is left is not asked then
			once := func(what, ns string, f func(context.Context) error) {
				if failed != nil {
					return
				}
				ctx, cancel := context.WithTimeout(ctx, askLimit/4)
				defer cancel()
				if err := within(ns, func() error { return f(ctx) }); err != nil {
					failed = fmt.Errorf("%s: %w", what, err)
				}
			}
			for _, name := range []string{"web", "moving", "tasks.moving"} {
				once("name "+name+" on "+from.host, from.ns(), lookup(name))
			}
			once("name tasks.web on "+from.host, from.ns(), lookupAll("tasks.web", tasks))
			for j, addr := range tasks {
				once("task on "+c.web[j].host+" from "+from.host, from.ns(), ask(addr+":80"))
			}
			for s, vip := range c.vips {
				for range 2 * len(five) {
					once("VIP of "+s+" on "+from.host, from.ns(), ask(vip+":80"))
				}
			}
			for range 3 {
				once("port of "+five[i%len(five)], c.clientNS(), ask(fmt.Sprintf("%s:%d", c.host(five[i%len(five)]).Addr, cutPort)))
			}
			return failed
		})
	}
	return g.Wait()
}
