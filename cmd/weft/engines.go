package main

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	balance "github.com/weftnet/weft/ingress/bpf"
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
	// EBPF: the eBPF engines may be chosen. As long as they are not the
	// default (vxlan/bpf/DESIGN.md), that is only when a flag names one.
	EBPF     bool
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
	if !c.EBPF {
		return []vxlan.Engine{bridge}, nil
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
	if !c.EBPF {
		return []ingress.Engine{n}, nil
	}
	ebpf, err := balance.New(balance.Config{Node: c.Node, Dir: c.BPFDir, Repaired: c.Repaired})
	if err != nil {
		return nil, err
	}
	// Published ports are nftables' on every overlay: one engine, its own
	// instance, as the two have different networks.
	host := nft.New(c.NetNSDir)
	host.Repaired = c.Repaired
	return []ingress.Engine{ingress.Split{Services: ebpf, Published: host}, n}, nil
}

// engines chooses this host's engines once, by what its kernel can do, and
// makes them for a node. Safe for concurrent use.
type engines struct {
	forced vxlan.Pair
	probe  engineConfig // Node is this installation: nothing of it outlives a probe
	log    *slog.Logger

	// mu guards: chosen, reasons. It is held while engines are probed: two
	// probes would meet in one scratch namespace.
	mu      sync.Mutex
	chosen  vxlan.Pair // zero until choose has succeeded
	reasons []weft.EngineChoice
}

func newEngines(cfg daemonConfig, local weft.ID, log *slog.Logger) *engines {
	return &engines{
		forced: vxlan.Pair{Overlay: cfg.OverlayEngine, Service: cfg.ServiceEngine}, log: log,
		probe: engineConfig{Node: local, Log: log}.in(cfg),
	}
}

// in completes c with what the daemon's configuration says.
func (c engineConfig) in(cfg daemonConfig) engineConfig {
	c.NetNSDir, c.BPFDir = netnsDir(cfg.ExecRoot), filepath.Join(cfg.ExecRoot, "bpf")
	c.EBPF = cfg.OverlayEngine == ebpfEngine || cfg.ServiceEngine == ebpfEngine
	return c
}

// ebpfEngine is the name of both eBPF engines.
const ebpfEngine = "ebpf"

// netnsDir is where namespaces are named.
func netnsDir(execRoot string) string { return filepath.Join(execRoot, "netns") }

// choose probes every engine of this build and takes the best pair. Once it has
// succeeded it does nothing; an error is that of vxlan.Choose.
func (e *engines) choose(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.chosen != (vxlan.Pair{}) {
		return nil
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
		for _, x := range overlays {
			err := x.Probe(ctx)
			o = append(o, vxlan.Candidate{Name: x.Name(), Err: err, Note: overlayNote(x)})
		}
		return nil
	})
	for _, x := range services {
		err := x.Probe(ctx)
		s = append(s, vxlan.Candidate{Name: x.Name(), Err: err, Note: serviceNote(x)})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	before := e.reasons
	e.chosen, e.reasons, err = vxlan.Choose(o, s, e.forced)
	if err == nil || before == nil { // not with each retry
		for _, r := range e.reasons {
			e.log.Info("engine judged", "kind", r.Kind, weft.KeyEngine, r.Engine, "chosen", r.Chosen, "reason", r.Reason)
		}
	}
	return err
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
	overlay, service := named(overlays, e.chosen.Overlay), named(services, e.chosen.Service)
	return overlay, service, service.Probe(ctx)
}

// named is the engine with a name that is among them.
func named[E interface{ Name() string }](all []E, name string) E {
	i := 0
	for all[i].Name() != name {
		i++
	}
	return all[i]
}
