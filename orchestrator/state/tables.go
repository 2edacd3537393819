package state

import (
	"encoding/binary"
	"fmt"

	"github.com/hashicorp/go-memdb"

	"github.com/weftnet/weft"
)

// Table and index names.
const (
	tCluster  = "cluster"
	tNodes    = "nodes"
	tServices = "services"
	tSpecs    = "specversions"
	tTasks    = "tasks"
	tNetworks = "networks"
	// Addresses, and the numbers of removed networks, that nobody may have yet.
	tResting     = "resting"
	tRestingNets = "restingnetworks"

	byID      = "id"
	byName    = "name"
	byFolded  = "foldedname"
	byService = "service"
	byNode    = "node"
	bySpec    = "spec"
	byPorts   = "ports"
	byVNI     = "vni"
)

// key makes an index of strings; each is closed by a zero byte so that no key
// is a prefix of another. Prefix searches use the raw form.
type key func(raw any) (ok bool, parts []string)

func (k key) FromObject(raw any) (bool, []byte, error) {
	ok, parts := k(raw)
	if !ok {
		return false, nil, nil
	}
	return true, join(parts), nil
}

func (k key) FromArgs(args ...any) ([]byte, error) {
	parts := make([]string, 0, len(args))
	for _, a := range args {
		s, ok := a.(string)
		if !ok {
			return nil, fmt.Errorf("index argument %v is %T, not a string", a, a)
		}
		parts = append(parts, s)
	}
	return join(parts), nil
}

func (k key) PrefixFromArgs(args ...any) ([]byte, error) {
	b, err := k.FromArgs(args...)
	if err != nil || len(b) == 0 {
		return b, err
	}
	return b[:len(b)-1], nil
}

func join(parts []string) []byte {
	var b []byte
	for _, p := range parts {
		b = append(append(b, p...), 0)
	}
	return b
}

// num is the fixed-width form of a number inside a key: it sorts as the number.
func num(n uint64) string {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n)
	return string(b[:])
}

func schema() *memdb.DBSchema {
	table := func(name string, idx ...*memdb.IndexSchema) *memdb.TableSchema {
		t := &memdb.TableSchema{Name: name, Indexes: map[string]*memdb.IndexSchema{}}
		for _, i := range idx {
			t.Indexes[i.Name] = i
		}
		return t
	}
	unique := func(name string, k key) *memdb.IndexSchema {
		return &memdb.IndexSchema{Name: name, Unique: true, Indexer: k}
	}
	many := func(name string, k key) *memdb.IndexSchema {
		return &memdb.IndexSchema{Name: name, AllowMissing: true, Indexer: k}
	}
	s := &memdb.DBSchema{Tables: map[string]*memdb.TableSchema{}}
	for _, t := range []*memdb.TableSchema{
		table(tCluster, unique(byID, func(any) (bool, []string) { return true, []string{"cluster"} })),
		table(tNodes, unique(byID, func(r any) (bool, []string) { return true, []string{string(r.(*weft.Node).ID)} })),
		table(tServices,
			unique(byID, func(r any) (bool, []string) { return true, []string{string(r.(*weft.Service).ID)} }),
			unique(byName, func(r any) (bool, []string) { return true, []string{r.(*weft.Service).Spec.Name} }),
			many(byFolded, func(r any) (bool, []string) { return true, []string{weft.FoldName(r.(*weft.Service).Spec.Name)} })),
		table(tSpecs, unique(byID, func(r any) (bool, []string) {
			s := r.(*weft.SpecVersion)
			return true, []string{string(s.Service), num(s.Version)}
		})),
		table(tTasks,
			unique(byID, func(r any) (bool, []string) { return true, []string{string(r.(*weft.Task).ID)} }),
			many(byService, func(r any) (bool, []string) { return true, []string{string(r.(*weft.Task).Service)} }),
			many(byNode, func(r any) (bool, []string) {
				t := r.(*weft.Task)
				return t.Node != "", []string{string(t.Node)}
			}),
			many(byPorts, func(r any) (bool, []string) {
				t := r.(*weft.Task)
				return len(t.Ports) > 0 && !t.Status.State.Ended(), []string{string(t.Node)}
			}),
			many(bySpec, func(r any) (bool, []string) {
				t := r.(*weft.Task)
				return true, []string{string(t.Service), num(t.SpecVersion)}
			})),
		table(tNetworks,
			unique(byID, func(r any) (bool, []string) { return true, []string{string(r.(*weft.Network).ID)} }),
			unique(byName, func(r any) (bool, []string) { return true, []string{r.(*weft.Network).Spec.Name} }),
			many(byFolded, func(r any) (bool, []string) { return true, []string{weft.FoldName(r.(*weft.Network).Spec.Name)} }),
			unique(byVNI, func(r any) (bool, []string) { return true, []string{num(uint64(r.(*weft.Network).VNI))} })),
		table(tResting, unique(byID, func(r any) (bool, []string) {
			a := r.(*RestingAddr)
			return true, []string{string(a.Network), addrKey(a.Addr)}
		})),
		table(tRestingNets, unique(byID, func(r any) (bool, []string) { return true, []string{string(r.(*RestingNetwork).ID)} })),
	} {
		s.Tables[t.Name] = t
	}
	return s
}
