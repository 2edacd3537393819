package gossiptest

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
)

// Population is a cluster's endpoints of IPv4, as a node knows them that takes part
// in all of its networks and has none of its own.
type Population struct {
	Networks, Owners int
	Each             int // endpoints of an owner on a network
	PerService       int // of these, in one service
	// Shuffled: which owner has which of a service's slots differs from service to
	// service. It is heeded where a service has one endpoint on each owner.
	Shuffled bool
	// Certificate is the length of an owner's certificate; 0: that of its name.
	Certificate int
}

// Entries is how many endpoints there are.
func (p Population) Entries() int { return p.Networks * p.Owners * p.Each }

// Cost is what a node's part in the table costs it.
type Cost struct {
	Bytes float64       // of memory for an endpoint
	Apply time.Duration // of processor time for an endpoint, with fake proofs
}

// networks are those of a population, in order.
func (p Population) networks() []weft.ID {
	var out []weft.ID
	for n := range p.Networks {
		out = append(out, ID("network", n))
	}
	slices.Sort(out)
	return out
}

// of are the endpoints of an owner. Where a service has one endpoint on each owner,
// addresses are given service by service, else owner by owner.
func (p Population) of(owner int, nets []weft.ID) []weft.Endpoint {
	var out []weft.Endpoint
	for n, id := range nets {
		for i := range p.Each {
			task := (n*p.Owners+owner)*p.Each + i
			e := Endpoint(task)
			e.Network, e.Service, e.Slot = id, ID("service", n*1_000_000+i/p.PerService), uint64(1+owner*p.PerService+i%p.PerService)
			if p.PerService == 1 {
				place := owner
				if p.Shuffled {
					place = (owner + rand.New(rand.NewPCG(uint64(n), uint64(i))).IntN(p.Owners)) % p.Owners
					e.Slot = uint64(1 + place)
				}
				a := uint32(i*p.Owners + place)
				e.Addr = netip.AddrFrom4([4]byte{10, byte(n)<<2 | byte(a>>16), byte(a >> 8), byte(a)})
			}
			out = append(out, e)
		}
	}
	return out
}

// Measure has a node learn a population, owner by owner.
func (p Population) Measure() (Cost, error) {
	nets := p.networks()
	k := &knower{id: ID("node", p.Owners), now: time.Unix(1e9, 0)}
	k.r = gossip.NewReplica(k.id, 1, 0, longSworn{sworn(k.id), p.Certificate}, rand.New(rand.NewPCG(1, 1)))
	k.r.Attach(k.now, nets)
	k.r.Publish(k.now, nil)
	k.rest()
	before := heapInUse()
	for o := range p.Owners {
		id := ID("node", o)
		r := gossip.NewReplica(id, 1, 0, longSworn{sworn(id), p.Certificate}, rand.New(rand.NewPCG(1, uint64(o))))
		r.Attach(k.now, nets)
		r.Publish(k.now, p.of(o, nets))
		if err := k.learn(id, r, nets, p.Each); err != nil {
			return Cost{}, err
		}
	}
	k.r.SetLive(k.now, nil)
	k.rest()
	for _, id := range nets {
		if got := k.r.Owners(id); got != p.Owners+1 {
			return Cost{}, fmt.Errorf("%d tables of a network are known, %d expected", got, p.Owners+1)
		}
	}
	cost := Cost{float64(heapInUse()-before) / float64(p.Entries()), k.took / time.Duration(p.Entries())}
	runtime.KeepAlive(k)
	return cost, nil
}

// heapInUse is what is in use.
func heapInUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what had a finalizer or was pooled
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// knower is a node that learns.
type knower struct {
	id   weft.ID
	r    *gossip.Replica
	now  time.Time
	met  []weft.ID
	took time.Duration // in Receive
}

// rest lets all end that is under way.
func (k *knower) rest() {
	for range 5 {
		k.now = k.now.Add(tick)
		k.r.Tick(k.now)
		k.r.Take()
	}
}

// learn brings a knower and an owner together until all is known.
func (k *knower) learn(id weft.ID, r *gossip.Replica, nets []weft.ID, each int) error {
	k.met = append(k.met, id)
	k.r.SetLive(k.now, k.met)
	r.SetLive(k.now, []weft.ID{k.id})
	end := k.now.Add(time.Minute)
	for known := 0; known < len(nets); {
		for _, p := range k.r.Take() {
			if _, err := r.Receive(k.now, k.id, p.Message, p.Stream); err != nil {
				return err
			}
		}
		for _, p := range r.Take() {
			begin := time.Now()
			_, err := k.r.Receive(k.now, id, p.Message, p.Stream)
			if k.took += time.Since(begin); err != nil {
				return err
			}
		}
		for known < len(nets) && k.r.Count(nets[known], id) == each {
			known++
		}
		if k.now.After(end) {
			return fmt.Errorf("tables of node %s on %d of %d networks are known", id, known, len(nets))
		}
		k.now = k.now.Add(time.Millisecond)
		r.Advance(k.now)
		k.r.Advance(k.now)
	}
	k.rest()
	return nil
}
