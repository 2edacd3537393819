package state

import (
	"fmt"
	"strings"

	"github.com/hashicorp/go-memdb"

	"github.com/weftnet/weft"
)

// Snapshot is an immutable view of the whole state at one log index. Lists are
// in the order of their ids. Values are shared with the store: they may be
// copied and kept, and what their pointers, maps and slices refer to must not
// be written. Safe for concurrent use.
type Snapshot struct {
	txn   *memdb.Txn
	index uint64
}

// Index is the log index of the newest entry in the view.
func (s *Snapshot) Index() uint64 { return s.index }

func first[T any](txn *memdb.Txn, table, index string, args ...any) (*T, error) {
	raw, err := txn.First(table, index, args...)
	if err != nil {
		return nil, fmt.Errorf("read %s by %s: %w", table, index, err)
	}
	if raw == nil {
		return nil, nil
	}
	return raw.(*T), nil
}

func all[T any](txn *memdb.Txn, table, index string, args ...any) ([]*T, error) {
	it, err := txn.Get(table, index, args...)
	if err != nil {
		return nil, fmt.Errorf("read %s by %s: %w", table, index, err)
	}
	var out []*T
	for raw := it.Next(); raw != nil; raw = it.Next() {
		out = append(out, raw.(*T))
	}
	return out, nil
}

// The errors of memdb's reads say that a table or an index does not exist or
// was given an argument of a wrong type: a mistake in this package, which the
// tests of every getter exclude.

func one[T any](s *Snapshot, table, index string, args ...any) (v T, ok bool) {
	p, err := first[T](s.txn, table, index, args...)
	if err != nil {
		panic(err)
	}
	if p == nil {
		return v, false
	}
	return *p, true
}

func shared[T any](s *Snapshot, table, index string, args ...any) []*T {
	ps, err := all[T](s.txn, table, index, args...)
	if err != nil {
		panic(err)
	}
	return ps
}

func list[T any](s *Snapshot, table, index string, args ...any) []T {
	ps := shared[T](s, table, index, args...)
	out := make([]T, len(ps))
	for i, p := range ps {
		out[i] = *p
	}
	return out
}

// Cluster is the cluster object; false before the first leader has stored it.
func (s *Snapshot) Cluster() (weft.Cluster, bool) {
	return one[weft.Cluster](s, tCluster, byID, "cluster")
}

// Node looks a node up by its id.
func (s *Snapshot) Node(id weft.ID) (weft.Node, bool) {
	return one[weft.Node](s, tNodes, byID, string(id))
}

// Nodes lists all nodes.
func (s *Snapshot) Nodes() []weft.Node { return list[weft.Node](s, tNodes, byID) }

// Service looks a service up by its id.
func (s *Snapshot) Service(id weft.ID) (weft.Service, bool) {
	return one[weft.Service](s, tServices, byID, string(id))
}

// ServiceByName looks a service up by its name, as it is written.
func (s *Snapshot) ServiceByName(name string) (weft.Service, bool) {
	return one[weft.Service](s, tServices, byName, name)
}

// ServiceCalled is a service that DNS does not tell from one of this name: that
// name itself, or else one that differs in case.
func (s *Snapshot) ServiceCalled(name string) (weft.Service, bool) {
	if v, ok := s.ServiceByName(name); ok {
		return v, true
	}
	return one[weft.Service](s, tServices, byFolded, weft.FoldName(name))
}

// Services lists all services.
func (s *Snapshot) Services() []weft.Service { return list[weft.Service](s, tServices, byID) }

// SharedServices lists all services as the store has them: one that has not changed
// is the same pointer in the next view, so that who has made something of it need
// not look at it again. They must not be written.
func (s *Snapshot) SharedServices() []*weft.Service {
	return shared[weft.Service](s, tServices, byID)
}

// Network looks a network up by its id.
func (s *Snapshot) Network(id weft.ID) (weft.Network, bool) {
	return one[weft.Network](s, tNetworks, byID, string(id))
}

// NetworkByName looks a network up by its name, as it is written.
func (s *Snapshot) NetworkByName(name string) (weft.Network, bool) {
	return one[weft.Network](s, tNetworks, byName, name)
}

// NetworkCalled is for networks what ServiceCalled is for services.
func (s *Snapshot) NetworkCalled(name string) (weft.Network, bool) {
	if v, ok := s.NetworkByName(name); ok {
		return v, true
	}
	return one[weft.Network](s, tNetworks, byFolded, weft.FoldName(name))
}

// Networks lists all networks.
func (s *Snapshot) Networks() []weft.Network { return list[weft.Network](s, tNetworks, byID) }

// Ingress is the routing mesh's network.
func (s *Snapshot) Ingress() (weft.Network, bool) {
	return one[weft.Network](s, tNetworks, byVNI, num(uint64(weft.IngressVNI)))
}

// Spec looks a spec version up.
func (s *Snapshot) Spec(service weft.ID, version uint64) (weft.SpecVersion, bool) {
	return one[weft.SpecVersion](s, tSpecs, byID, string(service), num(version))
}

// Specs lists the spec versions of a service, oldest first.
func (s *Snapshot) Specs(service weft.ID) []weft.SpecVersion {
	return list[weft.SpecVersion](s, tSpecs, byID+"_prefix", string(service)+"\x00")
}

// Task looks a task up by its id.
func (s *Snapshot) Task(id weft.ID) (weft.Task, bool) {
	return one[weft.Task](s, tTasks, byID, string(id))
}

// Tasks lists all tasks.
func (s *Snapshot) Tasks() []weft.Task { return list[weft.Task](s, tTasks, byID) }

// TasksOfService lists the tasks of a service, also of a removed one.
func (s *Snapshot) TasksOfService(service weft.ID) []weft.Task {
	return list[weft.Task](s, tTasks, byService, string(service))
}

// TasksOfNode lists the tasks that are or were assigned to a node.
func (s *Snapshot) TasksOfNode(node weft.ID) []weft.Task {
	return list[weft.Task](s, tTasks, byNode, string(node))
}

// SharedTasksOfNode is TasksOfNode by pointers, as SharedServices is Services.
func (s *Snapshot) SharedTasksOfNode(node weft.ID) []*weft.Task {
	return shared[weft.Task](s, tTasks, byNode, string(node))
}

// TasksWithPorts lists the tasks that have ports in mode host on a node and have not
// ended; "" = on any node.
func (s *Snapshot) TasksWithPorts(node weft.ID) []weft.Task {
	if node == "" {
		return list[weft.Task](s, tTasks, byPorts)
	}
	return list[weft.Task](s, tTasks, byPorts, string(node))
}

// ServicesByPrefix, NetworksByPrefix and NodesByPrefix list the objects whose
// id begins with prefix.
func (s *Snapshot) ServicesByPrefix(prefix string) []weft.Service {
	return list[weft.Service](s, tServices, byID+"_prefix", prefix)
}

// NetworksByPrefix: see ServicesByPrefix.
func (s *Snapshot) NetworksByPrefix(prefix string) []weft.Network {
	return list[weft.Network](s, tNetworks, byID+"_prefix", prefix)
}

// NetworkUsers lists the names of the services on a network, the services
// with published ports being on the ingress network.
func (s *Snapshot) NetworkUsers(network weft.ID) []string {
	ps, err := all[weft.Service](s.txn, tServices, byID)
	if err != nil {
		panic(err)
	}
	return networkUsers(ps, network)
}

func networkUsers(services []*weft.Service, network weft.ID) []string {
	var names []string
	for _, s := range services {
		uses := false
		for _, n := range s.Spec.Networks {
			uses = uses || n.Network == network
		}
		for _, v := range s.VIPs {
			uses = uses || v.Network == network
		}
		if uses {
			names = append(names, s.Spec.Name)
		}
	}
	return names
}

// InUse is the refusal to remove a network that services are on.
func InUse(network string, services []string) error {
	return fmt.Errorf("network %s is in use by service %s: remove the services first: %w", network, strings.Join(services, ", "), weft.ErrConflict)
}
