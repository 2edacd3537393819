package nft

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// ruleset is the wanted content of weft's table in one namespace: a plain
// value, computed from ingress.Table and compared with what the kernel has.
type ruleset struct {
	family nftables.TableFamily
	sets   []set
	chains []chain
	// prune names, of the dynamic set "flows", the data values that may
	// stay: entries that point anywhere else are dropped. flowsFit says that
	// there are none and the set need not be read.
	prune    map[string]bool
	flowsFit bool
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

// chain is a base chain and its rules.
type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	device   string // of the netdev family
	rules    []rule
}

// rule is a list of expressions with the words that explain it; the words are
// stored with the rule and are how it is recognised when read back, so they
// name every value that the expressions hold.
type rule struct {
	words string
	exprs []expr.Any
}

// signature names the shape of the table: everything but elements. It is
// stored in the comment of each rule; a table of another shape is replaced
// whole.
func (r ruleset) signature() string {
	h := sha256.New()
	for _, s := range r.sets {
		fmt.Fprintf(h, "set %s %v %v %v %v %v %v %d\n", s.name, s.key.Name, s.data.Name, s.isMap, s.interval, s.dynamic, s.timeout, s.size)
	}
	for _, c := range r.chains {
		fmt.Fprintf(h, "chain %s %v %d %d\n", c.name, c.kind, *c.hook, *c.priority)
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
		fmt.Fprintf(&b, "set %s (%d elements)\n", s.name, len(s.elements))
		count := map[string]int{}
		for k, v := range s.elements {
			count[s.show(k, v)]++
		}
		for _, line := range slices.Sorted(maps.Keys(count)) {
			fmt.Fprintf(&b, "\t%s x%d\n", line, count[line])
		}
	}
	for _, c := range r.chains {
		fmt.Fprintf(&b, "chain %s: %s hook %d priority %d\n", c.name, c.kind, *c.hook, *c.priority)
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

// intervalEnd stands as the data of the element that ends an interval.
const intervalEnd = "\xff"

func element(k, v string) nftables.SetElement {
	e := nftables.SetElement{Key: []byte(k), Val: []byte(v)}
	if v == intervalEnd {
		e.Val, e.IntervalEnd = nil, true
	}
	return e
}
