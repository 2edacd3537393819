package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft"
)

// maxListed bounds how many obstacles an error names: enough to see a pattern,
// few enough to read.
const maxListed = 8

// minHostBits: a subnet smaller than /29 has, after network, broadcast and
// gateway, at most one address for tasks and none for a service.
const minHostBits = 3

// Pools are the ranges that networks without a subnet of their own are cut
// from, in order of preference.
type Pools struct {
	Prefixes   []netip.Prefix
	MaskLength int // bits of each network cut
}

// Validate refuses pools that nothing can be cut from, and pools that overlap
// each other. Errors wrap weft.ErrInvalid, or weft.ErrUnsupported for IPv6:
// those networks are cut from the cluster's own range (Pick6).
func (p Pools) Validate() error {
	if len(p.Prefixes) == 0 {
		return fmt.Errorf("%w: no address pool given", weft.ErrInvalid)
	}
	for i, pool := range p.Prefixes {
		if pool.Addr().Is6() {
			return fmt.Errorf("address pool %s: %w: IPv6 networks are cut from a range that the cluster makes for itself; leave it out, and give a network its own --subnet where you need another range", pool, weft.ErrUnsupported)
		}
		if err := checkRange(pool); err != nil {
			return fmt.Errorf("address pool %s: %w", pool, err)
		}
		if p.MaskLength < pool.Bits() || p.MaskLength > pool.Addr().BitLen()-minHostBits {
			return fmt.Errorf("%w: mask length %d does not fit address pool %s: use %d to %d",
				weft.ErrInvalid, p.MaskLength, pool, pool.Bits(), pool.Addr().BitLen()-minHostBits)
		}
		for _, other := range p.Prefixes[:i] {
			if pool.Overlaps(other) {
				return fmt.Errorf("%w: address pool %s overlaps address pool %s", weft.ErrInvalid, pool, other)
			}
		}
	}
	return nil
}

// Pick returns the first subnet of MaskLength bits, in the order of the pools,
// that overlaps none of used. When there is none the error wraps
// weft.ErrUnavailable and lists what was in the way. used may hold any
// prefixes, host bits set or not, overlapping or not, of either family.
func (p Pools) Pick(used []netip.Prefix) (netip.Prefix, error) {
	if err := p.Validate(); err != nil {
		return netip.Prefix{}, err
	}
	return p.pick(used)
}

// SubnetBits6 is the length of every IPv6 subnet that weft chooses (RFC 4291
// section 2.5.4: interface identifiers have 64 bits).
const SubnetBits6 = 64

// Pick6 is Pick for the IPv6 range of a cluster: it returns the first free /64.
func Pick6(ula netip.Prefix, used []netip.Prefix) (netip.Prefix, error) {
	if !ula.IsValid() || !ula.Addr().Is6() || ula.Bits() > SubnetBits6 {
		return netip.Prefix{}, fmt.Errorf("%w: %s is not an IPv6 range of a cluster", weft.ErrInvalid, ula)
	}
	return Pools{Prefixes: []netip.Prefix{ula.Masked()}, MaskLength: SubnetBits6}.pick(used)
}

func (p Pools) pick(used []netip.Prefix) (netip.Prefix, error) {
	taken := make([]netip.Prefix, 0, len(used))
	for _, u := range used {
		if u.IsValid() {
			taken = append(taken, canonical(u))
		}
	}
	slices.SortFunc(taken, comparePrefix)
	for _, pool := range p.Prefixes {
		if s, ok := firstGap(pool, p.MaskLength, taken); ok {
			return s, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("%w: no free /%d left in the address pools %s; in the way: %s; give a subnet, or pools that are not in use",
		weft.ErrUnavailable, p.MaskLength, join(p.Prefixes), join(p.inTheWay(taken)))
}

// firstGap walks pool from its start and jumps over what is taken (sorted).
// Prefixes either nest or are apart, so the end of the larger of two that
// overlap is always a boundary of the mask length.
func firstGap(pool netip.Prefix, bits int, taken []netip.Prefix) (netip.Prefix, bool) {
	at := pool.Addr()
	for _, t := range taken {
		if !t.Overlaps(pool) || Last(t).Less(at) {
			continue
		}
		for {
			cand := netip.PrefixFrom(at, bits)
			if !cand.Overlaps(t) {
				if Last(cand).Less(t.Addr()) {
					return cand, true
				}
				break
			}
			at = Last(cand).Next()
			if end := Last(t); !end.Less(at) {
				at = end.Next()
			}
			if !at.IsValid() || !pool.Contains(at) {
				return netip.Prefix{}, false
			}
		}
	}
	return netip.PrefixFrom(at, bits), true
}

func (p Pools) inTheWay(taken []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(taken), func(t netip.Prefix) bool {
		return !slices.ContainsFunc(p.Prefixes, t.Overlaps)
	})
}

// Named is a range in use and by what: "network web", "host route on node h2".
type Named struct {
	Prefix netip.Prefix
	What   string
}

// CheckSubnet says whether want may become the subnet of a network. Errors:
// weft.ErrInvalid (host bits set, too small, not a unicast range),
// weft.ErrConflict (overlaps something in used, which is named).
func CheckSubnet(want netip.Prefix, used []Named) error {
	if err := checkRange(want); err != nil {
		return fmt.Errorf("subnet %s: %w", want, err)
	}
	if most := want.Addr().BitLen() - minHostBits; want.Bits() > most {
		return fmt.Errorf("%w: subnet %s is too small: use /%d or larger", weft.ErrInvalid, want, most)
	}
	for _, u := range used {
		if u.Prefix.IsValid() && canonical(u.Prefix).Overlaps(want) {
			return fmt.Errorf("%w: subnet %s overlaps %s (%s): use another range, or give none", weft.ErrConflict, want, canonical(u.Prefix), u.What)
		}
	}
	return nil
}

// notUnicast are ranges that no host may hold an address of, or none that is
// good beyond its link.
func notUnicast() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/8"),      // RFC 1122 section 3.2.1.3: this network
		netip.MustParsePrefix("127.0.0.0/8"),    // RFC 1122 section 3.2.1.3: loopback
		netip.MustParsePrefix("169.254.0.0/16"), // RFC 3927: link-local
		netip.MustParsePrefix("224.0.0.0/3"),    // RFC 5771 multicast, RFC 1112 section 4 reserved
		netip.MustParsePrefix("::/8"),           // RFC 4291 section 2.4: unspecified, loopback, IPv4-mapped
		netip.MustParsePrefix("fe80::/10"),      // RFC 4291 section 2.5.6: link-local
		netip.MustParsePrefix("ff00::/8"),       // RFC 4291 section 2.7: multicast
	}
}

func checkRange(p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return fmt.Errorf("%w: not an address range", weft.ErrInvalid)
	case p != p.Masked():
		return fmt.Errorf("%w: has host bits set: use %s", weft.ErrInvalid, p.Masked())
	}
	for _, bad := range notUnicast() {
		if bad.Overlaps(p) {
			return fmt.Errorf("%w: overlaps %s, which hosts cannot use", weft.ErrInvalid, bad)
		}
	}
	return nil
}

// Last returns the highest address of a prefix: of an IPv4 subnet its
// broadcast address. p must be valid.
func Last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b) // 4 or 16 bytes, as they came
	return a
}

// canonical clears host bits and takes an IPv4-mapped prefix for what it is.
func canonical(p netip.Prefix) netip.Prefix {
	if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p.Masked()
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

func join(ps []netip.Prefix) string {
	var b strings.Builder
	for i, p := range ps {
		if i == maxListed {
			fmt.Fprintf(&b, " and %d more", len(ps)-i)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(p.String())
	}
	return b.String()
}
