package agent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/netstate"
	"github.com/weftnet/weft/orchestrator/wire"
)

// drawAssignments is any message, also one that puts and removes at once; names have
// what JSON must escape.
func drawAssignments(t *rapid.T, seq uint64) wire.Assignments {
	a := wire.Assignments{Seq: seq, Full: seq == 1 || rapid.IntRange(0, 9).Draw(t, "full") == 0, Index: rapid.Uint64Range(0, 9).Draw(t, "index")}
	some := func(what string) (ids []weft.ID) {
		for range rapid.IntRange(0, 3).Draw(t, what) {
			ids = append(ids, testID(fmt.Sprintf("%s%d", what[:1], rapid.IntRange(0, 9).Draw(t, "which"))))
		}
		return ids
	}
	name := func() string { return rapid.SampledFrom([]string{"web", "<&>", "\u2028\"\\"}).Draw(t, "name") }
	for _, id := range some("service") {
		a.Services = append(a.Services, wire.ServiceView{ID: id, Name: name(), HideClient: rapid.Bool().Draw(t, "hides")})
	}
	for _, id := range some("task") {
		task := testTask(rapid.IntRange(1, 3).Draw(t, "slot"), front)
		task.ID, task.Service, task.SpecVersion = id, testID(fmt.Sprint("s", rapid.IntRange(0, 3).Draw(t, "of"))), rapid.Uint64Range(1, 11).Draw(t, "version")
		spec := testSpec(task.SpecVersion, name())
		spec.Service = task.Service
		a.Tasks, a.Specs = append(a.Tasks, task), append(a.Specs, spec)
	}
	for _, id := range some("network") {
		n := front
		n.ID, n.Spec.Name = id, name()
		a.Networks = append(a.Networks, n)
	}
	for _, id := range some("x node") {
		a.Nodes = append(a.Nodes, wire.NodeView{ID: id, Hostname: name(), DataPath: vtepB})
	}
	a.GoneServices, a.GoneTasks, a.GoneNetworks, a.GoneNodes = some("service"), some("task"), some("network"), some("x node")
	a.Ended, a.GoneEnded = some("task"), some("task")
	if rapid.IntRange(0, 4).Draw(t, "cluster") == 0 {
		a.Cluster = &wire.ClusterView{ID: testID("c"), KeyEpoch: rapid.Uint64Range(0, 3).Draw(t, "epoch")}
	}
	return a
}

// TestModelFileIsJSON: what is written of each model after the other is what
// json.Marshal makes of it, and the services that the plane lists are those of each.
func TestModelFileIsJSON(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		m, f, path := newModel(), modelFile{}, filepath.Join(dir, "assignments.json")
		var listed []netstate.Service
		for range rapid.IntRange(1, 12).Draw(t, "messages") {
			a := drawAssignments(t, m.Seq+1)
			next, err := m.apply(a)
			if err != nil {
				t.Fatal(err)
			}
			before := slices.Clone(listed)
			now := next.listServices(listed)
			if !reflect.DeepEqual(before, slices.Clone(listed)) {
				t.Fatal("a list that was given out was changed")
			}
			if whole := next.listServices(nil); !slices.EqualFunc(now, whole, func(a, b netstate.Service) bool { return reflect.DeepEqual(a, b) }) {
				t.Fatalf("listed %v, want %v", now, whole)
			}
			m, listed = next, now
			if err := f.save(path, m, a); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if want, err := json.Marshal(m); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("after %+v: written\n%s\nwant\n%s, %v", a, got, want, err)
			}
		}
	})
}

// TestListServicesShares: of a message about anything else the list is the same one.
func TestListServicesShares(t *testing.T) {
	m, err := newModel().apply(full(testTask(1, front)))
	if err != nil {
		t.Fatal(err)
	}
	listed := m.listServices(nil)
	next, err := m.apply(wire.Assignments{Seq: m.Seq + 1, GoneNodes: []weft.ID{nodeB}})
	if err != nil {
		t.Fatal(err)
	}
	if now := next.listServices(listed); len(now) != 1 || &now[0] != &listed[0] {
		t.Errorf("listed anew: %v", now)
	}
}
