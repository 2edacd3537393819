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

// HasIPv6 reports whether the network has, or is to have, addresses of IPv6.
func (n *NetworkSpec) HasIPv6() bool { return n.IPv6 }
