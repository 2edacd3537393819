package nft

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Bounds of what is read and told of the host's firewall. Our own choice.
const (
	// inputEvery is the shortest time between two readings: a host may have thousands
	// of rules, and every change of weft's own is one of nftables.
	inputEvery = 15 * time.Second
	// inputMost rules are told.
	inputMost = 256
)

// InputRules reads the rules of the host's firewall that name ports. Its methods may be
// called from any goroutine; its zero value is ready.
type InputRules struct {
	mu   sync.Mutex // guards: all below
	gen  uint32
	read time.Time
	last []weft.InputRule
	said string // the last error
}

// Read returns the rules of nftables, those of iptables in its present form among
// them, in the calling process's network namespace: of the chains that hook input and of
// those that they lead to, sorted, 256 at most. They are at most 15 s old, if anything has
// changed, and nil as long as they could not be read at all. Each error is told once.
func (r *InputRules) Read(now time.Time) ([]weft.InputRule, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.read.IsZero() && now.Sub(r.read) < inputEvery {
		return r.last, nil
	}
	r.read = now
	if err := r.renew(); err != nil {
		if err.Error() == r.said {
			return r.last, nil
		}
		r.said = err.Error()
		return r.last, fmt.Errorf("read the host's firewall: %w", err)
	}
	r.said = ""
	return r.last, nil
}

func (r *InputRules) renew() error {
	gen, err := generation()
	if err != nil || r.last != nil && gen == r.gen {
		return err
	}
	list, err := readInput()
	if err == nil {
		r.gen, r.last = gen, list
	}
	return err
}

// inFamily is a chain, or a set, of a table.
type inFamily struct {
	family nftables.TableFamily
	table  string
	name   string
}

func readInput() ([]weft.InputRule, error) {
	conn, err := open()
	if err != nil {
		return nil, err
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, err
	}
	var look []inFamily
	seen := map[inFamily]bool{}
	reach := func(c inFamily) {
		if !seen[c] {
			seen[c] = true
			look = append(look, c)
		}
	}
	for _, c := range chains {
		isOurs := strings.HasPrefix(c.Table.Name, weft.TableName)
		if c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookInput && c.Table.Family != nftables.TableFamilyBridge && !isOurs {
			reach(inFamily{c.Table.Family, c.Table.Name, c.Name})
		}
	}
	rules := map[inFamily][][]expression{}
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6, nftables.TableFamilyINet} {
		if slices.ContainsFunc(look, func(c inFamily) bool { return c.family == family }) {
			if err := readRules(family, rules); err != nil {
				return nil, err
			}
		}
	}
	sets := map[inFamily][]setElement{}
	out := []weft.InputRule{}
	for i := 0; i < len(look); i++ { // which grows
		c := look[i]
		elements := func(name string) []setElement {
			k := inFamily{c.family, c.table, name}
			if _, ok := sets[k]; !ok {
				sets[k] = readSet(k)
			}
			return sets[k]
		}
		for _, rule := range rules[c] {
			n := input(rule, elements)
			out = append(out, n.rules(fmt.Sprintf("chain %s of table %s %s", c.name, familyWord(c.family), c.table))...)
			for _, next := range n.chains {
				reach(inFamily{c.family, c.table, next})
			}
		}
	}
	slices.SortFunc(out, func(a, b weft.InputRule) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Chain, b.Chain))
	})
	out = slices.Compact(out)
	return out[:min(len(out), inputMost)], nil
}

// familyWord is what nft(8) calls a family.
func familyWord(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	}
	return "inet"
}

// readRules reads all rules of a family. The library's reading fails at expressions that
// it does not know, which those of others may be.
func readRules(family nftables.TableFamily, into map[inFamily][][]expression) error {
	var err error
	for range dumpTries {
		found := map[inFamily][][]expression{}
		err = dump(unix.NFT_MSG_GETRULE, byte(family), nil, func(body []byte) {
			c := inFamily{family: family}
			var rule []expression
			attributes(body, func(kind uint16, data []byte) {
				switch kind {
				case unix.NFTA_RULE_TABLE:
					c.table = cString(data)
				case unix.NFTA_RULE_CHAIN:
					c.name = cString(data)
				case unix.NFTA_RULE_EXPRESSIONS:
					attributes(data, func(_ uint16, one []byte) {
						a := values(slices.Clone(one))
						rule = append(rule, expression{cString(a[unix.NFTA_EXPR_NAME]), a[unix.NFTA_EXPR_DATA]})
					})
				}
			})
			found[c] = append(found[c], rule)
		})
		if err == nil {
			for c, rules := range found {
				into[c] = rules
			}
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return err
}

// readSet reads a set's elements; none if it cannot be read: it may have just gone.
func readSet(k inFamily) (out []setElement) {
	const keyEnd = 10 // NFTA_SET_ELEM_KEY_END (linux/netfilter/nf_tables.h)
	body := append(attribute(unix.NFTA_SET_ELEM_LIST_TABLE, []byte(k.table+"\x00")), attribute(unix.NFTA_SET_ELEM_LIST_SET, []byte(k.name+"\x00"))...)
	err := dump(unix.NFT_MSG_GETSETELEM, byte(k.family), body, func(b []byte) {
		attributes(values(b)[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, one []byte) {
			a := values(one)
			e := setElement{key: string(a.value(unix.NFTA_SET_ELEM_KEY)), isEnd: a.number(unix.NFTA_SET_ELEM_FLAGS)&elemIntervalEnd != 0}
			if v := values(a[unix.NFTA_SET_ELEM_DATA])[unix.NFTA_DATA_VERDICT]; v != nil {
				e.chain = verdictChain(v)
			}
			out = append(out, e)
			if last := a.value(keyEnd); len(last) == 2 { // an interval that says where it ends itself
				out = append(out, setElement{key: string(binary.BigEndian.AppendUint16(nil, binary.BigEndian.Uint16(last)+1)), isEnd: true})
			}
		})
	})
	if err != nil {
		return nil
	}
	return out
}
