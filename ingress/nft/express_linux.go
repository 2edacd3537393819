package nft

import (
	"github.com/google/nftables"

	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// expressNetwork makes the change of a few services, or of none, without reading
// the table or looking at the others. It reports false if it may not, or if
// somebody else has changed nftables: then a whole pass follows.
func (e *Engine) expressNetwork(n ingress.Network, p *place) (done bool, err error) {
	if e.atPorts || p.network == nil || !n.SameBut(p.network) {
		return false, nil
	}
	edits, ok := ingress.Changes(p.network.Services, n.Services, expressMost)
	if !ok {
		return false, nil
	}
	old, now := sides(edits)
	was, is := servicesPart(old, n.IPv6), servicesPart(now, n.IPv6)
	left := p.left[nftables.TableFamilyBridge]
	changes, ok := left.edit(was, is)
	if !ok {
		return false, nil
	}
	gone := goneBackends(old, n.Services)
	err = netns.Do(n.NetNS, func() (err error) {
		if done, err = p.express(left, changes); err != nil || !done {
			return err
		}
		left.become(was, is)
		for _, s := range now {
			for _, b := range s.Backends {
				left.prune[string(b.MAC)] = true
			}
		}
		if len(gone) == 0 {
			return nil
		}
		if err := p.endFlows(left, func(mac string) bool { return gone[mac] }); err != nil {
			return err
		}
		for mac := range gone {
			delete(left.prune, mac)
		}
		return nil
	})
	if p.network = nil; done && err == nil {
		p.network = &n
	}
	return done, err
}

// express makes changes to a table of the calling thread's namespace, if all is as it
// was left there.
func (p *place) express(left ruleset, changes []setDelta) (bool, error) {
	gen, err := generation()
	if err != nil || !p.holds(left.family, gen) {
		return false, err
	}
	return p.commit(left, changes)
}

// expressHost is the same for published ports.
func (e *Engine) expressHost(p *place, t *ingress.Table) (done bool, err error) {
	if e.host == nil || !sameHost(e.host, t) {
		return false, nil
	}
	old, now, ok := changedPorts(e.host.Published, t.Published, expressMost)
	if !ok {
		return false, nil
	}
	for _, f := range families(!e.without6) {
		was, is := f.publishedPart(old), f.publishedPart(now)
		left := p.left[f.host]
		changes, ok := left.edit(was, is)
		if !ok {
			return false, nil
		}
		if done, err := p.express(left, changes); err != nil || !done {
			return false, err
		}
		left.become(was, is)
	}
	before, after := trackableOf(withPorts(*t, old)), trackableOf(withPorts(*t, now))
	if !after.follows(&before) {
		if err := trackableAbout(*t, append(old, now...)).release(); err != nil {
			return false, err
		}
	}
	return true, nil
}
