package bpf

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
	overlay "github.com/weftnet/weft/vxlan/bpf"
)

// TestObjectIsOfTheSources: whoever changes the sources runs go generate.
func TestObjectIsOfTheSources(t *testing.T) {
	sums, err := os.ReadFile("balance.sum")
	must(t, err)
	lines := strings.Split(strings.TrimSpace(string(sums)), "\n")
	if len(lines) != 13 {
		t.Fatalf("balance.sum has %d lines, want ten sources and three objects", len(lines))
	}
	for _, line := range lines {
		want, file, _ := strings.Cut(line, "  ")
		b, err := os.ReadFile(file)
		must(t, err)
		if got := fmt.Sprintf("%x", sha256.Sum256(b)); got != want {
			t.Errorf("%s is not what the object was made of: run go generate ./ingress/bpf", file)
		}
	}
}

func TestLayouts(t *testing.T) {
	balance, err := loadBalance()
	must(t, err)
	socket, err := loadSocket()
	must(t, err)
	for _, c := range []struct {
		spec       *ebpf.CollectionSpec
		name       string
		key, value any
	}{
		{balance, balanceMapServices, overlay.AddrKey{}, serviceValue{}}, {balance, balanceMapSlots, slotKey{}, chunkValue{}},
		{balance, balanceMapFlows, flowKey{}, overlay.MACValue{}}, {balance, balanceMapPassing, flowKey{}, overlay.MACValue{}},
		{balance, balanceMapPieces, flowKey{}, overlay.MACValue{}},
		{socket, socketMapTasks, uint64(0), taskValue{}}, {socket, socketMapBackends, backendKey{}, backendValue{}},
		{socket, socketMapConnected, uint64(0), joinedValue{}}, {socket, socketMapAsked, partnerKey{}, standIn{}}, {socket, socketMapChosen, partnerKey{}, standIn{}},
	} {
		m := c.spec.Maps[c.name]
		if k, v := binary.Size(c.key), binary.Size(c.value); uint32(k) != m.KeySize || uint32(v) != m.ValueSize {
			t.Errorf("%s: Go has %d and %d bytes, C %d and %d", c.name, k, v, m.KeySize, m.ValueSize)
		}
	}
}

// TestPlan: every slot of every ring is one of the service's open backends, all
// of which have slots; order does not matter; who drains keeps flows and has no
// slot.
func TestPlan(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		n := ingress.Network{VNI: rapid.Uint32Range(1, 100).Draw(r, "vni")}
		for i := range rapid.IntRange(0, 4).Draw(r, "services") {
			s := ingress.Service{VIP: netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})}
			for j := range rapid.IntRange(0, 12).Draw(r, "backends") {
				a := netip.AddrFrom4([4]byte{10, 0, byte(2 + i), byte(j)})
				id := weft.ID(fmt.Sprintf("task%d-%d", i, j))
				s.Backends = append(s.Backends, ingress.Backend{Task: id, Addr: a, MAC: weft.EndpointMAC(id, a), Draining: rapid.Bool().Draw(r, "drains")})
			}
			n.Services = append(n.Services, s)
		}
		got, k := plan([]ingress.Network{n})
		used := 0
		for _, s := range n.Services {
			key := overlay.KeyOf(n.VNI, s.VIP)
			v, ok := got.services[key]
			if !ok {
				r.Fatalf("%s is missing", s.VIP)
			}
			open := map[vxlan.MAC]int{}
			for _, b := range s.Backends {
				if !k.allows(flowKey{VNI: n.VNI, Dst: key.Addr}, vxlan.MACOf(b.MAC)) {
					r.Fatalf("flows to %s may not stay", b.Task)
				}
				if !b.Draining {
					open[vxlan.MACOf(b.MAC)] = 0
				}
			}
			if v.Size != uint32(len(ingress.Ring(make([]string, len(open)), ringSize(len(open))))) {
				r.Fatalf("%s has %d slots for %d backends", s.VIP, v.Size, len(open))
			}
			for i := range v.Size {
				mac := got.slots[slotKey{Ring: v.Ring, Chunk: i / chunk}][i%chunk].MAC
				if _, ok := open[mac]; !ok {
					r.Fatalf("slot %d of %s leads to %v", i, s.VIP, mac)
				}
				open[mac]++
			}
			for mac, slots := range open {
				if slots == 0 {
					r.Fatalf("%v of %s has no slot", mac, s.VIP)
				}
			}
			used += int(v.Size) / chunk
		}
		if len(got.slots) != used {
			r.Fatalf("%d chunks, of which %d are used", len(got.slots), used)
		}
		for i := range n.Services {
			b := n.Services[i].Backends
			for x := range len(b) / 2 {
				b[x], b[len(b)-1-x] = b[len(b)-1-x], b[x]
			}
		}
		again, _ := plan([]ingress.Network{n})
		for key, v := range got.services {
			if again.services[key] != v {
				r.Fatalf("another order of backends makes another ring of %v", key)
			}
		}
	})
}

// TestRingSize: every backend has its least number of slots, none twice as many
// more than that but for whole chunks, and the last size serves all larger services.
func TestRingSize(t *testing.T) {
	last := ingress.RingSizes[len(ingress.RingSizes)-1]
	for n := 1; n < 3000; n++ {
		size, least := ringSize(n), n*ingress.SlotsPerBackend
		if size&(size-1) != 0 || size%chunk != 0 || size > last || size < min(least, last) || size > chunk && size >= 2*least {
			t.Fatalf("%d backends have a ring of %d", n, size)
		}
	}
}

func TestLostIsSeen(t *testing.T) {
	key := overlay.KeyOf(1, netip.MustParseAddr("10.0.0.1"))
	a, b := vxlan.MAC{2, 1}, vxlan.MAC{2, 2}
	one, two := keep{key: {a: true}}, keep{key: {a: true, b: true}}
	for _, c := range []struct {
		now, before keep
		want        bool
	}{{two, one, false}, {one, two, true}, {keep{}, one, true}, {one, one, false}, {one, nil, false}} {
		if got := c.now.lost(c.before); got != c.want {
			t.Errorf("%v after %v: lost %v, want %v", c.now, c.before, got, c.want)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Every ring is of whole chunks.
func TestRingsAreOfWholeChunks(t *testing.T) {
	for _, size := range ingress.RingSizes {
		if size%chunk != 0 {
			t.Errorf("a ring of %d slots is not of whole chunks of %d", size, chunk)
		}
	}
}
