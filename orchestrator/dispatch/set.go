package dispatch

import (
	"reflect"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Set is all that one node must know, as a value: the target of Diff. It is not
// changed once it is made: sets share what is the same.
type Set struct {
	Tasks    []*weft.Task // in the order of ids, as Services
	Specs    map[SpecKey]*weft.SpecVersion
	Networks map[weft.ID]weft.Network
	Services []*wire.ServiceView
	Nodes    map[weft.ID]wire.NodeView
	Cluster  wire.ClusterView
	// Ended tasks have addresses that rest on one of Networks.
	Ended map[weft.ID]struct{}

	stored []*weft.Task // what Tasks were made of, by the store
}

// SpecKey identifies a spec version.
type SpecKey struct {
	Service weft.ID
	Version uint64
}

// shared is the part of every node's set that is the same for all, computed
// once per log index. It is immutable; one that is made of another has what is the
// same from it.
type shared struct {
	index uint64
	nodes map[weft.ID]wire.NodeView
	// services in the order of ids, made of stored.
	services []*wire.ServiceView
	stored   []*weft.Service
	// published: services that every node must know; on: services by network.
	published []*wire.ServiceView
	on        map[weft.ID][]*wire.ServiceView
	ingress   *weft.Network
	cluster   wire.ClusterView
	// ended: tasks whose addresses rest, by network; rests: anything does.
	ended map[weft.ID][]weft.ID
	rests bool
}

// share computes the shared part of a view, from the last one if there is one.
func share(v *state.Snapshot, last *shared) *shared {
	s := &shared{index: v.Index(), nodes: map[weft.ID]wire.NodeView{}, ended: map[weft.ID][]weft.ID{}}
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
	if n, ok := v.Ingress(); ok {
		s.ingress = &n
	}
	if c, ok := v.Cluster(); ok {
		s.cluster = ClusterView(c)
	}
	s.stored = v.SharedServices()
	if last == nil {
		last = &shared{}
	} else if deepEqual(s.nodes, last.nodes) {
		s.nodes = last.nodes
	}
	var same bool
	if s.services, same = views(s.stored, last); same {
		s.services, s.published, s.on = last.services, last.published, last.on
		return s
	}
	s.on = map[weft.ID][]*wire.ServiceView{}
	for _, view := range s.services {
		if weft.InMesh(view.Ports) {
			s.published = append(s.published, view)
		}
		for _, t := range view.Networks {
			s.on[t.Network] = append(s.on[t.Network], view)
		}
	}
	return s
}

// views are what nodes know of services, in the order of ids. What says the same as
// in the last ones is the same pointer; same reports that all is.
func views(stored []*weft.Service, last *shared) (out []*wire.ServiceView, same bool) {
	out = make([]*wire.ServiceView, len(stored))
	same = len(stored) == len(last.stored)
	at := 0
	for i, svc := range stored {
		for at < len(last.stored) && last.stored[at].ID < svc.ID {
			at++
		}
		switch {
		case at == len(last.stored) || last.stored[at].ID != svc.ID:
			out[i], same = serviceView(svc), false
		case last.stored[at] == svc:
			out[i] = last.services[at]
		default:
			if out[i] = serviceView(svc); deepEqual(out[i], last.services[at]) {
				out[i] = last.services[at]
			} else {
				same = false
			}
		}
	}
	return out, same
}

func serviceView(svc *weft.Service) *wire.ServiceView {
	return &wire.ServiceView{
		ID: svc.ID, Name: svc.Spec.Name, EndpointMode: svc.Spec.EndpointMode,
		VIPs: svc.VIPs, Ports: svc.Ports, Networks: svc.Spec.Networks, Drain: svc.Spec.DrainTime(), HideClient: svc.Spec.HidesClients(),
	}
}

// service looks a service up.
func (s *shared) service(id weft.ID) (*wire.ServiceView, bool) {
	i, ok := slices.BinarySearchFunc(s.services, id, func(v *wire.ServiceView, id weft.ID) int { return compare(v.ID, id) })
	if !ok {
		return nil, false
	}
	return s.services[i], true
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
func Compute(v *state.Snapshot, node weft.ID) Set { return compute(v, share(v, nil), node, Set{}) }

// compute is Compute with the shared part of the view, and an earlier set of the
// node, empty if there is none, from which it has what is the same.
func compute(v *state.Snapshot, sh *shared, node weft.ID, last Set) Set {
	s := Set{Networks: map[weft.ID]weft.Network{}, Nodes: sh.nodes, Cluster: sh.cluster, Ended: map[weft.ID]struct{}{}}
	if sh.ingress != nil {
		n, ok := v.Node(node)
		if _, refused := n.Conflict(sh.ingress); ok && !refused {
			s.Networks[sh.ingress.ID] = *sh.ingress
		}
	}
	s.takeTasks(v, node, last)
	var more []*wire.ServiceView // beside those that are published
	for _, t := range s.Tasks {
		if t.Status.State.Ended() {
			continue // it is on no network any more
		}
		if len(t.Ports) > 0 {
			if svc, ok := sh.service(t.Service); ok {
				more = append(more, svc) // whether its clients are hidden
			}
		}
		for _, a := range t.Attachments {
			if _, has := s.Networks[a.Network]; has {
				continue
			}
			if n, ok := v.Network(a.Network); ok {
				s.Networks[n.ID] = n
			}
		}
	}
	for id := range s.Networks {
		more = append(more, sh.on[id]...)
		for _, task := range sh.ended[id] {
			s.Ended[task] = struct{}{}
		}
	}
	if s.Services = sh.published; len(more) > 0 {
		more = append(more, sh.published...)
		slices.SortFunc(more, func(a, b *wire.ServiceView) int { return compare(a.ID, b.ID) })
		s.Services = slices.Compact(more)
	}
	return s
}

// takeTasks gives s the tasks of a node, with their specifications.
func (s *Set) takeTasks(v *state.Snapshot, node weft.ID, last Set) {
	// Of a global service the node is known before a task's time has come.
	s.stored = slices.DeleteFunc(v.SharedTasksOfNode(node), func(t *weft.Task) bool { return t.Status.State < weft.TaskAssigned })
	if last.Specs != nil && slices.Equal(s.stored, last.stored) {
		s.stored, s.Tasks, s.Specs = last.stored, last.Tasks, last.Specs
		return
	}
	s.Tasks, s.Specs = make([]*weft.Task, len(s.stored)), map[SpecKey]*weft.SpecVersion{}
	at := 0
	for i, t := range s.stored {
		for at < len(last.stored) && last.stored[at].ID < t.ID {
			at++
		}
		if at < len(last.stored) && last.stored[at] == t {
			s.Tasks[i] = last.Tasks[at]
		} else {
			a := assignment(*t)
			s.Tasks[i] = &a
		}
		k := SpecKey{t.Service, t.SpecVersion}
		if _, ok := s.Specs[k]; ok {
			continue
		}
		// A version is immutable.
		if spec, ok := last.Specs[k]; ok {
			s.Specs[k] = spec
		} else if spec, ok := v.Spec(k.Service, k.Version); ok {
			s.Specs[k] = &spec
		}
	}
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
	a.Tasks, a.GoneTasks = diffInOrder(from.Tasks, to.Tasks, func(t *weft.Task) weft.ID { return t.ID }, sameTask)
	a.Networks, a.GoneNetworks = diff(from.Networks, to.Networks, sameNetwork)
	a.Services, a.GoneServices = diffInOrder(from.Services, to.Services, func(v *wire.ServiceView) weft.ID { return v.ID }, deepEqual[*wire.ServiceView])
	if !deepEqual(from.Nodes, to.Nodes) {
		a.Nodes, a.GoneNodes = diff(from.Nodes, to.Nodes, deepEqual[wire.NodeView])
	}
	for k, v := range to.Specs {
		// A version is immutable: what was sent needs no comparison.
		if _, ok := from.Specs[k]; !ok {
			a.Specs = append(a.Specs, *v)
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

// diffInOrder is diff of lists in the order of ids. What is the same pointer is not
// looked at.
func diffInOrder[T any](from, to []*T, id func(*T) weft.ID, same func(a, b *T) bool) (put []T, gone []weft.ID) {
	if len(from) == len(to) && (len(to) == 0 || &from[0] == &to[0]) {
		return nil, nil
	}
	for len(from)+len(to) > 0 {
		switch {
		case len(to) == 0 || len(from) > 0 && id(from[0]) < id(to[0]):
			gone, from = append(gone, id(from[0])), from[1:]
		case len(from) == 0 || id(to[0]) < id(from[0]):
			put, to = append(put, *to[0]), to[1:]
		default:
			if from[0] != to[0] && !same(from[0], to[0]) {
				put = append(put, *to[0])
			}
			from, to = from[1:], to[1:]
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

func sameTask(a, b *weft.Task) bool {
	return a.Service == b.Service && a.SpecVersion == b.SpecVersion && a.Meta.CreatedAt.Equal(b.Meta.CreatedAt) &&
		a.Desired == b.Desired && a.Node == b.Node && a.Status == b.Status &&
		a.NotBefore.Equal(b.NotBefore) && slices.Equal(a.Attachments, b.Attachments) && slices.EqualFunc(a.Ports, b.Ports, weft.PortSpec.Equal)
}

func sameNetwork(a, b weft.Network) bool { return a.Meta.Index == b.Meta.Index }

func deepEqual[T any](a, b T) bool { return reflect.DeepEqual(a, b) }
