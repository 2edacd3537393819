package vxlan

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/weftnet/weft"
)

// Engine is a Kernel that can be chosen. Implementations are vxlan/linux
// ("bridge") and vxlan/bpf ("ebpf").
type Engine interface {
	Kernel
	// Name is the word of --overlay-engine.
	Name() string
	// Probe builds the real thing in a scratch namespace and removes it: no
	// version is asked. An error that wraps weft.ErrUnsupported says what
	// the kernel lacks. It blocks, and is not called during Apply.
	Probe(ctx context.Context) error
}

// Pair is an overlay engine and the service engine on it. As a wish "" is any.
type Pair struct{ Overlay, Service string }

// pairs are the engines that go together, best first. The overlay engine
// decides where a balancer can meet a packet: on ebpf nothing passes a bridge,
// so what hooks into one has nothing to hook into, and the ebpf balancer is
// called by the ebpf overlay's program.
var pairs = [...]Pair{{"ebpf", "ebpf"}, {"bridge", "ipvs"}, {"bridge", "nft"}}

// MayOverlay says whether p as a wish leaves an overlay engine a chance. One without
// need not be probed: a probe may take a second, and a minute on an emulated processor.
func (p Pair) MayOverlay(name string) bool {
	return slices.ContainsFunc(pairs[:], func(q Pair) bool { return q.Overlay == name && p.allows(q) })
}

// MayService is MayOverlay of a service engine.
func (p Pair) MayService(name string) bool {
	return slices.ContainsFunc(pairs[:], func(q Pair) bool { return q.Service == name && p.allows(q) })
}

// allows says whether q fulfils p as a wish.
func (p Pair) allows(q Pair) bool {
	return (p.Overlay == "" || p.Overlay == q.Overlay) && (p.Service == "" || p.Service == q.Service)
}

// Candidate is an engine of this build and the result of its probe.
type Candidate struct {
	Name string
	Err  error // of Probe; nil = it works. Not asked where the flags leave no chance
	// Note says what it can do less well on this host, or does otherwise;
	// "" = nothing.
	Note string
}

// The kinds of weft.EngineChoice.
const (
	kindOverlay = "overlay"
	kindService = "service"
)

// Choose returns the best legal pair of candidates that work and that the
// forced names allow, and the reason for or against every candidate. held is the
// pair that running tasks of this node are on, zero without any: their ports
// belong to that engine, so it stays until they have gone. A forced name that
// this build lacks, whose probe failed or that is not what is held, a pair that
// does not go together, a held one that does not work any more and a host on
// which nothing works are errors that name the flag or the probe and say what to
// do; the reasons are given then, too.
func Choose(overlay, service []Candidate, forced, held Pair) (Pair, []weft.EngineChoice, error) {
	c := choice{overlay: overlay, service: service, forced: forced, held: held}
	err := c.checkForced()
	if err == nil {
		err = c.choose()
	}
	return c.pair, c.reasons(), err
}

// choice carries the arguments and the result through one Choose.
type choice struct {
	overlay, service   []Candidate
	forced, held, pair Pair
}

func (c *choice) checkForced() error {
	var failed error
	for _, f := range []struct {
		flag, name, kind, held string
		all                    []Candidate
	}{
		{"--overlay-engine", c.forced.Overlay, kindOverlay, c.held.Overlay, c.overlay},
		{"--service-engine", c.forced.Service, kindService, c.held.Service, c.service},
	} {
		if f.name == "" {
			continue
		}
		e, ok := find(f.all, f.name)
		if !ok {
			return fmt.Errorf("%s %s: this build has %s; name one of them, or leave the flag out to let the host decide: %w",
				f.flag, f.name, strings.Join(names(f.all), ", "), weft.ErrUnsupported)
		}
		if f.held != "" && f.held != f.name {
			return fmt.Errorf("%s %s: tasks that run on this node are on %s engine %s: leave the flag out, or %s: %w",
				f.flag, f.name, f.kind, f.held, howToChange, weft.ErrConflict)
		}
		if e.Err != nil && failed == nil {
			failed = fmt.Errorf("%s %s: its probe failed on this host: %w; give the host what it lacks, or leave the flag out to let the host decide", f.flag, f.name, e.Err)
		}
	}
	if f := c.forced; f.Overlay != "" && f.Service != "" && !slices.Contains(pairs[:], f) {
		return fmt.Errorf("--overlay-engine %s with --service-engine %s: they do not go together: %s; leave one of the flags out: %w",
			f.Overlay, f.Service, legal(), weft.ErrInvalid)
	}
	return failed
}

// howToChange is the way to other engines.
const howToChange = "drain the node (docker node update --availability drain), and start its daemon again when its tasks have gone"

// choose takes the first pair that works, or the one that is held.
func (c *choice) choose() error {
	for _, p := range pairs {
		if c.allowed(p) && works(c.overlay, p.Overlay) && works(c.service, p.Service) {
			c.pair = p
			return nil
		}
	}
	var why []string
	for _, l := range []struct {
		kind string
		all  []Candidate
		may  func(string) bool
	}{{kindOverlay, c.overlay, c.forced.MayOverlay}, {kindService, c.service, c.forced.MayService}} {
		for _, e := range l.all {
			if e.Err != nil && l.may(e.Name) {
				why = append(why, fmt.Sprintf("%s engine %s: %v", l.kind, e.Name, e.Err))
			}
		}
	}
	what := "no overlay engine works together with a service engine on this host"
	switch {
	case c.held != Pair{}:
		what = fmt.Sprintf("tasks that run on this node are on overlay engine %s with service engine %s, which do not work together now: run a build and a kernel that can, or reboot the host", c.held.Overlay, c.held.Service)
	case c.forced.Overlay != "":
		what = fmt.Sprintf("--overlay-engine %s: no service engine that runs on it works on this host", c.forced.Overlay)
	case c.forced.Service != "":
		what = fmt.Sprintf("--service-engine %s: no overlay engine that it runs on works on this host", c.forced.Service)
	}
	return fmt.Errorf("%s (%s): %s; give the host what it lacks: %w", what, legal(), strings.Join(why, "; "), weft.ErrUnsupported)
}

func (c *choice) allowed(p Pair) bool {
	return (c.held == Pair{} || c.held == p) && c.forced.allows(p)
}

// reasons are the verdicts, overlay engines first, in the candidates' order.
// Of one that the flags leave no chance nothing is said but that: it may not have been probed.
func (c *choice) reasons() []weft.EngineChoice {
	var out []weft.EngineChoice
	for _, e := range c.overlay {
		r := weft.EngineChoice{Kind: kindOverlay, Engine: e.Name, Chosen: e.Name == c.pair.Overlay}
		switch f := c.forced; {
		case f.MayOverlay(e.Name):
			r.Reason = c.reason(e, c.pair.Overlay, f.Overlay, c.held.Overlay, "--overlay-engine")
		case f.Overlay != "" && f.Overlay != e.Name:
			r.Reason = "--overlay-engine asks for " + f.Overlay
		default:
			r.Reason = fmt.Sprintf("--service-engine %s does not run on it", f.Service)
		}
		if r.Reason == "" {
			r.Reason = c.overlayReason(e)
		}
		out = append(out, r)
	}
	for _, e := range c.service {
		r := weft.EngineChoice{Kind: kindService, Engine: e.Name, Chosen: e.Name == c.pair.Service}
		switch f := c.forced; {
		case f.MayService(e.Name):
			r.Reason = c.reason(e, c.pair.Service, f.Service, c.held.Service, "--service-engine")
		case f.Service != "" && f.Service != e.Name:
			r.Reason = "--service-engine asks for " + f.Service
		default:
			r.Reason = "it does not run on the overlay engine " + f.Overlay
		}
		if r.Reason == "" {
			r.Reason = "it does not run on the overlay engine " + c.pair.Overlay
			if slices.Contains(pairs[:], Pair{c.pair.Overlay, e.Name}) {
				r.Reason = fmt.Sprintf("it works, and %s is better", c.pair.Service)
			}
		}
		out = append(out, r)
	}
	return out
}

// reason is what both kinds have in common; "" = none of it.
func (c *choice) reason(e Candidate, chosen, forced, held, flag string) string {
	note := ""
	if e.Note != "" {
		note = "; " + e.Note
	}
	switch {
	case e.Err != nil:
		return fmt.Sprintf("its probe failed: %v", e.Err)
	case e.Name == chosen && forced != "":
		return flag + " asks for it, and its probe succeeded" + note
	case e.Name == chosen && held != "":
		return "its probe succeeded, and tasks that run on this node are on it" + note
	case e.Name == chosen:
		return "its probe succeeded, and it is the best that does" + note
	case held != "" && held != e.Name:
		return fmt.Sprintf("it works, but tasks that run on this node are on %s: to change, %s", held, howToChange)
	case chosen == "":
		return "it works, and nothing that goes with it does"
	}
	return ""
}

func (c *choice) overlayReason(e Candidate) string {
	if !slices.ContainsFunc(pairs[:], func(p Pair) bool { return p.Overlay == e.Name && works(c.service, p.Service) }) {
		return "it works, and no service engine that runs on it does"
	}
	return fmt.Sprintf("it works, and %s is better", c.pair.Overlay)
}

// legal says in words which engines go together.
func legal() string {
	var overlays, out []string
	on := map[string][]string{}
	for _, p := range pairs {
		if on[p.Overlay] == nil {
			overlays = append(overlays, p.Overlay)
		}
		on[p.Overlay] = append(on[p.Overlay], p.Service)
	}
	for _, o := range overlays {
		out = append(out, fmt.Sprintf("on overlay engine %s runs service engine %s", o, strings.Join(on[o], " or ")))
	}
	return strings.Join(out, ", ")
}

func find(all []Candidate, name string) (Candidate, bool) {
	i := slices.IndexFunc(all, func(e Candidate) bool { return e.Name == name })
	if i < 0 {
		return Candidate{}, false
	}
	return all[i], true
}

func works(all []Candidate, name string) bool {
	e, ok := find(all, name)
	return ok && e.Err == nil
}

func names(all []Candidate) []string {
	out := make([]string, len(all))
	for i, e := range all {
		out[i] = e.Name
	}
	return out
}
