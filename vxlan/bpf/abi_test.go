package bpf

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// TestObjectIsOfTheSources: whoever changes c/ runs go generate.
func TestObjectIsOfTheSources(t *testing.T) {
	sums, err := os.ReadFile("overlay.sum")
	must(t, err)
	lines := strings.Split(strings.TrimSpace(string(sums)), "\n")
	if len(lines) != 7 {
		t.Fatalf("overlay.sum has %d lines, want the six sources and the object", len(lines))
	}
	for _, line := range lines {
		want, file, _ := strings.Cut(line, "  ")
		b, err := os.ReadFile(file)
		must(t, err)
		if got := fmt.Sprintf("%x", sha256.Sum256(b)); got != want {
			t.Errorf("%s is not what the object was made of: run go generate ./vxlan/bpf", file)
		}
	}
}

// TestLayouts: the Go structs are as long as the C ones, and have no holes.
func TestLayouts(t *testing.T) {
	spec, err := loadOverlay()
	must(t, err)
	for _, c := range []struct {
		name       string
		key, value any
	}{
		{overlayMapMacs, macKey{}, destValue{}}, {overlayMapEps, epKey{}, epValue{}},
		{overlayMapPorts, uint32(0), portValue{}}, {overlayMapNets, uint32(0), netValue{}},
		{overlayMapNatives, addr16{}, nativeValue{}}, {overlayMapEchoes, echoKey{}, uint64(0)},
	} {
		m := spec.Maps[c.name]
		if k, v := binary.Size(c.key), binary.Size(c.value); uint32(k) != m.KeySize || uint32(v) != m.ValueSize {
			t.Errorf("%s: Go has %d and %d bytes, C %d and %d", c.name, k, v, m.KeySize, m.ValueSize)
		}
	}
	if n := spec.Maps[overlayMapCounts].MaxEntries; int(n) != len(reasons) {
		t.Errorf("%d reasons for %d counters", len(reasons), n)
	}
}

func drawAddr(r *rapid.T, label string) netip.Addr {
	if rapid.Bool().Draw(r, label+" is IPv4") {
		return netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(r, label)))
	}
	return netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(r, label))).Unmap()
}

func TestAddressesComeBack(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		a := drawAddr(r, "address")
		if got := addrOf(a).Addr(); got != a && a != netip.IPv6Unspecified() {
			r.Fatalf("%s became %s", a, got)
		}
	})
}

func TestNetworksComeBack(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		n := vxlan.Network{
			ID: weft.ID(rapid.StringMatching(`[a-z0-9-]{1,63}`).Draw(r, "id")), VNI: rapid.Uint32Range(1, 1<<24-1).Draw(r, "vni"),
			MTU: rapid.IntRange(68, 65535).Draw(r, "mtu"), Port: rapid.Uint16Min(1).Draw(r, "port"),
			VTEP: netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(r, "vtep"))), Encrypted: rapid.Bool().Draw(r, "encrypted"), Native: rapid.Bool().Draw(r, "native"),
		}
		for range rapid.IntRange(0, maxSubnets).Draw(r, "subnets") {
			a := drawAddr(r, "subnet")
			if a == netip.IPv6Unspecified() {
				continue
			}
			n.Subnets = append(n.Subnets, netip.PrefixFrom(a, rapid.IntRange(0, a.BitLen()).Draw(r, "bits")))
		}
		v, err := encodeNet(n)
		if err != nil {
			r.Fatal(err)
		}
		got, ok := decodeNet(n.VNI, v)
		if !ok || got.ID != n.ID || got.MTU != n.MTU || got.Port != n.Port || got.VTEP != n.VTEP || got.Encrypted != n.Encrypted || got.Native != n.Native || !slices.Equal(got.Subnets, n.Subnets) {
			r.Fatalf("%+v became %+v, %v", n, got, ok)
		}
	})
}

// TestDamagedNetworksAreSeen: a value that was changed is another network or
// none, never the same one.
func TestDamagedNetworksAreSeen(t *testing.T) {
	n := vxlan.Network{ID: "abcdefghij", VNI: 7, MTU: 1450, Port: 4789, VTEP: netip.MustParseAddr("192.0.2.1"),
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/20"), netip.MustParsePrefix("fd00::/64")}}
	v, err := encodeNet(n)
	must(t, err)
	var buf bytes.Buffer
	must(t, binary.Write(&buf, binary.LittleEndian, v))
	rapid.Check(t, func(r *rapid.T) {
		b := bytes.Clone(buf.Bytes())
		b[rapid.IntRange(0, len(b)-1).Draw(r, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(r, "bit")
		var w netValue
		if err := binary.Read(bytes.NewReader(b), binary.LittleEndian, &w); err != nil {
			r.Fatal(err)
		}
		got, ok := decodeNet(n.VNI, w)
		if ok && got.ID == n.ID && got.MTU == n.MTU && got.Port == n.Port && got.VTEP == n.VTEP && got.Encrypted == n.Encrypted && got.Native == n.Native && slices.Equal(got.Subnets, n.Subnets) {
			r.Fatal("the damage is not seen")
		}
	})
}

func TestWhatDoesNotFitIsRefused(t *testing.T) {
	many := vxlan.Network{ID: "a", VNI: 1}
	for i := range maxSubnets + 1 {
		many.Subnets = append(many.Subnets, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i)}), 16))
	}
	for _, n := range []vxlan.Network{many, {ID: weft.ID(strings.Repeat("a", maxIDLength+1)), VNI: 1}, {ID: "a\x00b", VNI: 1}} {
		if _, err := encodeNet(n); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%.20s: got %v, want ErrInvalid", n.ID, err)
		}
	}
}

func TestAliasesComeBack(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		word := rapid.StringMatching(`[a-z0-9]{1,25}`)
		node, vni := weft.ID(word.Draw(r, "node")), rapid.Uint32().Draw(r, "vni")
		p := vxlan.Port{Task: weft.ID(word.Draw(r, "task")), IfName: word.Draw(r, "interface"),
			NetNS: "/" + rapid.StringMatching(`[a-z /]{1,40}`).Draw(r, "path")}
		got, ok := parseAlias(node, portAlias(node, vni, p))
		if !ok || got.vni != vni || got.leg != "" || got.port.Task != p.Task || got.port.IfName != p.IfName || got.port.NetNS != p.NetNS {
			r.Fatalf("%+v became %+v, %v", p, got, ok)
		}
		leg, ok := parseAlias(node, legAlias(node, vni, p.IfName))
		if !ok || leg.vni != vni || leg.leg != p.IfName {
			r.Fatalf("leg %s became %+v, %v", p.IfName, leg, ok)
		}
		up, ok := parseAlias(node, uplinkAlias(node, vni))
		if !ok || up.vni != vni || !up.isUplink || leg.isUplink || got.isUplink {
			r.Fatalf("the uplink became %+v, %v", up, ok)
		}
		if _, ok := parseAlias(node+"x", portAlias(node, vni, p)); ok {
			r.Fatal("the alias of another node was taken for ours")
		}
	})
}

func FuzzParseAlias(f *testing.F) {
	f.Add("weft:n v1 ebpf 5 port t eth0 /run/x")
	f.Add("weft:n v1 ebpf 5 leg weft-ingress")
	f.Add("weft:n v1 ebpf 5 uplink")
	f.Add("weft:n v1 port t eth0 /run/x")
	f.Fuzz(func(t *testing.T, s string) {
		o, ok := parseAlias("n", s)
		if !ok {
			return
		}
		again := legAlias("n", o.vni, o.leg)
		if o.leg == "" {
			again = portAlias("n", o.vni, o.port)
		}
		if o.isUplink {
			again = uplinkAlias("n", o.vni)
		}
		if back, ok := parseAlias("n", again); !ok || back.isUplink != o.isUplink || back.leg != o.leg || back.vni != o.vni || back.port.NetNS != o.port.NetNS {
			t.Errorf("%q became %q", s, again)
		}
	})
}
