package dispatch

import (
	"reflect"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Set is all that one node must know, as a value: the target of Diff.
type Set struct {
	Tasks    map[weft.ID]weft.Task
	Specs    map[SpecKey]weft.SpecVersion
	Networks map[weft.ID]weft.Network
	Services map[weft.ID]wire.ServiceView
	Nodes    map[weft.ID]wire.NodeView
	Cluster  wire.ClusterView
	// Ended tasks have addresses that rest on one of Networks.
	Ended map[weft.ID]struct{}
}

// SpecKey identifies a spec version.
type SpecKey struct {
	Service weft.ID
	Version uint64
}

// shared is the part of every node's set that is the same for all, computed
// once per log index. It is immutable.
type shared struct {
	index    uint64
	nodes    map[weft.ID]wire.NodeView
	services map[weft.ID]wire.ServiceView
	// published: services that every node must know; on: services by network.
	published []weft.ID
	on        map[weft.ID][]weft.ID
	ingress   *weft.Network
	cluster   wire.ClusterView
	// ended: tasks whose addresses rest, by network; rests: anything does.
	ended map[weft.ID][]weft.ID
	rests bool
}

func share(v *state.Snapshot) *shared {
	s := &shared{
		index: v.Index(),
		nodes: map[weft.ID]wire.NodeView{}, services: map[weft.ID]wire.ServiceView{},
		on: map[weft.ID][]weft.ID{}, ended: map[weft.ID][]weft.ID{},
	}
	for _, r := range v.AllResting() {
		s.rests = true
		if r.Task {
			s.ended[r.Network] = append(s.ended[r.Network], r.Owner)
		}
	}
	s.rests = s.rests || len(v.RestingNetworks()) > 0
	for _, n := range v.Nodes() {
		s.nodes[n.ID] = NodeView(n)
	}
	for _, svc := range v.Services() {
		s.services[svc.ID] = wire.ServiceView{
			ID: svc.ID, Name: svc.Spec.Name, EndpointMode: svc.Spec.EndpointMode,
			VIPs: svc.VIPs, Ports: svc.Ports, Networks: svc.Spec.Networks, Drain: svc.Spec.DrainTime(), HideClient: svc.Spec.HidesClients(),
		}
		if weft.InMesh(svc.Ports) {
			s.published = append(s.published, svc.ID)
		}
		for _, t := range svc.Spec.Networks {
			s.on[t.Network] = append(s.on[t.Network], svc.ID)
		}
	}
	if n, ok := v.Ingress(); ok {
		s.ingress = &n
	}
	if c, ok := v.Cluster(); ok {
		s.cluster = ClusterView(c)
	}
	return s
}

// NodeView is what other nodes know of n.
func NodeView(n weft.Node) wire.NodeView {
	v := wire.NodeView{
		ID: n.ID, Hostname: n.Description.Hostname, Addr: n.Status.Addr,
		DataPath: n.DataPath, IngressAddr: n.IngressAddr, IngressAddr6: n.IngressAddr6, Keys: n.Status.Keys,
		ClusterPort: n.Status.ClusterPort,
	}
	if n.Manager != nil {
		v.Manager = n.Manager.Addr
	}
	return v
}

// ClusterView is what every node knows of the cluster.
func ClusterView(c weft.Cluster) wire.ClusterView {
	return wire.ClusterView{
		ID: c.ID, DataPathPort: c.DataPathPort, GossipKey: c.GossipKey, AddrPools: c.AddrPools, KeyEpoch: c.KeyEpoch,
		GossipEpoch: c.GossipEpoch, GossipReads: c.GossipReads,
	}
}

// Compute is the full set of a node.
func Compute(v *state.Snapshot, node weft.ID) Set { return compute(v, share(v), node) }

func compute(v *state.Snapshot, sh *shared, node weft.ID) Set {
	s := Set{
		Tasks: map[weft.ID]weft.Task{}, Specs: map[SpecKey]weft.SpecVersion{},
		Networks: map[weft.ID]weft.Network{}, Services: map[weft.ID]wire.ServiceView{},
		Nodes: sh.nodes, Cluster: sh.cluster, Ended: map[weft.ID]struct{}{},
	}
	if sh.ingress != nil {
		n, ok := v.Node(node)
		if _, refused := n.Conflict(sh.ingress); ok && !refused {
			s.Networks[sh.ingress.ID] = *sh.ingress
		}
	}
	for _, t := range v.TasksOfNode(node) {
		if t.Status.State < weft.TaskAssigned {
			continue // of a global service: its node is known before its time has come
		}
		s.Tasks[t.ID] = assignment(t)
		k := SpecKey{t.Service, t.SpecVersion}
		if _, ok := s.Specs[k]; !ok {
			if spec, ok := v.Spec(k.Service, k.Version); ok {
				s.Specs[k] = spec
			}
		}
		if t.Status.State.Ended() {
			continue // it is on no network any more
		}
		if svc, ok := sh.services[t.Service]; ok && len(t.Ports) > 0 {
			s.Services[t.Service] = svc // whether its clients are hidden
		}
		for _, a := range t.Attachments {
			if n, ok := v.Network(a.Network); ok {
				s.Networks[n.ID] = n
			}
		}
	}
	for id := range s.Networks {
		for _, svc := range sh.on[id] {
			s.Services[svc] = sh.services[svc]
		}
		for _, task := range sh.ended[id] {
			s.Ended[task] = struct{}{}
		}
	}
	for _, svc := range sh.published {
		s.Services[svc] = sh.services[svc]
	}
	return s
}

// assignment is a task as its agent gets it. The agent itself is the source of
// the status between assigned and the end; sending it back would double every
// report. An ended status is sent: it tells an agent that lost its own memory
// not to run the task again.
func assignment(t weft.Task) weft.Task {
	t.Meta.Index, t.Meta.UpdatedAt = 0, t.Meta.CreatedAt
	if !t.Status.State.Ended() {
		t.Status = weft.TaskStatus{State: weft.TaskAssigned}
	}
	return t
}

// Full is the message that carries all of s.
func (s Set) Full() wire.Assignments {
	a := Diff(Set{}, s)
	a.Full = true
	a.Cluster = &s.Cluster
	return a
}

// Diff is the increment from one set to another, every list in the order of
// ids. Seq is left to the session.
func Diff(from, to Set) wire.Assignments {
	var a wire.Assignments
	a.Tasks, a.GoneTasks = diff(from.Tasks, to.Tasks, sameTask)
	a.Networks, a.GoneNetworks = diff(from.Networks, to.Networks, sameNetwork)
	a.Services, a.GoneServices = diff(from.Services, to.Services, deepEqual[wire.ServiceView])
	a.Nodes, a.GoneNodes = diff(from.Nodes, to.Nodes, deepEqual[wire.NodeView])
	for k, v := range to.Specs {
		// A version is immutable: what was sent needs no comparison.
		if _, ok := from.Specs[k]; !ok {
			a.Specs = append(a.Specs, v)
		}
	}
	slices.SortFunc(a.Specs, func(x, y weft.SpecVersion) int {
		if x.Service != y.Service {
			return compare(x.Service, y.Service)
		}
		return compare(x.Version, y.Version)
	})
	a.Ended, a.GoneEnded = missing(to.Ended, from.Ended), missing(from.Ended, to.Ended)
	if !reflect.DeepEqual(from.Cluster, to.Cluster) {
		a.Cluster = &to.Cluster
	}
	return a
}

// Empty reports whether a tells nothing that a node must hear now. That tasks
// ended long enough ago is told with the next increment.
func Empty(a wire.Assignments) bool {
	return !a.Full && a.Cluster == nil &&
		len(a.Tasks)+len(a.Specs)+len(a.Networks)+len(a.Services)+len(a.Nodes)+len(a.Ended)+
			len(a.GoneTasks)+len(a.GoneNetworks)+len(a.GoneServices)+len(a.GoneNodes) == 0
}

func diff[T any](from, to map[weft.ID]T, same func(a, b T) bool) (put []T, gone []weft.ID) {
	for _, id := range sorted(to) {
		old, ok := from[id]
		if !ok || !same(old, to[id]) {
			put = append(put, to[id])
		}
	}
	for _, id := range sorted(from) {
		if _, ok := to[id]; !ok {
			gone = append(gone, id)
		}
	}
	return put, gone
}

// missing are the ids of a that b has not, in their order.
func missing(a, b map[weft.ID]struct{}) []weft.ID {
	var out []weft.ID
	for id := range a {
		if _, ok := b[id]; !ok {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

func sorted[T any](m map[weft.ID]T) []weft.ID {
	ids := make([]weft.ID, 0, len(m))
	for id := range m {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func compare[T weft.ID | uint64](a, b T) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func sameTask(a, b weft.Task) bool {
	return a.Service == b.Service && a.SpecVersion == b.SpecVersion && a.Meta.CreatedAt.Equal(b.Meta.CreatedAt) &&
		a.Desired == b.Desired && a.Node == b.Node && a.Status == b.Status &&
		a.NotBefore.Equal(b.NotBefore) && slices.Equal(a.Attachments, b.Attachments) && slices.EqualFunc(a.Ports, b.Ports, weft.PortSpec.Equal)
}

func sameNetwork(a, b weft.Network) bool { return a.Meta.Index == b.Meta.Index }

func deepEqual[T any](a, b T) bool { return reflect.DeepEqual(a, b) }
