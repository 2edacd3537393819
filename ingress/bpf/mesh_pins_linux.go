package bpf

import (
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

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// meshPins are the open maps and programs of the mesh.
type meshPins struct {
	maps  map[string]*ebpf.Map
	progs map[string]*ebpf.Program
	ids   map[string]ebpf.ProgramID
	// made are the maps, and the programs, that had to be made.
	madeMaps, madeProgs []string
}

func (p *meshPins) close() {
	for _, m := range p.maps {
		m.Close()
	}
	for _, g := range p.progs {
		g.Close()
	}
}

// open opens the pins, and makes those that are not there or do not fit.
func (m *Mesh) open() (*meshPins, error) {
	spec, err := m.spec()
	if err != nil {
		return nil, fmt.Errorf("read mesh programs: %w", err)
	}
	for _, dir := range []string{m.path("progs"), m.path("links")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make folder of pins: %w", err)
		}
	}
	p := &meshPins{maps: map[string]*ebpf.Map{}, progs: map[string]*ebpf.Program{}, ids: map[string]ebpf.ProgramID{}}
	if err := m.openMaps(spec, p); err != nil {
		p.close()
		return nil, err
	}
	if err := m.openPrograms(spec, p); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (m *Mesh) openMaps(spec *ebpf.CollectionSpec, p *meshPins) error {
	for _, name := range meshShared {
		o, err := ebpf.LoadPinnedMap(filepath.Join(m.dir, name), nil)
		if err != nil {
			return fmt.Errorf("open the overlay's map %s: %w", name, err)
		}
		p.maps[name] = o
	}
	for _, name := range meshOwn {
		o, made, err := openMap(name, spec.Maps[name], m.path(name))
		if err != nil {
			return err
		}
		if p.maps[name] = o; made {
			p.madeMaps = append(p.madeMaps, name)
		}
	}
	return nil
}

// openPrograms adopts the pinned programs of this build if they read these very
// maps; else it makes all of them. Those of other builds lose their pins, and run
// on until their links are given the new ones.
func (m *Mesh) openPrograms(spec *ebpf.CollectionSpec, p *meshPins) error {
	sum := sha256.Sum256(_MeshBytes)
	build := "-" + hex.EncodeToString(sum[:8])
	for _, name := range meshProgs {
		g, err := ebpf.LoadPinnedProgram(m.path("progs", name+build), nil)
		if err != nil {
			continue
		}
		if p.isRead(spec.Programs[name], g) {
			p.progs[name] = g
			continue
		}
		g.Close()
	}
	if len(p.progs) < len(meshProgs) {
		if err := m.makePrograms(spec, p, build); err != nil {
			return err
		}
	}
	for name, g := range p.progs {
		info, err := g.Info()
		if err != nil {
			return fmt.Errorf("read program %s: %w", name, err)
		}
		p.ids[name], _ = info.ID()
	}
	return nil
}

func (m *Mesh) makePrograms(spec *ebpf.CollectionSpec, p *meshPins, build string) error {
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: p.maps})
	if err != nil {
		return fmt.Errorf("load mesh programs: %w", err)
	}
	defer coll.Close()
	old, err := os.ReadDir(m.path("progs"))
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	for _, f := range old {
		if err := os.Remove(m.path("progs", f.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove pin %s: %w", f.Name(), err)
		}
	}
	for _, name := range meshProgs {
		if g := p.progs[name]; g != nil {
			g.Close()
		} else {
			p.madeProgs = append(p.madeProgs, name)
		}
		p.progs[name] = coll.DetachProgram(name)
		if err := p.progs[name].Pin(m.path("progs", name+build)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return nil
}

// isRead reports whether a program reads the maps of p that its source names.
func (p *meshPins) isRead(spec *ebpf.ProgramSpec, g *ebpf.Program) bool {
	info, err := g.Info()
	if err != nil {
		return false
	}
	used, _ := info.MapIDs()
	for i := range spec.Instructions {
		o := p.maps[spec.Instructions[i].Reference()]
		if o != nil && !slices.Contains(used, mapID(o)) {
			return false
		}
	}
	return true
}

// converge makes maps and links equal to want. A process that is new takes no
// port away: want gets those that are there.
func (m *Mesh) converge(p *meshPins, want *meshLeft, isNew bool) error {
	lost := m.countPins(p)
	words, err := overlay.Dump[uint32, uint64](p.maps[meshMapPublished])
	if err != nil {
		return err
	}
	var entry entryValue
	if err := p.maps[meshMapEntry].Lookup(uint32(0), &entry); err != nil {
		return fmt.Errorf("read map %s: %w", meshMapEntry, err)
	}
	reaches, err := overlay.Dump[reachKey, hopValue](p.maps[meshMapReaches])
	if err != nil {
		return err
	}
	if m.left != nil && !lost {
		m.countMaps(meshLeft{bits: words, entry: entry, reaches: reaches}, *want)
	}
	if isNew {
		for k, v := range words {
			if v != 0 {
				want.bits[k] |= v
			}
		}
	}
	for k, v := range words {
		if v != 0 && want.bits[k] == 0 {
			want.bits[k] = 0 // written below, and not kept
		}
	}
	if err := add(p.maps[meshMapPublished], words, want.bits); err != nil {
		return err
	}
	maps.DeleteFunc(want.bits, func(_ uint32, v uint64) bool { return v == 0 })
	if entry != want.entry {
		if err := p.maps[meshMapEntry].Put(uint32(0), want.entry); err != nil {
			return fmt.Errorf("write map %s: %w", meshMapEntry, err)
		}
	}
	if err := errors.Join(add(p.maps[meshMapReaches], reaches, want.reaches), del(p.maps[meshMapReaches], reaches, want.reaches)); err != nil {
		return err
	}
	return m.attach(p, want.hooks, lost)
}

// attach makes the links equal to hooks, and takes off all others.
func (m *Mesh) attach(p *meshPins, hooks map[string]meshHook, lost bool) error {
	for pin, h := range hooks {
		reason, err := m.hook(p, pin, h)
		if err != nil {
			return err
		}
		if reason != "" && m.left != nil && !lost && m.left.hooks[pin] == h {
			m.repaired(weft.Repair{Kind: "hook " + wrong, Object: fmt.Sprintf("program %s at link %d", h.prog, h.ifindex), Reason: reason})
		}
	}
	entries, err := os.ReadDir(m.path("links"))
	if err != nil {
		return fmt.Errorf("list pinned links: %w", err)
	}
	for _, f := range entries {
		if _, ok := hooks[f.Name()]; ok {
			continue
		}
		if err := os.Remove(m.path("links", f.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove link %s: %w", f.Name(), err)
		}
	}
	return nil
}

// hook attaches a program unless it is, and says what was there instead; "" is
// the program, of whichever build.
func (m *Mesh) hook(p *meshPins, pin string, h meshHook) (was string, err error) {
	path := m.path("links", pin)
	was = reasonGone
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			return "", fmt.Errorf("read link %s: %w", pin, err)
		}
		tcx := info.TCX()
		switch {
		case tcx == nil || int(tcx.Ifindex) != h.ifindex || ebpf.AttachType(tcx.AttachType) != h.at:
			was = "it was detached"
		case info.Program == p.ids[h.prog]:
			return "", nil
		default:
			if err := l.Update(p.progs[h.prog]); err != nil {
				return "", fmt.Errorf("replace program %s at link %d: %w", h.prog, h.ifindex, err)
			}
			return "it had another program", nil
		}
	}
	l, err := overlay.AttachByTCX(h.ifindex, p.progs[h.prog], h.at)
	if err != nil {
		return "", fmt.Errorf("attach program %s to link %d: %w", h.prog, h.ifindex, err)
	}
	defer l.Close()
	if err := repin(l.Pin, path); err != nil {
		return "", fmt.Errorf("pin link of program %s at link %d: %w", h.prog, h.ifindex, err)
	}
	return was, nil
}

// countPins tells which pins others have damaged. What hangs on them is on their
// account, and all together are one object.
func (m *Mesh) countPins(p *meshPins) (lost bool) {
	if m.left == nil || len(p.madeMaps)+len(p.madeProgs) == 0 {
		return false
	}
	if len(p.madeMaps) == len(meshOwn) {
		m.repaired(weft.Repair{Kind: "map " + missing, Object: m.path(), Reason: reasonGone})
		return true
	}
	kind, names := "map", p.madeMaps
	if len(names) == 0 {
		kind, names = "program", p.madeProgs
	}
	for _, name := range names {
		m.repaired(weft.Repair{Kind: kind + " " + missing, Object: kind + " " + name, Reason: "its pin was gone or of another object"})
	}
	return true
}

// countMaps tells what others have written into the maps: what is neither as it
// was left nor as it is wanted.
func (m *Mesh) countMaps(have, want meshLeft) {
	if e := have.entry; e != m.left.entry && e != want.entry {
		m.repaired(weft.Repair{Kind: "entry " + wrong, Object: "the leg in map " + meshMapEntry, Reason: fmt.Sprintf("it was link %d of network %d", e.Leg, e.VNI)})
	}
	for k, v := range have.bits {
		if bad := (v ^ m.left.bits[k]) & (v ^ want.bits[k]); bad != 0 {
			m.repaired(weft.Repair{Kind: "published ports " + wrong, Object: "map " + meshMapPublished, Reason: fmt.Sprintf("bits %x of word %d were not as they were left", bad, k)})
			break
		}
	}
	for k := range joined(have.reaches, m.left.reaches) {
		h, l, w := have.reaches[k], m.left.reaches[k], want.reaches[k]
		if h != l && h != w {
			m.repaired(weft.Repair{Kind: "routes " + wrong, Object: "map " + meshMapReaches, Reason: fmt.Sprintf("one by link %d was not as it was left", k.Link&^family6)})
			break
		}
	}
}

// joined has the keys of both.
func joined[K comparable, V any](a, b map[K]V) map[K]V {
	out := maps.Clone(a)
	maps.Copy(out, b)
	return out
}

// dumpTries bounds how often a dump that changes interrupted is begun anew.
const dumpTries = 4

func complete[T any](list func() ([]T, error)) ([]T, error) {
	got, err := list()
	for i := 1; errors.Is(err, netlink.ErrDumpInterrupted) && i < dumpTries; i++ {
		got, err = list()
	}
	return got, err
}

// outside are the indexes of the links by which clients come.
func outside(links []netlink.Link, addrs []netlink.Addr) []int {
	at := map[int][]netip.Addr{}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			at[a.LinkIndex] = append(at[a.LinkIndex], ip.Unmap())
		}
	}
	var out []int
	for _, l := range links {
		a := l.Attrs()
		h := hostLink{Index: a.Index, Name: a.Name, Alias: a.Alias, IsEthernet: a.EncapType == "ether", HasMaster: a.MasterIndex != 0, Addrs: at[a.Index]}
		if h.isOutside() {
			out = append(out, a.Index)
		}
	}
	return out
}
