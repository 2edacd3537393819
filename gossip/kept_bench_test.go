package gossip

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/weftnet/weft"
)

// scattered are the entries of one owner of many, with n tasks of services that
// each has one on every owner: the dearest to keep.
func scattered(n int) []weft.Endpoint {
	r := rand.New(rand.NewPCG(uint64(n), 7))
	var out []weft.Endpoint
	for i := range n {
		id := func() weft.ID {
			var p packed
			for j := range p {
				p[j] = byte(r.Uint32())
			}
			return p.id()
		}
		slot := uint64(r.IntN(1000))
		a := uint32(10<<24 + i*1000 + int(slot))
		out = append(out, weft.Endpoint{
			Network: netID(0), Service: id(), Task: id(), Slot: 1 + slot, State: weft.EndpointReady,
			Addr: netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)}),
		})
	}
	slices.SortFunc(out, compareEntries)
	return out
}

// benchCore is a core that knows an owner's table, and what tells it that again.
func benchCore(b *testing.B, entries []weft.Endpoint) (*core, func()) {
	c := newCore(nodeID(3), 1, unproven{}, rand.New(rand.NewPCG(1, 1)))
	c.attach(testEpoch, []weft.ID{netID(0)})
	c.setLive(testEpoch, []weft.ID{nodeID(1)})
	n := uint64(0)
	tell := func(network weft.ID, o body) {
		n++
		c.receive(testEpoch, nodeID(1), &update{noTree, network, nodeID(1), stamp{1, n}, 0, 1, o.encode()}, true)
		c.take()
		clear(c.flights.byKey)
	}
	tell("", body{nil, bodyAttached, stamp{}, attachment{nets: []weft.ID{netID(0)}}.encode()})
	content := appendEntries(nil, entries)
	again := func() { tell(netID(0), body{nil, bodyWhole, stamp{}, content}) }
	again()
	if t := c.nets[netID(0)].tables.get(nodeID(1)); t == nil || int(t.count) != len(entries) {
		b.Fatal("the table is not known")
	}
	return c, again
}

// BenchmarkTable is what a table of another costs for each of its entries: to be
// taken, listed for readers, and told to a third.
func BenchmarkTable(b *testing.B) {
	for _, size := range []int{20, 1000} {
		entries := scattered(size)
		per := func(b *testing.B) {
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*size), "ns/entry")
			b.ReportMetric(0, "ns/op")
		}
		b.Run(fmt.Sprintf("take/%d", size), func(b *testing.B) {
			_, again := benchCore(b, entries)
			for b.Loop() {
				again()
			}
			per(b)
		})
		b.Run(fmt.Sprintf("list/%d", size), func(b *testing.B) {
			c, _ := benchCore(b, entries)
			for b.Loop() {
				if len(seen(c, nodeID(1))) != size {
					b.Fatal("entries are missing")
				}
			}
			per(b)
		})
		b.Run(fmt.Sprintf("tell/%d", size), func(b *testing.B) {
			c, _ := benchCore(b, entries)
			for b.Loop() {
				c.sendTable(key{netID(0), nodeID(1)}, stamp{}, true, nodeID(2))
				if len(c.take()) != 1 {
					b.Fatal("nothing is told")
				}
			}
			per(b)
		})
	}
}
