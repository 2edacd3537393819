package linux

import (
	"context"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// expressFor is how long after a pass over everything changes may be made without
// another one. Longer saves work in a storm of changes; what somebody else breaks
// in the meantime is seen that much later. Our own choice: with the five seconds
// of the agent's timer it stays below the ten of the promise.
const expressFor = 2 * time.Second

// express makes a change of a few entries, which it reads first: if one is not as
// it was left, or if anything else speaks against it, it reports false and a pass
// over everything follows.
func (k *Kernel) express(ctx context.Context, want vxlan.State) bool {
	if k.whole.IsZero() || time.Since(k.whole) > expressFor || k.cfg.fail != nil || ctx.Err() != nil {
		return false
	}
	ops, was, ok := k.audit.Delta(want)
	if !ok {
		return false
	}
	lanes := make(map[uint32]*lane, len(was.Networks))
	for vni := range was.Networks {
		l, err := k.openLane(vni)
		if err != nil {
			return false
		}
		defer l.shut()
		lanes[vni] = l
	}
	for _, op := range ops {
		lanes[op.VNI].ops = append(lanes[op.VNI].ops, op)
	}
	for vni, l := range lanes {
		if !l.isAsLeft(vxlan.Derive(was.Networks[vni])) {
			return false
		}
	}
	for _, l := range lanes {
		var all []write
		for _, op := range l.ops {
			all = append(all, l.writes(op)...)
		}
		if l.write(all) != nil {
			k.audit.Unsure(ops)
			return false
		}
	}
	k.audit.Left(want)
	return true
}

// lane is a network of which a few entries change.
type lane struct {
	socket
	devices
	ops []vxlan.Op
}

// openLane finds a network's namespace and devices. Devices that do not do as they
// should are for a pass over everything.
func (k *Kernel) openLane(vni uint32) (*lane, error) {
	ns, err := netns.Open(k.path(vni))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	l := &lane{}
	err = ns.Do(func() (err error) {
		l.socket, err = openSocket()
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := l.lookUp(vni); err != nil {
		l.shut()
		return nil, err
	}
	return l, nil
}

func (l *lane) lookUp(vni uint32) error {
	answers, err := l.ask([]*nl.NetlinkRequest{l.askLink(weft.BridgeName(vni)), l.askLink(weft.VXLANName(vni))})
	if err != nil {
		return err
	}
	bridge, err := answers[0].link()
	if err != nil {
		return err
	}
	tunnel, err := answers[1].link()
	if err != nil {
		return err
	}
	if !bridge.isUp || !tunnel.isUp || tunnel.master != bridge.index {
		return weft.ErrConflict
	}
	l.bridge, l.tunnel = bridge.index, tunnel.index
	return nil
}

// isAsLeft reports whether all that the operations change is as it was left. A
// kernel that cannot tell one entry is none that says so (Linux before 5.0).
func (l *lane) isAsLeft(left vxlan.Tables) bool {
	var reqs []*nl.NetlinkRequest
	var looks []func(found []*netlink.Neigh) bool
	for _, op := range l.ops {
		at := len(reqs)
		switch op.Kind {
		case vxlan.OpSetFDB, vxlan.OpDelFDB:
			way, there := left.FDB[vxlan.MACOf(op.MAC)]
			reqs = append(reqs, l.askEntry(l.tunnel, netlink.NTF_MASTER, op.MAC), l.askEntry(l.tunnel, netlink.NTF_SELF, op.MAC))
			looks = append(looks, func(found []*netlink.Neigh) bool { return l.hasFDB(found[at], found[at+1], way, there) })
		case vxlan.OpSetNeigh, vxlan.OpDelNeigh:
			mac, there := left.Neigh[op.Addr]
			reqs = append(reqs, l.askNeigh(l.bridge, op.Addr.Unmap().AsSlice()))
			looks = append(looks, func(found []*netlink.Neigh) bool { return hasNeigh(found[at], mac, there) })
		default:
			return false
		}
	}
	answers, err := l.ask(reqs)
	if err != nil {
		return false
	}
	found := make([]*netlink.Neigh, len(answers))
	for i, a := range answers {
		if found[i], err = a.neigh(); err != nil {
			return false
		}
	}
	for _, look := range looks {
		if !look(found) {
			return false
		}
	}
	return true
}

// hasFDB looks at both halves: the bridge's entry leads to the tunnel, the tunnel's
// to the VTEP. Entries that are not static are the kernel's own, as for Read.
func (l *lane) hasFDB(onBridge, onTunnel *netlink.Neigh, way vxlan.Way, there bool) bool {
	isStatic := onBridge != nil && onBridge.State == netlink.NUD_NOARP
	if isStatic != there || there && onBridge.LinkIndex != l.tunnel {
		return false
	}
	if !there || !way.VTEP.IsValid() {
		return onTunnel == nil
	}
	return onTunnel != nil && addrOf(onTunnel.IP) == way.VTEP.Unmap()
}

func hasNeigh(now *netlink.Neigh, mac vxlan.MAC, there bool) bool {
	isOurs := now != nil && now.State == netlink.NUD_PERMANENT
	return isOurs == there && (!there || vxlan.MACOf(now.HardwareAddr) == mac)
}
