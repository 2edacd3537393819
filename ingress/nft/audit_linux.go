package nft

import (
	"fmt"
	"os"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Kinds of repairs. A set counts once however many of its elements were not as
// they were left: one command flushes them all.
const (
	kindTable    = "nft table wrong"
	kindElements = "nft elements wrong"
	kindSysctl   = "sysctl wrong"
)

// place is a namespace with what the last Apply left in it, so that a repair is
// told from a change of the wish.
type place struct {
	name  string // for people: "the host", "network 4097"
	inode uint64 // a namespace made anew is empty, and that is not its table's fault
	left  map[nftables.TableFamily]ruleset
}

// placeAt is the place of a namespace file as it was left, or a new one that
// nothing is known of. path "" is the calling thread's namespace.
func (e *Engine) placeAt(path, name string) (*place, error) {
	file := path
	if path == "" {
		file = "/proc/thread-self/ns/net"
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: file, Err: err}
	}
	if p := e.places[path]; p != nil && p.inode == st.Ino {
		return p, nil
	}
	return &place{name: name, inode: st.Ino, left: map[nftables.TableFamily]ruleset{}}, nil
}

// converge is the function converge with the place's memory: what was not as it
// was left is reported once the transaction has been taken. A transaction that
// fails leaves what was there, so its repairs are owed.
func (e *Engine) converge(p *place, conn *nftables.Conn, want ruleset) error {
	var left *ruleset
	if l, ok := p.left[want.family]; ok {
		left = &l
	}
	found, err := converge(conn, want, left)
	if err != nil {
		return err
	}
	for _, r := range found {
		r.Object += " of " + p.name
		e.report(r)
	}
	p.left[want.family] = want
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
	case left == nil || want.family == nftables.TableFamilyNetdev:
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
