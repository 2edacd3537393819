package ingresstest

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// ErrRefused is what Bed.Open says of a connection that was refused: by a reset
// or port unreachable, not by silence.
var ErrRefused = errors.New("refused")

// Bed is a host with an engine, one network with backends, a client on the
// network and one outside. VIP, Inside and Host are of one family, which is the
// one that is tested.
type Bed struct {
	Engine ingress.Engine
	// Network exists: its VNI, NetNS and Bridge. Services are the suite's.
	Network ingress.Network
	// Missing is a path where no namespace is.
	Missing string
	// Backends, three at least, are on Network, hold VIP and can be reached
	// from Entry.
	Backends []ingress.Backend
	VIP      netip.Addr
	Entry    ingress.Entry
	// Inside is the address of the client on Network; Host is the address
	// at which a client outside asks for published ports.
	Inside netip.Addr
	Host   netip.Addr
	// Client is the address of the client outside, which backends are to see.
	// Without it requests to published ports are sent on from Entry.
	Client netip.Addr
	// Target is the port on which backends serve each protocol.
	Target map[weft.Protocol]uint16
	// Drops: the kernel cannot refuse on a network what no backend takes.
	Drops bool
	// Open begins a new flow: from the client on Network to VIP, or else
	// from outside to Host, each from a port of the client that was not used
	// before. Nobody there is an error, ErrRefused or not.
	Open func(t *testing.T, outside bool, p weft.Protocol, port uint16) (Flow, error)
}

// Flow is an open one.
type Flow interface {
	// Backend is who answered, Seen the client's address as it saw it.
	Backend() weft.ID
	Seen() netip.Addr
	// Again sends more on the same flow and says who answered.
	Again() (weft.ID, error)
}

// port that the suite publishes; idlePort has no backend.
const (
	port     = 30000
	idlePort = 30001
)

// Conformance is what an engine owes. All cases use one bed; each begins with
// empty tables.
func Conformance(t *testing.T, b *Bed) {
	if len(b.Backends) < 3 {
		t.Fatalf("a bed with %d backends, want three", len(b.Backends))
	}
	for _, tc := range []struct {
		name string
		run  func(*testing.T, *Bed)
	}{
		{"probe", testProbe},
		{"spreads and keeps the client's address", testSpread},
		{"flows stay when backends come and drain", testFlowsStay},
		{"removed backends get nothing", testRemoved},
		{"no backend is refused", testIdle},
		{"published ports", testPublished},
		{"published ports drain", testPublishedDrain},
		{"datagrams move with their backend", testDatagramsMove},
		{"unpublished ports", testUnpublished},
		{"a broken network", testBroken},
		{"close", testClose},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b.apply(t, ingress.Table{})
			tc.run(t, b)
		})
	}
}

func (b *Bed) apply(t *testing.T, table ingress.Table) {
	t.Helper()
	if err := b.Engine.Apply(t.Context(), table); err != nil {
		t.Fatalf("apply: %v", err)
	}
}

// table has the service with these backends, at its address and published.
func (b *Bed) table(backends ...ingress.Backend) ingress.Table {
	n := b.Network
	n.Services = []ingress.Service{{ID: "web", VIP: b.VIP, MAC: weft.VIPMAC("web", b.VIP), Backends: backends}}
	t := ingress.Table{Networks: []ingress.Network{n}, Ingress: b.Entry}
	for _, p := range []weft.Protocol{weft.TCP, weft.UDP} {
		t.Published = append(t.Published,
			ingress.Published{Service: "web", Protocol: p, Port: port, Target: b.Target[p], Backends: backends, HideClient: !b.Client.IsValid()},
			ingress.Published{Service: "idle", Protocol: p, Port: idlePort, Target: b.Target[p]})
	}
	return t
}

func draining(b ingress.Backend) ingress.Backend {
	b.Draining = true
	return b
}

// open begins a flow to the service that must be answered.
func (b *Bed) open(t *testing.T, outside bool, p weft.Protocol) Flow {
	t.Helper()
	to := b.Target[p]
	if outside {
		to = port
	}
	f, err := b.Open(t, outside, p, to)
	if err != nil {
		t.Fatalf("open %s flow (from outside: %v): %v", p, outside, err)
	}
	return f
}

// count opens n flows and counts who answers.
func (b *Bed) count(t *testing.T, outside bool, p weft.Protocol, n int) map[weft.ID]int {
	t.Helper()
	got := map[weft.ID]int{}
	for range n {
		f := b.open(t, outside, p)
		if want := b.client(outside); f.Seen() != want {
			t.Fatalf("the backend saw %s, want %s", f.Seen(), want)
		}
		got[f.Backend()]++
	}
	return got
}

func (b *Bed) client(outside bool) netip.Addr {
	switch {
	case !outside:
		return b.Inside
	case b.Client.IsValid():
		return b.Client
	case b.Host.Is6():
		return b.Entry.Addr6.Addr()
	}
	return b.Entry.Addr.Addr()
}

func again(t *testing.T, f Flow) {
	t.Helper()
	if id, err := f.Again(); err != nil || id != f.Backend() {
		t.Errorf("more on a flow of %s went to %q, %v", f.Backend(), id, err)
	}
}

func testProbe(t *testing.T, b *Bed) {
	if b.Engine.Name() == "" {
		t.Error("the engine has no name")
	}
	b.apply(t, b.table(b.Backends[0]))
	f := b.open(t, false, weft.TCP)
	for range 2 {
		if err := b.Engine.Probe(t.Context()); err != nil {
			t.Errorf("probe: %v", err)
		}
	}
	again(t, f)
}

func testSpread(t *testing.T, b *Bed) {
	b.apply(t, b.table(b.Backends[:3]...))
	// 120 flows over three backends: fewer than 15 on one happens less than
	// once in 10,000,000 runs.
	got := b.count(t, false, weft.TCP, 120)
	for _, k := range b.Backends[:3] {
		if got[k.Task] < 15 {
			t.Errorf("backends got %v of 120 flows", got)
		}
	}
}

func testFlowsStay(t *testing.T, b *Bed) {
	b.apply(t, b.table(b.Backends[0]))
	f := b.open(t, false, weft.TCP)
	for name, table := range map[string]ingress.Table{
		"the same again":      b.table(b.Backends[0]),
		"others join":         b.table(b.Backends[:3]...),
		"it drains":           b.table(draining(b.Backends[0]), b.Backends[1]),
		"it drains, no other": b.table(draining(b.Backends[0])),
	} {
		b.apply(t, table)
		if id, err := f.Again(); err != nil || id != f.Backend() {
			t.Errorf("%s: more on a flow of %s went to %q, %v", name, f.Backend(), id, err)
		}
	}
	b.apply(t, b.table(draining(b.Backends[0]), b.Backends[1]))
	if got := b.count(t, false, weft.TCP, 30); got[b.Backends[0].Task] != 0 {
		t.Errorf("new flows went to %v, the first drains", got)
	}
}

func testRemoved(t *testing.T, b *Bed) {
	b.apply(t, b.table(b.Backends[:2]...))
	b.count(t, false, weft.TCP, 20)
	b.apply(t, b.table(b.Backends[1]))
	if got := b.count(t, false, weft.TCP, 30); got[b.Backends[1].Task] != 30 {
		t.Errorf("new flows went to %v, the second is alone", got)
	}
}

func (b *Bed) wantNobody(t *testing.T, what string, outside bool, p weft.Protocol, to uint16) {
	t.Helper()
	f, err := b.Open(t, outside, p, to)
	switch {
	case err == nil:
		t.Errorf("%s: %s answered", what, f.Backend())
	case !errors.Is(err, ErrRefused) && (outside || !b.Drops):
		t.Errorf("%s: %v, want refused", what, err)
	}
}

func testIdle(t *testing.T, b *Bed) {
	b.apply(t, b.table())
	b.wantNobody(t, "no backend", false, weft.TCP, b.Target[weft.TCP])
	b.apply(t, b.table(draining(b.Backends[0])))
	b.wantNobody(t, "all drain", false, weft.TCP, b.Target[weft.TCP])
	b.apply(t, b.table(b.Backends[0]))
	b.open(t, false, weft.TCP)
}

func testPublished(t *testing.T, b *Bed) {
	b.apply(t, b.table(b.Backends[:3]...))
	for _, p := range []weft.Protocol{weft.TCP, weft.UDP} {
		got := b.count(t, true, p, 120)
		for _, k := range b.Backends[:3] {
			if got[k.Task] < 15 {
				t.Errorf("%s: backends got %v of 120 flows", p, got)
			}
		}
		b.wantNobody(t, "published without backends", true, p, idlePort)
	}
}

func testPublishedDrain(t *testing.T, b *Bed) {
	b.apply(t, b.table(b.Backends[0]))
	for _, p := range []weft.Protocol{weft.TCP, weft.UDP} {
		b.apply(t, b.table(b.Backends[0]))
		f := b.open(t, true, p)
		b.apply(t, b.table(draining(b.Backends[0]), b.Backends[1]))
		again(t, f)
		if got := b.count(t, true, p, 20); got[b.Backends[1].Task] != 20 {
			t.Errorf("%s: new flows went to %v, the first drains", p, got)
		}
	}
}

// testDatagramsMove: a client that goes on sending from one port is not held to
// a backend that has gone, nor to the answer that there is none.
func testDatagramsMove(t *testing.T, b *Bed) {
	b.apply(t, b.table(b.Backends[0]))
	f := b.open(t, true, weft.UDP)
	for _, to := range []ingress.Backend{b.Backends[1], b.Backends[2]} {
		b.apply(t, b.table(to))
		if id, err := f.Again(); err != nil || id != to.Task {
			t.Errorf("more on a flow whose backend was replaced went to %q, %v, want %s", id, err, to.Task)
		}
	}
	b.apply(t, b.table())
	if id, err := f.Again(); err == nil {
		t.Errorf("%s answered on a port without backends", id)
	}
	b.apply(t, b.table(b.Backends[0]))
	if id, err := f.Again(); err != nil || id != b.Backends[0].Task {
		t.Errorf("more on a flow after the port has backends again went to %q, %v", id, err)
	}
}

func testUnpublished(t *testing.T, b *Bed) {
	b.apply(t, b.table(b.Backends[0]))
	b.open(t, true, weft.TCP)
	table := b.table(b.Backends[0])
	table.Published = nil
	b.apply(t, table)
	f, err := b.Open(t, true, weft.TCP, port)
	if err == nil {
		t.Errorf("%s answered on a port that is published no more", f.Backend())
	}
}

func testBroken(t *testing.T, b *Bed) {
	table := b.table(b.Backends[0])
	missing := ingress.Network{VNI: b.Network.VNI + 1, NetNS: b.Missing, Bridge: b.Network.Bridge}
	table.Networks = append([]ingress.Network{missing}, table.Networks...)
	err := b.Engine.Apply(t.Context(), table)
	var n *ingress.NetworkError
	if !errors.As(err, &n) || n.VNI != missing.VNI {
		t.Errorf("apply with a missing namespace: %v, want an error of network %d", err, missing.VNI)
	}
	b.open(t, false, weft.TCP)
	b.open(t, true, weft.TCP)
}

func testClose(t *testing.T, b *Bed) {
	b.apply(t, b.table(b.Backends[0]))
	for range 2 {
		if err := b.Engine.Close(t.Context()); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if f, err := b.Open(t, true, weft.TCP, port); err == nil {
		t.Errorf("%s answered on a published port after close", f.Backend())
	}
	b.apply(t, b.table(b.Backends[0]))
	b.open(t, true, weft.TCP)
	if _, err := b.Engine.Stats(t.Context()); err != nil {
		t.Errorf("stats: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Engine.Apply(ended, ingress.Table{Networks: []ingress.Network{b.Network}}); !errors.Is(err, context.Canceled) {
		t.Errorf("apply under an ended context: %v", err)
	}
}
