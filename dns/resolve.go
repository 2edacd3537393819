package dns

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/weftnet/weft"
)

// View is what one task may see.
type View struct {
	// Networks of the task, in the order in which they answer for a name
	// that several of them know.
	Networks []weft.ID
	// Self is the task itself: its names answer from the moment it is
	// served, before any record of it came round.
	Self Task
	// Internal marks a task that is on internal networks only. External
	// names are NXDOMAIN to it: a name is a way out, too.
	Internal bool
}

// verdict is the decision about a name.
type verdict uint8

const (
	verdictFound   verdict = iota // exists here; the set may be empty
	verdictAbsent                 // does not exist, and nobody else is asked
	verdictForward                // not ours
)

// lookup decides what name (folded) means to v and, if it is ours, which
// addresses of the family it has.
//
// Not forwarded, though unknown, are names of one label: all of them are
// cluster names by construction, so a misspelt or stopped service would be
// told to the outside, and a resolver that answers everything would send the
// task to a stranger. For the same reason derived names of networks that v
// does not see stay here. A host that lives by search domains is not hurt:
// the client appends them itself and asks again.
func (s *Snapshot) lookup(v *View, name string, want6 bool) (addrs []netip.Addr, ttl uint32, d verdict) {
	d = verdictForward
	for _, id := range v.Networks {
		z := s.networks[id]
		if z == nil {
			continue
		}
		set := z.byName[name]
		if set == nil && z.name != "" {
			if host, ok := strings.CutSuffix(name, "."+z.name); ok {
				set = z.byName[host]
			}
		}
		if set == nil {
			continue
		}
		d, ttl = verdictFound, set.ttl
		if addrs = set.family(want6); len(addrs) > 0 {
			return addrs, ttl, d
		}
	}
	if d == verdictFound {
		return nil, ttl, d
	}
	if set := v.self(name); set != nil {
		return set.family(want6), set.ttl, verdictFound
	}
	if name == "localhost" || strings.HasSuffix(name, ".localhost") { // RFC 6761 section 6.3
		set := rrset{v4: []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}, v6: []netip.Addr{netip.IPv6Loopback()}}
		return set.family(want6), vipTTL, verdictFound
	}
	if _, ours := s.derived[name]; ours || v.Internal || name == "" || !strings.Contains(name, ".") {
		return nil, 0, verdictAbsent
	}
	return nil, 0, verdictForward
}

func (r *rrset) family(want6 bool) []netip.Addr {
	if want6 {
		return r.v6
	}
	return r.v4
}

func (v *View) self(name string) *rrset {
	for _, n := range v.Self.Names {
		if fold(n) == name {
			set := &rrset{ttl: taskTTL}
			for _, a := range v.Self.Addrs {
				set.add(a)
			}
			return set
		}
	}
	return nil
}

// reverse decides about a PTR question. Addresses of overlays, of any network
// of the cluster, and of loopback are never asked of others.
func (s *Snapshot) reverse(v *View, addr netip.Addr) (target string, d verdict) {
	for _, id := range v.Networks {
		if z := s.networks[id]; z != nil {
			if name, ok := z.byAddr[addr]; ok {
				return name, verdictFound
			}
		}
	}
	for _, a := range v.Self.Addrs {
		if a.Unmap() == addr && len(v.Self.Names) > 0 {
			return v.Self.Names[0] + ".", verdictFound
		}
	}
	if addr.IsLoopback() {
		return "localhost.", verdictFound
	}
	if v.Internal {
		return "", verdictAbsent
	}
	for _, p := range s.subnets {
		if p.Contains(addr) {
			return "", verdictAbsent
		}
	}
	for _, z := range s.networks {
		if _, known := z.byAddr[addr]; known {
			return "", verdictAbsent
		}
	}
	return "", verdictForward
}

const (
	arpa4 = ".in-addr.arpa" // RFC 1035 section 3.5
	arpa6 = ".ip6.arpa"     // RFC 3596 section 2.5
)

// reverseAddr parses a folded reverse name of a whole address.
func reverseAddr(name string) (netip.Addr, bool) {
	if host, ok := strings.CutSuffix(name, arpa4); ok {
		return reverse4(host)
	}
	if host, ok := strings.CutSuffix(name, arpa6); ok {
		return reverse6(host)
	}
	return netip.Addr{}, false
}

func reverse4(host string) (netip.Addr, bool) {
	labels := strings.Split(host, ".")
	if len(labels) != 4 {
		return netip.Addr{}, false
	}
	var b [4]byte
	for i, l := range labels {
		n, err := strconv.ParseUint(l, 10, 8)
		if err != nil || (len(l) > 1 && l[0] == '0') {
			return netip.Addr{}, false
		}
		b[3-i] = byte(n)
	}
	return netip.AddrFrom4(b), true
}

func reverse6(host string) (netip.Addr, bool) {
	if len(host) != 63 { // 32 nibbles and 31 dots
		return netip.Addr{}, false
	}
	var b [16]byte
	for i := range 32 {
		if i > 0 && host[2*i-1] != '.' {
			return netip.Addr{}, false
		}
		n, err := strconv.ParseUint(host[2*i:2*i+1], 16, 4)
		if err != nil {
			return netip.Addr{}, false
		}
		b[15-i/2] |= byte(n) << (4 * (i % 2))
	}
	return netip.AddrFrom16(b).Unmap(), true
}
