package agent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/netstate"
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
	from := newModel()
	if !a.Full {
		if a.Seq != m.Seq+1 {
			return m, fmt.Errorf("%w: have %d, got %d", errGap, m.Seq, a.Seq)
		}
		from = m
	}
	n := *from
	n.Seq, n.confirm = a.Seq, a.Confirm
	n.Index = max(n.Index, a.Index)
	n.Tasks = merged(n.Tasks, a.Tasks, func(t *weft.Task) weft.ID { return t.ID }, a.GoneTasks)
	n.Networks = merged(n.Networks, a.Networks, func(v *weft.Network) weft.ID { return v.ID }, a.GoneNetworks)
	n.Services = merged(n.Services, a.Services, func(v *wire.ServiceView) weft.ID { return v.ID }, a.GoneServices)
	n.Nodes = merged(n.Nodes, a.Nodes, func(v *wire.NodeView) weft.ID { return v.ID }, a.GoneNodes)
	if len(a.Tasks)+len(a.GoneTasks)+len(a.Specs) > 0 {
		n.Specs = merged(n.Specs, a.Specs, func(s *weft.SpecVersion) specKey { return specKey{s.Service, s.Version} }, nil)
		n.dropUnusedSpecs()
	}
	if len(a.Ended)+len(a.GoneEnded) > 0 {
		n.Ended = maps.Clone(n.Ended)
		for _, id := range a.Ended {
			n.Ended[id] = true
		}
		for _, id := range a.GoneEnded {
			delete(n.Ended, id)
		}
	}
	if a.Cluster != nil {
		n.Cluster = *a.Cluster
	} else if a.Full {
		n.Cluster = m.Cluster
	}
	return &n, nil
}

// merged is a map with what a message puts and without what it says is gone: the
// same map if that is nothing.
func merged[K comparable, V any](m map[K]V, puts []V, key func(*V) K, gone []K) map[K]V {
	if len(puts)+len(gone) == 0 {
		return m
	}
	out := make(map[K]V, len(m)+len(puts))
	maps.Copy(out, m)
	for i := range puts {
		out[key(&puts[i])] = puts[i]
	}
	for _, k := range gone {
		delete(out, k)
	}
	return out
}

// dropUnusedSpecs forgets versions that no task refers to any more; their
// removal is not announced.
func (m *model) dropUnusedSpecs() {
	used := map[specKey]bool{}
	for _, t := range m.Tasks {
		used[specKey{t.Service, t.SpecVersion}] = true
	}
	var gone []specKey
	for k := range m.Specs {
		if !used[k] {
			gone = append(gone, k)
		}
	}
	m.Specs = merged(m.Specs, nil, nil, gone)
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

// netstate is the model as the derivation takes it, but for the services, which
// listServices lists.
func (m *model) netstate(self weft.ID, vtep netip.Addr) netstate.Input {
	in := netstate.Input{DataPathPort: m.Cluster.DataPathPort, KeyEpoch: m.Cluster.KeyEpoch, Self: netstate.Node{ID: self, VTEP: vtep}}
	for _, n := range m.Networks {
		in.Networks = append(in.Networks, n)
	}
	for _, n := range m.Nodes {
		node := netstate.Node{ID: n.ID, Hostname: n.Hostname, VTEP: n.DataPath, IngressAddr: n.IngressAddr, IngressAddr6: n.IngressAddr6, Keys: n.Keys}
		if n.ID == self {
			node.VTEP = vtep
			in.Self = node
		}
		in.Nodes = append(in.Nodes, node)
	}
	return in
}

// listServices are the services as the derivation takes them, in the order of ids,
// made of the last such list: last itself if it still holds. It is not to be written.
func (m *model) listServices(last []netstate.Service) []netstate.Service {
	out := make([]netstate.Service, 0, len(m.Services))
	same := len(last) == len(m.Services)
	for i := range last {
		v, ok := m.Services[last[i].ID]
		if !ok {
			same = false
			continue
		}
		s := derived(&v)
		same = same && s.Equal(&last[i])
		out = append(out, s)
	}
	if same {
		return last
	}
	if len(out) < len(m.Services) { // some are new
		had := make(map[weft.ID]bool, len(out))
		for i := range out {
			had[out[i].ID] = true
		}
		for id, v := range m.Services {
			if !had[id] {
				out = append(out, derived(&v))
			}
		}
		slices.SortFunc(out, func(a, b netstate.Service) int { return cmp.Compare(a.ID, b.ID) })
	}
	return out
}

// derived is a service as the derivation takes it.
func derived(v *wire.ServiceView) netstate.Service {
	return netstate.Service{
		ID: v.ID, Name: v.Name, Mode: v.EndpointMode, VIPs: v.VIPs, Ports: v.Ports, Networks: v.Networks, HideClient: v.HideClient,
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
