// Package ingresstest holds a balancing engine without a kernel and the suite
// that every engine passes, this one included, so that it cannot drift from
// what kernels do.
//
// It is for tests only. The engine's methods may be called from any goroutine.
package ingresstest

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net/netip"
	"slices"
	"sync"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Packet is what a client sends.
type Packet struct {
	// VNI is the network that the client is on; 0 = it is outside the
	// cluster, or the host itself, and asks one of the host's addresses.
	VNI      uint32
	Protocol weft.Protocol
	Src, Dst netip.AddrPort
}

// Result is what becomes of a packet.
type Result struct {
	// Backend that gets it; "" = none.
	Backend weft.ID
	// Src and Dst as the backend sees them.
	Src, Dst netip.AddrPort
	// Refused: answered with a reset or port unreachable. A packet that is
	// neither refused nor sent to a backend is none of the balancer's.
	Refused bool
}

// Engine is ingress.Engine in memory.
type Engine struct {
	// mu guards: everything below.
	mu         sync.Mutex
	namespaces []string
	table      ingress.Table
	broken     map[uint32]bool // networks that the last Apply could not reach
	flows      map[Packet]Result
	stats      map[ingress.PortKey]uint64
}

var _ ingress.Engine = (*Engine)(nil)

// New returns an engine on a host that has these namespaces, by path.
func New(namespaces ...string) *Engine {
	return &Engine{namespaces: namespaces, flows: map[Packet]Result{}, stats: map[ingress.PortKey]uint64{}}
}

// Name implements ingress.Engine.
func (e *Engine) Name() string { return "memory" }

// Probe implements ingress.Engine.
func (e *Engine) Probe(ctx context.Context) error { return ctx.Err() }

// Apply implements ingress.Engine. A network whose namespace does not exist is
// a NetworkError; the others are applied.
func (e *Engine) Apply(ctx context.Context, t ingress.Table) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.table, e.broken = t, map[uint32]bool{}
	var errs []error
	for _, n := range t.Networks {
		if !slices.Contains(e.namespaces, n.NetNS) {
			e.broken[n.VNI] = true
			errs = append(errs, &ingress.NetworkError{VNI: n.VNI, Err: fmt.Errorf("open namespace %s: %w", n.NetNS, fs.ErrNotExist)})
		}
	}
	// A flow inside a network and one of datagrams leave a backend that is
	// gone; a connection from outside is tracked and ends with it.
	for p, r := range e.flows {
		if (p.VNI != 0 || p.Protocol == weft.UDP) && !slices.ContainsFunc(e.backendsLocked(p), func(b ingress.Backend) bool { return b.Task == r.Backend }) {
			delete(e.flows, p)
		}
	}
	return errors.Join(errs...)
}

// backendsLocked are the backends that p asks for; nil also if it asks for none.
func (e *Engine) backendsLocked(p Packet) []ingress.Backend {
	if p.VNI == 0 {
		pub, _ := e.publishedLocked(p)
		return pub.Backends
	}
	s, _ := e.serviceLocked(p)
	return s.Backends
}

func (e *Engine) publishedLocked(p Packet) (ingress.Published, bool) {
	for _, pub := range e.table.Published {
		if pub.Port == p.Dst.Port() && pub.Protocol == p.Protocol {
			return pub, true
		}
	}
	return ingress.Published{}, false
}

func (e *Engine) serviceLocked(p Packet) (ingress.Service, bool) {
	for _, n := range e.table.Networks {
		for _, s := range n.Services {
			if n.VNI == p.VNI && !e.broken[n.VNI] && s.VIP == p.Dst.Addr() {
				return s, true
			}
		}
	}
	return ingress.Service{}, false
}

// Trace sends one packet through the tables. Packets with equal fields are of
// one flow.
func (e *Engine) Trace(p Packet) Result {
	e.mu.Lock()
	defer e.mu.Unlock()
	if r, ok := e.flows[p]; ok {
		return r
	}
	if p.VNI == 0 {
		return e.enterLocked(p)
	}
	s, ok := e.serviceLocked(p)
	if !ok {
		return Result{}
	}
	b, ok := choose(p, s.Backends)
	if !ok {
		return Result{Refused: true}
	}
	r := Result{Backend: b.Task, Src: p.Src, Dst: p.Dst}
	e.flows[p] = r
	return r
}

// Forget ends the flows of a client's port, as its next request for a connection
// does.
func (e *Engine) Forget(src netip.AddrPort) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for p := range e.flows {
		if p.Src == src {
			delete(e.flows, p)
		}
	}
}

// enterLocked is the way of a request from outside.
func (e *Engine) enterLocked(p Packet) Result {
	pub, ok := e.publishedLocked(p)
	if !ok {
		return Result{}
	}
	b, ok := choose(p, pub.Backends)
	if !ok || e.table.Ingress.Link == "" {
		return Result{Refused: !ok}
	}
	e.stats[ingress.PortKey{Protocol: p.Protocol, Port: pub.Port}]++
	addr, leg := b.Addr, e.table.Ingress.Addr.Addr()
	if p.Dst.Addr().Is6() {
		leg = e.table.Ingress.Addr6.Addr()
		if addr.Is4() {
			addr = b.Addr6
		}
	}
	r := Result{Backend: b.Task, Dst: netip.AddrPortFrom(addr, pub.Target), Src: p.Src}
	if pub.HideClient || p.Src.Addr().IsLoopback() {
		r.Src = netip.AddrPortFrom(leg, p.Src.Port())
	}
	e.flows[p] = r
	return r
}

// choose picks by the ring that all engines use.
func choose(p Packet, all []ingress.Backend) (ingress.Backend, bool) {
	var keys []string
	var open []ingress.Backend
	for _, b := range all {
		if !b.Draining {
			keys, open = append(keys, string(b.Task)), append(open, b)
		}
	}
	ring := ingress.Ring(keys, ingress.RingSize(len(keys)))
	if ring == nil {
		return ingress.Backend{}, false
	}
	h := fnv.New64a()
	fmt.Fprint(h, p.Src, p.Dst, p.Protocol)
	return open[ring[h.Sum64()%uint64(len(ring))]], true
}

// Stats implements ingress.Engine.
func (e *Engine) Stats(ctx context.Context) (ingress.Stats, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := ingress.Stats{Published: map[ingress.PortKey]uint64{}}
	for k, n := range e.stats {
		out.Published[k] = n
	}
	return out, ctx.Err()
}

// Close implements ingress.Engine.
func (e *Engine) Close(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.table = ingress.Table{}
	clear(e.flows)
	clear(e.stats)
	return ctx.Err()
}
