package state

import (
	"fmt"
	"reflect"
	"time"

	"github.com/hashicorp/go-memdb"

	"github.com/weftnet/weft"
)

// tx is one command being applied. Everything in this file is deterministic:
// no clock, no randomness, no map order, no I/O. Stored objects are never
// written: a change stores a new one.
type tx struct {
	*memdb.Txn
	index   uint64
	at      time.Time
	changed *Changed
}

func applyCommand(t *tx, changes []Change) error {
	for i := range changes {
		if err := t.apply(&changes[i]); err != nil {
			return err
		}
	}
	return nil
}

func (t *tx) apply(c *Change) error {
	switch {
	case c.Cluster != nil:
		return t.putCluster(c.Cluster)
	case c.Node != nil:
		return t.putNode(c.Node)
	case c.Network != nil:
		return t.putNetwork(c.Network)
	case c.Service != nil:
		return t.putService(c.Service)
	case c.Task != nil:
		return t.createTask(c.Task)
	case c.NodeStatus != nil:
		return t.nodeStatus(c.NodeStatus)
	case c.ServiceUpdate != nil:
		return t.serviceUpdate(c.ServiceUpdate)
	case c.TaskStatus != nil:
		return t.taskStatus(c.TaskStatus)
	case c.TaskDesired != nil:
		return t.taskDesired(c.TaskDesired)
	case c.TaskAssign != nil:
		return t.taskAssign(c.TaskAssign)
	case c.TaskAttach != nil:
		return t.taskAttach(c.TaskAttach)
	case c.Delete != nil:
		return t.delete(c.Delete)
	case c.Release != nil:
		return t.release(c.Release)
	}
	return fmt.Errorf("apply change: it is of a kind that this build does not know: %w", weft.ErrUnsupported)
}

// lock checks the optimistic lock and returns the Meta to store.
func (t *tx) lock(what string, put weft.Meta, exists bool, stored weft.Meta) (weft.Meta, error) {
	switch {
	case put.Index == 0 && exists:
		return put, fmt.Errorf("create %s: it exists: %w", what, weft.ErrConflict)
	case put.Index != 0 && !exists:
		return put, fmt.Errorf("%s %w", what, weft.ErrNotFound)
	case put.Index != 0 && put.Index != stored.Index:
		return put, fmt.Errorf("update %s: it was read at %d and has changed at %d: %w", what, put.Index, stored.Index, weft.ErrOutOfSequence)
	case !exists:
		return weft.Meta{Index: t.index, CreatedAt: t.at, UpdatedAt: t.at}, nil
	}
	return weft.Meta{Index: t.index, CreatedAt: stored.CreatedAt, UpdatedAt: t.at}, nil
}

func (t *tx) putCluster(n *weft.Cluster) error {
	old, err := first[weft.Cluster](t.Txn, tCluster, byID, "cluster")
	if err != nil {
		return err
	}
	var stored weft.Meta
	if old != nil {
		stored = old.Meta
	}
	m, err := t.lock("cluster", n.Meta, old != nil, stored)
	if err != nil {
		return err
	}
	c := *n
	c.Meta = m
	t.changed.Cluster = true
	return t.Insert(tCluster, &c)
}

func (t *tx) putNode(n *weft.Node) error {
	if n.ID == "" {
		return fmt.Errorf("store node: it has no id: %w", weft.ErrInvalid)
	}
	old, err := first[weft.Node](t.Txn, tNodes, byID, string(n.ID))
	if err != nil {
		return err
	}
	c := *n
	var stored weft.Meta
	if old != nil {
		stored = old.Meta
		// What sessions own does not come from the editor's older copy.
		c.Status, c.Description, c.DataPath, c.Manager = old.Status, old.Description, old.DataPath, old.Manager
	}
	if c.Meta, err = t.lock("node "+string(n.ID), n.Meta, old != nil, stored); err != nil {
		return err
	}
	t.changed.Nodes[n.ID] = struct{}{}
	at, err := t.ingressOf(n)
	if err != nil {
		return err
	}
	if err := t.use(at); err != nil {
		return err
	}
	return t.Insert(tNodes, &c)
}

func (t *tx) putNetwork(n *weft.Network) error {
	if n.ID == "" || n.Spec.Name == "" {
		return fmt.Errorf("store network: it has no id or no name: %w", weft.ErrInvalid)
	}
	old, err := first[weft.Network](t.Txn, tNetworks, byID, string(n.ID))
	if err != nil {
		return err
	}
	named, err := first[weft.Network](t.Txn, tNetworks, byName, n.Spec.Name)
	if err != nil {
		return err
	}
	if named != nil && named.ID != n.ID {
		return fmt.Errorf("network with name %s already exists: %w", n.Spec.Name, weft.ErrConflict)
	}
	numbered, err := first[weft.Network](t.Txn, tNetworks, byVNI, num(uint64(n.VNI)))
	if err != nil {
		return err
	}
	if numbered != nil && numbered.ID != n.ID {
		return fmt.Errorf("store network %s: VNI %d belongs to network %s: %w", n.Spec.Name, n.VNI, numbered.Spec.Name, weft.ErrConflict)
	}
	var stored weft.Meta
	if old != nil {
		stored = old.Meta
	}
	c := *n
	if c.Meta, err = t.lock("network "+n.Spec.Name, n.Meta, old != nil, stored); err != nil {
		return err
	}
	t.changed.Networks[n.ID] = struct{}{}
	return t.Insert(tNetworks, &c)
}

func (t *tx) putService(n *weft.Service) error {
	if n.ID == "" || n.Spec.Name == "" {
		return fmt.Errorf("store service: it has no id or no name: %w", weft.ErrInvalid)
	}
	old, err := first[weft.Service](t.Txn, tServices, byID, string(n.ID))
	if err != nil {
		return err
	}
	named, err := first[weft.Service](t.Txn, tServices, byName, n.Spec.Name)
	if err != nil {
		return err
	}
	if named != nil && named.ID != n.ID {
		return fmt.Errorf("service with name %s already exists: %w", n.Spec.Name, weft.ErrConflict)
	}
	for _, net := range n.Spec.Networks {
		// Its removal may have been committed since the leader looked.
		have, err := first[weft.Network](t.Txn, tNetworks, byID, string(net.Network))
		if err != nil {
			return err
		}
		if have == nil {
			return fmt.Errorf("store service %s: network %s %w", n.Spec.Name, net.Network, weft.ErrNotFound)
		}
	}
	var stored weft.Meta
	if old != nil {
		stored = old.Meta
	}
	c := *n
	if c.Meta, err = t.lock("service "+n.Spec.Name, n.Meta, old != nil, stored); err != nil {
		return err
	}
	have, err := first[weft.SpecVersion](t.Txn, tSpecs, byID, string(n.ID), num(n.SpecVersion))
	if err != nil {
		return err
	}
	switch {
	case have == nil:
		if err := t.Insert(tSpecs, &weft.SpecVersion{Service: n.ID, Version: n.SpecVersion, Spec: n.Spec}); err != nil {
			return err
		}
	case !reflect.DeepEqual(have.Spec, n.Spec):
		return fmt.Errorf("store service %s: spec version %d is stored with another content: %w", n.Spec.Name, n.SpecVersion, weft.ErrConflict)
	}
	t.changed.Services[n.ID] = struct{}{}
	if err := t.Insert(tServices, &c); err != nil {
		return err
	}
	if old != nil {
		if err := t.restVIPs(n.ID, old.VIPs, n.VIPs); err != nil {
			return err
		}
	}
	for _, v := range n.VIPs {
		if err := t.use(weft.Attachment(v)); err != nil {
			return err
		}
	}
	if old != nil && old.SpecVersion != n.SpecVersion {
		return t.dropSpec(n.ID, old.SpecVersion)
	}
	return nil
}

// dropSpec deletes a spec version that neither its service nor a task needs.
func (t *tx) dropSpec(service weft.ID, version uint64) error {
	s, err := first[weft.Service](t.Txn, tServices, byID, string(service))
	if err != nil {
		return err
	}
	if s != nil && s.SpecVersion == version {
		return nil
	}
	user, err := first[weft.Task](t.Txn, tTasks, bySpec, string(service), num(version))
	if err != nil || user != nil {
		return err
	}
	_, err = t.DeleteAll(tSpecs, byID, string(service), num(version))
	return err
}

func (t *tx) createTask(n *weft.Task) error {
	if n.ID == "" || n.Service == "" {
		return fmt.Errorf("create task: it has no id or no service: %w", weft.ErrInvalid)
	}
	old, err := first[weft.Task](t.Txn, tTasks, byID, string(n.ID))
	if err != nil {
		return err
	}
	if old != nil {
		return fmt.Errorf("create task %s: it exists: %w", n.ID, weft.ErrConflict)
	}
	spec, err := first[weft.SpecVersion](t.Txn, tSpecs, byID, string(n.Service), num(n.SpecVersion))
	if err != nil {
		return err
	}
	if spec == nil {
		// The service went, or moved on, between the pass that decided
		// this and now: the next pass decides anew.
		return fmt.Errorf("create task %s: version %d of service %s %w", n.ID, n.SpecVersion, n.Service, weft.ErrNotFound)
	}
	c := *n
	c.Meta = weft.Meta{Index: t.index, CreatedAt: t.at, UpdatedAt: t.at}
	if err := t.use(c.Attachments...); err != nil {
		return err
	}
	return t.storeTask(nil, &c)
}

func (t *tx) storeTask(old, n *weft.Task) error {
	t.changed.Tasks[n.ID] = struct{}{}
	t.changed.Services[n.Service] = struct{}{}
	if n.Node != "" {
		t.changed.TaskNodes[n.Node] = struct{}{}
	}
	if old != nil && old.Node != "" {
		t.changed.TaskNodes[old.Node] = struct{}{}
	}
	if old != nil && n.Status.State.Ended() && !old.Status.State.Ended() {
		if err := t.restTask(n); err != nil {
			return err
		}
	}
	return t.Insert(tTasks, n)
}

// editTask stores a changed copy of a task; a task that is gone is skipped, and
// so is an edit that returns false.
func (t *tx) editTask(id weft.ID, edit func(n *weft.Task) bool) error {
	old, err := first[weft.Task](t.Txn, tTasks, byID, string(id))
	if err != nil || old == nil {
		return err
	}
	c := *old
	if !edit(&c) {
		return nil
	}
	c.Meta.Index, c.Meta.UpdatedAt = t.index, t.at
	return t.storeTask(old, &c)
}

func (t *tx) taskStatus(s *TaskStatus) error {
	if s.Status.State == weft.TaskRemove {
		old, err := first[weft.Task](t.Txn, tTasks, byID, string(s.Task))
		if err != nil || old == nil || old.Node != s.Node || old.Desired != weft.TaskRemove {
			return err
		}
		return t.deleteTask(old)
	}
	return t.editTask(s.Task, func(n *weft.Task) bool {
		if n.Node != s.Node && s.Node != "" {
			return false
		}
		if s.Status.State < n.Status.State || n.Status.State.Ended() || reflect.DeepEqual(n.Status, s.Status) {
			return false
		}
		n.Status = s.Status
		return true
	})
}

func (t *tx) taskDesired(d *TaskDesired) error {
	return t.editTask(d.Task, func(n *weft.Task) bool {
		if d.Desired <= n.Desired {
			return false
		}
		n.Desired = d.Desired
		return true
	})
}

func (t *tx) taskAssign(a *TaskAssign) error {
	node, err := first[weft.Node](t.Txn, tNodes, byID, string(a.Node))
	if err != nil || node == nil {
		return err // the node was removed meanwhile: the task stays pending
	}
	return t.editTask(a.Task, func(n *weft.Task) bool {
		if n.Status.State != weft.TaskPending || n.Node != "" && n.Node != a.Node {
			return false
		}
		n.Node, n.Ports = a.Node, a.Ports
		n.Status = weft.TaskStatus{State: weft.TaskAssigned, At: t.at, Message: "scheduler assigned task to node"}
		return true
	})
}

func (t *tx) taskAttach(a *TaskAttach) error {
	attached := false
	err := t.editTask(a.Task, func(n *weft.Task) bool {
		if n.Status.State != weft.TaskNew {
			return false
		}
		n.Attachments = a.Attachments
		n.Status = weft.TaskStatus{State: weft.TaskPending, At: t.at, Message: "pending task scheduling"}
		attached = true
		return true
	})
	if err != nil || !attached {
		return err
	}
	return t.use(a.Attachments...)
}

func (t *tx) nodeStatus(s *NodeStatus) error {
	old, err := first[weft.Node](t.Txn, tNodes, byID, string(s.Node))
	if err != nil || old == nil {
		return err
	}
	c := *old
	if s.State != nil {
		c.Status.State, c.Status.Message = *s.State, s.Message
	}
	if s.Description != nil {
		c.Description = *s.Description
	}
	if s.Session != nil {
		if s.Session.Addr.IsValid() {
			c.Status.Addr = s.Session.Addr
		}
		if s.Session.Port != 0 {
			c.Status.ClusterPort = s.Session.Port
		}
		if s.Session.DataPath.IsValid() {
			c.DataPath = s.Session.DataPath
		}
	}
	if s.Manager != nil {
		c.Manager = s.Manager
	}
	if s.DropManager {
		c.Manager = nil
	}
	if s.Keys != nil {
		c.Status.Keys = *s.Keys
	}
	if !reflect.DeepEqual(&c, old) {
		t.changed.Nodes[c.ID] = struct{}{}
	}
	if s.Listeners != nil {
		c.Status.Listeners = *s.Listeners
	}
	return t.Insert(tNodes, &c)
}

func (t *tx) serviceUpdate(u *ServiceUpdate) error {
	old, err := first[weft.Service](t.Txn, tServices, byID, string(u.Service))
	if err != nil || old == nil || old.SpecVersion != u.SpecVersion {
		return err
	}
	c := *old
	c.Update = u.Update
	t.changed.Services[c.ID] = struct{}{}
	return t.Insert(tServices, &c)
}
