package bpf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Config of an Engine.
type Config struct {
	// Node owns all objects; it is part of their names and aliases.
	Node weft.ID
	// Dir is the mount point of the engine's own bpffs, e.g. /run/weft/bpf; it
	// is made and mounted when needed. Nodes may share it. It must be the
	// same over the life of the objects, and absolute.
	Dir string
	// NetNSDir is the folder of namespace files, where package wg makes the
	// one of its devices. Without it encrypted networks are refused.
	NetNSDir string
	// Log gets what was refused or left to the kernel's VXLAN device. Required.
	Log *slog.Logger
	// Attach forces how programs are attached: AttachTCX or AttachClsact. "" is
	// the first of them that works on this host.
	Attach string
	// Ports forces what tasks' new ports are made of: PortsNetkit or PortsVeth.
	// "" is netkit where it works on this host. A port that stands stays what
	// it is as long as its task.
	Ports string
	// Repaired, when set, gets every repair before the Apply returns that
	// made it. It must not block.
	Repaired func(weft.Repair)
	// fail, when set, is asked before each operation; tests break off there.
	fail func(vxlan.Op) error
}

// Engine is the eBPF engine. What is wanted comes from outside and what is there
// from the kernel's maps and links; what it keeps is what the kernel can do, and
// the audit, which tells repairs from changes and is owned by Apply.
type Engine struct {
	cfg   Config
	build func() (build, error)
	audit vxlan.Audit
	// isMade: the last Apply of this process left all pins in place. What is
	// not there now, others have removed. Owned by Apply.
	isMade bool
	// ways are the routes that the last Apply has seen. Owned by Apply.
	ways map[[2]netip.Addr]hop
	// last is what the last Apply over everything found. Owned by Apply.
	last lastPass
}

var _ vxlan.Engine = (*Engine)(nil)

// New checks the configuration. It does no I/O.
func New(cfg Config) (*Engine, error) {
	if cfg.Node == "" || cfg.Log == nil || !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("configure overlay engine ebpf: node, log and an absolute folder (got %q) are needed: %w", cfg.Dir, weft.ErrInvalid)
	}
	if strings.ContainsAny(string(cfg.Node), "./") {
		return nil, fmt.Errorf("configure overlay engine ebpf: node id %q cannot be the name of a pin: %w", cfg.Node, weft.ErrInvalid)
	}
	if cfg.Attach != "" && cfg.Attach != AttachTCX && cfg.Attach != AttachClsact {
		return nil, fmt.Errorf("configure overlay engine ebpf: programs can be attached by %s or %s, not %q: %w", AttachTCX, AttachClsact, cfg.Attach, weft.ErrInvalid)
	}
	if cfg.Ports != "" && cfg.Ports != PortsNetkit && cfg.Ports != PortsVeth {
		return nil, fmt.Errorf("configure overlay engine ebpf: ports can be made of %s or %s, not %q: %w", PortsNetkit, PortsVeth, cfg.Ports, weft.ErrInvalid)
	}
	return &Engine{cfg: cfg, build: sync.OnceValues(func() (build, error) { return newBuild(cfg.Attach, cfg.Ports) })}, nil
}

// Name is "ebpf".
func (e *Engine) Name() string { return "ebpf" }

// Read implements vxlan.Kernel. What is there but not as Apply would make it
// is returned with the zero value in the field that is wrong, as vxlan/linux
// does: a network without ID is half made, one without VTEP lacks a program or
// a device, a port without Addr is broken, a peer whose VTEP is :: is sent the
// wrong way.
func (e *Engine) Read(ctx context.Context) (vxlan.State, error) {
	b, err := e.build()
	if err != nil {
		return vxlan.State{}, err
	}
	o, err := e.openPins(b)
	if err != nil {
		return vxlan.State{}, err
	}
	defer o.close()
	s, err := e.look(ctx, b, o)
	if err != nil {
		return vxlan.State{}, err
	}
	defer s.close()
	return s.state(ctx, vxlan.State{})
}

// Apply implements vxlan.Kernel. Without networks nothing stays, neither pins
// nor mount.
func (e *Engine) Apply(ctx context.Context, want vxlan.State) (err error) {
	b, err := e.build()
	if err != nil {
		return err
	}
	if _, err := os.Stat(e.nodeDir()); len(want.Networks) == 0 && isAbsent(err) {
		if left, err := e.hasLeft(); err != nil || !left {
			return errors.Join(err, ctx.Err()) // nothing was ever made
		}
	}
	if ctx.Err() == nil && e.express(want) {
		return nil
	}
	e.last = lastPass{}
	o, lost, err := e.makePins(b)
	if err != nil {
		return err
	}
	e.isMade = true
	defer o.close()
	s, err := e.look(ctx, b, o)
	if err != nil {
		return err
	}
	defer s.close()
	if err := endEpoch(o.maps[overlayMapEpoch]); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, beginEpoch(o.maps[overlayMapEpoch])) }()
	adopted := errors.Join(s.adopt(), s.reroute(e.ways))
	e.ways = s.host.hops // complete when Apply returns
	have, err := s.state(ctx, want)
	if err != nil {
		return err
	}
	w := &writer{snapshot: s, want: want}
	repairs, err := e.audit.Apply(ctx, have, want, w.do)
	var swept error
	if ctx.Err() == nil {
		swept = w.sweep()
	}
	e.report(lost, append(repairs, w.repairs...))
	if ctx.Err() == nil && swept == nil { // until then the pins say what is to be swept
		swept = e.tidy(b, s)
	}
	if err = errors.Join(adopted, err, swept); err == nil && ctx.Err() == nil {
		e.note(o)
	}
	return err
}

// report tells what was repaired. What a lost map held is on its account.
func (e *Engine) report(lost, others []weft.Repair) {
	if e.cfg.Repaired == nil {
		return
	}
	hasMaps := true
	for _, r := range lost {
		e.cfg.Repaired(r)
		hasMaps = hasMaps && !strings.HasPrefix(r.Kind, classMap)
	}
	for _, r := range others {
		if hasMaps {
			e.cfg.Repaired(r)
		}
	}
}

// hasLeft reports whether the host's namespace has anything of this node although
// its bpffs is gone.
func (e *Engine) hasLeft() (bool, error) {
	h, err := lookAtHost()
	if err != nil {
		return false, err
	}
	defer h.close()
	for _, l := range h.byIndex {
		if _, ok := parseAlias(e.cfg.Node, l.Attrs().Alias); ok || e.isTunnel(l) {
			return true, nil
		}
	}
	c := &clsact{e: e, host: h}
	if err := c.load(); err != nil {
		return false, err
	}
	for _, own := range c.seen {
		if len(own) > 0 {
			return true, nil
		}
	}
	return false, nil
}

// Note says what this host's kernel makes the engine do otherwise than it would
// choose; "" = nothing. It may block as long as Probe does.
func (e *Engine) Note() string {
	b, err := e.build()
	if err != nil {
		return ""
	}
	var notes []string
	if b.attach == AttachClsact && e.cfg.Attach == "" {
		notes = append(notes, "its programs are attached by filters of clsact qdiscs, as this kernel has no tcx")
	}
	if b.noNetkit != "" {
		notes = append(notes, "new ports of tasks are veth pairs, as no netkit pair works here ("+b.noNetkit+")")
	}
	return strings.Join(notes, "; ")
}

// Drops reads how many packets were dropped or refused since the maps were
// made, by reason. Without maps it is empty.
func (e *Engine) Drops(ctx context.Context) (map[string]uint64, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m, err := ebpf.LoadPinnedMap(e.path(overlayMapCounts), nil)
	if isAbsent(err) {
		return map[string]uint64{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open counters: %w", err)
	}
	defer m.Close()
	out := make(map[string]uint64, len(reasons))
	for i, name := range reasons {
		var each []uint64
		if err := m.Lookup(uint32(i), &each); err != nil {
			return nil, fmt.Errorf("read counter %q: %w", name, err)
		}
		for _, n := range each {
			out[name] += n
		}
	}
	return out, nil
}
