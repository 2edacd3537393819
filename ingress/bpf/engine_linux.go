package bpf

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// Config of an Engine.
type Config struct {
	// Node and Dir are those of the overlay engine's Config.
	Node weft.ID
	Dir  string
	// Cgroup is the folder of the unified tree below which the processes of the
	// node's tasks are (CgroupOf); it is made where it is not. "": service
	// addresses are balanced at the tasks' veths alone.
	Cgroup string
	// Repaired, when set, gets every repair before the Apply returns that
	// made it. It must not block.
	Repaired func(weft.Repair)
}

// Engine is ingress.Engine on the eBPF overlay, for service addresses alone: a
// table with published ports is weft.ErrUnsupported.
type Engine struct {
	dir  string
	spec func() (*ebpf.CollectionSpec, error)
	// kept is what the last Apply let flows lead to; nil before the first.
	// While nothing of it goes, the flows, which grow with traffic, need not
	// be read. Owned by Apply.
	kept keep
	// left is what the last Apply left in the maps, on the overlay's map hooks
	// of this id; nil before the first, and where nothing was left. Owned by
	// Apply.
	left     *tables
	hooks    ebpf.MapID
	sockets  sockets
	repaired func(weft.Repair)
	// whole is the last pass over everything, for those that are not; express
	// counts the latter. Owned by Apply.
	whole   wholePass
	express int
}

var _ ingress.Engine = (*Engine)(nil)

// New returns an engine that has done nothing yet.
func New(cfg Config) (*Engine, error) {
	if cfg.Node == "" || !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("configure service engine ebpf: a node and an absolute folder (got %q) are needed: %w", cfg.Dir, weft.ErrInvalid)
	}
	e := &Engine{dir: overlay.PinDir(cfg.Dir, cfg.Node), spec: sync.OnceValues(loadBalance), repaired: cfg.Repaired}
	e.sockets = sockets{cgroup: cfg.Cgroup, spec: sync.OnceValues(loadSocket), cookies: map[string]netnsCookie{}, patience: releaseAfter}
	if e.repaired == nil {
		e.repaired = func(weft.Repair) {}
	}
	return e, nil
}

// Name implements ingress.Engine.
func (e *Engine) Name() string { return "ebpf" }

// shared are the maps of the overlay that the program uses, own the others.
var (
	shared = []string{overlay.MapHooks, overlay.MapMACs, overlay.MapPorts, overlay.MapNets, overlay.MapCounts}
	own    = []string{balanceMapServices, balanceMapSlots, balanceMapFlows, balanceMapPassing, balanceMapPieces}
)

// pinned are the open maps and the program.
type pinned struct {
	maps map[string]*ebpf.Map
	prog *ebpf.Program
	// made are the maps, and the program, that had to be made.
	made []string
}

func (p *pinned) close() {
	for _, m := range p.maps {
		m.Close()
	}
	if p.prog != nil {
		p.prog.Close()
	}
}

// Apply implements ingress.Engine. A network that the overlay does not have is
// an ingress.NetworkError. The table is kept: it must not be changed afterwards.
func (e *Engine) Apply(ctx context.Context, t ingress.Table) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(t.Published) > 0 {
		return fmt.Errorf("service engine ebpf: published ports are another engine's: %w", weft.ErrUnsupported)
	}
	if e.applyExpress(t) {
		e.express++
		return nil
	}
	e.whole.memory = nil
	start, repaired := time.Now(), e.repaired
	faults := 0
	e.repaired = func(r weft.Repair) { faults++; repaired(r) }
	p, err := e.applyWhole(t)
	e.repaired = repaired
	if p == nil {
		return err
	}
	defer p.close()
	if err == nil && faults == 0 {
		e.note(p, t, start)
	}
	return err
}

// applyWhole reads everything and makes it right. The caller closes p.
func (e *Engine) applyWhole(t ingress.Table) (*pinned, error) {
	if _, err := os.Stat(filepath.Join(e.dir, overlay.MapHooks)); errors.Is(err, fs.ErrNotExist) {
		e.kept, e.left = nil, nil
		return nil, unavailable(t.Networks)
	}
	p, err := e.open()
	if err != nil {
		return nil, err
	}
	hooks := mapID(p.maps[overlay.MapHooks])
	if hooks != e.hooks { // the overlay has made everything anew
		e.left, e.hooks = nil, hooks
	}
	var errs []error
	var there []ingress.Network
	for _, n := range t.Networks {
		if raw, err := p.maps[overlay.MapNets].LookupBytes(n.VNI); err != nil || raw == nil {
			errs = append(errs, errors.Join(unavailable([]ingress.Network{n}), err))
			continue
		}
		there = append(there, n)
	}
	want, keep := plan(there)
	// A network that the overlay does not have at the moment is wanted all the
	// same, and nobody who speaks to its services is to be cut off.
	for _, n := range t.Networks {
		if !slices.ContainsFunc(there, func(h ingress.Network) bool { return h.VNI == n.VNI }) {
			_, missing := plan([]ingress.Network{n})
			maps.Copy(keep, missing)
		}
	}
	if e.sockets.isOn() {
		want.socketTables = planSockets(there, e.sockets.cookie)
		e.sockets.forget(there)
	}
	have, err := p.converge(want)
	if err != nil {
		return p, errors.Join(append(errs, err)...)
	}
	lost := e.count(p, have, want)
	if e.kept == nil || keep.lost(e.kept) {
		if err := p.prune(keep); err != nil {
			return p, errors.Join(append(errs, err)...)
		}
	}
	if e.sockets.isOn() && e.sockets.mayRelease(e.kept, keep, time.Now()) {
		if err := p.release(keep, socketsOf(there)); err != nil {
			return p, errors.Join(append(errs, err)...)
		}
	}
	e.kept = keep
	reason, err := p.hook()
	if err != nil {
		return p, errors.Join(append(errs, err)...)
	}
	if e.left != nil && reason != "" && !lost {
		e.repaired(weft.Repair{Kind: "hook " + wrong, Object: fmt.Sprintf("slot %d of map %s", overlay.HookBalance, overlay.MapHooks), Reason: reason})
	}
	if e.sockets.isOn() {
		reason, err := e.attach(p)
		if err != nil {
			e.left = nil
			return p, errors.Join(append(errs, err)...)
		}
		if e.left != nil && reason != "" && !lost {
			e.repaired(weft.Repair{Kind: "hook " + wrong, Object: "sockets of " + e.sockets.cgroup, Reason: reason})
		}
	}
	e.left = &want
	return p, errors.Join(errs...)
}

// count tells what others have damaged. What a lost pin held is on its account,
// and all pins together are one object.
func (e *Engine) count(p *pinned, have, want tables) (lost bool) {
	switch {
	case e.left == nil:
	case len(p.made) > e.ownMaps():
		e.repaired(weft.Repair{Kind: "map " + missing, Object: filepath.Join(e.dir, "balance"), Reason: reasonGone})
	case len(p.made) > 0:
		for _, name := range p.made {
			kind := "map"
			if name == balanceProgBalance {
				if kind = "program"; len(p.made) > 1 {
					continue // made for the map's sake
				}
			}
			e.repaired(weft.Repair{Kind: kind + " " + missing, Object: kind + " " + name, Reason: "its pin was gone or of another object"})
		}
	default:
		for _, r := range damage(*e.left, have, want) {
			e.repaired(r)
		}
	}
	return len(p.made) > 0
}

// ownMaps is how many maps are this engine's.
func (e *Engine) ownMaps() int {
	if e.sockets.isOn() {
		return len(own) + len(ownSockets)
	}
	return len(own)
}

// mapID is 0 for a map that cannot be asked.
func mapID(m *ebpf.Map) ebpf.MapID {
	info, err := m.Info()
	if err != nil {
		return 0
	}
	id, _ := info.ID()
	return id
}

func unavailable(networks []ingress.Network) error {
	var errs []error
	for _, n := range networks {
		errs = append(errs, &ingress.NetworkError{VNI: n.VNI, Err: fmt.Errorf("apply service addresses: the overlay engine ebpf does not have the network: %w", weft.ErrUnavailable)})
	}
	return errors.Join(errs...)
}

// open opens the pins, and makes those of ours that are not there or do not fit.
func (e *Engine) open() (*pinned, error) {
	spec, err := e.spec()
	if err != nil {
		return nil, fmt.Errorf("read balancer program: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(e.dir, "balance"), 0o700); err != nil {
		return nil, fmt.Errorf("make folder of pins: %w", err)
	}
	p := &pinned{maps: map[string]*ebpf.Map{}}
	if err := e.openMaps(spec, p); err != nil {
		p.close()
		return nil, err
	}
	if err := e.openProgram(spec, p); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (e *Engine) openMaps(spec *ebpf.CollectionSpec, p *pinned) error {
	for _, name := range shared {
		m, err := ebpf.LoadPinnedMap(filepath.Join(e.dir, name), nil)
		if err != nil {
			return fmt.Errorf("open the overlay's map %s: %w", name, err)
		}
		p.maps[name] = m
	}
	all, mine := slices.Clone(own), spec.Maps
	if e.sockets.isOn() {
		s, err := e.sockets.spec()
		if err != nil {
			return fmt.Errorf("read socket programs: %w", err)
		}
		mine = maps.Clone(mine)
		for _, name := range ownSockets {
			all, mine[name] = append(all, name), s.Maps[name]
		}
	}
	for _, name := range all {
		m, made, err := openMap(name, mine[name], filepath.Join(e.dir, "balance", name))
		if err != nil {
			return err
		}
		if p.maps[name] = m; made {
			p.made = append(p.made, name)
		}
	}
	return nil
}

// openMap adopts the map that is pinned at path if it is what spec asks for, else
// makes and pins one.
func openMap(name string, spec *ebpf.MapSpec, path string) (m *ebpf.Map, made bool, err error) {
	m, err = ebpf.LoadPinnedMap(path, nil)
	if err == nil && spec.Compatible(m) == nil {
		return m, false, nil
	}
	if err == nil {
		m.Close()
	}
	if m, err = ebpf.NewMap(spec); err != nil {
		return nil, false, fmt.Errorf("make map %s: %w", name, err)
	}
	if err := repin(m.Pin, path); err != nil {
		m.Close()
		return nil, false, fmt.Errorf("pin map %s: %w", name, err)
	}
	return m, true, nil
}

// openProgram adopts the pinned program of this build if it reads these very
// maps; else it makes one. Those of other builds lose their pins: the slot in
// hooks holds what runs.
func (e *Engine) openProgram(spec *ebpf.CollectionSpec, p *pinned) error {
	sum := sha256.Sum256(_BalanceBytes)
	name := balanceProgBalance + "-" + hex.EncodeToString(sum[:8])
	path := filepath.Join(e.dir, "balance", name)
	if prog, err := ebpf.LoadPinnedProgram(path, nil); err == nil {
		if p.isRead(prog) {
			p.prog = prog
			return nil
		}
		prog.Close()
	}
	replace := maps.Clone(p.maps)
	maps.DeleteFunc(replace, func(name string, _ *ebpf.Map) bool { return spec.Maps[name] == nil })
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		return fmt.Errorf("load balancer program: %w", err)
	}
	defer coll.Close()
	p.prog, p.made = coll.DetachProgram(balanceProgBalance), append(p.made, balanceProgBalance)
	pins, err := filepath.Glob(filepath.Join(e.dir, "balance", balanceProgBalance+"-*"))
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	for _, old := range pins {
		if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove pin %s: %w", old, err)
		}
	}
	if err := p.prog.Pin(path); err != nil {
		return fmt.Errorf("pin balancer program: %w", err)
	}
	return nil
}

// isRead reports whether the program at the veth reads all of these maps.
func (p *pinned) isRead(prog *ebpf.Program) bool {
	return p.reads(prog, overlay.MapHooks, overlay.MapPorts, overlay.MapCounts, balanceMapServices, balanceMapSlots, balanceMapFlows, balanceMapPassing, balanceMapPieces)
}

// reads reports whether a program reads these maps of p.
func (p *pinned) reads(prog *ebpf.Program, names ...string) bool {
	info, err := prog.Info()
	if err != nil {
		return false
	}
	used, _ := info.MapIDs()
	for _, name := range names {
		mi, err := p.maps[name].Info()
		if err != nil {
			return false
		}
		if id, ok := mi.ID(); !ok || !slices.Contains(used, id) {
			return false
		}
	}
	return true
}

func repin(pin func(string) error, path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return pin(path)
}

// hook puts the program into the overlay's slot, unless it is there, and says
// what was there; "" is the program.
func (p *pinned) hook() (was string, err error) {
	info, err := p.prog.Info()
	if err != nil {
		return "", fmt.Errorf("read balancer program: %w", err)
	}
	want, _ := info.ID()
	var have ebpf.ProgramID
	if err := p.maps[overlay.MapHooks].Lookup(overlay.HookBalance, &have); err == nil && have == want {
		return "", nil
	}
	if err := p.maps[overlay.MapHooks].Put(overlay.HookBalance, p.prog); err != nil {
		return "", fmt.Errorf("hook balancer program: %w", err)
	}
	if have != 0 {
		return "it had another program", nil
	}
	return "it was empty", nil
}

// Stats implements ingress.Engine: published ports are counted by whoever has
// them, so the map is empty.
func (e *Engine) Stats(ctx context.Context) (ingress.Stats, error) {
	return ingress.Stats{Published: map[ingress.PortKey]uint64{}}, ctx.Err()
}

// Close implements ingress.Engine.
func (e *Engine) Close(ctx context.Context) error {
	e.kept, e.left, e.whole = nil, nil, wholePass{}
	if err := e.detach(); err != nil {
		return err
	}
	if m, err := ebpf.LoadPinnedMap(filepath.Join(e.dir, overlay.MapHooks), nil); err == nil {
		err = m.Delete(overlay.HookBalance)
		m.Close()
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("unhook balancer program: %w", err)
		}
	}
	if err := os.RemoveAll(filepath.Join(e.dir, "balance")); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// Probe loads the program and sends it one packet for a service. An error wraps
// weft.ErrUnsupported and names what is missing. It touches no pin.
func (e *Engine) Probe(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	spec, err := e.spec()
	if err != nil {
		return fmt.Errorf("read balancer program: %w", err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return fmt.Errorf("service engine ebpf: load the balancer program: %w: %w", weft.ErrUnsupported, err)
	}
	defer coll.Close()
	vip := netip.MustParseAddr("192.0.2.9")
	backend := ingress.Backend{Task: "t", MAC: []byte{2, 0, 0, 0, 0, 1}}
	want, _ := plan([]ingress.Network{{VNI: probeVNI, Services: []ingress.Service{{VIP: vip, Backends: []ingress.Backend{backend}}}}})
	p := &pinned{maps: maps.Clone(coll.Maps)}
	if err := errors.Join(p.write(tables{}, want), overlay.ProbePort(coll.Maps[overlay.MapPorts], probeVNI)); err != nil {
		return fmt.Errorf("service engine ebpf: write maps: %w: %w", weft.ErrUnsupported, err)
	}
	if _, _, err := coll.Programs[balanceProgBalance].Test(probePacket(vip)); err != nil {
		return fmt.Errorf("service engine ebpf: run the balancer program: %w: %w", weft.ErrUnsupported, err)
	}
	flows, err := overlay.Dump[flowKey, overlay.MACValue](coll.Maps[balanceMapPassing])
	if err != nil || len(flows) != 1 {
		return fmt.Errorf("service engine ebpf: balance a packet: %d flows: %w", len(flows), errors.Join(weft.ErrUnsupported, err))
	}
	for _, v := range flows {
		if v.MAC != vxlan.MACOf(backend.MAC) {
			return fmt.Errorf("service engine ebpf: balance a packet: it went to %s: %w", v.MAC.HardwareAddr(), weft.ErrUnsupported)
		}
	}
	e.sockets.lacks = ""
	if e.sockets.cgroup != "" {
		if err := e.sockets.probe(); err != nil {
			e.sockets.lacks = err.Error()
		}
	}
	return nil
}

const probeVNI = 1

// probePacket is a datagram to a service.
func probePacket(vip netip.Addr) []byte {
	b := make([]byte, 14+28+32)
	copy(b[12:], "\x08\x00\x45")
	b[17], b[22], b[23] = 60, 64, 17
	copy(b[26:], "\x0a\x00\x00\x01")
	copy(b[30:], vip.AsSlice())
	copy(b[34:], strings.Repeat("\x12\x34", 2))
	return b
}
