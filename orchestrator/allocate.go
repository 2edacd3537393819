package orchestrator

import (
	"errors"
	"net/netip"
	"slices"
	"sync"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/orchestrator/state"
)

// allocator holds the addresses of one term: those in the state and those of
// commands under way. Subnets, VNIs and ports need no memory, they are chosen
// from a view, one edit at a time.
//
// An address is free, held or resting. It goes to rest when the state says so
// and is free again when the state has forgotten that; see rest.go.
type allocator struct {
	// mu guards: all fields. API calls and the leader's loop allocate at
	// the same time.
	mu     sync.Mutex
	spaces map[weft.ID]*space
	// held is what each owner (task, service or node) has.
	held map[weft.ID][]weft.Attachment
}

type space struct {
	net   weft.Network
	addrs *families // held and resting ones are taken
	// resting addresses, with the log index at which they were freed.
	resting map[netip.Addr]uint64
}

func host(a netip.Addr, s weft.Subnet) netip.Prefix { return netip.PrefixFrom(a, s.Prefix.Bits()) }

func newAllocator(v *state.Snapshot) *allocator {
	a := &allocator{spaces: map[weft.ID]*space{}, held: map[weft.ID][]weft.Attachment{}}
	for _, n := range v.Networks() {
		a.spaceLocked(n)
	}
	ingress, hasIngress := v.Ingress()
	for _, n := range v.Nodes() {
		if hasIngress && n.IngressAddr.IsValid() {
			a.keepLocked(n.ID, weft.Attachment{Network: ingress.ID, Addr: n.IngressAddr, Addr6: n.IngressAddr6})
		}
	}
	for _, s := range v.Services() {
		for _, vip := range s.VIPs {
			a.keepLocked(s.ID, weft.Attachment(vip))
		}
	}
	for _, t := range v.Tasks() {
		if t.Status.State.Ended() {
			continue
		}
		for _, at := range t.Attachments {
			a.keepLocked(t.ID, at)
		}
	}
	for id := range a.spaces {
		a.restLocked(v, id)
	}
	return a
}

func (a *allocator) spaceLocked(n weft.Network) *space {
	s, ok := a.spaces[n.ID]
	if !ok {
		s = &space{net: n, addrs: newFamilies(n.Spec), resting: map[netip.Addr]uint64{}}
		a.spaces[n.ID] = s
	}
	return s
}

// keepLocked notes an address that the state says is in use. The state is
// right even if two objects claim one address: the second is then freed with
// the first, and neither is given out before.
func (a *allocator) keepLocked(owner weft.ID, at weft.Attachment) {
	s, ok := a.spaces[at.Network]
	if !ok {
		return // the network is gone, the task has not stopped yet
	}
	if err := s.addrs.take(at); err != nil {
		return
	}
	a.held[owner] = append(a.held[owner], at)
}

// attach chooses addresses on each network for owner: all or none. A network
// without a free address is a *fullError.
func (a *allocator) attach(owner weft.ID, networks []weft.Network) ([]weft.Attachment, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var got []weft.Attachment
	for _, n := range networks {
		s := a.spaceLocked(n)
		at, err := s.addrs.next(n.ID)
		if err != nil {
			for _, g := range got {
				a.spaces[g.Network].addrs.free(g)
			}
			return nil, &fullError{net: n, usage: s.usage()}
		}
		got = append(got, at)
	}
	if len(got) > 0 {
		a.held[owner] = append(a.held[owner], got...)
	}
	return got, nil
}

// release takes from owner what it holds, except the addresses to keep. What
// rests by the view v, which must be newer than the change that took it off its
// owner, is not free yet; what never came into the state is.
func (a *allocator) release(v *state.Snapshot, owner weft.ID, keep ...weft.Attachment) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var left []weft.Attachment
	for _, h := range a.held[owner] {
		if slices.Contains(keep, h) {
			left = append(left, h)
			continue
		}
		s, ok := a.spaces[h.Network]
		if !ok {
			continue
		}
		for _, p := range h.Addrs() {
			addr := p.Addr().Unmap()
			if r, rests := v.RestingAddr(h.Network, addr); rests {
				s.resting[addr] = r.Index
			} else {
				s.addrs.Free(addr)
			}
		}
	}
	if len(left) == 0 {
		delete(a.held, owner)
		return
	}
	a.held[owner] = left
}

// restLocked takes in which addresses of a network rest. It reports whether any
// has become free. What an owner holds is left to release.
func (a *allocator) restLocked(v *state.Snapshot, network weft.ID) (freed bool) {
	s, ok := a.spaces[network]
	if !ok {
		return false
	}
	rests := map[netip.Addr]bool{}
	for _, r := range v.Resting(network) {
		rests[r.Addr] = true
		if _, known := s.resting[r.Addr]; !known && s.addrs.Take(r.Addr) == nil {
			s.resting[r.Addr] = r.Index
		}
	}
	for addr, index := range s.resting {
		// An edit may have laid it down after this view.
		if !rests[addr] && index <= v.Index() {
			s.addrs.Free(addr)
			delete(s.resting, addr)
			freed = true
		}
	}
	return freed
}

// rest is restLocked for all networks of which something changed.
func (a *allocator) rest(v *state.Snapshot, networks map[weft.ID]struct{}) (freed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id := range networks {
		freed = a.restLocked(v, id) || freed
	}
	return freed
}

// follow takes in which networks there are: removed ones lose their space. The
// loop and edits call it, each with a view of its own: one that is missing in a
// view older than itself was not removed.
func (a *allocator) follow(v *state.Snapshot) {
	a.mu.Lock()
	defer a.mu.Unlock()
	exists := map[weft.ID]bool{}
	for _, n := range v.Networks() {
		exists[n.ID] = true
		a.spaceLocked(n)
	}
	for id, s := range a.spaces {
		if !exists[id] && s.net.Meta.Index <= v.Index() {
			delete(a.spaces, id)
		}
	}
}

// pickIngress chooses the subnet of the ingress network: 10.255.0.0/16 if it is
// free and in the pools, else the first free /16 of the pools; a pool that is
// smaller is taken whole.
func pickIngress(c weft.Cluster, used []netip.Prefix) (weft.Subnet, error) {
	prefer := netip.MustParsePrefix("10.255.0.0/16")
	if inPools(prefer, c.AddrPools) && !slices.ContainsFunc(used, prefer.Overlaps) {
		return weft.Subnet{Prefix: prefer, Gateway: prefer.Addr().Next()}, nil
	}
	var errs []error
	for _, pool := range c.AddrPools {
		p, err := ipam.Pools{Prefixes: []netip.Prefix{pool}, MaskLength: max(ingressBits, pool.Bits())}.Pick(used)
		if err == nil {
			return weft.Subnet{Prefix: p, Gateway: p.Addr().Next()}, nil
		}
		errs = append(errs, err)
	}
	return weft.Subnet{}, errors.Join(errs...)
}

func inPools(p netip.Prefix, pools []netip.Prefix) bool {
	for _, q := range pools {
		if q.Bits() <= p.Bits() && q.Overlaps(p) {
			return true
		}
	}
	return false
}

// usedPrefixes is what a new subnet must not overlap, with the name of each.
func usedPrefixes(v *state.Snapshot) []ipam.Named {
	used := []ipam.Named{
		{What: "the gateway bridge of every host", Prefix: weft.GatewayPool()}, {What: "the gateway bridge of every host", Prefix: weft.GatewayPool6()},
	}
	for _, n := range v.Networks() {
		for _, s := range n.Spec.Subnets {
			used = append(used, ipam.Named{What: "network " + n.Spec.Name, Prefix: s.Prefix})
		}
	}
	for _, n := range v.Nodes() {
		for _, p := range n.Description.UsedPrefixes {
			used = append(used, ipam.Named{What: "a route, address or resolver of node " + nodeName(n), Prefix: p})
		}
		for _, a := range nodeAddrs(&n) {
			used = append(used, ipam.Named{What: "the address of node " + nodeName(n), Prefix: netip.PrefixFrom(a, a.BitLen())})
		}
	}
	return used
}

// nodeAddrs are the addresses by which other nodes reach n. Behind a NAT the
// node itself does not know them.
func nodeAddrs(n *weft.Node) []netip.Addr {
	all := []netip.Addr{n.Status.Addr, n.DataPath}
	if n.Manager != nil {
		all = append(all, n.Manager.Addr.Addr())
	}
	var out []netip.Addr
	for _, a := range all {
		if a.IsValid() && !slices.Contains(out, a.Unmap()) {
			out = append(out, a.Unmap())
		}
	}
	return out
}

func nodeName(n weft.Node) string {
	if n.Description.Hostname != "" {
		return n.Description.Hostname
	}
	return string(n.ID)
}
