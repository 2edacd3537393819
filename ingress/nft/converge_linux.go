package nft

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// chunk is how many elements go into one message: a netlink attribute holds
// 64 KiB, and an element of ours takes at most 100 bytes.
const chunk = 400

// converge makes the table in the namespace of conn equal to want: it reads what is
// there and sends the difference as one transaction. A table whose shape is
// not the wanted one is replaced whole, in the same transaction. It returns what
// was repaired: what was neither as left, which may be unknown (nil), nor as
// wanted.
func converge(conn *nftables.Conn, want ruleset, left *ruleset) ([]weft.Repair, error) {
	table := &nftables.Table{Name: weft.TableName, Family: want.family}
	misfit, err := shapeMisfit(conn, table, want)
	if err != nil {
		return nil, err
	}
	if misfit != "" {
		fault, err := tableFault(conn, table, want, left, misfit)
		if err != nil {
			return nil, err
		}
		var found []weft.Repair
		if fault != "" {
			found = append(found, weft.Repair{Kind: kindTable, Object: "table " + table.Name, Reason: fault})
		}
		return found, replace(conn, table, want)
	}
	return convergeSets(conn, table, want, left)
}

// convergeSets makes the elements of a table of the wanted shape right.
func convergeSets(conn *nftables.Conn, table *nftables.Table, want ruleset, left *ruleset) ([]weft.Repair, error) {
	var found []weft.Repair
	changed := false
	for _, s := range want.sets {
		if s.dynamic && want.flowsFit {
			continue
		}
		have, err := readElements(conn, s.object(table))
		if err != nil {
			return nil, fmt.Errorf("read set %s: %w", s.name, err)
		}
		d := diff(have, s.elements)
		if s.dynamic {
			d = stale(have, want.prune)
		}
		if len(d.add)+len(d.del) > 0 {
			changed = true
			if fault := elementFault(have, left.elementsOf(s), s.elements); fault != "" && left != nil && !s.dynamic {
				found = append(found, weft.Repair{Kind: kindElements, Object: "set " + s.name, Reason: fault})
			}
			if err := change(conn, s.object(table), d); err != nil {
				return nil, fmt.Errorf("change set %s: %w", s.name, err)
			}
		}
	}
	if !changed {
		return nil, nil
	}
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("commit nftables elements: %w", err)
	}
	return found, nil
}

// elementsOf are the elements of the set of that name.
func (r *ruleset) elementsOf(like set) map[string]string {
	if r == nil {
		return nil
	}
	for _, s := range r.sets {
		if s.name == like.name {
			return s.elements
		}
	}
	return nil
}

// stale selects flows that lead to no backend any more.
func stale(have map[string]string, keep map[string]bool) delta {
	var d delta
	for k, v := range have {
		if !keep[v] {
			d.del = append(d.del, nftables.SetElement{Key: []byte(k), Val: []byte(v)})
		}
	}
	return d
}

// shapeMisfit says in what the table has not the wanted sets, chains and rules,
// told by the words stored with each rule; "" = it has all.
func shapeMisfit(conn *nftables.Conn, table *nftables.Table, want ruleset) (string, error) {
	if _, err := conn.ListTableOfFamily(table.Name, table.Family); err != nil {
		// The library tells "not there" by a plain error only.
		if errors.Is(err, unix.ENOENT) || strings.Contains(err.Error(), "not found") || strings.Contains(err.Error(), "expected 1") {
			return "it was gone", nil
		}
		return "", fmt.Errorf("read nftables table: %w", err)
	}
	sets, err := conn.GetSets(table)
	if err != nil {
		return "", fmt.Errorf("read nftables sets: %w", err)
	}
	names := map[string]bool{}
	for _, s := range sets {
		if !s.Anonymous {
			names[s.Name] = true
		}
	}
	for _, s := range want.sets {
		if !names[s.name] {
			return fmt.Sprintf("its set %s was gone", s.name), nil
		}
	}
	sig := want.signature()
	for _, c := range want.chains {
		rules, err := conn.GetRules(table, &nftables.Chain{Name: c.name, Table: table})
		if errors.Is(err, unix.ENOENT) {
			return fmt.Sprintf("its chain %s was gone", c.name), nil
		}
		if err != nil {
			return "", fmt.Errorf("read nftables chain %s: %w", c.name, err)
		}
		if len(rules) != len(c.rules) {
			return fmt.Sprintf("its chain %s had %d rules instead of %d", c.name, len(rules), len(c.rules)), nil
		}
		for i, r := range rules {
			words, _ := userdata.GetString(r.UserData, userdata.TypeComment)
			if words != comment(sig, c.rules[i]) {
				return fmt.Sprintf("rule %d of its chain %s was another", i+1, c.name), nil
			}
		}
	}
	return "", nil
}

// comment is what nft prints behind the rule; the kernel keeps 255 bytes of
// user data with a rule.
func comment(sig string, r rule) string {
	s := sig + " " + r.words
	return s[:min(len(s), 120)]
}

func replace(conn *nftables.Conn, table *nftables.Table, want ruleset) error {
	conn.AddTable(table) // so that the deletion finds one
	conn.DelTable(table)
	conn.AddTable(table)
	for i, s := range want.sets {
		obj := s.object(table)
		obj.ID = uint32(i + 1)
		if err := conn.AddSet(obj, nil); err != nil {
			return fmt.Errorf("add set %s: %w", s.name, err)
		}
		if err := change(conn, obj, diff(nil, s.elements)); err != nil {
			return fmt.Errorf("fill set %s: %w", s.name, err)
		}
	}
	sig := want.signature()
	for _, c := range want.chains {
		policy := nftables.ChainPolicyAccept
		obj := conn.AddChain(&nftables.Chain{
			Name: c.name, Table: table, Type: c.kind, Hooknum: c.hook, Priority: c.priority, Policy: &policy, Device: c.device,
		})
		for _, r := range c.rules {
			conn.AddRule(&nftables.Rule{
				Table: table, Chain: obj, Exprs: r.exprs,
				UserData: userdata.AppendString(nil, userdata.TypeComment, comment(sig, r)),
			})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("commit nftables table: %w", err)
	}
	return nil
}

func change(conn *nftables.Conn, obj *nftables.Set, d delta) error {
	for _, part := range chunks(d.del) {
		if err := conn.SetDeleteElements(obj, part); err != nil {
			return err
		}
	}
	for _, part := range chunks(d.add) {
		if err := conn.SetAddElements(obj, part); err != nil {
			return err
		}
	}
	return nil
}

func chunks(e []nftables.SetElement) [][]nftables.SetElement {
	var out [][]nftables.SetElement
	for len(e) > chunk {
		out = append(out, e[:chunk])
		e = e[chunk:]
	}
	if len(e) > 0 {
		out = append(out, e)
	}
	return out
}

func readElements(conn *nftables.Conn, obj *nftables.Set) (map[string]string, error) {
	list, err := conn.GetSetElements(obj)
	if err != nil {
		return nil, err
	}
	out := make(map[string]string, len(list))
	for _, e := range list {
		v := string(e.Val)
		if e.IntervalEnd {
			v = intervalEnd
		}
		out[string(e.Key)] = v
	}
	return out, nil
}

// object is the set as the library names it.
func (s set) object(table *nftables.Table) *nftables.Set {
	return &nftables.Set{
		Table: table, Name: s.name, KeyType: s.key, DataType: s.data, IsMap: s.isMap,
		Concatenation: s.concat, Interval: s.interval, Dynamic: s.dynamic,
		HasTimeout: s.timeout > 0, Timeout: s.timeout, Size: s.size,
		KeyByteOrder: binaryutil.BigEndian,
	}
}
