package weft

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// OptionMTU bounds the MTU of a network's ports from above, in bytes of the
// inner IP packet. Docker's key (moby, daemon/libnetwork/netlabel, DriverMTU).
const OptionMTU = "com.docker.network.driver.mtu"

// OptionEncap says how a network's packets go to other nodes: always in VXLAN
// (EncapVXLAN, as without the option), or without encapsulation where that is
// proven to arrive (EncapNative), or so only where the sender's link does not cut
// VXLAN's large packets itself (EncapAuto).
const (
	OptionEncap = "encap"

	EncapVXLAN  = "vxlan"
	EncapNative = "native"
	EncapAuto   = "auto"
)

func encaps() []string { return []string{EncapVXLAN, EncapNative, EncapAuto} }

// Bounds of OptionMTU. Every IPv4 host takes packets of 576 bytes (RFC 791
// section 3.1), and Linux answers "too big" only from there on; every IPv6 link
// carries 1280 (RFC 8200 section 5). An IP length holds 65535.
const (
	minNetworkMTU     = 576
	minNetworkMTUIPv6 = 1280
	maxNetworkMTU     = 65535
)

// networkOption is one key that a network may be made with.
type networkOption struct {
	key string
	// use is the sentence for somebody who wrote another key.
	use string
	// check refuses a value with what to write instead, or says nothing.
	check func(n *NetworkSpec, value string) error
}

// networkOptions is the whole list: what is not in it is refused by name.
func networkOptions() []networkOption {
	return []networkOption{
		{OptionMTU, OptionMTU + "=BYTES", checkNetworkMTU},
		{OptionEncrypted, OptionEncrypted, checkEncrypted},
		{OptionEncap, OptionEncap + "=" + strings.Join(encaps(), "|"), checkEncap},
	}
}

// CheckOptions judges the network's options alone. The error names the key and
// says what to do; it wraps ErrUnsupported for a key that no option has, and
// ErrInvalid for a wrong value.
func (n *NetworkSpec) CheckOptions() error {
	all := networkOptions()
	for _, key := range slices.Sorted(maps.Keys(n.Options)) {
		field := fmt.Sprintf("Options[%q]", key)
		i := slices.IndexFunc(all, func(o networkOption) bool { return o.key == key })
		if i < 0 {
			var known []string
			for _, o := range all {
				known = append(known, o.use)
			}
			return at(field, fmt.Errorf("%w: there is no such option: leave it out or use %s", ErrUnsupported, strings.Join(known, ", ")))
		}
		if err := all[i].check(n, n.Options[key]); err != nil {
			return at(field, err)
		}
	}
	return nil
}

func checkNetworkMTU(n *NetworkSpec, value string) error {
	mtu, err := strconv.Atoi(value)
	switch {
	case err != nil || value != strconv.Itoa(mtu):
		return fmt.Errorf("%w: %q: write a number of bytes, as in 1400", ErrInvalid, value)
	case mtu < minNetworkMTU || mtu > maxNetworkMTU:
		return fmt.Errorf("%w: %d: use %d to %d bytes", ErrInvalid, mtu, minNetworkMTU, maxNetworkMTU)
	case mtu < minNetworkMTUIPv6 && n.HasIPv6():
		return fmt.Errorf("%w: %d: IPv6 needs %d bytes (RFC 8200): use at least that, or a network without IPv6", ErrInvalid, mtu, minNetworkMTUIPv6)
	}
	return nil
}

// MTU is the bound that OptionMTU sets, in bytes; 0 = none but the underlay's.
// A stored network has a valid one.
func (n *NetworkSpec) MTU() int {
	mtu, err := strconv.Atoi(n.Options[OptionMTU])
	if err != nil {
		return 0
	}
	return mtu
}

func checkEncap(n *NetworkSpec, value string) error {
	switch {
	case !slices.Contains(encaps(), value):
		return fmt.Errorf("%w: %q: write one of %s", ErrInvalid, value, strings.Join(encaps(), ", "))
	case n.Encrypted():
		return fmt.Errorf("%w: %q: an encrypted network has a tunnel of its own: leave out this option, or %q", ErrInvalid, value, OptionEncrypted)
	case n.Ingress && value != EncapVXLAN:
		return fmt.Errorf("%w: %q: packets of the ingress network keep the addresses of services, and need VXLAN: leave the option out", ErrInvalid, value)
	}
	return nil
}

// Encap is how the network's packets go to other nodes: one of the values of
// OptionEncap.
func (n *NetworkSpec) Encap() string {
	if v, ok := n.Options[OptionEncap]; ok {
		return v
	}
	return EncapVXLAN
}

// HasIPv6 reports whether the network has, or is to have, addresses of IPv6.
func (n *NetworkSpec) HasIPv6() bool { return n.IPv6 }
