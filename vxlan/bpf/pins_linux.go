package bpf

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Pins of one node, below Config.Dir:
//
//	<node>/v<abi>/<map>               the maps, by their names in c/overlay.h
//	<node>/v<abi>/progs/<prog>-<hash> the programs of one build
//	<node>/v<abi>/links/<name>        a port's veth, or "u<ifindex>" of a device
//	<node>/v<abi>/netkit/<name>       a port's netkit
//	<node>/v<abi>/balance/…           those of package ingress/bpf
//	<node>/qdiscs/<ifindex>           an empty folder: that link's qdisc is ours
//
// A pin's name has no dot: the kernel keeps those for itself.

var mapNames = []string{overlayMapMacs, overlayMapEps, overlayMapPorts, overlayMapNets, overlayMapCounts, overlayMapHooks, overlayMapNatives, overlayMapEchoes, overlayMapEpoch}

var progNames = []string{overlayProgFromTask, overlayProgForward, overlayProgFromUnderlay, overlayProgFromNative, overlayProgFromTunnel}

// build is the programs of this binary for this kernel.
type build struct {
	spec *ebpf.CollectionSpec
	hash string // names the pins: another build's programs are replaced
	// attach is AttachTCX or AttachClsact.
	attach string
	// ports is PortsNetkit or PortsVeth; noNetkit is why it is not the former,
	// "" unless the kernel was asked.
	ports, noNetkit string
}

// newBuild parses the object file and asks the kernel what may be switched on,
// and unless attach and ports say it, how programs are attached and what ports
// are made of.
func newBuild(attach, ports string) (build, error) {
	spec, err := loadOverlay()
	if err != nil {
		return build{}, fmt.Errorf("read overlay programs: %w", err)
	}
	probe, err := ebpf.NewProgram(spec.Programs[overlayProgProbeSwitch])
	if err != nil {
		return build{}, unsupported("load a classifier program", err)
	}
	defer probe.Close()
	canSwitch, err := canSwitchFamily(probe)
	if err != nil {
		return build{}, err
	}
	if attach == "" {
		if attach, err = chooseAttach(probe); err != nil {
			return build{}, err
		}
	}
	why := ""
	if ports == "" {
		back, err := ebpf.NewProgram(spec.Programs[overlayProgProbeNetkit])
		if err != nil {
			return build{}, unsupported("load a classifier program", err)
		}
		defer back.Close()
		ports, why = choosePorts(func() error { return tryNetkit(back) })
	}
	v := uint8(0)
	if canSwitch {
		v = 1
	}
	if err := spec.Variables[overlayVarCanSwitchFamily].Set(v); err != nil {
		return build{}, fmt.Errorf("configure overlay programs: %w", err)
	}
	delete(spec.Programs, overlayProgProbeSwitch)
	delete(spec.Programs, overlayProgProbeNetkit)
	sum := sha256.Sum256(append([]byte{v}, _OverlayBytes...))
	return build{spec: spec, hash: hex.EncodeToString(sum[:8]), attach: attach, ports: ports, noNetkit: why}, nil
}

// objects are the open pins. A nil map or program is not there, or not usable.
type objects struct {
	maps  map[string]*ebpf.Map
	progs map[string]*ebpf.Program
	ids   map[string]ebpf.ProgramID
	// isHooked: a balancer can give packets back.
	isHooked bool
}

func (o *objects) close() {
	for _, m := range o.maps {
		m.Close()
	}
	for _, p := range o.progs {
		p.Close()
	}
}

// complete reports whether everything is there and belongs together.
func (o *objects) complete() bool {
	return len(o.maps) == len(mapNames) && len(o.progs) == len(progNames)
}

func (e *Engine) nodeDir() string { return filepath.Join(e.cfg.Dir, string(e.cfg.Node)) }

func (e *Engine) path(parts ...string) string {
	return filepath.Join(append([]string{PinDir(e.cfg.Dir, e.cfg.Node)}, parts...)...)
}

func (b build) progPin(name string) string { return name + "-" + b.hash }

func isAbsent(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }

// isScarce reports an error that says nothing about the object: it may be well.
func isScarce(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EPERM)
}

// isMounted reports whether Dir is a bpffs.
func (e *Engine) isMounted() bool {
	var st unix.Statfs_t
	return unix.Statfs(e.cfg.Dir, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

func (e *Engine) mount() error {
	if e.isMounted() {
		return nil
	}
	if err := os.MkdirAll(e.cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("make folder of the bpffs: %w", err)
	}
	if err := unix.Mount("bpf", e.cfg.Dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount bpffs on %s: %w", e.cfg.Dir, err)
	}
	return nil
}

// openPins opens what is pinned and sound. It makes nothing.
func (e *Engine) openPins(b build) (*objects, error) {
	o := &objects{maps: map[string]*ebpf.Map{}, progs: map[string]*ebpf.Program{}, ids: map[string]ebpf.ProgramID{}}
	ids := make(map[string]ebpf.MapID, len(mapNames))
	for _, name := range mapNames {
		m, err := ebpf.LoadPinnedMap(e.path(name), nil)
		if isScarce(err) {
			o.close()
			return nil, fmt.Errorf("open map %s: %w", name, err)
		}
		if err != nil {
			continue // absent, or no map at all
		}
		info, err := m.Info()
		if id, ok := infoID(info); err == nil && ok && b.spec.Maps[name].Compatible(m) == nil {
			o.maps[name], ids[name] = m, id
			continue
		}
		m.Close()
	}
	for _, name := range progNames {
		p, err := ebpf.LoadPinnedProgram(e.path("progs", b.progPin(name)), nil)
		if isScarce(err) {
			o.close()
			return nil, fmt.Errorf("open program %s: %w", name, err)
		}
		if err != nil {
			continue
		}
		if id, ok := usesMaps(b.spec.Programs[name], p, ids); ok {
			o.progs[name], o.ids[name] = p, id
			continue
		}
		p.Close()
	}
	if o.complete() {
		var id ebpf.ProgramID
		err := o.maps[overlayMapHooks].Lookup(uint32(hookForward), &id)
		o.isHooked = err == nil && id == o.ids[overlayProgForward]
	}
	return o, nil
}

func infoID(i *ebpf.MapInfo) (ebpf.MapID, bool) {
	if i == nil {
		return 0, false
	}
	return i.ID()
}

// usesMaps reports whether a program reads the very maps that are pinned: one
// that was loaded before somebody removed a pin has the old ones.
func usesMaps(spec *ebpf.ProgramSpec, p *ebpf.Program, ids map[string]ebpf.MapID) (ebpf.ProgramID, bool) {
	info, err := p.Info()
	if err != nil {
		return 0, false
	}
	used, ok := info.MapIDs()
	if !ok {
		return 0, false
	}
	for i := range spec.Instructions {
		ref := spec.Instructions[i].Reference()
		if !slices.Contains(mapNames, ref) {
			continue
		}
		if id, there := ids[ref]; !there || !slices.Contains(used, id) {
			return 0, false
		}
	}
	return info.ID()
}

// makePins opens what is pinned and makes the rest. Maps that are sound keep
// their contents; if a program must be made, all of this build are. lost is what
// others have damaged.
func (e *Engine) makePins(b build) (o *objects, lost []weft.Repair, err error) {
	if err := e.mount(); err != nil {
		return nil, nil, err
	}
	for _, dir := range []string{e.path("progs"), e.path("links")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, nil, fmt.Errorf("make folder of pins: %w", err)
		}
	}
	if o, err = e.openPins(b); err != nil {
		return nil, nil, err
	}
	if e.isMade {
		lost = e.findLost(b, o)
	}
	if !o.complete() {
		err = e.makeObjects(b, o)
	}
	if err == nil && !o.isHooked {
		if err = o.maps[overlayMapHooks].Put(uint32(hookForward), o.progs[overlayProgForward]); err != nil {
			err = fmt.Errorf("hook program %s: %w", overlayProgForward, err)
		}
		o.isHooked = err == nil
	}
	if err != nil {
		o.close()
		return nil, nil, err
	}
	return o, lost, nil
}

// The first halves of kinds of repairs that are the pins' own.
const (
	classMap     = "map"
	classProgram = "program"
	classHook    = "hook"
)

// findLost says what of the pins is not there or not usable, one object for each
// damage: without any map the folder itself, without a map not its programs.
func (e *Engine) findLost(b build, o *objects) []weft.Repair {
	if len(o.maps) == 0 {
		return []weft.Repair{{Kind: classMap + " missing", Object: e.path(), Reason: vxlan.FaultGone}}
	}
	var lost []weft.Repair
	look := func(class, name, path string) {
		r := weft.Repair{Kind: class + " missing", Object: class + " " + name, Reason: vxlan.FaultGone}
		if _, err := os.Stat(path); err == nil {
			r.Kind, r.Reason = class+" wrong", "its pin was of another object"
		}
		lost = append(lost, r)
	}
	for _, name := range mapNames {
		if o.maps[name] == nil {
			look(classMap, name, e.path(name))
		}
	}
	if len(lost) > 0 {
		return lost
	}
	for _, name := range progNames {
		if o.progs[name] == nil {
			look(classProgram, name, e.path("progs", b.progPin(name)))
		}
	}
	if len(lost) == 0 && !o.isHooked {
		lost = append(lost, weft.Repair{Kind: classHook + " wrong", Object: fmt.Sprintf("slot %d of map %s", hookForward, overlayMapHooks),
			Reason: "it did not have the program " + overlayProgForward})
	}
	return lost
}

func (e *Engine) makeObjects(b build, o *objects) error {
	for _, name := range mapNames {
		if o.maps[name] != nil {
			continue
		}
		m, err := ebpf.NewMap(b.spec.Maps[name])
		if err != nil {
			return fmt.Errorf("make map %s: %w", name, err)
		}
		o.maps[name] = m
		if err := repin(m.Pin, e.path(name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(b.spec, ebpf.CollectionOptions{MapReplacements: o.maps})
	if err != nil {
		return fmt.Errorf("load overlay programs: %w", err)
	}
	defer coll.Close()
	for _, name := range progNames {
		if old := o.progs[name]; old != nil {
			old.Close()
		}
		p := coll.DetachProgram(name)
		o.progs[name] = p
		info, err := p.Info()
		if err != nil {
			return fmt.Errorf("read program %s: %w", name, err)
		}
		o.ids[name], _ = info.ID()
		if err := repin(p.Pin, e.path("progs", b.progPin(name))); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return nil
}

// repin pins where something unusable may be.
func repin(pin func(string) error, path string) error {
	if err := os.Remove(path); err != nil && !isAbsent(err) {
		return err
	}
	return pin(path)
}

// tidy removes what other builds left: the pins of their programs, which no link
// needs, and the folders of other layouts. Without a network everything goes.
func (e *Engine) tidy(b build, s *snapshot) error {
	if len(s.nets) == 0 {
		return e.removeAll()
	}
	return errors.Join(
		removeOthers(e.nodeDir(), func(name string) bool {
			return name == fmt.Sprintf("v%d", abiVersion) || name == filepath.Base(e.qdiscDir())
		}),
		removeOthers(e.path("progs"), func(name string) bool { return strings.HasSuffix(name, "-"+b.hash) }))
}

func removeOthers(dir string, keep func(string) bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	var errs []error
	for _, f := range entries {
		if !keep(f.Name()) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, f.Name())))
		}
	}
	return errors.Join(errs...)
}

// removeAll takes this node's pins away, and the mount if it was the last.
func (e *Engine) removeAll() error {
	e.isMade = false
	if err := os.RemoveAll(e.nodeDir()); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	rest, err := os.ReadDir(e.cfg.Dir)
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	// The kernel puts files of its own into a fresh bpffs; folders are nodes'.
	if slices.ContainsFunc(rest, fs.DirEntry.IsDir) {
		return nil
	}
	if err := unix.Unmount(e.cfg.Dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount bpffs %s: %w", e.cfg.Dir, err)
	}
	if err := os.Remove(e.cfg.Dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) && !isAbsent(err) {
		return fmt.Errorf("remove folder of the bpffs: %w", err)
	}
	return nil
}

// canSwitchFamily tests whether decapsulation may change an IPv4 packet into an
// IPv6 one (BPF_F_ADJ_ROOM_DECAP_L3_IPV6, Linux 6.3). A kernel that runs no
// program at all is weft.ErrUnsupported.
func canSwitchFamily(p *ebpf.Program) (bool, error) {
	packet := make([]byte, 200)
	copy(packet[12:], []byte{0x08, 0x00, 0x45}) // IPv4
	ret, err := p.Run(&ebpf.RunOptions{Data: packet})
	if err != nil {
		return false, unsupported("run a classifier program", err)
	}
	return ret == 0, nil
}

func unsupported(what string, err error) error {
	return fmt.Errorf("overlay engine ebpf: %s: %w: %w", what, weft.ErrUnsupported, err)
}
