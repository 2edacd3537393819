package state

import (
	"testing"

	"github.com/weftnet/weft"
)

// TestSharedObjectsStayTheSame: what has not changed is the same pointer in the next
// view, what has is another one, and the view before keeps what it had.
func TestSharedObjectsStayTheSame(t *testing.T) {
	s := New()
	apply(t, s, 1, Command{At: t0, Changes: []Change{
		{Network: testNetwork(2, 4097)}, {Node: testNode(3)}, {Service: testService(4, id(2))}, {Service: testService(5)},
		{Task: testTask(6, 4, id(3))}, {Task: testTask(7, 4, id(3))}, {Task: testTask(8, 4, id(9))},
	}})
	before := s.View()
	services, tasks := before.SharedServices(), before.SharedTasksOfNode(id(3))
	if len(services) != 2 || len(tasks) != 2 || services[0].ID != id(4) || tasks[1].ID != id(7) {
		t.Fatalf("services %v, tasks %v", services, tasks)
	}
	apply(t, s, 2, Command{At: t0, Changes: []Change{
		{ServiceUpdate: &ServiceUpdate{Service: id(5), SpecVersion: 1, Update: weft.UpdateStatus{State: weft.UpdateRunning}}},
		{TaskStatus: &TaskStatus{Task: id(7), Node: id(3), Status: weft.TaskStatus{State: weft.TaskRunning, At: t0}}},
	}})
	now := s.View()
	if s, k := now.SharedServices(), now.SharedTasksOfNode(id(3)); s[0] != services[0] || s[1] == services[1] || k[0] != tasks[0] || k[1] == tasks[1] {
		t.Errorf("services %p became %p, tasks %p became %p: want the first of each alone the same", services, s, tasks, k)
	}
	if s, k := before.SharedServices(), before.SharedTasksOfNode(id(3)); s[1] != services[1] || k[1] != tasks[1] || k[1].Status.State != weft.TaskAssigned {
		t.Error("the view before has changed")
	}
}
