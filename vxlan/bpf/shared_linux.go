package bpf

import (
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// What the balancer of package ingress/bpf shares with the engine.

// PinDir is the folder of a node's pinned maps below the bpffs at mount. The
// balancer keeps its own pins in the folder "balance" of it, and they go with it.
func PinDir(mount string, node weft.ID) string {
	return filepath.Join(mount, string(node), fmt.Sprintf("v%d", abiVersion))
}

// Pinned maps that the balancer's program uses, and the slot of "hooks" that is
// its own.
const (
	MapHooks  = overlayMapHooks
	MapMACs   = overlayMapMacs
	MapPorts  = overlayMapPorts
	MapNets   = overlayMapNets
	MapCounts = overlayMapCounts

	HookBalance uint32 = hookBalance
)

// AddrKey is an address of a network as a key of maps (struct ep_key).
type AddrKey = epKey

// KeyOf makes the key of an address.
func KeyOf(vni uint32, a netip.Addr) AddrKey { return AddrKey{VNI: vni, Addr: addrOf(a)} }

// MACValue is a hardware address as a value of maps (struct ep).
type MACValue = epValue

// ValueOf makes the value of a hardware address.
func ValueOf(m vxlan.MAC) MACValue { return MACValue{MAC: m} }

// PortValue is what the programs know of the port at the far end of a veth, by
// whose index MapPorts has it (struct port).
type PortValue = portValue

// AttachByTCX attaches a program to a link of the calling namespace by tcx, behind
// those that are there. The link is the caller's to pin or close.
func AttachByTCX(ifindex int, p *ebpf.Program, at ebpf.AttachType) (link.Link, error) {
	return patiently(func() (link.Link, error) {
		return link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: at})
	})
}

// Dump reads a whole map. Entries that change meanwhile may be seen or not.
func Dump[K comparable, V any](m *ebpf.Map) (map[K]V, error) { return dump[K, V](m) }

// ProbePort makes the loopback a port of a network in a scratch map of ports:
// that is where a test run of a program begins.
func ProbePort(ports *ebpf.Map, vni uint32) error {
	return ports.Put(uint32(1), portValue{VNI: vni})
}
