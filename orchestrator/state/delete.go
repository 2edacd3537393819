package state

import (
	"fmt"

	"github.com/weftnet/weft"
)

func (t *tx) delete(r *Ref) error {
	switch r.Kind {
	case KindNode:
		return t.deleteNode(r)
	case KindService:
		return t.deleteService(r)
	case KindNetwork:
		return t.deleteNetwork(r)
	case KindTask:
		old, err := first[weft.Task](t.Txn, tTasks, byID, string(r.ID))
		if err != nil || old == nil {
			return err
		}
		return t.deleteTask(old)
	}
	return fmt.Errorf("delete %s %s: it is of a kind that this build does not know: %w", r.Kind, r.ID, weft.ErrUnsupported)
}

func (r *Ref) lock(name string, stored weft.Meta) error {
	if r.Index != 0 && r.Index != stored.Index {
		return fmt.Errorf("remove %s %s: it was read at %d and has changed at %d: %w", r.Kind, name, r.Index, stored.Index, weft.ErrOutOfSequence)
	}
	return nil
}

// deleteNode also orphans the node's tasks: nobody will ever report them again.
func (t *tx) deleteNode(r *Ref) error {
	old, err := first[weft.Node](t.Txn, tNodes, byID, string(r.ID))
	if err != nil || old == nil {
		return err
	}
	if err := r.lock(string(old.ID), old.Meta); err != nil {
		return err
	}
	tasks, err := all[weft.Task](t.Txn, tTasks, byNode, string(r.ID))
	if err != nil {
		return err
	}
	for _, k := range tasks {
		if k.Status.State.Ended() {
			continue
		}
		if err := t.editTask(k.ID, func(n *weft.Task) bool {
			n.Status = weft.TaskStatus{State: weft.TaskOrphaned, At: t.at, Message: "node removed", Err: "node " + string(r.ID) + " was removed from the cluster"}
			return true
		}); err != nil {
			return err
		}
	}
	t.changed.Nodes[r.ID] = struct{}{}
	t.changed.TaskNodes[r.ID] = struct{}{}
	at, err := t.ingressOf(old)
	if err != nil {
		return err
	}
	if err := t.rest(old.ID, false, at); err != nil {
		return err
	}
	return t.Delete(tNodes, old)
}

// deleteService leaves the tasks: the leader shuts them down. Spec versions
// live on with them.
func (t *tx) deleteService(r *Ref) error {
	old, err := first[weft.Service](t.Txn, tServices, byID, string(r.ID))
	if err != nil || old == nil {
		return err
	}
	if err := r.lock(old.Spec.Name, old.Meta); err != nil {
		return err
	}
	t.changed.Services[r.ID] = struct{}{}
	if err := t.restVIPs(old.ID, old.VIPs, nil); err != nil {
		return err
	}
	if err := t.Delete(tServices, old); err != nil {
		return err
	}
	return t.dropSpec(r.ID, old.SpecVersion)
}

// deleteNetwork checks use once more: a service that joined the network may
// have been committed since the leader looked.
func (t *tx) deleteNetwork(r *Ref) error {
	old, err := first[weft.Network](t.Txn, tNetworks, byID, string(r.ID))
	if err != nil || old == nil {
		return err
	}
	if err := r.lock(old.Spec.Name, old.Meta); err != nil {
		return err
	}
	services, err := all[weft.Service](t.Txn, tServices, byID)
	if err != nil {
		return err
	}
	if users := networkUsers(services, r.ID); len(users) > 0 {
		return InUse(old.Spec.Name, users)
	}
	t.changed.Networks[r.ID] = struct{}{}
	if err := t.restNetwork(old); err != nil {
		return err
	}
	return t.Delete(tNetworks, old)
}

func (t *tx) deleteTask(old *weft.Task) error {
	t.changed.Tasks[old.ID] = struct{}{}
	t.changed.Services[old.Service] = struct{}{}
	if old.Node != "" {
		t.changed.TaskNodes[old.Node] = struct{}{}
	}
	if !old.Status.State.Ended() {
		if err := t.restTask(old); err != nil {
			return err
		}
	}
	if err := t.Delete(tTasks, old); err != nil {
		return err
	}
	return t.dropSpec(old.Service, old.SpecVersion)
}
