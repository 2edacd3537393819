package dns

import (
	"bytes"
	"hash/maphash"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/publicsuffix"

	"github.com/weftnet/weft"
)

// View is what one task may see, and how it asks.
type View struct {
	// Networks of the task, in the order in which they answer for a name
	// that several of them know.
	Networks []weft.ID
	// Self is the task itself, of service Service: its names answer from the
	// moment it is served, before any record of it came round and whether
	// it is ready or not.
	Self    Task
	Service string
	// Internal marks a task that is on internal networks only. External
	// names are NXDOMAIN to it: a name is a way out, too. Only nameservers of its
	// own that are near are asked.
	Internal bool
	// Search are the search domains that the task's client appends: a name of
	// the cluster with one of them behind is answered here.
	Search []string
	// HostSearch are the search domains of the host, which Search may take the
	// place of: what ends in one of them is a real name, also where a network of
	// the task has the name of its last labels.
	HostSearch []string
	// Nameservers are asked for external names instead of the host's, the
	// first three of them; none = the host's.
	Nameservers []netip.Addr
	// Near are the subnets of the task's networks. A nameserver of its own in one
	// of them is asked by Dial, from inside the task's namespace: it is a task or a
	// service there. Dial is as Config.Dial; nil = all are asked from the host's side.
	Near []Near
	Dial Dial
}

// Near is a subnet of one of a task's networks.
type Near struct {
	Network weft.ID
	Subnet  netip.Prefix
}

// view is View as questions need it. It is immutable.
type view struct {
	networks []weft.ID
	own      map[string]*rrset // the task's own names, folded
	service  string            // its own, folded; "" = none
	offer    offer             // of service, as far as what is below it goes
	addrs    []netip.Addr
	ptr      string   // target of PTR of addrs; "" = none
	search   []string // folded, each with a dot before it
	real     []string // search and the host's, in the same form: names outside
	internal bool     // nobody is asked
	servers  nameservers
}

func compile(v *View) *view {
	out := &view{networks: v.Networks, own: map[string]*rrset{}, servers: newNameservers(v)}
	out.internal = v.Internal && len(out.servers.list) == 0
	out.service = fold(v.Service)
	out.offer.isPublic = out.service != "" && isPublic(out.service)
	set := &rrset{rank: rankTask, ttl: taskTTL}
	for _, a := range v.Self.Addrs {
		set.add(a)
		out.addrs = append(out.addrs, a.Unmap())
	}
	derived := *set
	derived.derived = true
	for i, n := range v.Self.Names {
		out.own[fold(n)] = set
		if i == 0 { // as in addService
			out.own[fold(n)] = &derived
		}
	}
	if at := v.Self.place(); at != "" && out.service != "" {
		out.own[at+"."+out.service] = &derived
	}
	if len(v.Self.Names) > 0 {
		out.ptr = v.Self.Names[0] + "."
	}
	out.search = dotted(v.Search)
	out.real = append(dotted(v.HostSearch), out.search...)
	return out
}

// dotted are domains, folded, each with a dot before it.
func dotted(domains []string) (out []string) {
	for _, d := range domains {
		if d = fold(d); d != "" {
			out = append(out, "."+d)
		}
	}
	return out
}

// verdict is the decision about a name.
type verdict uint8

const (
	verdictFound   verdict = iota // exists here; the set may be empty
	verdictAbsent                 // does not exist, and nobody else is asked
	verdictForward                // not ours
)

// lookup decides what name (folded) means to v and, if it is ours, which
// addresses of the family it has. It allocates nothing.
//
// Not forwarded, though unknown, are names of one label: all of them are
// cluster names by construction, so a misspelt or stopped service would be
// told to the outside, and a resolver that answers everything would send the
// task to a stranger. For the same reason derived names of networks that v
// does not see stay here, and what ends in the name of a network of v. A
// host that lives by search domains is not hurt: the client appends them itself and
// asks again. What it then asks about a name that is known here is answered here:
// clients append domains to names that exist, too, if they have no address of the
// family.
func (s *Snapshot) lookup(v *view, name []byte, want6 bool) (addrs []netip.Addr, ttl uint32, d verdict) {
	set := s.find(v, name, want6)
	if set == nil {
		set = localhost(name)
	}
	if set != nil {
		return set.family(want6), set.ttl, verdictFound
	}
	plain := withoutSRV(name)
	if s.isDerived(v, name) || isOneLabel(plain) || s.isBelow(v, name) {
		return nil, 0, verdictAbsent
	}
	for _, d := range v.search {
		rest, ok := cutSuffix(name, d)
		if !ok {
			continue
		}
		if set := s.find(v, rest, want6); set != nil {
			return set.family(want6), set.ttl, verdictFound
		}
		if s.isDerived(v, rest) {
			return nil, 0, verdictAbsent
		}
	}
	if v.internal || s.isUnder(v, plain) {
		return nil, 0, verdictAbsent
	}
	return nil, 0, verdictForward
}

// find returns what name, in full or without the name of a network of v, has on
// the first of these networks that has an address of the family for it; else
// what it has on the first that knows it, which is then empty. The task's own
// names stand in for what nobody else holds. nil = unknown.
func (s *Snapshot) find(v *view, name []byte, want6 bool) *rrset {
	var first *rrset
	held := false
	for _, id := range v.networks {
		z := s.networks[id]
		if z == nil {
			continue
		}
		set := z.name(name)
		if set == nil && z.suffix != "" {
			if host, ok := cutSuffix(name, z.suffix); ok {
				set = z.name(host)
			}
		}
		if set == nil {
			continue
		}
		if len(set.family(want6)) > 0 {
			return set
		}
		held = held || !set.isEmpty()
		if first == nil {
			first = set
		}
	}
	if !held {
		if own := s.own(v, name); own != nil {
			return own
		}
	}
	return first
}

// own is what name means if it is the task's own, in full or with one of its
// networks behind.
func (s *Snapshot) own(v *view, name []byte) *rrset {
	if set := v.own[string(name)]; set != nil {
		return set
	}
	for _, id := range v.networks {
		if z := s.networks[id]; z != nil && z.suffix != "" {
			if host, ok := cutSuffix(name, z.suffix); ok && v.own[string(host)] != nil {
				return v.own[string(host)]
			}
		}
	}
	return nil
}

// localhost answers for itself (RFC 6761 section 6.3).
func localhost(name []byte) *rrset {
	const host = "localhost"
	rest, ok := cutSuffix(name, host)
	if !ok || len(rest) > 0 && rest[len(rest)-1] != '.' {
		return nil
	}
	return &loopback
}

var loopback = rrset{ttl: vipTTL, v4: []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}, v6: []netip.Addr{netip.IPv6Loopback()}}

// isDerived reports whether name, which nobody of v's has, is derived on any network, or is
// the SRV name of such, or of what v has: SRV is answered for services alone.
func (s *Snapshot) isDerived(v *view, name []byte) bool {
	plain := withoutSRV(name)
	if len(plain) < len(name) {
		if set := s.find(v, plain, false); set != nil && set.derived {
			return true
		}
	}
	return s.hasDerived(plain)
}

func (s *Snapshot) hasDerived(name []byte) bool {
	hash := maphash.Bytes(s.seed, name)
	for _, z := range s.networks {
		if set := z.shard(hash).byName[string(name)]; set != nil && set.derived {
			return true
		}
	}
	return false
}

// isBelow reports whether name ends in the name of a network of v, and no real names do:
// it is then nobody else's, and if it is unknown it does not exist.
func (s *Snapshot) isBelow(v *view, name []byte) bool {
	for _, id := range v.networks {
		z := s.networks[id]
		if z == nil || z.suffix == "" || z.isPublic {
			continue
		}
		if host, ok := cutSuffix(name, z.suffix); ok && !v.isReal(name[len(host):]) {
			return true
		}
	}
	return false
}

// isUnder reports whether name, which is unknown, ends in the name of a service or alias
// of v's networks: a slot that is not there (yet), a host without a task, a misspelt
// derived name. Where real names end in it, too, only the tasks and slots of a service
// are ours, also with a network behind. The name itself, and what is known with a search
// domain behind, were looked for before.
func (s *Snapshot) isUnder(v *view, name []byte) bool {
	if place, o := s.under(v, "", name); o != nil && (o.owns(place) || !o.isPublic && !v.isReal(name[len(place):])) {
		return true
	}
	for _, id := range v.networks {
		if z := s.networks[id]; z != nil && z.suffix != "" {
			if host, ok := cutSuffix(name, z.suffix); ok {
				if place, o := s.under(v, id, host); o != nil && o.owns(place) {
					return true
				}
			}
		}
	}
	return false
}

// under takes the name of a service or alias off the end of name, one of network, or, if
// that is "", of any of v's networks; a service goes before an alias. nil = there is none.
func (s *Snapshot) under(v *view, network weft.ID, name []byte) (place []byte, o *offer) {
	dot := bytes.LastIndexByte(name, '.')
	if dot < 0 {
		return nil, nil
	}
	place, name = name[:dot], name[dot+1:]
	if v.service != "" && string(name) == v.service {
		return place, &v.offer
	}
	for _, id := range v.networks {
		z := s.networks[id]
		if z == nil || network != "" && id != network {
			continue
		}
		if has := z.offered(name); has != nil && (o == nil || has.rank < o.rank) {
			o = has
		}
	}
	return place, o
}

// owns reports whether place is such as the cluster itself puts before the name of the
// service: tasks, or a slot.
func (o *offer) owns(place []byte) bool {
	if o.rank != rankService || len(place) == 0 {
		return false
	}
	for _, c := range place {
		if c < '0' || c > '9' {
			return string(place) == "tasks"
		}
	}
	return place[0] != '0'
}

// isReal reports whether a search domain is, or ends in, the name of a network or service
// (suffix, with its dot): a company's own top domain is in no public list.
func (v *view) isReal(suffix []byte) bool {
	for _, d := range v.real {
		if n := len(d) - len(suffix); n >= 0 && d[n:] == string(suffix) {
			return true
		}
	}
	return false
}

// isPublic reports whether the name of a network or service (folded) ends in a top
// domain of ICANN's: real names end in it, too. The list is asked for a name below, as
// some top domains have rules for those alone (*.ck).
func isPublic(name string) bool {
	_, icann := publicsuffix.PublicSuffix("x." + name[strings.LastIndexByte(name, '.')+1:])
	return icann
}

// domains are what may stand behind a name of the cluster when v asks: the search
// domains, and the names of v's networks.
func (s *Snapshot) domains(v *view) []string {
	out := slices.Clone(v.search)
	for _, id := range v.networks {
		if z := s.networks[id]; z != nil && z.suffix != "" {
			out = append(out, z.suffix)
			for _, d := range v.search {
				out = append(out, z.suffix+d)
			}
		}
	}
	return out
}

// isOneLabel: the root has none, and is nobody's business outside either.
func isOneLabel(name []byte) bool { return bytes.IndexByte(name, '.') < 0 }

// withoutSRV is what stands behind port and protocol: SRV names are ours as that is.
func withoutSRV(name []byte) []byte {
	if _, _, rest, ok := cutSRV(name); ok {
		return rest
	}
	return name
}

// cutSuffix is bytes.CutSuffix with a string.
func cutSuffix(b []byte, suffix string) ([]byte, bool) {
	if n := len(b) - len(suffix); n >= 0 && string(b[n:]) == suffix {
		return b[:n], true
	}
	return b, false
}

func (r *rrset) family(want6 bool) []netip.Addr {
	if want6 {
		return r.v6
	}
	return r.v4
}

// cutSRV takes apart _PORT._PROTOCOL.REST (RFC 2782).
func cutSRV(name []byte) (port, proto, rest []byte, ok bool) {
	port, rest, ok = bytes.Cut(name, []byte{'.'})
	if !ok || len(port) < 2 || port[0] != '_' {
		return nil, nil, nil, false
	}
	proto, rest, ok = bytes.Cut(rest, []byte{'.'})
	if !ok || len(proto) < 2 || proto[0] != '_' || len(rest) == 0 {
		return nil, nil, nil, false
	}
	return port[1:], proto[1:], rest, true
}

// service decides what the SRV name (folded) means to v: the port and the ready
// tasks. A port that the service does not name and that is no number does not
// exist. Names that are no SRV names, and those of nothing known here, are left
// to lookup: found is false.
func (s *Snapshot) service(v *view, name []byte) (port uint16, tasks []*instance, d verdict, found bool) {
	portName, proto, rest, ok := cutSRV(name)
	if !ok {
		return 0, nil, 0, false
	}
	o := s.offered(v, rest)
	for _, d := range v.search {
		if short, ok := cutSuffix(rest, d); o == nil && ok {
			o = s.offered(v, short)
		}
	}
	if o == nil {
		return 0, nil, 0, false
	}
	if port = o.port(string(portName), weft.Protocol(proto)); port == 0 {
		return 0, nil, verdictAbsent, true
	}
	return port, o.tasks, verdictFound, true
}

func (s *Snapshot) offered(v *view, name []byte) *offer {
	for _, id := range v.networks {
		z := s.networks[id]
		if z == nil {
			continue
		}
		if o := z.offered(name); o != nil {
			return o
		}
		if host, ok := cutSuffix(name, z.suffix); ok && z.suffix != "" {
			if o := z.offered(host); o != nil {
				return o
			}
		}
	}
	return nil
}

// port finds the port that name (folded) stands for: one of that name, else the
// number. 0 = none.
func (o *offer) port(name string, proto weft.Protocol) uint16 {
	if proto != weft.TCP && proto != weft.UDP && proto != weft.SCTP {
		return 0
	}
	for _, p := range o.ports {
		if p.Protocol == proto && strings.EqualFold(p.Name, name) {
			return p.Port
		}
	}
	n, err := strconv.ParseUint(name, 10, 16)
	if err != nil || name[0] < '1' || name[0] > '9' { // neither 0 nor 080 nor +80
		return 0
	}
	return uint16(n)
}

// reverse decides about a PTR question. Addresses of overlays, of any network
// of the cluster, and of loopback are never asked of others.
func (s *Snapshot) reverse(v *view, addr netip.Addr) (target string, d verdict) {
	for _, id := range v.networks {
		if z := s.networks[id]; z != nil {
			if name, ok := z.target(addr); ok {
				return name, verdictFound
			}
		}
	}
	for _, a := range v.addrs {
		if a == addr && v.ptr != "" {
			return v.ptr, verdictFound
		}
	}
	if addr.IsLoopback() {
		return "localhost.", verdictFound
	}
	if v.internal || s.isOverlay(netip.PrefixFrom(addr, addr.BitLen())) {
		return "", verdictAbsent
	}
	for _, z := range s.networks {
		if _, known := z.target(addr); known {
			return "", verdictAbsent
		}
	}
	return "", verdictForward
}

const (
	arpa4 = "in-addr.arpa" // RFC 1035 section 3.5
	arpa6 = "ip6.arpa"     // RFC 3596 section 2.5
)

// reverseNet reads a folded reverse name from its end: the addresses that it is
// about, and whether it is just the name of them, with nothing before it. A
// whole address of IPv4 in IPv6 is one of IPv4.
func reverseNet(name string) (p netip.Prefix, exact, ok bool) {
	width, base, size := 8, 10, 4
	rest, ok := cutDomain(name, arpa4)
	if !ok {
		width, base, size = 4, 16, 16
		if rest, ok = cutDomain(name, arpa6); !ok {
			return netip.Prefix{}, false, false
		}
	}
	var b [16]byte
	bits := 0
	for rest != "" && bits < 8*size {
		label := rest[strings.LastIndexByte(rest, '.')+1:]
		n, err := strconv.ParseUint(label, base, width)
		if err != nil || len(label) > 1 && (label[0] == '0' || base == 16) || label[0] == '+' {
			break
		}
		b[bits/8] |= byte(n) << (8 - width - bits%8)
		bits += width
		rest = strings.TrimSuffix(rest[:len(rest)-len(label)], ".")
	}
	a, _ := netip.AddrFromSlice(b[:size])
	if a.Is4In6() && bits == 128 {
		return netip.PrefixFrom(a.Unmap(), 32), rest == "", true
	}
	return netip.PrefixFrom(a, bits), rest == "", true
}

// cutDomain takes domain, and the dot before it, from the end of name.
func cutDomain(name, domain string) (rest string, ok bool) {
	if name == domain {
		return "", true
	}
	return strings.CutSuffix(name, "."+domain)
}

// isOverlay reports whether all of p is of networks of the cluster, or of
// loopback.
func (s *Snapshot) isOverlay(p netip.Prefix) bool {
	for _, n := range s.subnets {
		if n.Bits() <= p.Bits() && n.Contains(p.Addr()) {
			return true
		}
	}
	return p.Addr().IsLoopback() && (p.Addr().Is4() && p.Bits() >= 8 || p.Bits() == 128)
}
