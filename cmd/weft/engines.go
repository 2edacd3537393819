package main

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	balance "github.com/weftnet/weft/ingress/bpf"
	"github.com/weftnet/weft/ingress/ipvs"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/linux"
)

// engineConfig is what engines are made of.
type engineConfig struct {
	Node     weft.ID
	NetNSDir string
	BPFDir   string // where the eBPF engines mount their bpffs
	Log      *slog.Logger
	Repaired func(weft.Repair)
}

// overlayEngines are the overlay engines of this build, best first. Making one
// does nothing: a new engine is a line here.
func overlayEngines(c engineConfig) ([]vxlan.Engine, error) {
	bridge, err := linux.New(linux.Config{Node: c.Node, NetNSDir: c.NetNSDir, Log: c.Log, Repaired: c.Repaired})
	if err != nil {
		return nil, err
	}
	ebpf, err := bpf.New(bpf.Config{Node: c.Node, Dir: c.BPFDir, NetNSDir: c.NetNSDir, Log: c.Log, Repaired: c.Repaired})
	if err != nil {
		return nil, err
	}
	return []vxlan.Engine{ebpf, bridge}, nil
}

// serviceEngines are the service engines of this build, best first.
func serviceEngines(c engineConfig) ([]ingress.Engine, error) {
	n := nft.New(c.NetNSDir)
	n.Repaired = c.Repaired
	cgroup, err := balance.CgroupOf(c.Node)
	if err != nil && !errors.Is(err, weft.ErrUnsupported) {
		return nil, err
	}
	ebpf, err := balance.New(balance.Config{Node: c.Node, Dir: c.BPFDir, Cgroup: cgroup, Repaired: c.Repaired})
	if err != nil {
		return nil, err
	}
	virtual, err := ipvs.New(ipvs.Config{Node: c.Node, NetNSDir: c.NetNSDir, Repaired: c.Repaired})
	if err != nil {
		return nil, err
	}
	// Published ports are nftables' on every overlay: one engine, its own
	// instance, as the two have different networks. On the eBPF one, flows that it
	// has let in go past the host.
	host := nft.New(c.NetNSDir)
	host.Repaired = c.Repaired
	mesh, err := balance.NewMesh(balance.MeshConfig{Node: c.Node, Dir: c.BPFDir, Table: host, Repaired: c.Repaired})
	if err != nil {
		return nil, err
	}
	return []ingress.Engine{ingress.Split{Services: ebpf, Published: mesh}, ingress.Split{Services: virtual, Published: host}, n}, nil
}

// engines chooses this host's engines once, by what its kernel can do, and
// makes them for a node. Safe for concurrent use.
type engines struct {
	forced vxlan.Pair
	probe  engineConfig // Node is this installation: nothing of it outlives a probe
	// held is the pair that running tasks of this host are on; zero = none are.
	held func() (vxlan.Pair, error)
	log  *slog.Logger

	// mu guards: chosen, bound, reasons. It is held while engines are probed: two
	// probes would meet in one scratch namespace.
	mu      sync.Mutex
	chosen  vxlan.Pair // zero until choose has succeeded
	bound   bool       // chosen was held
	reasons []weft.EngineChoice
}

func newEngines(cfg daemonConfig, local weft.ID, log *slog.Logger) *engines {
	return &engines{
		forced: vxlan.Pair{Overlay: cfg.OverlayEngine, Service: cfg.ServiceEngine}, log: log,
		probe: engineConfig{Node: local, Log: log}.in(cfg),
		held: func() (vxlan.Pair, error) {
			s, err := loadMember(cfg.DataRoot)
			if s == nil || err != nil {
				return vxlan.Pair{}, err
			}
			return engineUser{cfg.ExecRoot, s.Node}.held()
		},
	}
}

// in completes c with what the daemon's configuration says.
func (c engineConfig) in(cfg daemonConfig) engineConfig {
	c.NetNSDir, c.BPFDir = netnsDir(cfg.ExecRoot), bpfDir(cfg.ExecRoot)
	return c
}

// ebpfEngine is the name of both eBPF engines.
const ebpfEngine = "ebpf"

// bpfDir is where the eBPF engines mount their bpffs.
func bpfDir(execRoot string) string { return filepath.Join(execRoot, "bpf") }

// netnsDir is where namespaces are named.
func netnsDir(execRoot string) string { return filepath.Join(execRoot, "netns") }

// choose probes every engine of this build that the flags leave a chance and takes
// the best pair. Once it has succeeded it does nothing; an error is that of
// vxlan.Choose.
func (e *engines) choose(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.chosen != (vxlan.Pair{}) {
		return nil
	}
	held, err := e.held()
	if err != nil {
		return err
	}
	overlays, err := overlayEngines(e.probe)
	if err != nil {
		return err
	}
	services, err := serviceEngines(e.probe)
	if err != nil {
		return err
	}
	// Side by side: names of running tasks pause until the engines are there.
	var o, s []vxlan.Candidate
	var g errgroup.Group
	g.Go(func() error {
		o = judge(ctx, overlays, e.forced.MayOverlay, overlayNote)
		return nil
	})
	s = judge(ctx, services, e.forced.MayService, serviceNote)
	if err := g.Wait(); err != nil {
		return err
	}
	before := e.reasons
	e.bound = held != vxlan.Pair{}
	e.chosen, e.reasons, err = vxlan.Choose(o, s, e.forced, held)
	if err == nil || before == nil { // not with each retry
		for _, r := range e.reasons {
			e.log.Info("engine judged", "kind", r.Kind, weft.KeyEngine, r.Engine, "chosen", r.Chosen, "reason", r.Reason)
		}
	}
	return err
}

// judge probes the engines that may be chosen: the others only have to be named.
func judge[E interface {
	Name() string
	Probe(context.Context) error
}](ctx context.Context, all []E, may func(string) bool, note func(E) string) []vxlan.Candidate {
	var out []vxlan.Candidate
	for _, x := range all {
		c := vxlan.Candidate{Name: x.Name()}
		if may(c.Name) {
			c.Err = x.Probe(ctx)
			c.Note = note(x)
		}
		out = append(out, c)
	}
	return out
}

// overlayNote says what an overlay engine does otherwise on this host.
func overlayNote(e vxlan.Engine) string {
	if n, ok := e.(interface{ Note() string }); ok {
		return n.Note()
	}
	return ""
}

// serviceNote says what a service engine can do less well on this host.
func serviceNote(e ingress.Engine) string {
	var notes []string
	if n, ok := e.(interface{ Note() string }); ok && n.Note() != "" {
		notes = append(notes, n.Note())
	}
	if r, ok := e.(interface{ CanRefuse() bool }); ok && !r.CanRefuse() {
		notes = append(notes, "this kernel lacks nft_reject_bridge and nft_reject_netdev, so a service without tasks is silent")
	}
	if r, ok := e.(interface{ CanPublish6() bool }); ok && !r.CanPublish6() {
		notes = append(notes, "this kernel does not translate IPv6, so ports are published on IPv4 only")
	}
	return strings.Join(notes, "; ")
}

// verdicts are the chosen pair and the reason for or against each engine.
func (e *engines) verdicts() (vxlan.Pair, []weft.EngineChoice) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.chosen, e.reasons
}

// of makes the chosen engines for a node. The service engine is probed again:
// the instance that works has to know what its kernel can do.
func (e *engines) of(ctx context.Context, c engineConfig) (vxlan.Engine, ingress.Engine, error) {
	if err := e.choose(ctx); err != nil {
		return nil, nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	overlays, err := overlayEngines(c)
	if err != nil {
		return nil, nil, err
	}
	services, err := serviceEngines(c)
	if err != nil {
		return nil, nil, err
	}
	overlay, _ := find(overlays, e.chosen.Overlay) // choose has found both
	service, _ := find(services, e.chosen.Service)
	return overlay, service, service.Probe(ctx)
}

// release ends a choice that running tasks had bound: they have gone, so the
// best of the host can be taken. An error leaves the next choose to try again.
func (e *engines) release(ctx context.Context) error {
	e.mu.Lock()
	bound := e.bound
	if bound {
		e.chosen = vxlan.Pair{}
	}
	e.mu.Unlock()
	if !bound {
		return nil
	}
	return e.choose(ctx)
}

// find is the engine with a name.
func find[E interface{ Name() string }](all []E, name string) (E, bool) {
	for _, e := range all {
		if e.Name() == name {
			return e, true
		}
	}
	var none E
	return none, false
}
