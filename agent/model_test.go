package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/dns"
	"github.com/weftnet/weft/orchestrator/wire"
)

var update = flag.Bool("update", false, "write golden files; never for a version that was released")

// TestStoredForms: files of this version are read as they were written once. A
// change that breaks this needs a new version and a way to read the old one.
func TestStoredForms(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	m, err := newModel().apply(full(testTask(1, front)))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		file    string
		version int
		value   any
		into    any
	}{
		{"assignments.v1.json", modelVersion, m, newModel()},
		{"task.v1.json", statusVersion, &storedStatus{Version: statusVersion, Status: weft.TaskStatus{
			State: weft.TaskFailed, At: at, Message: "failed", Err: "task: non-zero exit (3)", ExitCode: 3, ExitKnown: true,
		}}, new(storedStatus)},
		{"task.v1-drain.json", statusVersion, &storedStatus{Version: statusVersion, Drain: at, Status: weft.TaskStatus{
			State: weft.TaskRunning, At: at, Message: "started", Err: "unhealthy container", PID: 7, Ran: at, Unhealthy: true,
		}}, new(storedStatus)},
		{"endpoints.v1.json", endpointsVersion, &storedEndpoints{endpointsVersion, at, []storedOwner{{nodeB, vtepB, []weft.OwnedEndpoint{
			{Endpoint: endpointOf(1), Owner: nodeB, VTEP: vtepB},
		}}}}, new(storedEndpoints)},
	} {
		t.Run(tc.file, func(t *testing.T) {
			path := filepath.Join("testdata", tc.file)
			if *update {
				if err := saveFile(path, tc.value); err != nil {
					t.Fatal(err)
				}
			}
			found, err := loadFile(path, tc.version, tc.into)
			if err != nil || !found {
				t.Fatalf("read %s: found %v, %v", path, found, err)
			}
			if !reflect.DeepEqual(tc.into, tc.value) {
				t.Errorf("read\n%+v, want\n%+v", tc.into, tc.value)
			}
			golden, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := json.Marshal(tc.value); err != nil || !bytes.Equal(b, golden) {
				t.Errorf("written now as\n%s, %v", b, err)
			}
		})
	}
}

func TestSpecKeyText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := specKey{weft.ID(rapid.StringMatching(`[0-9a-z]{25}`).Draw(t, "id")), rapid.Uint64().Draw(t, "version")}
		b, err := k.MarshalText()
		var back specKey
		if err := errors.Join(err, back.UnmarshalText(b)); err != nil || back != k {
			t.Fatalf("%v became %v, %v", k, back, err)
		}
	})
	for _, bad := range []string{"", "x", "x/", "x/y", "x/-1", "x/1 ", "x/18446744073709551616"} {
		if err := new(specKey).UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

// TestApplyLeavesTheOldModel: readers on other goroutines hold it.
func TestApplyLeavesTheOldModel(t *testing.T) {
	first, err := newModel().apply(full(testTask(1, front)))
	if err != nil {
		t.Fatal(err)
	}
	before, err := json.Marshal(first)
	if err != nil {
		t.Fatal(err)
	}
	spec := testSpec(2)
	task := testTask(1, front)
	task.SpecVersion = 2
	next, err := first.apply(wire.Assignments{
		Seq: 2, Tasks: []weft.Task{task}, Specs: []weft.SpecVersion{spec}, GoneNetworks: []weft.ID{back.ID}, GoneNodes: []weft.ID{nodeB},
		Cluster: &wire.ClusterView{DataPathPort: 4790},
	})
	if err != nil {
		t.Fatal(err)
	}
	if after, err := json.Marshal(first); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the old model has changed to %s, %v", after, err)
	}
	if _, ok := next.Specs[specKey{svc, 1}]; ok || len(next.Specs) != 1 {
		t.Errorf("specs %v, want version 2 alone", next.Specs)
	}
	if len(next.Networks) != 1 || len(next.Nodes) != 1 || next.Cluster.DataPathPort != 4790 {
		t.Errorf("next = %+v", next)
	}
	if got := next.vnis(task); len(got) != 1 || got[0] != 4097 {
		t.Errorf("vnis %v", got)
	}
}

// TestFullReplacesAll: nothing of before is left but the cluster's view.
func TestFullReplacesAll(t *testing.T) {
	first, err := newModel().apply(full(testTask(1, front)))
	if err != nil {
		t.Fatal(err)
	}
	next, err := first.apply(wire.Assignments{Seq: 1, Full: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(next.Tasks)+len(next.Specs)+len(next.Networks)+len(next.Services)+len(next.Nodes) != 0 {
		t.Errorf("left over: %+v", next)
	}
	if next.Cluster.DataPathPort != 4789 {
		t.Error("the cluster's view was lost")
	}
}

func TestViewOfATask(t *testing.T) {
	mesh := weft.Network{ID: testID("i"), VNI: weft.IngressVNI, Spec: weft.NetworkSpec{Name: "ingress", Ingress: true, Subnets: front.Spec.Subnets}}
	inside := back
	inside.Spec.Internal = true
	a := full()
	a.Networks = []weft.Network{front, inside, mesh}
	m, err := newModel().apply(a)
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("search of.the.host\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	names, err := dns.New(dns.Config{Log: slog.New(slog.DiscardHandler), ResolvConf: conf})
	if err != nil {
		t.Fatal(err)
	}
	self := &Agent{cfg: Config{Names: names}}
	on := func(ns ...weft.Network) weft.Task {
		task := testTask(1, front)
		task.Attachments = nil
		for i, n := range ns {
			task.Attachments = append(task.Attachments, weft.Attachment{Network: n.ID, Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 16, byte(i + 1)}), 20)})
		}
		return task
	}
	for _, tc := range []struct {
		name     string
		task     weft.Task
		networks []weft.Network
		internal bool
	}{
		{"the ingress network has no names", on(mesh, front), []weft.Network{front}, false},
		{"internal networks only", on(mesh, inside), []weft.Network{inside}, true},
		{"one way out is enough", on(inside, front), []weft.Network{inside, front}, false},
		{"no network at all", on(), nil, false},
		{"ingress alone", on(mesh), nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := self.view(m, tc.task, sandbox.Sandbox{})
			var networks []weft.ID
			var near []dns.Near
			for _, n := range tc.networks {
				networks = append(networks, n.ID)
				near = append(near, dns.Near{Network: n.ID, Subnet: n.Spec.Subnets[0].Prefix})
			}
			if !reflect.DeepEqual(v.Networks, networks) || !reflect.DeepEqual(v.Near, near) || v.Internal != tc.internal {
				t.Errorf("networks %v near %v internal %v", v.Networks, v.Near, v.Internal)
			}
			// A task has a gateway exactly if it may ask for names outside.
			c := newController(self, m, tc.task)
			box := c.sandbox(m)
			if box.Gateway == v.Internal {
				t.Errorf("gateway %v although names outside are refused: %v", box.Gateway, v.Internal)
			}
			// What the client appends is what the resolver takes off again.
			if want := []string{"of.the.host"}; !slices.Equal(box.Search, want) || !slices.Equal(v.Search, want) {
				t.Errorf("search domains %q, and %q for the resolver, want the host's", box.Search, v.Search)
			}
		})
	}
}

func TestOutboxKeepsTheNewest(t *testing.T) {
	o := newOutbox()
	at := func(s weft.TaskState) weft.TaskStatus { return weft.TaskStatus{State: s} }
	one, two := testID("t1"), testID("t2")
	o.put(one, at(weft.TaskStarting))
	o.put(one, at(weft.TaskRunning))
	o.put(two, at(weft.TaskRunning))
	got := map[weft.ID]weft.TaskState{}
	for _, r := range o.take() {
		got[r.Task] = r.Status.State
	}
	if want := map[weft.ID]weft.TaskState{one: weft.TaskRunning, two: weft.TaskRunning}; !reflect.DeepEqual(got, want) {
		t.Errorf("took %v, want %v", got, want)
	}
	if more := o.take(); len(more) != 0 {
		t.Errorf("took %v again", more)
	}
}
