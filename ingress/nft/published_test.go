package nft

import (
	"cmp"
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/nftables/binaryutil"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Address plan: the host has 192.0.2.1, 192.0.2.2, 127.0.0.1, 2001:db8::1 and
// 2001:db8::2; clients are 198.51.100.7 and 203.0.113.9 (2001:db8:7::7, 2001:db8:8::8).
var (
	hostAddrs = []netip.Addr{
		netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("127.0.0.1"),
		netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"),
	}
	clientAddrs = []netip.Addr{
		netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("255.255.255.255"),
		netip.MustParseAddr("2001:db8:7::7"), netip.MustParseAddr("2001:db8:8::8"),
	}
	clientNets = []netip.Prefix{
		netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("224.0.0.0/3"), netip.MustParsePrefix("0.0.0.0/1"), netip.MustParsePrefix("2001:db8:7::/48"), netip.MustParsePrefix("8000::/1"),
	}
)

// drawSome are some of a list.
func drawSome[T any](r *rapid.T, of []T, what string) (out []T) {
	for _, x := range of {
		if rapid.IntRange(0, 2).Draw(r, what) == 0 {
			out = append(out, x)
		}
	}
	return out
}

// drawApart are published ports of which no two meet at one address: what the leader
// allows.
func drawApart(r *rapid.T) (out []ingress.Published) {
	for range rapid.IntRange(0, 12).Draw(r, "ports") {
		p := ingress.Published{
			Protocol: rapid.SampledFrom([]weft.Protocol{weft.TCP, weft.UDP}).Draw(r, "protocol"), Port: rapid.Uint16Range(65528, 65535).Draw(r, "port"),
			HideClient: rapid.Bool().Draw(r, "hide"), Allow: drawSome(r, clientNets, "allowed"), Backends: drawBackends(r),
		}
		p.Count = rapid.Uint16Range(0, 65535-p.Port+1).Draw(r, "count")
		p.Target = rapid.SampledFrom([]uint16{p.Port, 80}).Draw(r, "target")
		if rapid.IntRange(0, 3).Draw(r, "bound") > 0 {
			p.IPs = drawSome(r, hostAddrs, "address")
		}
		spec := specOf(p)
		if !slices.ContainsFunc(out, func(o ingress.Published) bool { other := specOf(o); return spec.Clashes(&other) }) {
			out = append(out, p)
		}
	}
	return out
}

func specOf(p ingress.Published) weft.PortSpec {
	return weft.PortSpec{Protocol: p.Protocol, Published: p.Port, Count: p.Count, IPs: p.IPs}
}

// asking is what a packet asks.
type asking struct {
	proto      weft.Protocol
	at, client netip.Addr
	port       uint16
}

// meaning is what becomes of it: to is none if the host has it.
type meaning struct {
	to       string // backends with their port, in order
	isHidden bool
}

// rules reads the sets as the kernel's rules do.
type rules struct {
	f  *family
	in map[string]map[string]string
}

func rulesOf(s publishedSets) rules {
	out := rules{s.f, map[string]map[string]string{}}
	for _, set := range s.all() {
		out.in[set.name] = set.elements
	}
	return out
}

// interval is the data of the one that key is in.
func (r rules) interval(set, key string) (string, bool) {
	best, data := "", intervalEnd
	for k, v := range r.in[set] {
		start := strings.TrimSuffix(k, endMark)
		if start <= key && (start > best || start == best && v != intervalEnd) {
			best, data = start, v
		}
	}
	return data, data != intervalEnd
}

// ruleKey is the key of a rule of a kind.
func (r rules) ruleKey(a asking, k kind) (string, bool) {
	port, everywhere := portOf(a.proto, a.port), string(make([]byte, r.f.bytes))
	switch {
	case k.isBound && k.isRange:
		d, ok := r.interval("spans", raw(a.at)+port)
		return port[:4] + d, ok
	case k.isBound:
		d, ok := r.in["at"][port+raw(a.at)]
		return port + d, ok
	case k.isRange:
		d, ok := r.interval("ranges", port)
		return port[:4] + d + "\x00\x00" + everywhere, ok
	}
	return port + everywhere, true
}

func (r rules) means(a asking) (m meaning) {
	for _, k := range kinds() {
		key, ok := r.ruleKey(a, k)
		if _, hides := r.in["hidden"][key]; ok && hides {
			m.isHidden = true
		}
	}
	for _, k := range kinds() {
		key, ok := r.ruleKey(a, k)
		if !ok {
			continue
		}
		if _, limited := r.in["limited"][key]; limited {
			if _, ok := r.interval("allowed", key+raw(a.client)); !ok {
				return meaning{}
			}
		}
		if way, ok := r.in[k.ports()][key]; ok {
			m.to = r.pick(a, way)
			return m
		}
	}
	return meaning{}
}

// pick is what the chain of a way finds.
func (r rules) pick(a asking, way string) string {
	port, isBound := strings.CutPrefix(way, pickBound)
	key, ok := r.ruleKey(a, kind{isBound, !strings.HasPrefix(port, pickOne)})
	if !ok {
		return "no rule"
	}
	to := map[string]bool{}
	count, err := strconv.Atoi(port[strings.LastIndexByte(port, '-')+1:])
	if err != nil {
		return err.Error()
	}
	for i := range 2 * count {
		seat := uint32(i)
		if i >= count {
			seat = uint32(mostSeats + i - count)
		}
		data, ok := r.in["slots"][key+string(binaryutil.NativeEndian.PutUint32(seat))]
		if !ok {
			continue
		}
		target := data[r.f.bytes : r.f.bytes+2]
		switch {
		case strings.HasPrefix(port, pickKeep):
			target = string(binary.BigEndian.AppendUint16(nil, a.port))
		case strings.HasPrefix(port, pickMove):
			target = r.in["targets"][portOf(a.proto, a.port)+key[8:]]
		}
		addr, _ := netip.AddrFromSlice([]byte(data[:r.f.bytes]))
		if len(target) < 2 {
			return "no target"
		}
		to[netip.AddrPortFrom(addr, binary.BigEndian.Uint16([]byte(target))).String()] = true
	}
	return strings.Join(slices.Sorted(maps.Keys(to)), " ")
}

// slowMeaning asks every published port.
func slowMeaning(published []ingress.Published, f *family, a asking) meaning {
	for _, p := range published {
		if p.Protocol != a.proto || a.port < p.Port || int(a.port) >= int(p.Port)+int(max(p.Count, 1)) || len(p.IPs) > 0 && !slices.Contains(p.IPs, a.at) {
			continue
		}
		if len(p.Allow) > 0 && !slices.ContainsFunc(p.Allow, func(n netip.Prefix) bool { return n.Contains(a.client) }) {
			return meaning{}
		}
		to := map[string]bool{}
		for _, b := range p.Backends {
			if addr := f.addressOf(b); addr.IsValid() && !b.Draining {
				to[netip.AddrPortFrom(addr, p.Target+a.port-p.Port).String()] = true
			}
		}
		if len(to) == 0 {
			return meaning{}
		}
		return meaning{strings.Join(slices.Sorted(maps.Keys(to)), " "), p.HideClient}
	}
	return meaning{}
}

// TestWhatIsAsked: the sets say of every address, port and client what the published
// ports say, and the kernel takes their intervals.
func TestWhatIsAsked(t *testing.T) {
	translated := 0
	rapid.Check(t, func(r *rapid.T) {
		published := drawApart(r)
		for _, f := range families(true) {
			sets := f.publishedSets()
			for _, p := range published {
				sets.add(p)
			}
			if *sets.twice {
				r.Fatalf("an element stands twice, by %+v", published)
			}
			for _, s := range sets.all() {
				checkIntervals(r, s)
			}
			rules := rulesOf(sets)
			for _, at := range hostAddrs {
				for _, client := range clientAddrs {
					for port := 65527; f.has(at) && f.has(client) && port <= 65535; port++ {
						for _, proto := range []weft.Protocol{weft.TCP, weft.UDP} {
							a := asking{proto, at, client, uint16(port)}
							got, want := rules.means(a), slowMeaning(published, f, a)
							if got != want {
								r.Fatalf("%+v means %+v, want %+v, by %+v", a, got, want, published)
							}
							if want.to != "" {
								translated++
							}
						}
					}
				}
			}
		}
	})
	if translated == 0 {
		t.Error("nothing was translated: the test shows nothing")
	}
}

// checkIntervals refuses what the kernel refuses: intervals that overlap, or end
// before they begin.
func checkIntervals(r *rapid.T, s set) {
	if !s.interval {
		return
	}
	type bound struct {
		key   string
		isEnd bool
	}
	var all []bound
	for k, v := range s.elements {
		all = append(all, bound{strings.TrimSuffix(k, endMark), v == intervalEnd})
	}
	slices.SortFunc(all, func(a, b bound) int {
		if c := cmp.Compare(a.key, b.key); c != 0 || a.isEnd == b.isEnd {
			return c
		}
		if a.isEnd {
			return -1
		}
		return 1
	})
	open := false
	for _, b := range all {
		if open != b.isEnd {
			r.Fatalf("set %s: intervals overlap at %q of %q", s.name, b.key, s.elements)
		}
		open = !open
	}
	if open {
		r.Fatalf("set %s: the last interval has no end: %q", s.name, s.elements)
	}
}

// TestUnanswered: a port that is left out is named, with those of its addresses that are.
func TestUnanswered(t *testing.T) {
	p := func(proto weft.Protocol, host bool, ips ...netip.Addr) ingress.Published {
		return ingress.Published{Protocol: proto, Port: 80, Host: host, IPs: ips}
	}
	two := netip.MustParsePrefix("10.0.16.250/24")
	six := netip.MustParsePrefix("fd00::1/64")
	both := ingress.Table{Ingress: ingress.Entry{Link: "leg", Addr: two, Addr6: six}, Gateway: ingress.Gateway{Bridge: "gw", Addr6: six}}
	four := ingress.Table{Ingress: ingress.Entry{Link: "leg", Addr: two}, Gateway: ingress.Gateway{Bridge: "gw"}}
	const noTranslation, noNetwork, noBridge = "this kernel does not translate IPv6", "the ingress network has no IPv6", "the host has no IPv6 behind its gateway bridge"
	for name, tc := range map[string]struct {
		e      Engine
		t      ingress.Table
		p      ingress.Published
		reason string
		addrs  []netip.Addr
	}{
		"all there":                      {Engine{ip6: true}, both, p(weft.SCTP, false, hostAddrs...), "", nil},
		"no SCTP":                        {Engine{ip6: true, lacksSCTP: true}, both, p(weft.SCTP, false), noSCTP, nil},
		"no SCTP, a port of TCP":         {Engine{ip6: true, lacksSCTP: true}, both, p(weft.TCP, false), "", nil},
		"no translation":                 {Engine{}, both, p(weft.TCP, false, hostAddrs...), noTranslation, hostAddrs[3:]},
		"no translation, mode host":      {Engine{}, both, p(weft.TCP, true, hostAddrs[3]), noTranslation, hostAddrs[3:4]},
		"no translation, bound to IPv4":  {Engine{}, both, p(weft.TCP, false, hostAddrs[:2]...), "", nil},
		"no translation, bound nowhere":  {Engine{}, both, p(weft.TCP, false), "", nil},
		"network without":                {Engine{ip6: true}, four, p(weft.UDP, false, hostAddrs...), noNetwork, hostAddrs[3:]},
		"bridge without":                 {Engine{ip6: true}, four, p(weft.UDP, true, hostAddrs...), noBridge, hostAddrs[3:]},
		"neither network nor bridge yet": {Engine{ip6: true}, ingress.Table{}, p(weft.UDP, true, hostAddrs...), "", nil},
	} {
		tc.t.Published = []ingress.Published{tc.p}
		got := tc.e.Unanswered(tc.t)
		switch {
		case tc.reason == "" && len(got) == 0:
		case len(got) != 1 || got[0].Reason != tc.reason || got[0].Port != 80 || !slices.Equal(got[0].Addrs, tc.addrs):
			t.Errorf("%s: %+v, want %q at %v", name, got, tc.reason, tc.addrs)
		}
	}
}
