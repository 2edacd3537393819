package linux

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// Config of a Kernel.
type Config struct {
	// Node owns all objects; it is part of their names and aliases.
	Node weft.ID
	// NetNSDir is the folder of namespace files, e.g. /run/weft/netns. It
	// must be the same over the life of the objects.
	NetNSDir string
	// Log gets what was repaired or refused. Required.
	Log *slog.Logger
	// Repaired, when set, gets every repair before the Apply returns that
	// made it. It must not block.
	Repaired func(weft.Repair)
	// fail, when set, is asked before each operation; tests break off there.
	fail func(vxlan.Op) error
}

// Kernel is the bridge engine. It implements vxlan.Kernel. What is wanted and
// what is there comes from outside; what it keeps is the audit, which tells
// repairs from changes, and when it last saw everything. Owned by Apply.
type Kernel struct {
	cfg   Config
	audit vxlan.Audit
	whole time.Time // of the last pass over everything; zero: it had a fault, or there was none

	lockless atomic.Bool // ports cannot be locked, as the last probe saw
}

var _ vxlan.Kernel = (*Kernel)(nil)

// New checks the configuration. It does no I/O.
func New(cfg Config) (*Kernel, error) {
	if cfg.Node == "" || cfg.NetNSDir == "" || cfg.Log == nil {
		return nil, fmt.Errorf("configure overlay engine: node, namespace folder and log are needed: %w", weft.ErrInvalid)
	}
	return &Kernel{cfg: cfg}, nil
}

// Apply implements vxlan.Kernel.
func (k *Kernel) Apply(ctx context.Context, want vxlan.State) error {
	if k.express(ctx, want) {
		return nil
	}
	k.whole = time.Time{}
	have, err := k.Read(ctx)
	if err != nil {
		return err
	}
	host, err := netns.Current()
	if err != nil {
		return err
	}
	defer host.Close()
	w := &writer{k: k, host: host, nets: make(map[uint32]*hidden)}
	defer w.close()
	repairs, err := k.audit.Apply(ctx, have, want, w.do)
	for _, r := range repairs {
		if k.cfg.Repaired != nil {
			k.cfg.Repaired(r)
		}
	}
	if err == nil {
		k.whole = time.Now()
	}
	return err
}

// hidden is an open hidden namespace.
type hidden struct {
	ns   *netns.Handle
	conn *conn
	devices
}

// devices are those that a network's entries are about.
type devices struct {
	// bridge and tunnel are link indexes, 0 until looked up.
	bridge, tunnel int
	// isUplink: tunnel is an encrypted network's uplink, no VXLAN device.
	isUplink bool
}

func (h *hidden) close() {
	h.conn.close()
	h.ns.Close() // nothing was written through it
}

func (k *Kernel) open(vni uint32) (*hidden, error) {
	ns, err := netns.Open(k.path(vni))
	if err != nil {
		return nil, err
	}
	c, err := dialAt(ns)
	if err != nil {
		ns.Close()
		return nil, err
	}
	return &hidden{ns: ns, conn: c}, nil
}

// cryptPath is the file of the namespace with the WireGuard devices, which
// vxlan/wg makes and removes.
func (k *Kernel) cryptPath() string { return k.cfg.NetNSDir + "/" + weft.CryptNetNS(k.cfg.Node) }

// path is the hidden namespace's file.
func (k *Kernel) path(vni uint32) string {
	return k.cfg.NetNSDir + "/" + weft.OverlayNetNS(k.cfg.Node, vni)
}

// vnis lists the networks that have a namespace file, complete or not.
func (k *Kernel) vnis() ([]uint32, error) {
	prefix := weft.NetNSPrefix(k.cfg.Node) + "n"
	names, err := netns.List(k.cfg.NetNSDir, prefix)
	if err != nil {
		return nil, err
	}
	var out []uint32
	for _, name := range names {
		vni, err := strconv.ParseUint(strings.TrimPrefix(name, prefix), 10, 32)
		if err == nil && name == weft.OverlayNetNS(k.cfg.Node, uint32(vni)) {
			out = append(out, uint32(vni))
		}
	}
	return out, nil
}
