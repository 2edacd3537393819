package main

import (
	"context"
	"net/netip"
	"strings"

	"github.com/weftnet/weft/lab/vm"
	"github.com/weftnet/weft/vxlan/wg"
)

// Paths between two hosts with WireGuard in the kernel, or in user space.
const (
	kernelAlone   = "kernel-alone"   // sockets on the WireGuard device itself
	kernelNetwork = "kernel-network" // two tasks of an encrypted network
	kernelStacked = "kernel-stacked" // sockets on a VXLAN device whose packets go through WireGuard
	userAlone     = "user-alone"
	userNetwork   = "user-network"
	userStacked   = "user-stacked"
)

var cryptCases = []string{kernelNetwork, kernelStacked, userAlone, userNetwork, userStacked}

// cryptCounts: a tunnel in user space takes a hundred instructions for each byte.
var cryptCounts = map[pattern]int{rr: 300, crr: 50, udp: 16 * window, bulk: 4 << 10}

var cryptPairs = []pair{{userNetwork, userAlone}, {userNetwork, userStacked}}

// cryptLimits: bulk through an encrypted network is at least 0.8 of WireGuard alone in
// the kernel, and in user space 4 times VXLAN stacked in it.
var cryptLimits = []limit{
	{Case: kernelNetwork, Metric: string(bulk), Over: kernelAlone, Least: 0.8},
	{Case: userNetwork, Metric: string(bulk), Over: userStacked, Least: 4},
}

// wireguardBench: encrypted networks on the instruction clock.
func wireguardBench() benchmark {
	c := trafficChoices(nil)
	c.Cases, c.Usual = cryptCases, cryptCases
	return benchmark{
		Name:    "wireguard",
		About:   "what encrypted networks cost in instructions (kernel, both ends and the user-space engines): operations per 10^9 of them, and the same with VXLAN stacked in WireGuard, against sockets on the kernel's WireGuard device itself, in a guest whose clock counts them",
		Choices: c,
		Linked:  true,
		Away: func(ctx context.Context, o options) (away, error) {
			s, kernel, err := inGuest(ctx, o, vm.Config{MemoryMiB: 1024, DiskMiB: 512},
				"for m in wireguard tun veth vxlan bridge nf_tables nft_reject_bridge; do modprobe $m; done\n"+guestCommand(o, "-wireguard"))
			if err != nil {
				return away{}, err
			}
			return away{
				Series: s, Guest: "Linux " + kernel + " on one processor, whose clock counts instructions",
				Limits: limitsOn(cryptLimits, kernelAlone, o.cases, o.metrics),
			}, nil
		},
	}
}

// wireguard makes two hosts with each engine that a path needs, and gives the paths;
// the first is kernelAlone, the baseline.
func (g *ground) wireguard(ctx context.Context, names []string) ([]opener, error) {
	engines := map[string]*cryptField{}
	var out []opener
	for _, name := range append([]string{kernelAlone}, names...) {
		engine := wg.EngineKernel
		if strings.HasPrefix(name, "user") {
			engine = wg.EngineUser
		}
		if engines[engine] == nil {
			f, err := newCryptField(ctx, g.log, engine)
			if err != nil {
				return nil, err
			}
			g.later(func() error { return f.close(context.WithoutCancel(ctx)) })
			engines[engine] = f
		}
		p := engines[engine].path(name)
		out = append(out, opener{name, func(ctx context.Context) (*way, error) { return p.open(ctx, g.core) }})
	}
	return out, nil
}

// path is one of a field, by the address plan of encrypt.
func (f *cryptField) path(name string) path {
	p := path{name: name, from: f.crypt[0], to: f.crypt[1]}
	switch name {
	case kernelNetwork, userNetwork:
		p.from, p.to, p.addr = f.task[0], f.task[1], netip.MustParseAddr("10.100.9.20")
	case kernelStacked, userStacked:
		p.addr = netip.MustParseAddr("10.97.9.2")
	default:
		p.addr, p.own = netip.MustParseAddr("10.100.9.2"), netip.MustParseAddr("10.100.9.1")
	}
	return p
}
