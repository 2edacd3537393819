package agent

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
)

// fakeTable is gossip.Table with the other nodes under the test's hand.
type fakeTable struct {
	journal *journal

	mu        sync.Mutex
	own       []weft.Endpoint
	attached  []weft.ID
	published int
	others    map[weft.ID][]weft.OwnedEndpoint
	alive     map[weft.ID]gossip.Member
	changed   chan struct{}
}

func newFakeTable(j *journal) *fakeTable {
	return &fakeTable{
		journal: j, others: map[weft.ID][]weft.OwnedEndpoint{}, changed: make(chan struct{}),
		alive: map[weft.ID]gossip.Member{nodeA: {ID: nodeA, Addr: vtepA, VTEP: vtepA}},
	}
}

func (f *fakeTable) Publish(e []weft.Endpoint) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var words []string
	for _, x := range e {
		words = append(words, fmt.Sprintf("%s:%s", [...]string{"starting", "ready", "draining"}[x.State], x.Task.Short()[:2]))
	}
	f.journal.add("publish %s", strings.Join(words, " "))
	f.published++
	if !slices.Equal(f.own, e) {
		f.own = e
		f.bumpLocked()
	}
}

func (f *fakeTable) Attach(networks []weft.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	networks = append([]weft.ID{}, networks...)
	slices.Sort(networks)
	if f.attached == nil || !slices.Equal(f.attached, networks) {
		f.attached = networks
		f.bumpLocked()
	}
}

func (f *fakeTable) bumpLocked() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// set makes a node alive with these endpoints, in one step.
func (f *fakeTable) set(m gossip.Member, e ...weft.Endpoint) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.alive[m.ID] = m
	f.others[m.ID] = nil
	for _, x := range e {
		f.others[m.ID] = append(f.others[m.ID], weft.OwnedEndpoint{Endpoint: x, Owner: m.ID, VTEP: m.VTEP})
	}
	f.bumpLocked()
}

// fail takes a node out of sight, as gossip does when it is not heard.
func (f *fakeTable) fail(id weft.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.alive, id)
	delete(f.others, id)
	f.bumpLocked()
}

func (f *fakeTable) Snapshot() ([]weft.OwnedEndpoint, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []weft.OwnedEndpoint
	for _, x := range f.own {
		out = append(out, weft.OwnedEndpoint{Endpoint: x, Owner: nodeA, VTEP: vtepA})
	}
	for _, others := range f.others {
		for _, e := range others {
			if f.attached == nil || slices.Contains(f.attached, e.Network) { // of other networks gossip brings nothing
				out = append(out, e)
			}
		}
	}
	slices.SortStableFunc(out, func(a, b weft.OwnedEndpoint) int { return strings.Compare(string(a.Owner), string(b.Owner)) })
	return out, f.changed
}

func (f *fakeTable) Members() ([]gossip.Member, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []gossip.Member
	for _, m := range f.alive {
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b gossip.Member) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return out, f.changed
}

func (f *fakeTable) ownEndpoints() []weft.Endpoint {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.own)
}
