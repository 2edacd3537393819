package nft

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// chunk is how many elements go into one message: a netlink attribute holds
// 64 KiB, and an element of ours takes at most 100 bytes.
const chunk = 400

// elementRoom is how many bytes an element takes at most in the library's message.
const elementRoom = 200

// converge makes the table in the calling thread's namespace equal to want: it reads
// what is there and sends the difference as one transaction. A table whose shape is
// not the wanted one is replaced whole, in the same transaction. It returns what
// was repaired: what was neither as left, which may be unknown (nil), nor as
// wanted; and how many transactions it has made.
func converge(conn *nftables.Conn, want ruleset, left *ruleset) ([]weft.Repair, uint32, error) {
	table := want.table()
	misfit, err := shapeMisfit(conn, table, want)
	if err != nil {
		return nil, 0, err
	}
	if misfit != "" {
		fault, err := tableFault(conn, table, want, left, misfit)
		if err != nil {
			return nil, 0, err
		}
		var found []weft.Repair
		if fault != "" {
			found = append(found, weft.Repair{Kind: kindTable, Object: "table " + table.Name, Reason: fault})
		}
		var known map[string]map[string]string
		if misfit != tableGone {
			if known, err = remembered(conn, table, want); err != nil {
				return nil, 0, err
			}
		}
		made, err := replace(conn, table, want, known)
		if err != nil || want.prune == nil {
			return found, made, err
		}
		ended, err := want.endFlows(func(mac string) bool { return !want.prune[mac] })
		return found, made + ended, err
	}
	return convergeSets(want, left)
}

// convergeSets makes the elements of a table of the wanted shape right, and then,
// when no packet adds such a flow any more, ends flows that lead to nobody.
func convergeSets(want ruleset, left *ruleset) ([]weft.Repair, uint32, error) {
	var found []weft.Repair
	var changes []setDelta
	for _, s := range want.sets {
		if s.dynamic {
			continue
		}
		have, err := readElements(s.object(want.table()))
		if err != nil {
			return nil, 0, fmt.Errorf("read set %s: %w", s.name, err)
		}
		d := s.diff(have)
		if len(d.add)+len(d.del) == 0 {
			continue
		}
		if fault := elementFault(have, left.elementsOf(s), s.elements); fault != "" && left != nil {
			found = append(found, weft.Repair{Kind: kindElements, Object: "set " + s.name, Reason: fault})
		}
		changes = append(changes, setDelta{s, d})
	}
	made, err := want.commitElements(changes, 0)
	if err != nil {
		return nil, made, fmt.Errorf("commit nftables elements: %w", err)
	}
	if want.flowsFit || want.prune == nil {
		return found, made, nil
	}
	ended, err := want.endFlows(func(mac string) bool { return !want.prune[mac] })
	return found, made + ended, err
}

// flowTries is how often flows are read and deleted all at once before each is
// deleted by itself. Our own choice.
const flowTries = 3

// quietLooks looks in a row must find no flow that is to end. One may miss some: the
// kernel goes on with a list where so many flows as it has told are behind it, and
// meanwhile others have ended. Our own choice.
const quietLooks = 2

// endFlows deletes the flows that lead to a backend which is gone, the maps having been
// changed before.
func (r ruleset) endFlows(gone func(mac string) bool) (transactions uint32, err error) {
	err = ingress.EndFlows(ingress.PacketsPass, func() (int, error) {
		made, err := r.endFlowsOnce(gone)
		transactions += made
		return int(made), err
	}, quietLooks)
	return transactions, err
}

// endFlowsOnce looks for them once. Packets move and end flows meanwhile, and one that
// is not there any more fails the whole transaction.
func (r ruleset) endFlowsOnce(gone func(mac string) bool) (transactions uint32, err error) {
	for _, s := range r.sets {
		if !s.dynamic {
			continue
		}
		var err error = unix.ENOENT
		for try := 0; errors.Is(err, unix.ENOENT); try++ {
			have, rerr := readElements(s.object(r.table()))
			if rerr != nil {
				return transactions, fmt.Errorf("read set %s: %w", s.name, rerr)
			}
			stale := misleading(have, gone)
			made := uint32(0)
			if try < flowTries {
				made, err = r.deleteAll(s, stale)
			} else {
				made, err = r.deleteEach(s, stale)
			}
			transactions += made
		}
		if err != nil {
			return transactions, fmt.Errorf("end flows of set %s: %w", s.name, err)
		}
	}
	return transactions, nil
}

func (r ruleset) deleteAll(s set, elements []nftables.SetElement) (transactions uint32, err error) {
	return r.commitElements([]setDelta{{s, delta{del: elements}}}, 0)
}

// deleteEach takes what is not there for deleted.
func (r ruleset) deleteEach(s set, elements []nftables.SetElement) (transactions uint32, err error) {
	for i := range elements {
		made, err := r.deleteAll(s, elements[i:i+1])
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return transactions, err
		}
		transactions += made
	}
	return transactions, nil
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

// misleading selects flows that lead to a backend which is gone.
func misleading(have map[string]string, gone func(mac string) bool) []nftables.SetElement {
	var out []nftables.SetElement
	for k, v := range have {
		if gone(v) {
			out = append(out, nftables.SetElement{Key: []byte(k), Val: []byte(v)})
		}
	}
	return out
}

// tableGone is what shapeMisfit says of a table that is not there.
const tableGone = "it was gone"

// shapeMisfit says in what the table has not the wanted sets, chains and rules,
// told by the words stored with each rule; "" = it has all.
func shapeMisfit(conn *nftables.Conn, table *nftables.Table, want ruleset) (string, error) {
	if _, err := conn.ListTableOfFamily(table.Name, table.Family); err != nil {
		// The library tells "not there" by a plain error only.
		if errors.Is(err, unix.ENOENT) || strings.Contains(err.Error(), "not found") || strings.Contains(err.Error(), "expected 1") {
			return tableGone, nil
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
	have, err := readWords(conn, table)
	if err != nil {
		return "", err
	}
	for _, c := range want.chains {
		words, ok := have[c.name]
		if !ok {
			return fmt.Sprintf("its chain %s was gone", c.name), nil
		}
		if len(words) != len(c.rules) {
			return fmt.Sprintf("its chain %s had %d rules instead of %d", c.name, len(words), len(c.rules)), nil
		}
		for i, w := range words {
			if w != comment(sig, c.rules[i]) {
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

// replace makes the table anew. Rules of zones follow in transactions of their
// own: without them the shape is not the wanted one, so that what a crash leaves
// in between is replaced again. So do elements for which one transaction of this
// process has no room. known are the elements of dynamic sets.
func replace(conn *nftables.Conn, table *nftables.Table, want ruleset, known map[string]map[string]string) (transactions uint32, err error) {
	room, err := sendRoom()
	if err != nil {
		return 0, err
	}
	room /= 2            // the other half is the rules'
	conn.AddTable(table) // so that the deletion finds one
	conn.DelTable(table)
	conn.AddTable(table)
	for i, s := range want.sets {
		obj := s.object(table)
		obj.ID = uint32(i + 1)
		if err := conn.AddSet(obj, nil); err != nil {
			return 0, fmt.Errorf("add set %s: %w", s.name, err)
		}
	}
	if err := addTimes(conn, table, want.times); err != nil {
		return 0, err
	}
	chains := make([]*nftables.Chain, len(want.chains))
	for i, c := range want.chains {
		obj := &nftables.Chain{Name: c.name, Table: table}
		if c.hook != nil {
			policy := nftables.ChainPolicyAccept
			obj.Type, obj.Hooknum, obj.Priority, obj.Policy, obj.Device = c.kind, c.hook, c.priority, &policy, c.device
		}
		chains[i] = conn.AddChain(obj)
	}
	var later []setDelta
	for i, s := range want.sets { // behind the chains that they lead to
		if s.dynamic {
			s.elements = known[s.name]
		}
		if room -= len(s.elements) * elementRoom; room < 0 {
			// A flow that a packet brings back meanwhile would fail what comes later.
			if !s.dynamic {
				later = append(later, setDelta{s, s.diff(nil)})
			}
			continue
		}
		obj := s.object(table)
		obj.ID = uint32(i + 1)
		if err := change(conn, obj, s.diff(nil)); err != nil {
			return 0, fmt.Errorf("fill set %s: %w", s.name, err)
		}
	}
	sig := want.signature()
	for i, c := range want.chains {
		for _, r := range c.rules {
			if c.original {
				continue
			}
			conn.AddRule(&nftables.Rule{
				Table: table, Chain: chains[i], Exprs: r.exprs,
				UserData: userdata.AppendString(nil, userdata.TypeComment, comment(sig, r)),
			})
		}
	}
	if err := conn.Flush(); err != nil {
		return 0, fmt.Errorf("commit nftables table: %w", err)
	}
	made, err := want.commitElements(later, 0)
	if transactions = 1 + made; err != nil {
		return transactions, fmt.Errorf("commit nftables elements: %w", err)
	}
	for _, c := range want.chains {
		for _, r := range c.rules {
			if !c.original {
				continue
			}
			if err := addZoneRule(table, c.name, r.exprs, comment(sig, r)); err != nil {
				return transactions, fmt.Errorf("add rule %q: %w", r.words, err)
			}
			transactions++
		}
	}
	return transactions, nil
}

// remembered are, by set, what packets have put into the dynamic sets of a table that
// is made anew, for those that stay what they are: a flow keeps its backend, whatever
// was wrong with the table. What comes and goes meanwhile is forgotten.
func remembered(conn *nftables.Conn, table *nftables.Table, want ruleset) (map[string]map[string]string, error) {
	if !slices.ContainsFunc(want.sets, func(s set) bool { return s.dynamic }) {
		return nil, nil
	}
	have, err := conn.GetSets(table)
	if err != nil {
		return nil, fmt.Errorf("read nftables sets: %w", err)
	}
	out := map[string]map[string]string{}
	for _, s := range want.sets {
		i := slices.IndexFunc(have, func(h *nftables.Set) bool {
			return h.Name == s.name && h.Dynamic && h.IsMap == s.isMap && h.KeyType.Bytes == s.key.Bytes && h.DataType.Bytes == s.data.Bytes
		})
		if !s.dynamic || i < 0 {
			continue
		}
		if out[s.name], err = readElements(s.object(table)); err != nil {
			return nil, fmt.Errorf("read set %s: %w", s.name, err)
		}
	}
	return out, nil
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

// object is the set as the library names it.
func (s set) object(table *nftables.Table) *nftables.Set {
	return &nftables.Set{
		Table: table, Name: s.name, KeyType: s.key, DataType: s.data, IsMap: s.isMap,
		Concatenation: s.concat, Interval: s.interval, Dynamic: s.dynamic,
		HasTimeout: s.timeout > 0, Timeout: s.timeout, Size: s.size,
		KeyByteOrder: binaryutil.BigEndian,
	}
}
