package bpf

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/linux"
)

// clsact is the attacher of filters: direct-action classifiers of the clsact
// qdisc of a device, or of the ingress qdisc that somebody else has put there.
//
// A filter's name says whose it is. The format outlives the process and carries
// its version; the last word is there if the qdisc is ours, too:
//
//	weft:<node> v1 <program>[ qdisc]
//
// That is also filed as an empty folder <node>/qdiscs/<ifindex> of the bpffs, made
// before the qdisc is: one of the two survives whatever is damaged.
type clsact struct {
	e    *Engine
	o    *objects
	host *host
	// seen has the devices with such a qdisc, and what of it is this node's;
	// nil until it is needed.
	seen map[int][]ownFilter
	// foreign are those with a qdisc that weft does not make.
	foreign map[int]bool
}

// ownFilter is a filter with a name of this node.
type ownFilter struct {
	*netlink.BpfFilter
	prog    string
	isQdisc bool // the qdisc is ours
}

// filterPriority is our own choice: behind those to whom the order matters, who
// take low numbers, and before those to whom it does not: the kernel gives them
// 49152 and below. It gives them what is one less than the first of all, which
// our taking 1 would make 0.
const filterPriority = 30000

// filterHandle is this node's number among filters of that priority: several
// nodes may share a device.
func (e *Engine) filterHandle() uint32 {
	h := fnv.New32a()
	h.Write([]byte(e.cfg.Node))
	return h.Sum32() | 1 // 0 is "any"
}

const filterVersion = "v1"

func (e *Engine) filterName(prog string, isQdisc bool) string {
	name := weft.LinkAlias(e.cfg.Node) + " " + filterVersion + " " + prog
	if isQdisc {
		name += " qdisc"
	}
	return name
}

// own is f if its name says that it is this node's.
func (e *Engine) own(f netlink.Filter) (ownFilter, bool) {
	b, ok := f.(*netlink.BpfFilter)
	if !ok {
		return ownFilter{}, false
	}
	w := strings.Split(b.Name, " ")
	if len(w) < 3 || w[0] != weft.LinkAlias(e.cfg.Node) || w[1] != filterVersion {
		return ownFilter{}, false
	}
	o := ownFilter{BpfFilter: b, prog: w[2], isQdisc: len(w) == 4 && w[3] == "qdisc"}
	return o, b.Name == e.filterName(o.prog, o.isQdisc)
}

// filter is how a hook's filter has to be.
func (e *Engine) filter(h hook, isQdisc bool, fd int) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: h.ifindex, Parent: netlink.HANDLE_MIN_INGRESS,
			Handle: e.filterHandle(), Priority: filterPriority, Protocol: unix.ETH_P_ALL},
		Fd: fd, Name: e.filterName(h.prog, isQdisc), DirectAction: true,
	}
}

// isInPlace reports whether a filter stands where filter puts it.
func (e *Engine) isInPlace(f ownFilter) bool {
	return f.Handle == e.filterHandle() && f.Priority == filterPriority && f.Protocol == unix.ETH_P_ALL &&
		(f.Chain == nil || *f.Chain == 0)
}

func byIndex(ifindex int) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
}

func (h *host) filters(ifindex int, parent uint32) ([]netlink.Filter, error) {
	fs, err := linux.Complete(func() ([]netlink.Filter, error) { return h.conn.FilterList(byIndex(ifindex), parent) })
	if err != nil && !isGone(err) {
		return nil, fmt.Errorf("list filters of link %d: %w", ifindex, err)
	}
	return fs, nil
}

// load reads all devices, once.
func (c *clsact) load() error {
	if c.seen != nil {
		return nil
	}
	qs, err := linux.Complete(func() ([]netlink.Qdisc, error) { return c.host.conn.QdiscList(nil) })
	if err != nil {
		return fmt.Errorf("list qdiscs: %w", err)
	}
	seen := make(map[int][]ownFilter)
	c.foreign = make(map[int]bool)
	for _, q := range qs {
		if q.Attrs().Parent == netlink.HANDLE_CLSACT {
			c.foreign[q.Attrs().LinkIndex] = q.Type() != "clsact"
			if seen[q.Attrs().LinkIndex], err = c.list(q.Attrs().LinkIndex); err != nil {
				return err
			}
		}
	}
	c.seen = seen
	return nil
}

// list reads this node's filters of one device.
func (c *clsact) list(ifindex int) ([]ownFilter, error) {
	fs, err := c.host.filters(ifindex, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return nil, err
	}
	var out []ownFilter
	for _, f := range fs {
		if own, ok := c.e.own(f); ok {
			out = append(out, own)
		}
	}
	return out, nil
}

func (c *clsact) isAttached(h hook) bool {
	if c.load() != nil {
		return false
	}
	for _, f := range c.seen[h.ifindex] {
		if c.e.isInPlace(f) && f.prog == h.prog && f.DirectAction && f.Id != 0 && ebpf.ProgramID(f.Id) == c.o.ids[h.prog] {
			return true
		}
	}
	return false
}

func (c *clsact) attach(h hook) error {
	if err := c.load(); err != nil {
		return err
	}
	if c.isAttached(h) {
		return nil
	}
	ours, err := c.makeQdisc(h.ifindex)
	if err != nil {
		return err
	}
	err = c.host.conn.FilterReplace(c.e.filter(h, ours, c.o.progs[h.prog].FD()))
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("attach program %s to link %d: a filter of another kind or protocol may have priority %d, which is weft's; move it: %w: %w",
			h.prog, h.ifindex, filterPriority, weft.ErrConflict, err)
	}
	if err != nil {
		return fmt.Errorf("attach program %s to link %d: %w", h.prog, h.ifindex, err)
	}
	c.seen[h.ifindex], err = c.list(h.ifindex)
	return err
}

// makeQdisc makes the device's qdisc if it has none, and reports whether it is
// ours.
func (c *clsact) makeQdisc(ifindex int) (ours bool, err error) {
	ours = c.isFiled(ifindex)
	own, exists := c.seen[ifindex]
	if exists {
		for _, f := range own {
			ours = ours || f.isQdisc
		}
		if !ours || c.foreign[ifindex] {
			return false, nil
		}
		return true, c.file(ifindex)
	}
	if err := c.file(ifindex); err != nil {
		return false, err
	}
	err = c.host.conn.QdiscAdd(clsactAt(ifindex))
	if errors.Is(err, unix.EEXIST) { // just now, and by somebody else
		return false, c.unfile(ifindex)
	}
	if err != nil {
		return false, fmt.Errorf("add a clsact qdisc to link %d: %w", ifindex, err)
	}
	c.seen[ifindex] = nil
	return true, nil
}

func clsactAt(ifindex int) netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
}

func (e *Engine) qdiscDir() string { return filepath.Join(e.nodeDir(), "qdiscs") }

func (c *clsact) filed(ifindex int) string {
	return filepath.Join(c.e.qdiscDir(), strconv.Itoa(ifindex))
}

func (c *clsact) isFiled(ifindex int) bool {
	_, err := os.Stat(c.filed(ifindex))
	return err == nil
}

func (c *clsact) file(ifindex int) error {
	if err := os.MkdirAll(c.filed(ifindex), 0o700); err != nil {
		return fmt.Errorf("note whose qdisc link %d has: %w", ifindex, err)
	}
	return nil
}

func (c *clsact) unfile(ifindex int) error {
	if err := os.Remove(c.filed(ifindex)); err != nil && !isAbsent(err) {
		return fmt.Errorf("note that the qdisc of link %d is not ours: %w", ifindex, err)
	}
	return nil
}

func (c *clsact) standing() ([]hook, error) {
	if err := c.load(); err != nil {
		return nil, err
	}
	var out []hook
	for index, own := range c.seen {
		l := c.host.byIndex[index]
		for _, f := range own {
			if l == nil || c.o.ours(ebpf.ProgramID(f.Id)) != f.prog {
				continue
			}
			switch f.prog {
			case overlayProgFromTask:
				out = append(out, portHook(l))
			case overlayProgFromUnderlay, overlayProgFromNative:
				out = append(out, underlayHook(index, f.prog == overlayProgFromNative))
			case overlayProgFromTunnel:
				out = append(out, tunnelHook(index))
			}
		}
	}
	return out, nil
}

// sweep leaves a qdisc to those who have filters on it, whoever made it.
func (c *clsact) sweep(keep map[string]hook) error {
	c.seen = nil
	if err := c.load(); err != nil {
		return err
	}
	needed := make(map[int]hook, len(keep))
	for _, h := range keep {
		needed[h.ifindex] = h
	}
	var errs []error
	for index, own := range c.seen {
		h, isNeeded := needed[index]
		ours := c.isFiled(index)
		for _, f := range own {
			ours = ours || f.isQdisc
			if isNeeded && c.e.isInPlace(f) && f.prog == h.prog {
				continue
			}
			if err := c.host.conn.FilterDel(f.BpfFilter); err != nil && !isGone(err) {
				errs = append(errs, fmt.Errorf("remove filter %q of link %d: %w", f.Name, index, err))
			}
		}
		if ours && !isNeeded {
			errs = append(errs, c.giveBack(index))
		}
	}
	return errors.Join(append(errs, c.sweepFiled())...)
}

// giveBack removes a qdisc of ours that nobody uses.
func (c *clsact) giveBack(ifindex int) error {
	if c.foreign[ifindex] {
		return c.unfile(ifindex)
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		fs, err := c.host.filters(ifindex, parent)
		if err != nil {
			return err
		}
		if len(fs) > 0 {
			return c.unfile(ifindex)
		}
	}
	if err := c.host.conn.QdiscDel(clsactAt(ifindex)); err != nil && !isGone(err) {
		return fmt.Errorf("remove the clsact qdisc of link %d: %w", ifindex, err)
	}
	return c.unfile(ifindex)
}

// sweepFiled forgets qdiscs that are gone, with their device or without.
func (c *clsact) sweepFiled() error {
	entries, err := os.ReadDir(c.e.qdiscDir())
	if isAbsent(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list qdiscs of ours: %w", err)
	}
	var errs []error
	for _, f := range entries {
		index, err := strconv.Atoi(f.Name())
		if _, ok := c.seen[index]; err == nil && !ok {
			errs = append(errs, c.unfile(index))
		}
	}
	return errors.Join(errs...)
}
