package weft

import (
	"encoding/base64"
	"fmt"
	"net"
)

// WireGuardPort and the port after it are the two UDP ports of encrypted
// networks unless a node says otherwise, one for each of the two devices between
// which keys are changed. They are open only while a node carries an encrypted
// network.
const WireGuardPort uint16 = 51820

// OptionEncrypted is the driver option of a network whose traffic between
// nodes is encrypted; its value is "" or "true".
const OptionEncrypted = "encrypted"

// Encrypted reports whether the network's traffic between nodes is encrypted.
func (s NetworkSpec) Encrypted() bool {
	v, ok := s.Options[OptionEncrypted]
	return ok && (v == "" || v == "true")
}

// checkEncrypted takes what Encrypted takes and nothing else. Docker encrypts
// with any value, "false" too; here that is refused and not guessed at.
func checkEncrypted(_ *NetworkSpec, value string) error {
	if value != "" && value != "true" {
		return fmt.Errorf("%w: %q: leave the value out, or leave the option out for a network that is not encrypted", ErrInvalid, value)
	}
	return nil
}

// PublicKey is a Curve25519 public key (RFC 7748), as WireGuard uses it.
type PublicKey [32]byte

// String is the key in base64, as the wg command prints it.
func (k PublicKey) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// MarshalText implements encoding.TextMarshaler, for JSON.
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText is the inverse of MarshalText; what is no key is ErrInvalid.
func (k *PublicKey) UnmarshalText(b []byte) error {
	raw, err := base64.StdEncoding.DecodeString(string(b))
	if err != nil || len(raw) != len(k) {
		return fmt.Errorf("public key %q is not 32 bytes in base64: %w", b, ErrInvalid)
	}
	copy(k[:], raw)
	return nil
}

// NodeKey is the public half of a node's key of one epoch, and the UDP port
// where it is used. The private half never leaves the node.
type NodeKey struct {
	Epoch  uint64
	Public PublicKey
	Port   uint16
}

// KeySlots is how many keys a node has in use at once: that of the current
// epoch and that of the one before it.
const KeySlots = 2

// Slot is the device, 0 or 1, that uses the key.
func (k NodeKey) Slot() int { return int(k.Epoch % KeySlots) }

// CryptNetNS is the name of the namespace file in which a node's WireGuard
// devices live; no link of the underlay is in it.
func CryptNetNS(node ID) string { return fmt.Sprintf("weft-%s-crypt", cut(string(node), 8)) }

// CryptLink is the WireGuard device of a slot inside that namespace.
func CryptLink(slot int) string { return fmt.Sprintf("wg%d", slot) }

// UplinkName is an encrypted network's way out of its bridge, where another
// network has its VXLAN device; RouterName is the other end, in CryptNetNS.
func UplinkName(vni uint32) string { return fmt.Sprintf("wu%d", vni) }

// RouterName: see UplinkName.
func RouterName(vni uint32) string { return fmt.Sprintf("wr%d", vni) }

// RouterMAC is the hardware address of that end: it answers for all endpoints
// on other nodes. It is of the class of nodes' legs (NodeMAC), which are on the
// ingress network only, and that is never encrypted: so it is no endpoint's and
// no service's.
func RouterMAC(vni uint32) net.HardwareAddr {
	return net.HardwareAddr{0x1a, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni)}
}
