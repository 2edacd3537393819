package vxlan

import (
	"fmt"
	"net/netip"

	"github.com/weftnet/weft"
)

// Encryption is what a node's encrypted networks share: the other nodes and
// their keys. Which addresses are behind a node follows from the networks.
type Encryption struct {
	// Epoch is the cluster's current generation of keys.
	Epoch uint64
	Peers []EncryptionPeer
}

// EncryptionPeer is another node.
type EncryptionPeer struct {
	Node weft.ID
	VTEP netip.Addr
	// Keys that the node has published, at most one of a slot counts: the
	// newest. A node without keys cannot be reached on encrypted networks.
	Keys []weft.NodeKey
}

// WireGuard adds an outer IP header, UDP (8 bytes), its own header (16) and an
// authentication tag (16) to each inner packet (the WireGuard paper, section 5.4.6).
const (
	cryptOverheadIPv4 = 20 + 8 + 16 + 16
	cryptOverheadIPv6 = 40 + 8 + 16 + 16
)

// EncryptedMTU is MTU for an encrypted network: underlay - 60 for an IPv4 VTEP,
// - 80 for IPv6. Its errors are those of MTU.
func EncryptedMTU(underlay int, vtep netip.Addr) (int, error) {
	if !vtep.IsValid() {
		return 0, fmt.Errorf("compute MTU of the encrypted overlay: no VTEP address: %w", weft.ErrInvalid)
	}
	mtu := min(underlay, maxMTU) - cryptOverhead(vtep)
	if mtu < minMTU {
		return 0, fmt.Errorf("compute MTU of the encrypted overlay: an underlay of %d bytes leaves %d, less than %d: %w", underlay, mtu, minMTU, weft.ErrInvalid)
	}
	return mtu, nil
}

// EncryptedWay is EncryptedMTU for a path that is narrower than this node's own
// link. WireGuard pads a packet to a multiple of 16 bytes within the MTU of its
// device, which is that of the own link: what is rounded down stays as it is.
func EncryptedWay(path int, vtep netip.Addr) (int, error) {
	const unit = 16 // the WireGuard paper, section 5.4.6
	mtu, err := EncryptedMTU(path, vtep)
	return mtu / unit * unit, err
}

func cryptOverhead(vtep netip.Addr) int {
	if vtep.Unmap().Is6() {
		return cryptOverheadIPv6
	}
	return cryptOverheadIPv4
}
