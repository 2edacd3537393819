package wg

import (
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

// TestTwoKernels: each network is made by the kernel for it, and both are read.
func TestTwoKernels(t *testing.T) {
	var bridge, plain vxlantest.Kernel
	e, err := New(Config{
		Node: "n", NetNSDir: t.TempDir(), RunDir: t.TempDir(), KeyFile: t.TempDir() + "/keys", Engine: EngineNone,
		Bridge: &bridge, Plain: &plain, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	network := func(vni uint32, encrypted bool) vxlan.Network {
		return vxlan.Network{ID: weft.ID(rune('a' + vni%26)), VNI: vni, MTU: 1400, VTEP: netip.MustParseAddr("10.99.0.1"), Port: 4789, Encrypted: encrypted}
	}
	want := vxlan.State{Networks: map[uint32]vxlan.Network{5001: network(5001, false), 5002: network(5002, true)}}
	if err := e.apply(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	holds := func(k vxlan.Kernel, vnis ...uint32) {
		t.Helper()
		st, err := k.Read(t.Context())
		if got := slices.Sorted(maps.Keys(st.Networks)); err != nil || !slices.Equal(got, vnis) {
			t.Errorf("networks %v, %v; want %v", got, err, vnis)
		}
	}
	holds(&plain, 5001)
	holds(&bridge, 5002)
	holds(e, 5001, 5002)
	// Without an engine the encrypted one goes, from both.
	if err := e.Apply(t.Context(), want); !errors.Is(err, weft.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
	holds(e, 5001)
}

func TestNewRefuses(t *testing.T) {
	good := Config{Node: "n", NetNSDir: "/x", RunDir: "/y", KeyFile: "/z", Bridge: &vxlantest.Kernel{}, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	for name, spoil := range map[string]func(*Config){
		"no bridge": func(c *Config) { c.Bridge = nil }, "no key file": func(c *Config) { c.KeyFile = "" },
		"unknown engine": func(c *Config) { c.Engine = "ipsec" }, "no second port": func(c *Config) { c.Port = 65535 },
	} {
		c := good
		spoil(&c)
		if _, err := New(c); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
