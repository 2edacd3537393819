package weft

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// DNSConfig says how the tasks of a service look up names. Names of the cluster
// are answered on the node in any case.
type DNSConfig struct {
	// Nameservers are asked for external names, in this order, instead of the
	// node's own; at most MaxNameservers. Those in a subnet of one of the task's
	// networks are asked from the task, all others from the node; a task on
	// internal networks alone has none of the others (CheckInternal).
	Nameservers []netip.Addr `json:",omitzero" cbor:",omitzero"`
	// Search are the domains that clients append, instead of the node's own;
	// the one domain "." is none at all.
	Search []string `json:",omitzero" cbor:",omitzero"`
	// Options go to the client's resolver as they are; without one that says
	// otherwise ndots is 0.
	Options []string `json:",omitzero" cbor:",omitzero"`
}

// Limits of a DNSConfig.
const (
	MaxNameservers = 3  // resolv.conf(5): MAXNS
	maxSearch      = 32 // ours; the old C library reads 6 of them, the new one all
	maxOptions     = 32 // ours
	maxNdots       = 15 // resolv.conf(5): larger ones are capped
	maxHosts       = 1024
)

// Equal reports whether both say the same; nil and empty are equal.
func (c DNSConfig) Equal(o DNSConfig) bool {
	return slices.Equal(c.Nameservers, o.Nameservers) && slices.Equal(c.Search, o.Search) && slices.Equal(c.Options, o.Options)
}

// SearchDomains are the domains to append: the service's, or else the node's.
func (c DNSConfig) SearchDomains(node []string) []string {
	switch {
	case len(c.Search) == 1 && c.Search[0] == ".":
		return nil
	case len(c.Search) > 0:
		return c.Search
	}
	return node
}

// Validate reports the first value that cannot be honoured, under the field
// names of the API, wrapping ErrInvalid.
func (c DNSConfig) Validate(base string) error {
	if n := len(c.Nameservers); n > MaxNameservers {
		return invalid(base+".Nameservers", "%d are given: at most %d are asked", n, MaxNameservers)
	}
	for i, a := range c.Nameservers {
		if why := badNameserver(a); why != "" {
			return invalid(fieldNameserver(base, i), "%s %s", a, why)
		}
		if slices.Contains(c.Nameservers[:i], a) {
			return invalid(fieldNameserver(base, i), "%s is given twice", a)
		}
	}
	if n := len(c.Search); n > maxSearch {
		return invalid(base+".Search", "%d domains are more than %d", n, maxSearch)
	}
	for i, d := range c.Search {
		if d == "." && len(c.Search) == 1 {
			continue
		}
		if err := CheckDomain(d); err != nil {
			return at(fmt.Sprintf("%s.Search[%d]", base, i), err)
		}
	}
	if n := len(c.Options); n > maxOptions {
		return invalid(base+".Options", "%d options are more than %d", n, maxOptions)
	}
	for i, o := range c.Options {
		if err := checkResolverOption(o); err != nil {
			return at(fmt.Sprintf("%s.Options[%d]", base, i), err)
		}
	}
	return nil
}

func fieldNameserver(base string, i int) string { return fmt.Sprintf("%s.Nameservers[%d]", base, i) }

// badNameserver is why an address cannot be a task's nameserver; "" = it can. The node
// asks for the task, so what means another host to the node than to the task is none.
func badNameserver(a netip.Addr) string {
	const instead = "leave it out, and the nodes' own nameservers are asked, or use an address that the nodes reach"
	switch a := a.Unmap(); {
	case !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "is no host: use the address of one"
	case a == netip.AddrFrom4([4]byte{127, 0, 0, 11}):
		return "is the resolver that every task has: leave it out, or name whom that one is to ask"
	case a.IsLoopback():
		return "is a loopback address, which is another host's on each node: " + instead
	case a.Is6() && a.IsLinkLocalUnicast(): // 169.254.0.0/16 is where clouds have theirs
		return "is link-local, which is another host's on each link: " + instead
	case a.Zone() != "":
		return "has a zone: use an address without one"
	}
	return ""
}

// CheckInternal reports the first nameserver that is never asked by a task all of
// whose networks are internal, with these subnets: one outside of them. As Validate.
func (c DNSConfig) CheckInternal(base string, subnets []netip.Prefix) error {
	for i, a := range c.Nameservers {
		if !slices.ContainsFunc(subnets, func(p netip.Prefix) bool { return p.Contains(a.Unmap()) }) {
			return invalid(fieldNameserver(base, i), "%s is outside of the service's networks, which are all internal, so no task could ask it: use the address of a task or service in %s, or add a network that is not internal",
				a, joinPrefixes(subnets))
		}
	}
	return nil
}

func joinPrefixes(ps []netip.Prefix) string {
	words := make([]string, len(ps))
	for i, p := range ps {
		words[i] = p.String()
	}
	return strings.Join(words, " or ")
}

// checkResolverOption: one word, and a number where resolvers stumble over
// anything else. What the word means is up to the image's resolver.
func checkResolverOption(o string) error {
	if o == "" || len(o) > 64 || strings.ContainsFunc(o, func(r rune) bool { return r <= ' ' || r > '~' || r == '#' || r == ';' }) {
		return fmt.Errorf("%w: %q: an option is one word like ndots:1 or rotate", ErrInvalid, o)
	}
	name, value, _ := strings.Cut(o, ":")
	switch name {
	case "ndots", "timeout", "attempts":
		if n, err := strconv.Atoi(value); err != nil || n < 0 || name == "ndots" && n > maxNdots || n > 30 {
			return fmt.Errorf("%w: %q: write a number behind %s:, of at most %d", ErrInvalid, o, name, map[bool]int{true: maxNdots, false: 30}[name == "ndots"])
		}
	}
	return nil
}

// CheckDomain accepts the name of a domain, as a search domain is: labels of
// letters, digits, '-' and '_', joined by dots. Errors wrap ErrInvalid.
func CheckDomain(s string) error {
	if s == "" || len(s) > maxDNSName {
		return fmt.Errorf("%w: %q: a domain has 1 to %d characters", ErrInvalid, s, maxDNSName)
	}
	for label := range strings.SplitSeq(s, ".") {
		bad := label == "" || len(label) > maxDNSLabel || label[0] == '-' || label[len(label)-1] == '-'
		for i := 0; i < len(label) && !bad; i++ {
			bad = !isAlphanumeric(label[i]) && label[i] != '-' && label[i] != '_'
		}
		if bad {
			return fmt.Errorf("%w: %q: a domain is labels of at most %d letters, digits, '-' and '_', joined by dots", ErrInvalid, s, maxDNSLabel)
		}
	}
	return nil
}

// HostEntry is a further line of a container's /etc/hosts.
type HostEntry struct {
	Addr  netip.Addr
	Names []string
}

// Equal reports whether both are the same line.
func (h HostEntry) Equal(o HostEntry) bool {
	return h.Addr == o.Addr && slices.Equal(h.Names, o.Names)
}

// String is the line as Docker's API has it: "ADDRESS NAME…".
func (h HostEntry) String() string {
	return h.Addr.String() + " " + strings.Join(h.Names, " ")
}

// ParseHostEntry reads such a line. Errors wrap ErrInvalid.
func ParseHostEntry(s string) (HostEntry, error) {
	f := strings.Fields(s)
	if len(f) < 2 || strings.ContainsAny(s, "\r\n#") {
		return HostEntry{}, fmt.Errorf("%w: %q: write an address and names, with spaces between", ErrInvalid, s)
	}
	a, err := netip.ParseAddr(f[0])
	if err != nil {
		return HostEntry{}, fmt.Errorf("%w: %q: %q is no address", ErrInvalid, s, f[0])
	}
	h := HostEntry{Addr: a, Names: f[1:]}
	return h, h.check()
}

func (h HostEntry) check() error {
	if !h.Addr.IsValid() || h.Addr.Zone() != "" {
		return fmt.Errorf("%w: %q: the address is missing or has a zone", ErrInvalid, h)
	}
	if len(h.Names) == 0 {
		return fmt.Errorf("%w: %q: a name is missing", ErrInvalid, h)
	}
	for _, n := range h.Names {
		if err := CheckDomain(n); err != nil {
			return err
		}
	}
	return nil
}

func checkHosts(field string, hosts []HostEntry) error {
	if n := len(hosts); n > maxHosts {
		return invalid(field, "%d lines are more than %d", n, maxHosts)
	}
	for i, h := range hosts {
		if err := h.check(); err != nil {
			return at(fmt.Sprintf("%s[%d]", field, i), err)
		}
	}
	return nil
}
