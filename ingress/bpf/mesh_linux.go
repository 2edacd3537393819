package bpf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	overlay "github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/netns"
)

// MeshConfig of a Mesh.
type MeshConfig struct {
	// Node and Dir are those of the overlay engine's Config.
	Node weft.ID
	Dir  string
	// Table is the engine that lets flows in, chooses their backends and has all
	// that does not go past the host.
	Table ingress.Engine
	// Repaired, when set, gets every repair before the Apply returns that
	// made it. It must not block.
	Repaired func(weft.Repair)
}

// Mesh is ingress.Engine for published ports on the eBPF overlay: another
// engine's, and programs by which the flows that this one has let in go past the
// host. Where those cannot be had, it is the other engine alone.
type Mesh struct {
	dir      string
	table    ingress.Engine
	spec     func() (*ebpf.CollectionSpec, error)
	repaired func(weft.Repair)
	// lacks is why everything goes through the host; found out by Probe.
	lacks string
	// patience is how long this process takes nothing away: at first it may know
	// less than the one before it. since is its first pass.
	patience time.Duration
	since    time.Time
	// kept is what the last pass let flows lead to; nil until the process is
	// patient no more. left is what the last pass left; nil before the first, and
	// where nothing was left. Owned by Apply.
	kept *leads
	left *meshLeft
}

var _ ingress.Engine = (*Mesh)(nil)

// meshLeft is what a pass left.
type meshLeft struct {
	bits    portBits
	entry   entryValue
	reaches map[reachKey]hopValue
	hooks   map[string]meshHook
	maps    ebpf.MapID // the overlay's: another one is another folder
}

// meshHook is a program at a link.
type meshHook struct {
	ifindex int
	at      ebpf.AttachType
	prog    string
}

// NewMesh returns an engine that has done nothing yet.
func NewMesh(cfg MeshConfig) (*Mesh, error) {
	if cfg.Node == "" || !filepath.IsAbs(cfg.Dir) || cfg.Table == nil {
		return nil, fmt.Errorf("configure published ports in eBPF: a node, an absolute folder (got %q) and an engine that lets flows in are needed: %w", cfg.Dir, weft.ErrInvalid)
	}
	m := &Mesh{dir: overlay.PinDir(cfg.Dir, cfg.Node), table: cfg.Table, spec: sync.OnceValues(loadMeshPrograms), repaired: cfg.Repaired, patience: releaseAfter}
	if m.repaired == nil {
		m.repaired = func(weft.Repair) {}
	}
	return m, nil
}

// meshShared are the overlay's maps that the programs read, meshOwn the others.
var (
	meshShared = []string{overlay.MapMACs, overlay.MapCounts}
	meshOwn    = append([]string{meshMapEntry, meshMapPublished, meshMapReaches, meshMapFragments, meshMapFresh, meshMapSlow, meshMapPassings}, meshFlows...)
	meshFlows  = []string{meshMapRequests, meshMapAnswers, meshMapRequestsUdp, meshMapAnswersUdp}
	meshProgs  = []string{meshProgFromOutside, meshProgFromLeg, meshProgToLeg}
)

// loadMeshPrograms leaves out the maps of the overlay's that no program of these
// reads.
func loadMeshPrograms() (*ebpf.CollectionSpec, error) {
	spec, err := loadMesh()
	if err != nil {
		return nil, err
	}
	for _, name := range []string{overlay.MapHooks, overlay.MapPorts, overlay.MapNets, meshMapEps} {
		delete(spec.Maps, name)
	}
	return spec, nil
}

// Name implements ingress.Engine.
func (m *Mesh) Name() string { return m.table.Name() }

// Note says what this engine does otherwise on this host.
func (m *Mesh) Note() string {
	var notes []string
	if n, ok := m.table.(interface{ Note() string }); ok && n.Note() != "" {
		notes = append(notes, n.Note())
	}
	if m.lacks != "" {
		notes = append(notes, "published ports go through the host's stack: "+m.lacks)
	}
	return strings.Join(notes, "; ")
}

// Unanswered are the published ports that the other engine does not answer.
func (m *Mesh) Unanswered(t ingress.Table) []ingress.Unanswered {
	return ingress.UnansweredBy(m.table, t)
}

// Probe implements ingress.Engine: only the other engine must work.
func (m *Mesh) Probe(ctx context.Context) error {
	if err := m.table.Probe(ctx); err != nil {
		return err
	}
	m.lacks = ""
	if err := m.probe(); err != nil {
		m.lacks = err.Error()
	}
	return ctx.Err()
}

// probe loads the programs and attaches them in a scratch namespace.
func (m *Mesh) probe() error {
	spec, err := m.spec()
	if err != nil {
		return fmt.Errorf("read mesh programs: %w", err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return fmt.Errorf("load mesh programs: %w", err)
	}
	defer coll.Close()
	dir, err := os.MkdirTemp("", "weft-probe")
	if err != nil {
		return fmt.Errorf("make scratch folder: %w", err)
	}
	defer os.RemoveAll(dir)
	path, err := netns.Create(dir, "probe")
	if err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	err = netns.Do(path, func() error {
		const loopback = 1 // of every namespace
		for name, at := range map[string]ebpf.AttachType{meshProgFromOutside: ebpf.AttachTCXIngress, meshProgFromLeg: ebpf.AttachTCXIngress, meshProgToLeg: ebpf.AttachTCXEgress} {
			l, err := overlay.AttachByTCX(loopback, coll.Programs[name], at)
			if err != nil {
				return fmt.Errorf("attach program %s by tcx: %w", name, err)
			}
			if err := l.Close(); err != nil {
				return fmt.Errorf("detach program %s: %w", name, err)
			}
		}
		return nil
	})
	return errors.Join(err, netns.Remove(path))
}

// Stats implements ingress.Engine: what begins a flow is the other engine's to
// count.
func (m *Mesh) Stats(ctx context.Context) (ingress.Stats, error) { return m.table.Stats(ctx) }

// Slow is how many packets went through the host's stack since the maps were made:
// those that left by its leg on the ingress network, and those that came by it. What
// goes past the host is not counted. Zero where nothing is published.
func (m *Mesh) Slow() (requests, answers uint64, err error) {
	o, err := ebpf.LoadPinnedMap(m.path(meshMapSlow), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("open counters: %w", err)
	}
	defer o.Close()
	var sums [2]uint64
	for i := range sums {
		var each []uint64
		if err := o.Lookup(uint32(i), &each); err != nil {
			return 0, 0, fmt.Errorf("read counter %d of map %s: %w", i, meshMapSlow, err)
		}
		for _, n := range each {
			sums[i] += n
		}
	}
	return sums[0], sums[1], nil
}

// Close implements ingress.Engine.
func (m *Mesh) Close(ctx context.Context) error {
	return errors.Join(m.remove(), m.table.Close(ctx))
}

// Apply implements ingress.Engine: first the other engine's table, as who is let
// in by it is let past here.
func (m *Mesh) Apply(ctx context.Context, t ingress.Table) error {
	err := m.table.Apply(ctx, t)
	if ctx.Err() != nil || m.lacks != "" {
		return err
	}
	if mine := m.apply(t, time.Now()); mine != nil {
		err = errors.Join(err, fmt.Errorf("apply flows of published ports: %w", mine))
	}
	return err
}

func (m *Mesh) path(parts ...string) string {
	return filepath.Join(append([]string{m.dir, "mesh"}, parts...)...)
}

// remove takes everything away: a link without a pin goes with it.
func (m *Mesh) remove() error {
	m.left, m.kept = nil, nil
	if err := os.RemoveAll(m.path()); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

func (m *Mesh) apply(t ingress.Table, now time.Time) error {
	if m.since.IsZero() {
		m.since = now
	}
	isNew := now.Sub(m.since) < m.patience
	if _, err := os.Stat(filepath.Join(m.dir, overlay.MapPorts)); errors.Is(err, fs.ErrNotExist) {
		m.left, m.kept = nil, nil // no eBPF overlay, or no network of it
		return nil
	}
	bits, leads := planMesh(t.Published)
	if len(bits) == 0 || t.Ingress.Link == "" {
		if isNew {
			return nil
		}
		return m.remove()
	}
	leg, err := netlink.LinkByName(t.Ingress.Link)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil // the other engine has said so
	}
	if err != nil {
		return fmt.Errorf("look up link %s: %w", t.Ingress.Link, err)
	}
	entry, err := m.entryAt(leg)
	if err != nil {
		return err
	}
	want := meshLeft{bits: bits, entry: entry}
	if err := want.look(leg.Attrs().Index); err != nil {
		return err
	}
	p, err := m.open()
	if err != nil {
		return err
	}
	defer p.close()
	want.maps = mapID(p.maps[overlay.MapMACs])
	if m.left != nil && m.left.maps != want.maps {
		m.left = nil // the overlay has made everything anew
	}
	if err := m.converge(p, &want, isNew); err != nil {
		m.left = nil
		return err
	}
	m.left = &want
	if isNew {
		return nil
	}
	if m.kept == nil || leads.lost(*m.kept) {
		if err := p.prune(leads); err != nil {
			return err
		}
	}
	m.kept = &leads
	return nil
}

// entryAt is what the overlay knows of the leg.
func (m *Mesh) entryAt(leg netlink.Link) (entryValue, error) {
	ports, err := ebpf.LoadPinnedMap(filepath.Join(m.dir, overlay.MapPorts), nil)
	if err != nil {
		return entryValue{}, fmt.Errorf("open the overlay's map %s: %w", overlay.MapPorts, err)
	}
	defer ports.Close()
	var v overlay.PortValue
	if err := ports.Lookup(uint32(leg.Attrs().ParentIndex), &v); err != nil {
		return entryValue{}, fmt.Errorf("the overlay engine ebpf does not have the port of %s: %w: %w", leg.Attrs().Name, weft.ErrUnavailable, err)
	}
	return entryValue{
		Leg: uint32(leg.Attrs().Index), VNI: v.VNI, Tunnel: v.Tunnel, UDP: v.UDP, MAC: v.MAC, VTEP: v.VTEP, MTU: uint16(leg.Attrs().MTU),
	}, nil
}

// look finds what has to be attached, by the name of the pin, and whom the links
// lead to.
func (w *meshLeft) look(leg int) error {
	links, err := complete(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list the host's addresses: %w", err)
	}
	routes, err := complete(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	w.hooks = map[string]meshHook{
		"leg-in":  {leg, ebpf.AttachTCXIngress, meshProgFromLeg},
		"leg-out": {leg, ebpf.AttachTCXEgress, meshProgToLeg},
	}
	at := outside(links, addrs)
	for _, l := range at {
		w.hooks[fmt.Sprintf("outside-%d", l)] = meshHook{l, ebpf.AttachTCXIngress, meshProgFromOutside}
	}
	w.reaches = reachesOf(at, hostRoutes(links, routes))
	return nil
}

// hostRoutes are the routes that lead by links.
func hostRoutes(links []netlink.Link, routes []netlink.Route) []hostRoute {
	mtus := map[int]int{}
	for _, l := range links {
		mtus[l.Attrs().Index] = l.Attrs().MTU
	}
	var out []hostRoute
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST {
			continue
		}
		dst := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Family == netlink.FAMILY_V6 {
			dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		if r.Dst != nil {
			ip, ok := netip.AddrFromSlice(r.Dst.IP)
			bits, _ := r.Dst.Mask.Size()
			if !ok {
				continue
			}
			dst = netip.PrefixFrom(ip, bits)
		}
		hops := r.MultiPath
		if len(hops) == 0 {
			hops = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via}}
		}
		for _, hop := range hops {
			h := hostRoute{Link: hop.LinkIndex, Dst: dst, MTU: mtus[hop.LinkIndex], IsMain: r.Table == unix.RT_TABLE_MAIN}
			if r.MTU > 0 {
				h.MTU = min(h.MTU, r.MTU)
			}
			gw := hop.Gw
			if via, ok := hop.Via.(*netlink.Via); ok && via != nil {
				gw = via.Addr
			}
			if ip, ok := netip.AddrFromSlice(gw); ok && !ip.IsUnspecified() {
				h.Via = ip.Unmap()
			}
			out = append(out, h)
		}
	}
	return out
}

// prune ends the flows that lead to what takes no packets any more.
func (p *meshPins) prune(l leads) error {
	return ingress.EndFlows(ingress.PacketsPass, func() (ended int, err error) {
		for _, name := range meshFlows {
			isAnswer := name == meshMapAnswers || name == meshMapAnswersUdp
			n, err := endFlows(p.maps[name], func(key endsValue, to turnValue) bool { return l.allows(flowOf(key, to, isAnswer)) })
			if ended += n; err != nil {
				return ended, err
			}
		}
		return ended, nil
	}, 1)
}
