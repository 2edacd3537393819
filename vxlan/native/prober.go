package native

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Link is a segment of other nodes; bpf.Segment is one. It is used by Run alone.
type Link interface {
	// Ask sends probes and returns why some could not be sent, by their way.
	Ask(probes []vxlan.NativeProbe) map[vxlan.NativeWay]error
	// Echoed reports whether the echo of a probe has come, once.
	Echoed(p vxlan.NativeProbe) (bool, error)
	Close() error
}

// Config of a Prober. All fields are required.
type Config struct {
	// Open opens the link; Run closes it.
	Open func() (Link, error)
	Log  *slog.Logger
}

// Prober proves native ways. Make it with New, run it with Run, once at a time;
// the other methods may be called from any goroutine, before Run, too.
type Prober struct {
	cfg  Config
	wake chan struct{} // capacity 1: the core was changed; never closed

	// mu guards: core, proven, changed, why.
	mu      sync.Mutex
	core    *core
	proven  map[vxlan.NativeWay]bool // never written once set
	changed chan struct{}            // closed at the next change of proven
	why     map[vxlan.NativeWay]string
}

// New checks the configuration; it does no I/O and starts nothing.
func New(cfg Config) (*Prober, error) {
	if cfg.Open == nil || cfg.Log == nil {
		return nil, fmt.Errorf("native probes: open and log are needed: %w", weft.ErrInvalid)
	}
	return &Prober{
		cfg: cfg, wake: make(chan struct{}, 1), core: newCore(drawID, mathrand.IntN),
		proven: map[vxlan.NativeWay]bool{}, changed: make(chan struct{}), why: map[vxlan.NativeWay]string{},
	}, nil
}

func drawID() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return binary.BigEndian.Uint64(b[:])
}

// Watch replaces the ways that matter. What was proven of others is forgotten.
func (p *Prober) Watch(ways map[vxlan.NativeWay]vxlan.NativeEnds) {
	p.mu.Lock()
	p.core.watch(time.Now(), ways)
	maps.DeleteFunc(p.why, func(k vxlan.NativeWay, _ string) bool { _, ok := ways[k]; return !ok })
	p.publishLocked()
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Proven are the ways on which packets were seen to arrive. The map is not to be
// written. The channel is closed at the next change.
func (p *Prober) Proven() (map[vxlan.NativeWay]bool, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.proven, p.changed
}

// Ways are all ways that are watched, in order, and how their packets go.
func (p *Prober) Ways() []weft.Way {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []weft.Way
	for _, k := range slices.SortedFunc(maps.Keys(p.core.ways), compareWays) {
		w := p.core.ways[k]
		s := weft.Way{VNI: k.VNI, VTEP: k.VTEP, Native: p.proven[k], Since: w.since}
		switch why, is := p.why[k]; {
		case s.Native:
		case is:
			s.Reason = why
		case len(w.open) == 0:
			s.Reason = "no family of its addresses can go so over this underlay"
		case w.misses > 0:
			s.Reason = "probes do not come back"
		default:
			s.Reason = fmt.Sprintf("%d more probes must come back", max(w.need-w.hits, 1))
		}
		out = append(out, s)
	}
	return out
}

// Run asks until ctx ends and returns nil. An error says what could not be opened.
func (p *Prober) Run(ctx context.Context) error {
	l, err := p.cfg.Open()
	if err != nil {
		return err
	}
	defer l.Close()
	for {
		wait := p.round(l)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-p.wake:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// round does what is due and returns how long there is nothing more to do.
func (p *Prober) round(l Link) time.Duration {
	p.mu.Lock()
	failed := map[vxlan.NativeWay]error{}
	probes := p.core.step(time.Now(), func(n vxlan.NativeProbe) bool {
		ok, err := l.Echoed(n)
		if err != nil {
			failed[n.NativeWay] = err
		}
		return ok
	})
	p.mu.Unlock()
	if len(probes) > 0 {
		maps.Copy(failed, l.Ask(probes))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.explainLocked(probes, failed)
	for _, c := range p.core.news() {
		if c.proven {
			p.cfg.Log.Info("node is reached without encapsulation", weft.KeyPeer, c.way.VTEP, weft.KeyVNI, c.way.VNI)
			continue
		}
		p.cfg.Log.Warn("node is not reached without encapsulation any more: its packets go by VXLAN", weft.KeyPeer, c.way.VTEP, weft.KeyVNI, c.way.VNI)
	}
	p.publishLocked()
	next := p.core.next()
	if next.IsZero() {
		return time.Hour // Watch wakes it
	}
	return max(time.Until(next), time.Millisecond)
}

// explainLocked says once why a way cannot be asked about, and once more when
// the reason is another one.
func (p *Prober) explainLocked(probes []vxlan.NativeProbe, failed map[vxlan.NativeWay]error) {
	for _, n := range probes {
		err, is := failed[n.NativeWay]
		if !is {
			delete(p.why, n.NativeWay)
			continue
		}
		if err.Error() != p.why[n.NativeWay] {
			p.why[n.NativeWay] = err.Error()
			p.cfg.Log.Info("node cannot be asked for native packets: its packets go by VXLAN", weft.KeyPeer, n.VTEP, weft.KeyVNI, n.VNI, weft.KeyErr, err)
		}
	}
}

func (p *Prober) publishLocked() {
	proven := p.core.proven()
	if maps.Equal(proven, p.proven) {
		return
	}
	p.proven = proven
	close(p.changed)
	p.changed = make(chan struct{})
}
