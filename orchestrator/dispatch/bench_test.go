package dispatch

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// many fills a world with services that have a published port and one task each, on
// three nodes.
func many(w *world, services int) {
	w.base()
	for i := range services {
		w.must(state.Change{Service: manyService(i)}, state.Change{Task: manyTask(i)})
	}
}

func manyService(i int) *weft.Service {
	s := &weft.Service{ID: weft.ID(fmt.Sprintf("s%024d", i)), SpecVersion: 1, Spec: weft.ServiceSpec{Name: fmt.Sprint("svc", i)}}
	s.Spec.Ports = []weft.PortSpec{{Protocol: weft.TCP, Target: 80, Published: uint16(10000 + i)}}
	s.Ports = s.Spec.Ports
	s.VIPs = []weft.VIP{{Network: "i", Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(128 + i/250), byte(1 + i%250)}), 16)}}
	return s
}

func manyTask(i int) *weft.Task {
	return &weft.Task{
		ID: weft.ID(fmt.Sprintf("t%024d", i)), Service: weft.ID(fmt.Sprintf("s%024d", i)), SpecVersion: 1, Slot: 1, Node: id("n", 1+i%3),
		Desired: weft.TaskRunning, Status: weft.TaskStatus{State: weft.TaskAssigned},
		Attachments: []weft.Attachment{{Network: "i", Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i / 250), byte(1 + i%250)}), 16)}},
	}
}

// BenchmarkOneMoreService is what the leader does to tell three nodes of one more
// service among 2,000, once it is stored.
func BenchmarkOneMoreService(b *testing.B) {
	const services = 2000
	w := newWorld(b)
	many(w, services)
	d := New(Config{Store: w.store})
	var sent [3]Set
	for n := range sent {
		sent[n], _ = d.current(id("n", n+1), Set{})
	}
	told := share(w.store.View(), nil)
	sub := w.store.Subscribe()
	defer sub.Close()
	sub.Take()
	for i := services; b.Loop(); i++ {
		b.StopTimer()
		w.must(state.Change{Service: manyService(i)})
		b.StartTimer()
		c := sub.Take()
		told = d.wake(&c, told)
		for n := range sent {
			next, _ := d.current(id("n", n+1), sent[n])
			if a := Diff(sent[n], next); len(a.Services) != 1 {
				b.Fatalf("node %d is told of %d services", n+1, len(a.Services))
			}
			sent[n] = next
		}
	}
}
