package agent

import (
	"errors"
	"fmt"
	"maps"
	"sort"
	"strconv"
	"strings"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// model is everything the leader has told this node, merged. It is a plain
// value: apply returns a new one and leaves the old as it was, so that readers
// on other goroutines keep a consistent picture without a lock.
type model struct {
	Version  int // of the file, modelVersion
	Seq      uint64
	Tasks    map[weft.ID]weft.Task
	Specs    map[specKey]weft.SpecVersion
	Networks map[weft.ID]weft.Network
	Services map[weft.ID]wire.ServiceView
	Nodes    map[weft.ID]wire.NodeView
	Cluster  wire.ClusterView
	// Index is the log index of the state that this is made of.
	Index uint64 `json:",omitempty"`
	// Ended are tasks whose addresses are about to be given to others.
	Ended map[weft.ID]bool `json:",omitempty"`
	// confirm: the leader waits for word that this is carried out. Every
	// session begins with a message that says so anew.
	confirm bool
}

// modelVersion is the version of the stored form; a file of another version
// is refused by name, never guessed at.
const modelVersion = 1

type specKey struct {
	Service weft.ID
	Version uint64
}

// MarshalText makes specKey usable as a key of a JSON object.
func (k specKey) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%s/%d", k.Service, k.Version), nil
}

// UnmarshalText is the inverse of MarshalText.
func (k *specKey) UnmarshalText(b []byte) error {
	service, version, ok := strings.Cut(string(b), "/")
	if !ok {
		return fmt.Errorf("parse spec key %q: no slash", b)
	}
	n, err := strconv.ParseUint(version, 10, 64)
	if err != nil {
		return fmt.Errorf("parse spec key %q: %w", b, err)
	}
	k.Service, k.Version = weft.ID(service), n
	return nil
}

func newModel() *model {
	return &model{
		Version: modelVersion,
		Tasks:   map[weft.ID]weft.Task{}, Specs: map[specKey]weft.SpecVersion{},
		Networks: map[weft.ID]weft.Network{}, Services: map[weft.ID]wire.ServiceView{},
		Nodes: map[weft.ID]wire.NodeView{}, Ended: map[weft.ID]bool{},
	}
}

// errGap means that an increment was lost; only a new session can mend it.
var errGap = errors.New("assignment sequence has a gap")

// apply merges one message. A full set replaces all; an increment must follow
// the last one directly.
func (m *model) apply(a wire.Assignments) (*model, error) {
	n := newModel()
	if !a.Full {
		if a.Seq != m.Seq+1 {
			return m, fmt.Errorf("%w: have %d, got %d", errGap, m.Seq, a.Seq)
		}
		n = m.clone()
	}
	n.Seq, n.confirm = a.Seq, a.Confirm
	n.Index = max(n.Index, a.Index)
	for _, t := range a.Tasks {
		n.Tasks[t.ID] = t
	}
	for _, s := range a.Specs {
		n.Specs[specKey{s.Service, s.Version}] = s
	}
	for _, v := range a.Networks {
		n.Networks[v.ID] = v
	}
	for _, v := range a.Services {
		n.Services[v.ID] = v
	}
	for _, v := range a.Nodes {
		n.Nodes[v.ID] = v
	}
	remove(n.Tasks, a.GoneTasks)
	remove(n.Networks, a.GoneNetworks)
	remove(n.Services, a.GoneServices)
	remove(n.Nodes, a.GoneNodes)
	for _, id := range a.Ended {
		n.Ended[id] = true
	}
	remove(n.Ended, a.GoneEnded)
	if a.Cluster != nil {
		n.Cluster = *a.Cluster
	} else if a.Full {
		n.Cluster = m.Cluster
	}
	n.dropUnusedSpecs()
	return n, nil
}

func (m *model) clone() *model {
	n := newModel()
	n.Seq, n.Cluster, n.Index = m.Seq, m.Cluster, m.Index
	maps.Copy(n.Ended, m.Ended)
	maps.Copy(n.Tasks, m.Tasks)
	maps.Copy(n.Specs, m.Specs)
	maps.Copy(n.Networks, m.Networks)
	maps.Copy(n.Services, m.Services)
	maps.Copy(n.Nodes, m.Nodes)
	return n
}

// dropUnusedSpecs forgets versions that no task refers to any more; their
// removal is not announced.
func (m *model) dropUnusedSpecs() {
	used := map[specKey]bool{}
	for _, t := range m.Tasks {
		used[specKey{t.Service, t.SpecVersion}] = true
	}
	for k := range m.Specs {
		if !used[k] {
			delete(m.Specs, k)
		}
	}
}

// vnis are the networks of a task, as kernel objects and their errors name
// them.
func (m *model) vnis(t weft.Task) []uint32 {
	var out []uint32
	for _, at := range t.Attachments {
		if n, ok := m.Networks[at.Network]; ok {
			out = append(out, n.VNI)
		}
	}
	return out
}

// managers are the cluster ports of all managers, in a stable order.
func (m *model) managers() []wire.NodeView {
	var out []wire.NodeView
	for _, n := range m.Nodes {
		if n.Manager.IsValid() {
			out = append(out, n)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}

func remove[V any](m map[weft.ID]V, ids []weft.ID) {
	for _, id := range ids {
		delete(m, id)
	}
}

// loadModel reads what the last run of the daemon knew; a missing file is an
// empty model.
func loadModel(path string) (*model, error) {
	m := newModel()
	found, err := loadFile(path, modelVersion, m)
	if err != nil || !found {
		return newModel(), err
	}
	return m, nil
}

func (m *model) save(path string) error { return saveFile(path, m) }
