package bpf

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	overlay "github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/netns"
)

// socketAttach is where each program of c/socket.c belongs.
var socketAttach = map[string]ebpf.AttachType{
	socketProgConnect4: ebpf.AttachCGroupInet4Connect, socketProgConnect6: ebpf.AttachCGroupInet6Connect,
	socketProgSendmsg4: ebpf.AttachCGroupUDP4Sendmsg, socketProgSendmsg6: ebpf.AttachCGroupUDP6Sendmsg,
	socketProgRecvmsg4: ebpf.AttachCGroupUDP4Recvmsg, socketProgRecvmsg6: ebpf.AttachCGroupUDP6Recvmsg,
	socketProgGetpeername4: ebpf.AttachCgroupInet4GetPeername, socketProgGetpeername6: ebpf.AttachCgroupInet6GetPeername,
}

// ownSockets are the maps of those programs alone; rings they have in common with
// the program at the veth.
var ownSockets = []string{socketMapTasks, socketMapBackends, socketMapConnected, socketMapAsked, socketMapChosen}

const cgroupRoot = "/sys/fs/cgroup"

// CgroupOf is the folder of the unified cgroup tree under which the processes of a
// node's tasks are: the node's own where there is only that tree (weft.CgroupPath),
// and the top where containers are placed in the older ones and leave their place
// in this one to chance. A host without the tree is weft.ErrUnsupported.
func CgroupOf(node weft.ID) (string, error) {
	for _, dir := range []string{cgroupRoot, filepath.Join(cgroupRoot, "unified")} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		if dir == cgroupRoot {
			dir = filepath.Dir(filepath.Join(dir, weft.CgroupPath(node, "t")))
		}
		return dir, nil
	}
	return "", fmt.Errorf("no unified cgroup tree is mounted at %s: %w", cgroupRoot, weft.ErrUnsupported)
}

// sockets is what an engine keeps for the programs of sockets. Owned by Apply.
type sockets struct {
	cgroup string // "" = there are none
	// lacks is why Probe found that there can be none.
	lacks string
	spec  func() (*ebpf.CollectionSpec, error)
	// cookies of tasks' namespaces, by path.
	cookies map[string]netnsCookie
	// sweepAt is when this process has known the cluster for long enough to end
	// connections; zero: that time has come, and what had been lost is released.
	sweepAt time.Time
	// patience is releaseAfter, but for tests.
	patience time.Duration
}

// netnsCookie is the kernel's number of the namespace that a file leads to. The
// inode of one that has gone is given to the next: the time tells them apart.
type netnsCookie struct {
	inode  uint64
	made   unix.Timespec
	cookie uint64
}

func (s *sockets) isOn() bool { return s.cgroup != "" && s.lacks == "" }

// cookie reads the number of a task's namespace, once for each namespace. One that
// is not there has none: its task is about to go.
func (s *sockets) cookie(path string) (uint64, bool) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		delete(s.cookies, path)
		return 0, false
	}
	if c, ok := s.cookies[path]; ok && c.inode == st.Ino && c.made == st.Ctim {
		return c.cookie, true
	}
	c := netnsCookie{inode: st.Ino, made: st.Ctim}
	err := netns.Do(path, func() (err error) { c.cookie, err = currentCookie(); return err })
	if err != nil {
		return 0, false
	}
	s.cookies[path] = c
	return c.cookie, true
}

// forget drops the cookies of tasks that are on none of these networks.
func (s *sockets) forget(networks []ingress.Network) {
	paths := socketsOf(networks)
	maps.DeleteFunc(s.cookies, func(path string, _ netnsCookie) bool {
		_, is := slices.BinarySearch(paths, path)
		return !is
	})
}

// currentCookie is that of the calling thread's namespace.
func currentCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd)
	c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("read the cookie of a network namespace: %w", err)
	}
	return c, nil
}

// load makes the programs, on the maps that are given.
func (s *sockets) load(maps map[string]*ebpf.Map) (*ebpf.Collection, error) {
	spec, err := s.spec()
	if err != nil {
		return nil, fmt.Errorf("read socket programs: %w", err)
	}
	spec = spec.Copy()
	used := append(slices.Clone(ownSockets), socketMapServices, socketMapSlots)
	for name := range spec.Maps {
		if !slices.Contains(used, name) {
			delete(spec.Maps, name) // the overlay's, which no program of these reads
		}
	}
	replace := map[string]*ebpf.Map{}
	for _, name := range used {
		if maps[name] != nil {
			replace[name] = maps[name]
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		return nil, fmt.Errorf("load socket programs: %w", err)
	}
	return coll, nil
}

// probe loads the programs, attaches them to a cgroup of its own, and removes that.
func (s *sockets) probe() error {
	if _, err := currentCookie(); err != nil {
		return err
	}
	coll, err := s.load(nil)
	if err != nil {
		return err
	}
	defer coll.Close()
	root := cgroupRoot
	if !strings.HasPrefix(s.cgroup, root+"/weft/") {
		root = s.cgroup
	}
	dir, err := os.MkdirTemp(root, "weft-probe-")
	if err != nil {
		return fmt.Errorf("make a cgroup: %w", err)
	}
	var errs []error
	for name, at := range socketAttach {
		l, err := link.AttachCgroup(link.CgroupOptions{Path: dir, Attach: at, Program: coll.Programs[name]})
		if err != nil {
			errs = append(errs, fmt.Errorf("attach %s to a cgroup: %w", name, err))
			continue
		}
		errs = append(errs, l.Close())
	}
	return errors.Join(append(errs, os.Remove(dir))...)
}

// attach has this build's programs run on the maps of p at every socket below the
// cgroup, and says what was not so before; "" = everything was.
func (e *Engine) attach(p *pinned) (reason string, err error) {
	dir := filepath.Join(e.dir, "balance", "sockets")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make folder of pins: %w", err)
	}
	if err := os.MkdirAll(e.sockets.cgroup, 0o755); err != nil {
		return "", fmt.Errorf("make cgroup: %w", err)
	}
	sum := sha256.Sum256(_SocketBytes)
	build := hex.EncodeToString(sum[:8])
	var coll *ebpf.Collection
	defer func() {
		if coll != nil {
			coll.Close()
		}
	}()
	for name, at := range socketAttach {
		progPin, linkPin := filepath.Join(dir, name+"-"+build), filepath.Join(dir, name)
		prog, err := ebpf.LoadPinnedProgram(progPin, nil)
		if err == nil && !p.reads(prog, socketMapTasks) {
			prog.Close()
			err = fs.ErrNotExist
		}
		if err != nil {
			if coll == nil {
				if coll, err = e.sockets.load(p.maps); err != nil {
					return "", err
				}
			}
			prog = coll.DetachProgram(name)
			if err := repinProgram(prog, dir, name, progPin); err != nil {
				prog.Close()
				return "", err
			}
		}
		was, err := attachOne(prog, at, e.sockets.cgroup, linkPin)
		prog.Close()
		if err != nil {
			return "", fmt.Errorf("attach %s to %s: %w", name, e.sockets.cgroup, err)
		}
		if was != "" {
			reason = name + " " + was
		}
	}
	return reason, nil
}

// repinProgram pins a program in the place of those of other builds.
func repinProgram(prog *ebpf.Program, dir, name, pin string) error {
	old, err := filepath.Glob(filepath.Join(dir, name+"-*"))
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	for _, o := range old {
		if err := os.Remove(o); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove pin %s: %w", o, err)
		}
	}
	if err := prog.Pin(pin); err != nil {
		return fmt.Errorf("pin socket program: %w", err)
	}
	return nil
}

// attachOne has prog run where the pinned link is, without a gap, or makes the
// link. It says what was there; "" = the program.
func attachOne(prog *ebpf.Program, at ebpf.AttachType, cgroup, pin string) (was string, err error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer l.Close()
		if isOf(l, prog, cgroup) {
			return "", nil
		}
		if sameCgroup(l, cgroup) && l.Update(prog) == nil {
			return "had another program", nil
		}
		if err := os.Remove(pin); err != nil {
			return "", fmt.Errorf("remove pin: %w", err)
		}
	} else if rerr := os.Remove(pin); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		return "", fmt.Errorf("remove pin: %w", rerr)
	}
	made, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: at, Program: prog})
	if err != nil {
		return "", err
	}
	defer made.Close()
	if err := made.Pin(pin); err != nil {
		return "", fmt.Errorf("pin link: %w", err)
	}
	return "was not attached", nil
}

func isOf(l link.Link, prog *ebpf.Program, cgroup string) bool {
	li, err := l.Info()
	if err != nil {
		return false
	}
	pi, err := prog.Info()
	if err != nil {
		return false
	}
	id, ok := pi.ID()
	return ok && li.Program == id && sameCgroup(l, cgroup)
}

// sameCgroup: the link's cgroup is the one that has the name now. One that was
// removed has id 0.
func sameCgroup(l link.Link, cgroup string) bool {
	li, err := l.Info()
	if err != nil || li.Cgroup() == nil {
		return false
	}
	id, err := cgroupID(cgroup)
	return err == nil && li.Cgroup().CgroupId == id
}

// cgroupID is the number of a cgroup: its file handle (name_to_handle_at(2)).
func cgroupID(path string) (uint64, error) {
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, path, 0)
	if err != nil {
		return 0, fmt.Errorf("read the id of cgroup %s: %w", path, err)
	}
	if b := h.Bytes(); len(b) == 8 {
		return binary.NativeEndian.Uint64(b), nil
	}
	return 0, fmt.Errorf("read the id of cgroup %s: a handle of %d bytes", path, len(h.Bytes()))
}

// releaseAfter is how long a new process ends no connection: what it knows of other
// nodes at first may be less than what the one before it knew. Our own choice: some
// times what gossip takes to tell a new member everything.
const releaseAfter = 5 * time.Second

// mayRelease reports whether connections to what is not in now are to be ended;
// before is what the last pass kept, nil before the first.
func (s *sockets) mayRelease(before, now keep, at time.Time) bool {
	if before == nil {
		s.sweepAt = at.Add(s.patience)
		return false
	}
	return s.mayEnd(func() bool { return now.lost(before) }, at)
}

// mayEnd is mayRelease of a pass that is not the first, if lost says whether
// anything is gone.
func (s *sockets) mayEnd(lost func() bool, at time.Time) bool {
	switch {
	case s.sweepAt.IsZero():
		return lost()
	case at.Before(s.sweepAt):
		return false
	}
	s.sweepAt = time.Time{} // what was lost meanwhile, and before this process
	return true
}

// release ends the connections of sockets that lead to what takes no packets any
// more: who waits for a backend that is gone learns it at once. paths are the
// namespaces of the tasks.
func (p *pinned) release(k keep, paths []string) error {
	connected, err := overlay.Dump[uint64, joinedValue](p.maps[socketMapConnected])
	if err != nil {
		return err
	}
	asked, err := overlay.Dump[partnerKey, standIn](p.maps[socketMapAsked])
	if err != nil {
		return err
	}
	gone := map[uint64]bool{}
	for cookie, j := range connected {
		if !k.allows(j.Is.service(), j.Is.MAC) {
			gone[cookie] = true
			if err := forget(p.maps[socketMapConnected], cookie); err != nil {
				return err
			}
		}
	}
	for key, s := range asked {
		if !k.allows(s.service(), s.MAC) {
			if err := forget(p.maps[socketMapAsked], key); err != nil {
				return err
			}
		}
	}
	if len(gone) == 0 {
		return nil
	}
	var errs []error
	for _, path := range paths {
		err := netns.Do(path, func() error { return destroy(gone) })
		if err != nil && !errors.Is(err, weft.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// forget deletes what is known of a socket, which may have been pushed out meanwhile.
func forget[K comparable](m *ebpf.Map, key K) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget a socket: %w", err)
	}
	return nil
}

// destroy ends the TCP sockets of the calling thread's namespace with these
// cookies (sock_diag(7), SOCK_DESTROY). A kernel that cannot leaves them to TCP's
// own limits.
func destroy(gone map[uint64]bool) error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		list, err := netlink.SocketDiagTCP(family)
		if err != nil {
			return fmt.Errorf("list sockets: %w", err)
		}
		for _, s := range list {
			cookie := uint64(s.ID.Cookie[0]) | uint64(s.ID.Cookie[1])<<32
			if !gone[cookie] {
				continue
			}
			err := destroySocket(family, s.ID)
			if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) {
				return fmt.Errorf("end the connection to %s: %w", s.ID.Destination, err)
			}
		}
	}
	return nil
}

// diagRequest is struct inet_diag_req_v2 (linux/inet_diag.h) that names one socket.
type diagRequest [56]byte

func (r diagRequest) Len() int          { return len(r) }
func (r diagRequest) Serialize() []byte { return r[:] }

func destroySocket(family uint8, id netlink.SocketID) error {
	const sockDestroy = 21 // SOCK_DESTROY, linux/sock_diag.h
	r := diagRequest{family, unix.IPPROTO_TCP}
	binary.NativeEndian.PutUint32(r[4:], ^uint32(0)) // in any state
	binary.BigEndian.PutUint16(r[8:], id.SourcePort)
	binary.BigEndian.PutUint16(r[10:], id.DestinationPort)
	src, dst := id.Source, id.Destination
	if family == unix.AF_INET {
		src, dst = src.To4(), dst.To4()
	}
	copy(r[12:28], src)
	copy(r[28:44], dst)
	binary.NativeEndian.PutUint32(r[44:], id.Interface)
	binary.NativeEndian.PutUint32(r[48:], id.Cookie[0])
	binary.NativeEndian.PutUint32(r[52:], id.Cookie[1])
	req := nl.NewNetlinkRequest(sockDestroy, unix.NLM_F_ACK)
	req.AddData(r)
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}

// socketsOf are the namespaces of all tasks of these networks.
func socketsOf(networks []ingress.Network) []string {
	var out []string
	for _, n := range networks {
		out = append(out, n.Tasks...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Note says what this host's kernel cannot do.
func (e *Engine) Note() string {
	if e.sockets.lacks != "" {
		return "service addresses cost each packet something, as they cannot be balanced at sockets: " + e.sockets.lacks
	}
	return ""
}

// BalancesSockets reports whether connections of tasks are balanced as they are made, so
// that they come to a backend's own address. Known after Probe.
func (e *Engine) BalancesSockets() bool { return e.sockets.isOn() }

// detach takes the programs of sockets away, and the cgroup if it is the node's own
// and empty.
func (e *Engine) detach() error {
	if e.sockets.cgroup == "" {
		return nil
	}
	dir := filepath.Join(e.dir, "balance", "sockets")
	for name := range socketAttach {
		// The kernel takes its time to let go of a link that nobody has.
		if l, err := link.LoadPinnedLink(filepath.Join(dir, name), nil); err == nil {
			if err := errors.Join(l.Detach(), l.Close()); err != nil {
				return fmt.Errorf("detach %s: %w", name, err)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	if strings.HasPrefix(e.sockets.cgroup, cgroupRoot+"/weft/") {
		err := os.Remove(e.sockets.cgroup)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
	return nil
}
