package nft

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Kinds of repairs. A set counts once however many of its elements were not as
// they were left: one command flushes them all.
const (
	kindTable    = "nft table wrong"
	kindElements = "nft elements wrong"
	kindSysctl   = "sysctl wrong"
	kindAddress  = "address wrong"
)

// place is a namespace with what the last Apply left in it, so that a repair is
// told from a change of the wish.
type place struct {
	name  string // for people: "the host", "network 4097"
	inode uint64 // a namespace made anew is empty, and that is not its table's fault
	left  map[nftables.TableFamily]ruleset
	// gen is the generation at which the tables of the families in known are as
	// left says, each with the time it was read whole; 0 = it is not known.
	gen   uint32
	known map[nftables.TableFamily]time.Time
	// network is what the bridge's table was made of; nil = it is not known.
	network *ingress.Network
}

// placeAt is the place of a namespace file as it was left, or a new one that
// nothing is known of. path "" is the calling thread's namespace.
func (e *Engine) placeAt(path, name string) (*place, error) {
	now, err := newPlace(path, name)
	if err != nil {
		return nil, err
	}
	if p := e.places[path]; p != nil && p.inode == now.inode {
		return p, nil
	}
	return now, nil
}

// newPlace is a place that nothing is known of.
func newPlace(path, name string) (*place, error) {
	file := path
	if path == "" {
		file = "/proc/thread-self/ns/net"
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: file, Err: err}
	}
	return &place{name: name, inode: st.Ino, left: map[nftables.TableFamily]ruleset{}}, nil
}

// converge is the function converge with the place's memory: what was not as it
// was left is reported once the transaction has been taken. A transaction that
// fails leaves what was there, so its repairs are owed.
func (e *Engine) converge(p *place, conn *nftables.Conn, want ruleset) error {
	if e.lacksTimes {
		want = want.withoutTimes()
	}
	want = want.hurried(e.hurry)
	before, err := generation()
	if err != nil {
		return err
	}
	var left *ruleset
	if l, ok := p.left[want.family]; ok {
		left = &l
	}
	if p.holds(want.family, before) && left.signature() == want.signature() {
		if done, err := p.follow(left, want); err != nil || done {
			return err
		}
	}
	read := time.Now()
	found, made, err := converge(conn, want, left)
	if err != nil {
		p.forget()
		return err
	}
	for _, r := range found {
		r.Object += " of " + p.name
		e.report(r)
	}
	now, err := generation()
	if err != nil {
		return err
	}
	p.left[want.family] = want
	p.hold(want.family, read, before, now, made)
	return nil
}

// follow makes a table that is as left say what want says, without reading it. It
// reports false if somebody has changed nftables meanwhile.
func (p *place) follow(left *ruleset, want ruleset) (bool, error) {
	var changes []setDelta
	for _, s := range want.sets {
		if d := s.diff(left.elementsOf(s)); !s.dynamic && len(d.add)+len(d.del) > 0 {
			changes = append(changes, setDelta{s, d})
		}
	}
	if done, err := p.commit(want, changes); err != nil || !done {
		return false, err
	}
	p.left[want.family] = want
	if want.flowsFit || want.prune == nil {
		return true, nil
	}
	return true, p.endFlows(want, func(mac string) bool { return !want.prune[mac] })
}

// commit makes changes to a table that is as it was left, if it still is.
func (p *place) commit(r ruleset, changes []setDelta) (done bool, err error) {
	made, err := r.commitElements(changes, p.gen)
	if errors.Is(err, unix.ERESTART) || errors.Is(err, errTooLarge) {
		return false, nil
	}
	if err != nil {
		p.forget()
		return false, fmt.Errorf("commit nftables elements: %w", err)
	}
	p.gen = after(p.gen, made)
	return true, nil
}

// endFlows ends the flows of a table that is as it was left.
func (p *place) endFlows(r ruleset, gone func(mac string) bool) error {
	made, err := r.endFlows(gone)
	if err != nil {
		p.forget()
		return err
	}
	now, err := generation()
	if err != nil || now != after(p.gen, made) {
		p.forget()
		return err
	}
	p.gen = now
	return nil
}

func (e *Engine) report(r weft.Repair) {
	if e.Repaired != nil {
		e.Repaired(r)
	}
}

// tableFault is the repair of a table whose shape is not the wanted one: "" when
// the wish has another shape than what was left, and that was there. The chains
// of the netdev family go with their devices, which is no fault of the table.
func tableFault(conn *nftables.Conn, table *nftables.Table, want ruleset, left *ruleset, misfit string) (string, error) {
	switch {
	case left == nil || want.family == nftables.TableFamilyNetdev && misfit != tableGone:
		return "", nil
	case left.signature() == want.signature():
		return misfit, nil
	}
	return shapeMisfit(conn, table, *left)
}

// elementFault says which elements that must be changed are not as they were
// left; "" = none.
func elementFault(have, left, want map[string]string) string {
	missing, wrong, stray := 0, 0, 0
	for k, v := range left {
		h, ok := have[k]
		w, wanted := want[k]
		switch {
		case !wanted: // it goes anyway
		case !ok:
			missing++
		case h != v && h != w:
			wrong++
		}
	}
	for k, h := range have {
		if _, ok := left[k]; ok {
			continue
		}
		if w, wanted := want[k]; !wanted || w != h {
			stray++
		}
	}
	if missing+wrong+stray == 0 {
		return ""
	}
	return fmt.Sprintf("%d elements were missing, %d wrong, %d stray", missing, wrong, stray)
}
