package weft

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"time"
)

// Kernel object names. An interface name fits 15 bytes (IFNAMSIZ - 1,
// linux/if.h). All names of objects that live in a host's own namespace carry
// part of the id of the node or task that owns them, so that several nodes can
// share one kernel and every object proves whose it is.

// HostVethName is the host side of a task's gateway leg: "wv" + 11 characters
// of the task id (random, so 56 bits of it).
func HostVethName(task ID) string { return "wv" + cut(string(task), 11) }

// PortVethName is the bridge side of a task's port on one network: "wp" + 11
// hexadecimal digits of a hash over task and network. It lives in the
// network's hidden namespace.
func PortVethName(task, network ID) string {
	h := fnv.New64a()
	h.Write([]byte(task))
	h.Write([]byte{'/'})
	h.Write([]byte(network))
	return fmt.Sprintf("wp%011x", h.Sum64()&(1<<44-1))
}

// VXLANName is the VXLAN device of a network.
func VXLANName(vni uint32) string { return fmt.Sprintf("wx%d", vni) }

// TunnelName is the VXLAN device of the eBPF engine for one UDP port, of all
// networks that use it.
func TunnelName(port uint16) string { return fmt.Sprintf("wxu%d", port) }

// BridgeName is the bridge inside a network's hidden namespace.
func BridgeName(vni uint32) string { return fmt.Sprintf("wb%d", vni) }

// BalancerName is the device by which the hidden namespace itself takes and sends
// on what is sent to a network's service addresses.
func BalancerName(vni uint32) string { return fmt.Sprintf("wi%d", vni) }

// GatewayBridge is the per-host bridge by which tasks reach the outside.
const GatewayBridge = "weft-gw"

// GatewayLeg is the end of it inside a task.
const GatewayLeg = "gw0"

// GatewayPool is the range of the gateway bridge, unless the host uses it
// already. No overlay may overlap it: a container has a leg in both.
func GatewayPool() netip.Prefix { return netip.MustParsePrefix("172.31.240.0/20") }

// GatewayPool6 is the range of IPv6 addresses behind every gateway bridge, for ports in
// mode host: each host has its own use of it, and no packet leaves a host with one. The
// global ID of RFC 4193 is the word "weftg". No overlay may overlap it, either.
func GatewayPool6() netip.Prefix { return netip.MustParsePrefix("fd77:6566:7467::/64") }

// GatewayAddr6 is the host's own address in GatewayPool6.
func GatewayAddr6() netip.Addr { return GatewayTwin(netip.AddrFrom4([4]byte{0, 0, 0, 1})) }

// GatewayTwin is the address in GatewayPool6 that goes with an IPv4 address behind the
// gateway bridge; invalid without one.
func GatewayTwin(a netip.Addr) netip.Addr {
	if !a.Is4() {
		return netip.Addr{}
	}
	twin, low := GatewayPool6().Addr().As16(), a.As4()
	copy(twin[12:], low[:])
	return netip.AddrFrom16(twin)
}

// IngressLeg is the host's own port on the ingress network.
const IngressLeg = "weft-ingress"

// TableName is the nftables table that weft owns; it writes no other.
const TableName = "weft"

// LinkAlias is the ifalias of every link that weft makes: proof of ownership
// that survives a restart. A link without it is never touched.
func LinkAlias(node ID) string { return "weft:" + string(node) }

// TaskNetNS is the name of a task's network namespace file.
func TaskNetNS(node, task ID) string {
	return fmt.Sprintf("weft-%s-t%s", cut(string(node), 8), cut(string(task), 12))
}

// OverlayNetNS is the name of the hidden namespace file of a network on a node.
func OverlayNetNS(node ID, vni uint32) string {
	return fmt.Sprintf("weft-%s-n%d", cut(string(node), 8), vni)
}

// How long the answers of the resolvers may be remembered: to the name of a task,
// and of a service by its own address. Addresses that are given up are not given
// out again before. Both stay at or below 5 s, so that clients follow changes.
const (
	TaskNameTTL    = 1 * time.Second
	ServiceNameTTL = 5 * time.Second
)

// NetNSPrefix is the common prefix of a node's namespace names.
func NetNSPrefix(node ID) string { return "weft-" + cut(string(node), 8) + "-" }

// CgroupPath is the cgroup of a task, from the root of each hierarchy.
func CgroupPath(node, task ID) string { return "/weft/" + string(node) + "/" + string(task) }

// ContainerID is the 64-digit id under which Docker's clients see a task.
func ContainerID(task ID) string {
	sum := sha256.Sum256([]byte("weft container " + string(task)))
	return hex.EncodeToString(sum[:])
}

// EndpointMAC is the hardware address of a task on a network: locally
// administered (IEEE 802, bit 1 of the first byte), 20 bits of generation
// hashed from the task, so that a reused address does not match an entry made
// for its former holder, and the last 24 bits of the address, so that it is
// unique within the network (no subnet is larger than /8).
func EndpointMAC(task ID, addr netip.Addr) net.HardwareAddr {
	return derivedMAC(0x02, string(task), addr)
}

// VIPMAC is the hardware address that answers for a service address. No
// device owns it: the balancer rewrites it to a backend's. The low half of its
// first byte keeps it apart from every EndpointMAC, and the two of a service that
// has an address of each family apart from each other.
func VIPMAC(service ID, addr netip.Addr) net.HardwareAddr {
	if addr.Unmap().Is6() {
		return derivedMAC(0x0e, string(service), addr)
	}
	return derivedMAC(0x06, string(service), addr)
}

// NodeMAC is the hardware address of a node's own leg on the ingress network.
func NodeMAC(node ID, addr netip.Addr) net.HardwareAddr {
	return derivedMAC(0x0a, string(node), addr)
}

// derivedMAC lays out, from the first byte on: 4 bits of generation and 4 of
// class, 16 bits of generation, 24 bits of the address. One byte of generation
// alone would let one stale entry in 256 match.
func derivedMAC(class byte, owner string, addr netip.Addr) net.HardwareAddr {
	h := fnv.New32a()
	h.Write([]byte(owner))
	s := h.Sum32()
	gen := s>>20 ^ s&0xfffff
	a := addr.Unmap().AsSlice()
	tail := a[len(a)-3:]
	return net.HardwareAddr{byte(gen>>16)<<4 | class, byte(gen >> 8), byte(gen), tail[0], tail[1], tail[2]}
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n]
}
