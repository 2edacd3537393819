package state

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/weftnet/weft"
)

// RestingAddr is an address that was taken off its holder and is not given out
// yet: a member may still have an entry for the former holder.
type RestingAddr struct {
	Network weft.ID
	Addr    netip.Addr
	Owner   weft.ID // the former holder: a task, a service or a node
	// Task says that Owner is one. Members are told the ids of such tasks, so
	// that what gossip still says of them does not count.
	Task  bool      `cbor:",omitempty"`
	Index uint64    // of the entry that freed it
	At    time.Time // of the command that freed it
}

// RestingNetwork is the numbers of a removed network that are not given out yet.
type RestingNetwork struct {
	ID      weft.ID
	Name    string
	VNI     uint32
	Subnets []weft.Subnet
	Index   uint64
	At      time.Time
}

// Release ends the rest of addresses and of removed networks. What rests no more
// is skipped.
type Release struct {
	Addrs    []Rested  `cbor:",omitempty"`
	Networks []weft.ID `cbor:",omitempty"`
}

// Rested are addresses of one network that were freed at or before Index; one
// that was freed again since then rests anew.
type Rested struct {
	Network weft.ID
	Index   uint64
	Addrs   []netip.Addr
}

// Resting lists the resting addresses of a network, in the order of addresses.
func (s *Snapshot) Resting(network weft.ID) []RestingAddr {
	return list[RestingAddr](s, tResting, byID+"_prefix", string(network)+"\x00")
}

// AllResting lists the resting addresses of all networks, in the order of
// networks and addresses.
func (s *Snapshot) AllResting() []RestingAddr { return list[RestingAddr](s, tResting, byID) }

// RestingAddr looks a resting address up.
func (s *Snapshot) RestingAddr(network weft.ID, a netip.Addr) (RestingAddr, bool) {
	return one[RestingAddr](s, tResting, byID, string(network), addrKey(a))
}

// RestingNetworks lists the removed networks whose numbers rest.
func (s *Snapshot) RestingNetworks() []RestingNetwork {
	return list[RestingNetwork](s, tRestingNets, byID)
}

// addrKey sorts as the address does within its family.
func addrKey(a netip.Addr) string {
	a = a.Unmap()
	return string([]byte{byte(a.BitLen())}) + string(a.AsSlice())
}

// rest lays down what owner gives up. Addresses of networks that are gone went
// with them.
func (t *tx) rest(owner weft.ID, isTask bool, at weft.Attachment) error {
	net, err := first[weft.Network](t.Txn, tNetworks, byID, string(at.Network))
	if err != nil || net == nil {
		return err
	}
	for _, p := range at.Addrs() {
		t.changed.Resting[at.Network] = struct{}{}
		if err := t.Insert(tResting, &RestingAddr{
			Network: at.Network, Addr: p.Addr().Unmap(), Owner: owner, Task: isTask, Index: t.index, At: t.at,
		}); err != nil {
			return err
		}
	}
	return nil
}

// restTask: the addresses of a task that has ended or is forgotten. One that
// never had a node has never been heard of by anybody.
func (t *tx) restTask(k *weft.Task) error {
	if k.Node == "" {
		return nil
	}
	for _, at := range k.Attachments {
		if err := t.rest(k.ID, true, at); err != nil {
			return err
		}
	}
	return nil
}

// restVIPs: what a service has had and has no longer.
func (t *tx) restVIPs(service weft.ID, had, has []weft.VIP) error {
	kept := map[netip.Prefix]weft.ID{}
	for _, v := range has {
		at := weft.Attachment(v)
		for _, p := range at.Addrs() {
			kept[p] = v.Network
		}
	}
	for _, v := range had {
		at := weft.Attachment(v)
		for _, p := range at.Addrs() {
			if kept[p] == v.Network {
				continue
			}
			if err := t.rest(service, false, weft.Attachment{Network: v.Network, Addr: p}); err != nil {
				return err
			}
		}
	}
	return nil
}

// use ends the rest of what a command gives to a new holder.
func (t *tx) use(given ...weft.Attachment) error {
	for _, at := range given {
		for _, p := range at.Addrs() {
			old, err := first[RestingAddr](t.Txn, tResting, byID, string(at.Network), addrKey(p.Addr()))
			if err != nil {
				return err
			}
			if old == nil {
				continue
			}
			t.changed.Resting[at.Network] = struct{}{}
			if err := t.Delete(tResting, old); err != nil {
				return err
			}
		}
	}
	return nil
}

// ingress is the id of the routing mesh's network, "" before there is one.
func (t *tx) ingress() (weft.ID, error) {
	n, err := first[weft.Network](t.Txn, tNetworks, byVNI, num(uint64(weft.IngressVNI)))
	if err != nil || n == nil {
		return "", err
	}
	return n.ID, nil
}

// ingressOf is what a node has on that network.
func (t *tx) ingressOf(n *weft.Node) (weft.Attachment, error) {
	id, err := t.ingress()
	return weft.Attachment{Network: id, Addr: n.IngressAddr, Addr6: n.IngressAddr6}, err
}

// restNetwork: the network's numbers rest in place of its addresses.
func (t *tx) restNetwork(n *weft.Network) error {
	if _, err := t.DeleteAll(tResting, byID+"_prefix", string(n.ID)+"\x00"); err != nil {
		return fmt.Errorf("forget the resting addresses of network %s: %w", n.Spec.Name, err)
	}
	t.changed.Resting[n.ID] = struct{}{}
	return t.Insert(tRestingNets, &RestingNetwork{
		ID: n.ID, Name: n.Spec.Name, VNI: n.VNI, Subnets: n.Spec.Subnets, Index: t.index, At: t.at,
	})
}

func (t *tx) release(r *Release) error {
	for _, rested := range r.Addrs {
		for _, addr := range rested.Addrs {
			a, err := first[RestingAddr](t.Txn, tResting, byID, string(rested.Network), addrKey(addr))
			if err != nil {
				return err
			}
			if a == nil || a.Index > rested.Index {
				continue
			}
			t.changed.Resting[rested.Network] = struct{}{}
			if err := t.Delete(tResting, a); err != nil {
				return err
			}
		}
	}
	for _, id := range r.Networks {
		n, err := first[RestingNetwork](t.Txn, tRestingNets, byID, string(id))
		if err != nil {
			return err
		}
		if n == nil {
			continue
		}
		t.changed.Resting[id] = struct{}{}
		if err := t.Delete(tRestingNets, n); err != nil {
			return err
		}
	}
	return nil
}
