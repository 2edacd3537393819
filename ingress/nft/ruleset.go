package nft

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/weftnet/weft"
)

// ruleset is the wanted content of weft's table in one namespace: a plain
// value, computed from ingress.Table and compared with what the kernel has.
type ruleset struct {
	family nftables.TableFamily
	name   string // of the table; "" = weft.TableName
	sets   []set
	times  []times
	chains []chain
	// prune names, of the dynamic set "flows", the data values that may
	// stay: entries that point anywhere else are dropped. flowsFit says that
	// there are none and the set need not be read.
	prune    map[string]bool
	flowsFit bool
	// twice: an element was put twice.
	twice bool
}

// set is a set or map and its elements: key to data, both as the kernel keeps
// them. A plain set has empty data. Elements of a dynamic set are the kernel's
// own and not compared.
type set struct {
	name     string
	key      nftables.SetDatatype
	data     nftables.SetDatatype
	isMap    bool
	concat   bool
	interval bool
	dynamic  bool
	timeout  time.Duration
	size     uint32
	elements map[string]string
	// show prints an element without its slot; nil for dynamic sets.
	show func(key, data string) string
}

// filler puts an element into the set of that name.
type filler func(set, key, data string)

// filler fills the sets that there are. An element that stands twice, with other data or the same,
// is two wishes in one: what is changed by the wishes' differences is not such a
// ruleset.
func (r *ruleset) filler() filler {
	elements := make(map[string]map[string]string, len(r.sets))
	for _, s := range r.sets {
		elements[s.name] = s.elements
	}
	return func(set, key, data string) {
		in, ok := elements[set]
		if !ok {
			return
		}
		before := len(in)
		if in[key] = data; len(in) == before {
			r.twice = true
		}
	}
}

// chain is a chain and its rules; one without a hook is reached from others.
type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	device   string // of the netdev family
	// original: the rules set the zone of connection tracking, of the original
	// direction alone (addZoneRule).
	original bool
	rules    []rule
}

// rule is a list of expressions with the words that explain it; the words are
// stored with the rule and are how it is recognised when read back, so they
// name every value that the expressions hold.
type rule struct {
	words string
	exprs []expr.Any
}

// table is the table as the library names it.
func (r ruleset) table() *nftables.Table {
	return &nftables.Table{Name: cmp.Or(r.name, weft.TableName), Family: r.family}
}

// signature names the shape of the table: everything but elements and devices. It is
// stored in the comment of each rule; a table of another shape is replaced
// whole.
func (r ruleset) signature() string {
	h := sha256.New()
	for _, s := range r.sets {
		fmt.Fprintf(h, "set %s %v %v %v %v %v %v %d\n", s.name, s.key.Name, s.data.Name, s.isMap, s.interval, s.dynamic, s.timeout, s.size)
	}
	for _, t := range r.times {
		fmt.Fprintf(h, "times %s %v\n", t.name, t.states)
	}
	for _, c := range r.chains {
		if c.hook == nil {
			fmt.Fprintf(h, "chain %s\n", c.name)
		} else {
			fmt.Fprintf(h, "chain %s %v %d %d\n", c.name, c.kind, *c.hook, *c.priority)
		}
		for _, ru := range c.rules {
			fmt.Fprintf(h, "rule %s\n", ru.words)
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:12]
}

// String prints the ruleset for golden files and for people: elements that
// differ only by their slot stand in one line with their number.
func (r ruleset) String() string {
	var b strings.Builder
	for _, s := range r.sets {
		if s.dynamic && r.name != "" {
			fmt.Fprintf(&b, "set %s (dynamic, %s)\n", s.name, s.timeout)
			continue
		}
		fmt.Fprintf(&b, "set %s (%d elements)\n", s.name, len(s.elements))
		count := map[string]int{}
		for k, v := range s.elements {
			count[s.show(k, v)]++
		}
		for _, line := range slices.Sorted(maps.Keys(count)) {
			fmt.Fprintf(&b, "\t%s x%d\n", line, count[line])
		}
	}
	for _, t := range r.times {
		fmt.Fprintf(&b, "times %s: closing %s\n", t.name, t.states[expr.CtStateTCPCLOSEWAIT])
	}
	for _, c := range r.chains {
		if c.hook == nil {
			fmt.Fprintf(&b, "chain %s\n", c.name)
		} else {
			fmt.Fprintf(&b, "chain %s: %s hook %d priority %d\n", c.name, c.kind, *c.hook, *c.priority)
		}
		for _, ru := range c.rules {
			fmt.Fprintf(&b, "\t%s\n", ru.words)
		}
	}
	return b.String()
}

// delta is the difference between the elements that a set has and those that
// it should have. A key whose data changed stands in both lists: nftables has
// no way to overwrite.
type delta struct {
	add, del []nftables.SetElement
}

// diff is the difference of the set's elements. Those of intervals are in order:
// the kernel takes the end of one whose beginning it has not seen for an overlap.
func (s set) diff(have map[string]string) delta {
	d := diff(have, s.elements)
	if s.interval {
		for _, l := range [][]nftables.SetElement{d.add, d.del} {
			slices.SortFunc(l, func(a, b nftables.SetElement) int {
				if c := bytes.Compare(a.Key, b.Key); c != 0 || a.IntervalEnd == b.IntervalEnd {
					return c
				}
				if a.IntervalEnd {
					return -1
				}
				return 1
			})
		}
	}
	s.verdicts(d.add)
	s.verdicts(d.del)
	return d
}

// diff compares elements by key and data.
func diff(have, want map[string]string) delta {
	var d delta
	for k, v := range have {
		if w, ok := want[k]; !ok || w != v {
			d.del = append(d.del, element(k, v))
		}
	}
	for k, v := range want {
		if h, ok := have[k]; !ok || h != v {
			d.add = append(d.add, element(k, v))
		}
	}
	return d
}

// intervalEnd stands as the data of the element that ends an interval, endMark
// behind its key: another interval may begin there.
const intervalEnd, endMark = "\xff", "\xffend"

func element(k, v string) nftables.SetElement {
	if v == intervalEnd {
		return nftables.SetElement{Key: []byte(strings.TrimSuffix(k, endMark)), IntervalEnd: true}
	}
	return nftables.SetElement{Key: []byte(k), Val: []byte(v)}
}

// verdicts gives elements of a map to chains what the library wants of them.
func (s set) verdicts(l []nftables.SetElement) {
	if s.data.Name != nftables.TypeVerdict.Name {
		return
	}
	for i := range l {
		l[i].VerdictData = &expr.Verdict{Kind: expr.VerdictGoto, Chain: string(l[i].Val)}
	}
}
