//go:build lab

package lab

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

// healLimit is when everything must answer again after a cut has healed. The
// aim is 5 s; the rest is for a machine that does much else.
const healLimit = 10 * time.Second

// TestFaultsCutAndHeal cuts one host off, both ways and one way, for less than
// NodeDownAfter (5 s) and for more: each once; soak: 10 times.
func TestFaultsCutAndHeal(t *testing.T) { cutAndHeal(t, "flt-cut", 1) }

// TestSoakCutAndHeal is TestFaultsCutAndHeal in its long form.
func TestSoakCutAndHeal(t *testing.T) {
	soak(t)
	cutAndHeal(t, "flt-cut-s", 10)
}

func cutAndHeal(t *testing.T, lab string, n int) {
	r := newRig(t, lab)
	r.web(8094)
	r.must(r.on("h1", "service", "create", "-d", "--name", "moving", "--replicas", "3", "--network", "front", "weft/whoami")...)
	r.eventually("service moving", func() error { return r.allAnswer(8094) })
	for round := range n {
		for _, c := range []struct {
			name   string
			length time.Duration
			cuts   [][]string
		}{
			{"3 s", 3 * time.Second, [][]string{{"h3", "h1"}, {"h3", "h2"}}},
			{"20 s", 20 * time.Second, [][]string{{"h3", "h1"}, {"h3", "h2"}}},
			{"8 s, h3 is not heard", 8 * time.Second, [][]string{{"--one-way", "h3", "h1"}, {"--one-way", "h3", "h2"}}},
			{"8 s, h3 does not hear", 8 * time.Second, [][]string{{"--one-way", "h1", "h3"}, {"--one-way", "h2", "h3"}}},
			{"8 s, two workers apart", 8 * time.Second, [][]string{{"h2", "h3"}}},
		} {
			before, err := r.replicas("web", three...)
			if err != nil {
				t.Fatal(err)
			}
			for _, cut := range c.cuts {
				r.must(append([]string{r.weft, "lab", "cut", "--name", r.name}, cut...)...)
			}
			if err := pause(t.Context(), c.length); err != nil {
				t.Fatal(err)
			}
			r.must(r.weft, "lab", "heal", "--name", r.name)
			healed := time.Now()
			r.eventually("after a cut of "+c.name, func() error { return r.allAnswer(8094) })
			took := time.Since(healed)
			t.Logf("round %d: cut of %s: everything answers %s after it healed", round, c.name, took.Round(10*time.Millisecond))
			if took > healLimit {
				t.Errorf("cut of %s: everything answered only %s after it healed, want %s", c.name, took, healLimit)
			}
			after, err := r.replicas("web", three...)
			if err != nil {
				t.Fatal(err)
			}
			if c.length < 5*time.Second && !slices.Equal(identities(before), identities(after)) {
				t.Errorf("cut of %s: tasks were %q, are %q", c.name, identities(before), identities(after))
			}
		}
	}
}

// allAnswer checks names, VIP, tasks and published port from every host, and
// that each service runs as often as it should, no more.
func (r *rig) allAnswer(port int) error {
	var web []replica
	for _, service := range []string{"web", "moving"} {
		rs, err := r.replicas(service, three...)
		if err != nil {
			return err
		}
		if len(rs) != 3 {
			return fmt.Errorf("%d containers of %s run, want 3", len(rs), service)
		}
		if service == "web" {
			web = rs
		}
	}
	vip, err := r.vip("web")
	if err != nil {
		return err
	}
	var errs []error
	once := func(what, ns string, f func(context.Context) error) {
		if err := askOnce(r.t.Context(), ns, f); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	for _, from := range web {
		once("name on "+from.host, from.ns(), lookup("web"))
		for _, to := range web {
			once(from.host+" to the task on "+to.host, from.ns(), ask(to.addrs["front"]+":80"))
		}
		for range 6 {
			once("VIP on "+from.host, from.ns(), ask(vip+":80"))
			once("port of "+from.host, r.clientNS(), ask(fmt.Sprintf("%s:%d", r.host(from.host).Addr, port)))
		}
		if len(errs) > 0 {
			break
		}
	}
	return errors.Join(errs...)
}
