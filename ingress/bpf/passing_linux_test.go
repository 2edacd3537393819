package bpf

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	overlay "github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestSilentAmongShort: a flow has no clock; what ends a silent one is that others
// need its room. Connections that have ended, and datagrams, do not: four times as
// many as there is room for leave it alone. Without its entry it is cut, so the test
// would see that.
func TestSilentAmongShort(t *testing.T) {
	netnstest.NeedRoot(t)
	b := newBed(t, "")
	backends := []ingress.Backend{b.backend(0, 11), b.backend(0, 12)}
	_, inside := b.task(0, 50)
	b.apply()
	e, err := New(Config{Node: b.nodes[0], Dir: b.mount(0)})
	must(t, err)
	must(t, e.Probe(t.Context()))
	t.Cleanup(func() { must(t, e.Close(context.Background())) })
	vip := netip.MustParseAddr(vipText)
	apply := func() {
		must(t, e.Apply(t.Context(), ingress.Table{Networks: []ingress.Network{{VNI: vni, NetNS: b.dir, Tasks: []string{inside}, Services: []ingress.Service{
			{ID: "web", VIP: vip, MAC: weft.VIPMAC("web", vip), Backends: backends}}}}}))
	}
	open := func() *socketFlow {
		f, err := openFlow(t, inside, "tcp", netip.AddrPortFrom(vip, 80))
		must(t, err)
		return f
	}
	apply()
	silent := open()
	for range 20 { // short ones: each is in the map of those that pass in the end
		f := open()
		must(t, f.c.Close())
	}
	deadline := time.Now().Add(silence)
	for b.entries(balanceMapFlows) != 1 && time.Now().Before(deadline) {
		<-time.After(time.Millisecond)
	}
	if open, past := b.entries(balanceMapFlows), b.entries(balanceMapPassing); open != 1 || past < 20 {
		t.Errorf("one connection is open and 20 have ended: %d and %d are known", open, past)
	}
	for i := range backends { // from here on its flow alone says where it goes
		backends[i].Draining = string(backends[i].Task) == silent.name
	}
	apply()
	b.crowd(balanceMapPassing)
	if name, err := silent.Again(); err != nil || string(name) != silent.name {
		t.Errorf("a silent connection among short ones: %q, %v", name, err)
	}
	b.forget(balanceMapFlows)
	if name, err := silent.Again(); err == nil {
		t.Errorf("it lives without its flow, too: %q; the test shows nothing", name)
	}
}

func (b *bed) balance(name string) *ebpf.Map {
	m, err := ebpf.LoadPinnedMap(filepath.Join(overlay.PinDir(b.mount(0), b.nodes[0]), "balance", name), nil)
	must(b.t, err)
	return m
}

// entries counts those of a map.
func (b *bed) entries(name string) int {
	m := b.balance(name)
	defer m.Close()
	all, err := overlay.Dump[flowKey, overlay.MACValue](m)
	must(b.t, err)
	return len(all)
}

// forget empties a map.
func (b *bed) forget(name string) {
	m := b.balance(name)
	defer m.Close()
	all, err := overlay.Dump[flowKey, overlay.MACValue](m)
	must(b.t, err)
	for k := range all {
		must(b.t, m.Delete(k))
	}
}

// crowd puts four times as many flows into a map as it holds.
func (b *bed) crowd(name string) {
	m := b.balance(name)
	defer m.Close()
	n := 4 * int(m.MaxEntries())
	keys, values := make([]flowKey, n), make([]overlay.MACValue, n)
	for i := range keys {
		keys[i] = flowKey{VNI: vni + 1, SPort: uint16(i), DPort: uint16(i >> 16)}
	}
	if done, err := m.BatchUpdate(keys, values, nil); err != nil {
		b.t.Fatal(fmt.Errorf("%d of %d flows in map %s: %w", done, n, name, err))
	}
}
