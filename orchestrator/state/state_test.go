package state

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

var update = flag.Bool("update", false, "write golden files of the newest version")

// Fixed ids and times, so that encodings are golden.
var t0 = time.Date(2026, 11, 20, 10, 0, 0, 123456789, time.UTC)

func id(n int) weft.ID { return weft.ID(fmt.Sprintf("%025d", n)) }

func testNode(n int) *weft.Node {
	return &weft.Node{
		ID:          id(n),
		Spec:        weft.NodeSpec{Labels: map[string]string{"b": "2", "a": "1"}, Role: weft.RoleManager},
		Description: weft.NodeDescription{Hostname: fmt.Sprintf("h%d", n), NanoCPUs: 2e9, UsedPrefixes: []netip.Prefix{netip.MustParsePrefix("192.168.0.0/24")}},
		Status:      weft.NodeStatus{State: weft.NodeReady, Addr: netip.MustParseAddr("10.99.0.1"), Seen: t0},
		DataPath:    netip.MustParseAddr("2001:db8::1"),
		IngressAddr: netip.MustParsePrefix("10.255.0.2/16"),
		Manager:     &weft.ManagerStatus{Addr: netip.MustParseAddrPort("10.99.0.1:2377")},
	}
}

func testNetwork(n int, vni uint32) *weft.Network {
	return &weft.Network{ID: id(n), VNI: vni, Spec: weft.NetworkSpec{Name: fmt.Sprintf("net%d", n), Driver: "overlay",
		Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.0.16.0/20"), Gateway: netip.MustParseAddr("10.0.16.1")}}}}
}

func testService(n int, networks ...weft.ID) *weft.Service {
	s := &weft.Service{ID: id(n), SpecVersion: 1, Spec: weft.ServiceSpec{
		Name: fmt.Sprintf("svc%d", n), Replicas: 2, Update: weft.DefaultUpdate,
		Container: weft.ContainerSpec{Image: "weft/whoami", Env: []string{"A=b"}, StopGrace: 10 * time.Second},
		Ports:     []weft.PortSpec{{Protocol: weft.TCP, Target: 80}},
	}, Ports: []weft.PortSpec{{Protocol: weft.TCP, Target: 80, Published: 30000}}}
	for _, net := range networks {
		s.Spec.Networks = append(s.Spec.Networks, weft.NetworkTarget{Network: net, Aliases: []string{"x"}})
		s.VIPs = append(s.VIPs, weft.VIP{Network: net, Addr: netip.MustParsePrefix("10.0.16.2/20")})
	}
	return s
}

func testTask(n, service int, node weft.ID) *weft.Task {
	return &weft.Task{ID: id(n), Service: id(service), Slot: 1, SpecVersion: 1, Node: node, Desired: weft.TaskRunning,
		Attachments: []weft.Attachment{{Network: id(2), Addr: netip.MustParsePrefix("10.0.16.3/20")}},
		Status:      weft.TaskStatus{State: weft.TaskAssigned, At: t0, Message: "assigned"}, NotBefore: t0}
}

// goldenCommands has every kind of change once.
func goldenCommands() []Command {
	down := weft.NodeDown
	return []Command{{At: t0, Changes: []Change{
		{Cluster: &weft.Cluster{ID: id(1), Spec: weft.DefaultClusterSpec(), AddrPools: weft.DefaultAddrPools(), MaskLength: 20,
			DataPathPort: 4789, CACert: []byte("c"), CAKey: []byte("k"), Tokens: weft.JoinTokens{Worker: "w", Manager: "m"}, GossipKey: []byte("g")}},
		{Network: testNetwork(2, 4097)},
		{Node: testNode(3)},
		{Service: testService(4, id(2))},
		{Task: testTask(5, 4, id(3))},
	}}, {At: t0.Add(time.Second), Changes: []Change{
		{NodeStatus: &NodeStatus{Node: id(3), State: &down, Message: "m", Listeners: &[]weft.Listener{{Protocol: weft.UDP, Port: 53}},
			Description: &weft.NodeDescription{Hostname: "h"}, Session: &NodeSession{Addr: netip.MustParseAddr("10.99.0.2")},
			Manager: &weft.ManagerStatus{Addr: netip.MustParseAddrPort("10.99.0.2:2377")}, DropManager: false}},
		{ServiceUpdate: &ServiceUpdate{Service: id(4), SpecVersion: 1, Update: weft.UpdateStatus{State: weft.UpdateDone, StartedAt: t0, EndedAt: t0, Message: "done"}}},
		{TaskStatus: &TaskStatus{Task: id(5), Node: id(3), Status: weft.TaskStatus{State: weft.TaskRunning, At: t0, Message: "started", PID: 7}}},
		{TaskDesired: &TaskDesired{Task: id(5), Desired: weft.TaskShutdown}},
		{TaskAssign: &TaskAssign{Task: id(5), Node: id(3)}},
		{TaskAttach: &TaskAttach{Task: id(5), Attachments: []weft.Attachment{{Network: id(2), Addr: netip.MustParsePrefix("10.0.16.9/20")}}}},
		{Delete: &Ref{Kind: KindTask, ID: id(99), Index: 1}},
	}}}
}

func golden(t *testing.T, name string, got []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: the encoding has changed (%d bytes, stored %d): that breaks stored logs; add a version", name, len(got), len(want))
	}
	return want
}

func apply(t *testing.T, s *Store, index uint64, cmds ...Command) []error {
	t.Helper()
	b, err := EncodeEntry(cmds)
	if err != nil {
		t.Fatal(err)
	}
	errs, err := s.Apply(index, b)
	if err != nil {
		t.Fatal(err)
	}
	return errs
}

func persist(t interface {
	Helper()
	Fatal(...any)
}, s *Store) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.View().Persist(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestGolden(t *testing.T) {
	b, err := EncodeEntry(goldenCommands())
	if err != nil {
		t.Fatal(err)
	}
	entry := golden(t, "entry-v1.cbor", b)
	s := New()
	errs, err := s.Apply(7, entry)
	if err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	// A snapshot of the first version is read as one in which nothing rests.
	first, err := os.ReadFile(filepath.Join("testdata", "snapshot-v1.cbor"))
	if err != nil {
		t.Fatal(err)
	}
	r := New()
	if err := r.Restore(bytes.NewReader(first)); err != nil {
		t.Fatal(err)
	}
	if r.Index() != 7 || !bytes.Equal(persist(t, r), persist(t, s)) {
		t.Error("a restored snapshot of version 1 is another state")
	}
	k, ok := r.View().Task(id(5))
	if !ok || k.Status.State != weft.TaskRunning || k.Desired != weft.TaskShutdown || k.Status.PID != 7 {
		t.Errorf("task is %+v", k)
	}
	n, ok := r.View().Node(id(3))
	if !ok || n.Status.State != weft.NodeDown || n.Manager.Addr.String() != "10.99.0.2:2377" || n.DataPath.String() != "2001:db8::1" || n.Meta.Index != 7 || !n.Meta.CreatedAt.Equal(t0) {
		t.Errorf("node is %+v", n)
	}
}

// goldenRest lays down an address of each kind of holder and a network, and
// releases what was freed at the first entry.
func goldenRest() []Command {
	return []Command{{At: t0, Changes: []Change{
		{Network: ingressNetwork(8)},
		{Network: testNetwork(9, 5000)},
		{Node: testNode(10)},
		{Delete: &Ref{Kind: KindNode, ID: id(10)}},
		{Delete: &Ref{Kind: KindService, ID: id(4)}},
		{TaskStatus: &TaskStatus{Task: id(5), Node: id(3), Status: weft.TaskStatus{State: weft.TaskShutdown, At: t0}}},
		{Delete: &Ref{Kind: KindNetwork, ID: id(9)}},
	}}, {At: t0, Changes: []Change{
		{Release: &Release{Addrs: []Rested{{Network: id(2), Index: 7, Addrs: []netip.Addr{netip.MustParseAddr("10.0.16.2")}}}, Networks: []weft.ID{id(99)}}},
	}}}
}

func ingressNetwork(n int) *weft.Network {
	x := testNetwork(n, weft.IngressVNI)
	x.Spec.Name, x.Spec.Ingress = weft.IngressName, true
	return x
}

func TestGoldenRest(t *testing.T) {
	b, err := EncodeEntry(goldenRest())
	if err != nil {
		t.Fatal(err)
	}
	entry := golden(t, "entry-v1-rest.cbor", b)
	s := New()
	apply(t, s, 7, goldenCommands()...)
	if errs, err := s.Apply(8, entry); err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	snap := golden(t, "snapshot-v2.cbor", persist(t, s))
	r := New()
	if err := r.Restore(bytes.NewReader(snap)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(persist(t, r), snap) {
		t.Error("a restored snapshot is another state")
	}
	var got []string
	for _, a := range r.View().AllResting() {
		got = append(got, fmt.Sprintf("%s on %s of %s, task %v, at %d", a.Addr, a.Network[23:], a.Owner[23:], a.Task, a.Index))
	}
	want := []string{"10.0.16.2 on 02 of 04, task false, at 8", "10.0.16.3 on 02 of 05, task true, at 8", "10.255.0.2 on 08 of 10, task false, at 8"}
	if strings.Join(got, "; ") != strings.Join(want, "; ") {
		t.Errorf("resting: %q, want %q", got, want)
	}
	if n := r.View().RestingNetworks(); len(n) != 1 || n[0].VNI != 5000 || n[0].Subnets[0].Prefix.String() != "10.0.16.0/20" {
		t.Errorf("resting networks: %+v", n)
	}
	apply(t, s, 9, Command{Changes: []Change{{Release: &Release{Addrs: []Rested{{Network: id(2), Index: 8, Addrs: []netip.Addr{netip.MustParseAddr("10.0.16.2"), netip.MustParseAddr("10.0.16.3")}}}, Networks: []weft.ID{id(9)}}}}})
	if a, n := s.View().AllResting(), s.View().RestingNetworks(); len(a) != 1 || a[0].Network != id(8) || len(n) != 0 {
		t.Errorf("after the release: %+v, %+v", a, n)
	}
}

// TestGoldenClusterPort is the second recording of version 1, with nodes that
// tell their cluster port. The first has none and keeps its bytes.
func TestGoldenClusterPort(t *testing.T) {
	told := testNode(3)
	told.Status.ClusterPort = 4377
	b, err := EncodeEntry([]Command{{At: t0, Changes: []Change{
		{Node: told}, {Node: testNode(4)},
		{NodeStatus: &NodeStatus{Node: id(4), Session: &NodeSession{Addr: netip.MustParseAddr("10.99.0.4"), Port: 5377}}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	s := New()
	errs, err := s.Apply(7, golden(t, "entry-v1.1.cbor", b))
	if err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	snap, err := os.ReadFile(filepath.Join("testdata", "snapshot-v1.1.cbor"))
	if err != nil {
		t.Fatal(err)
	}
	r := New()
	if err := r.Restore(bytes.NewReader(snap)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(persist(t, r), persist(t, s)) {
		t.Error("a restored snapshot of version 1 is another state")
	}
	for n, want := range map[int]string{3: "10.99.0.1:4377", 4: "10.99.0.4:5377"} {
		k, ok := r.View().Node(id(n))
		if got := k.ClusterAddr().String(); !ok || got != want {
			t.Errorf("node %d is dialled at %s, want %s", n, got, want)
		}
	}
	// A record that was written before, and a session of a node that does not
	// tell its port.
	old := New()
	first, err := os.ReadFile(filepath.Join("testdata", "snapshot-v1.cbor"))
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Restore(bytes.NewReader(first)); err != nil {
		t.Fatal(err)
	}
	apply(t, old, 8, Command{Changes: []Change{{NodeStatus: &NodeStatus{Node: id(3), DropManager: true, Session: &NodeSession{Addr: netip.MustParseAddr("10.99.0.9")}}}}})
	if n, _ := old.View().Node(id(3)); n.Status.ClusterPort != 0 || n.ClusterAddr().String() != "10.99.0.9:2377" {
		t.Errorf("a node of the first recording is dialled at %s", n.ClusterAddr())
	}
	apply(t, s, 8, Command{Changes: []Change{{NodeStatus: &NodeStatus{Node: id(3), Session: &NodeSession{}}}}})
	if n, _ := s.View().Node(id(3)); n.Status.ClusterPort != 4377 {
		t.Errorf("a session without a port left %d", n.Status.ClusterPort)
	}
}

// TestGoldenKeys: what came with encrypted networks.
func TestGoldenKeys(t *testing.T) {
	s := New()
	apply(t, s, 1, goldenCommands()...)
	keys := []weft.NodeKey{{Epoch: 1, Public: weft.PublicKey{1}, Port: 51821}, {Epoch: 2, Public: weft.PublicKey{2}, Port: 51820}}
	c, _ := s.View().Cluster()
	c.KeyEpoch, c.KeyEpochAt = 2, t0
	b, err := EncodeEntry([]Command{{At: t0, Changes: []Change{{NodeStatus: &NodeStatus{Node: id(3), Keys: &keys}}, {Cluster: &c}}}})
	if err != nil {
		t.Fatal(err)
	}
	errs, err := s.Apply(7, golden(t, "entry-v1-keys.cbor", b))
	if err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	r := New()
	if err := r.Restore(bytes.NewReader(golden(t, "snapshot-v2-keys.cbor", persist(t, s)))); err != nil {
		t.Fatal(err)
	}
	n, _ := r.View().Node(id(3))
	c, _ = r.View().Cluster()
	if !slices.Equal(n.Status.Keys, keys) || c.KeyEpoch != 2 || !c.KeyEpochAt.Equal(t0) {
		t.Errorf("keys %v, epoch %d since %s", n.Status.Keys, c.KeyEpoch, c.KeyEpochAt)
	}
}

// TestGoldenGossip: what came with the change of gossip's keys. A cluster that was
// written before has a ring of one.
func TestGoldenGossip(t *testing.T) {
	s := New()
	apply(t, s, 1, goldenCommands()...)
	c, _ := s.View().Cluster()
	if r := c.GossipRing(); len(r.Keys()) != 1 || r.Sends.Epoch != 0 || string(r.Sends.Key) != "g" {
		t.Errorf("a cluster of before has the ring %v", r)
	}
	c.GossipEpoch, c.GossipKey, c.GossipEpochAt = 3, []byte("new"), t0
	c.GossipReads = []weft.GossipKey{{Epoch: 2, Key: []byte("old")}}
	b, err := EncodeEntry([]Command{{At: t0, Changes: []Change{{Cluster: &c}}}})
	if err != nil {
		t.Fatal(err)
	}
	errs, err := s.Apply(7, golden(t, "entry-v1-gossip.cbor", b))
	if err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	r := New()
	if err := r.Restore(bytes.NewReader(golden(t, "snapshot-v2-gossip.cbor", persist(t, s)))); err != nil {
		t.Fatal(err)
	}
	got, _ := r.View().Cluster()
	if want := c.GossipRing(); !got.GossipRing().Equal(want) || !got.GossipEpochAt.Equal(t0) {
		t.Errorf("ring %v since %s", got.GossipRing(), got.GossipEpochAt)
	}
}

func TestUnknownAndBroken(t *testing.T) {
	s := New()
	apply(t, s, 1, goldenCommands()...)
	good := persist(t, s)
	entry, err := EncodeEntry(goldenCommands())
	if err != nil {
		t.Fatal(err)
	}
	future := bytes.Clone(entry)
	future[0] = 9
	for _, c := range []struct {
		name, want string
		b          []byte
	}{
		{"empty", "empty", nil}, {"version", "version 9 is not known", future}, {"cut", "version 1", entry[:20]},
	} {
		if _, err := s.Apply(2, c.b); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("entry %s: %v", c.name, err)
		}
	}
	newer := bytes.Clone(good)
	newer[len(magic)] = 3
	for _, c := range []struct {
		name, want string
		b          []byte
	}{
		{"empty", "head", nil}, {"foreign", "not a snapshot", []byte("0123456789abcdef")},
		{"version", "version 3 is not known", newer}, {"no trailer", "without its trailer", good[:len(magic)+1]},
		{"cut", "unexpected EOF", good[:len(good)-3]}, {"longer", "follow its trailer", append(bytes.Clone(good), good[len(magic)+1:]...)},
	} {
		if err := s.Restore(bytes.NewReader(c.b)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("snapshot %s: %v", c.name, err)
		}
	}
	if !bytes.Equal(persist(t, s), good) {
		t.Error("what could not be read has changed the state")
	}
	if errs := apply(t, s, 3, Command{Changes: []Change{{}}}); !errors.Is(errs[0], weft.ErrUnsupported) {
		t.Errorf("change of an unknown kind: %v", errs)
	}
}

func TestRefusals(t *testing.T) {
	base := func() *Store {
		s := New()
		if err := errors.Join(apply(t, s, 1, goldenCommands()[0])...); err != nil {
			t.Fatal(err)
		}
		return s
	}
	edited := func(index uint64) *weft.Service {
		x := testService(4, id(2))
		x.Meta.Index, x.SpecVersion = index, 2
		x.Spec.Replicas = 5
		return x
	}
	renamed := func(n int, name string) *weft.Service { x := testService(n); x.Spec.Name = name; return x }
	other := testService(4, id(2))
	other.Meta.Index, other.Spec.Replicas = 1, 9
	for _, c := range []struct {
		name   string
		change Change
		want   error
	}{
		{"create existing", Change{Service: testService(4, id(2))}, weft.ErrConflict},
		{"name taken", Change{Service: renamed(6, "svc4")}, weft.ErrConflict},
		{"stale lock", Change{Service: edited(9)}, weft.ErrOutOfSequence},
		{"right lock", Change{Service: edited(1)}, nil},
		{"edit of nothing", Change{Node: func() *weft.Node { n := testNode(8); n.Meta.Index = 1; return n }()}, weft.ErrNotFound},
		{"spec version reused", Change{Service: other}, weft.ErrConflict},
		{"network missing", Change{Service: testService(6, id(77))}, weft.ErrNotFound},
		{"network name taken", Change{Network: func() *weft.Network { n := testNetwork(8, 5000); n.Spec.Name = "net2"; return n }()}, weft.ErrConflict},
		{"VNI taken", Change{Network: testNetwork(8, 4097)}, weft.ErrConflict},
		{"network in use", Change{Delete: &Ref{Kind: KindNetwork, ID: id(2)}}, weft.ErrConflict},
		{"task of an unknown version", Change{Task: testTask(9, 44, "")}, weft.ErrNotFound},
		{"task exists", Change{Task: testTask(5, 4, "")}, weft.ErrConflict},
		{"delete with a stale lock", Change{Delete: &Ref{Kind: KindService, ID: id(4), Index: 5}}, weft.ErrOutOfSequence},
		{"delete of an unknown kind", Change{Delete: &Ref{Kind: "secret", ID: id(4)}}, weft.ErrUnsupported},
		{"delete of nothing", Change{Delete: &Ref{Kind: KindNode, ID: id(44)}}, nil},
		{"second cluster", Change{Cluster: &weft.Cluster{ID: id(1)}}, weft.ErrConflict},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := base()
			before := persist(t, s)
			// The second change shows that a refused command leaves nothing,
			// also of what came before the refusal; the next command stands.
			errs := apply(t, s, 2, Command{Changes: []Change{{Network: testNetwork(50, 5050)}, c.change}}, Command{Changes: []Change{{Network: testNetwork(51, 5051)}}})
			if !errors.Is(errs[0], c.want) || errs[1] != nil {
				t.Fatalf("results %v, want %v", errs, c.want)
			}
			v := s.View()
			if _, ok := v.Network(id(50)); ok != (c.want == nil) {
				t.Error("half a command was applied")
			}
			if _, ok := v.Network(id(51)); !ok {
				t.Error("a refused command took the next one with it")
			}
			if bytes.Equal(before, persist(t, s)) {
				t.Error("nothing changed")
			}
		})
	}
}

func TestTaskOnlyGrows(t *testing.T) {
	s := New()
	apply(t, s, 1, goldenCommands()[0])
	index := uint64(1)
	report := func(node weft.ID, st weft.TaskState) weft.TaskState {
		index++
		apply(t, s, index, Command{Changes: []Change{{TaskStatus: &TaskStatus{Task: id(5), Node: node, Status: weft.TaskStatus{State: st}}}}})
		k, ok := s.View().Task(id(5))
		if !ok {
			return 0
		}
		return k.Status.State
	}
	for _, c := range []struct {
		node      weft.ID
		say, want weft.TaskState
	}{
		{id(3), weft.TaskRunning, weft.TaskRunning},
		{id(3), weft.TaskStarting, weft.TaskRunning}, // late report
		{id(9), weft.TaskFailed, weft.TaskRunning},   // of another node
		{id(3), weft.TaskRemove, weft.TaskRunning},   // nobody asked for it
		{id(3), weft.TaskComplete, weft.TaskComplete},
		{id(3), weft.TaskFailed, weft.TaskComplete}, // it ended once
	} {
		if got := report(c.node, c.say); got != c.want {
			t.Errorf("%s reports %s: task is %s, want %s", c.node, c.say, got, c.want)
		}
	}
	desire := func(d weft.TaskState) weft.TaskState {
		index++
		apply(t, s, index, Command{Changes: []Change{{TaskDesired: &TaskDesired{Task: id(5), Desired: d}}}})
		k, _ := s.View().Task(id(5))
		return k.Desired
	}
	if desire(weft.TaskRemove) != weft.TaskRemove || desire(weft.TaskRunning) != weft.TaskRemove {
		t.Error("the desired state does not only grow")
	}
	if got := report(id(3), weft.TaskRemove); got != 0 {
		t.Errorf("removed task is %s", got)
	}
}

func TestSpecVersionsGoWithTheirLastUser(t *testing.T) {
	s := New()
	apply(t, s, 1, goldenCommands()[0])
	versions := func() string {
		var out []string
		for _, v := range s.View().Specs(id(4)) {
			out = append(out, fmt.Sprint(v.Version))
		}
		return strings.Join(out, " ")
	}
	next := func(index uint64, version uint64) {
		x := testService(4, id(2))
		x.Meta.Index, x.SpecVersion = index, version
		x.Spec.Replicas = version
		if err := apply(t, s, index+1, Command{Changes: []Change{{Service: x}}})[0]; err != nil {
			t.Fatal(err)
		}
	}
	next(1, 2)
	if versions() != "1 2" {
		t.Errorf("with a task on 1: versions %s", versions())
	}
	next(2, 3)
	if versions() != "1 3" {
		t.Errorf("2 has no user: versions %s", versions())
	}
	apply(t, s, 9, Command{Changes: []Change{{Delete: &Ref{Kind: KindService, ID: id(4)}}}})
	if versions() != "1" {
		t.Errorf("service removed: versions %s", versions())
	}
	apply(t, s, 10, Command{Changes: []Change{{Delete: &Ref{Kind: KindTask, ID: id(5)}}}})
	if versions() != "" {
		t.Errorf("last task removed: versions %s", versions())
	}
}

func TestNodeRemovalOrphansTasks(t *testing.T) {
	s := New()
	apply(t, s, 1, goldenCommands()[0])
	apply(t, s, 2, Command{At: t0, Changes: []Change{{Delete: &Ref{Kind: KindNode, ID: id(3)}}}})
	k, _ := s.View().Task(id(5))
	if k.Status.State != weft.TaskOrphaned || !strings.Contains(k.Status.Err, string(id(3))) {
		t.Errorf("task is %+v", k.Status)
	}
}

func TestSubscription(t *testing.T) {
	s := New()
	sub := s.Subscribe()
	defer sub.Close()
	<-sub.C()
	if c := sub.Take(); !c.All {
		t.Error("the first Take does not say All")
	}
	apply(t, s, 1, goldenCommands()[0])
	apply(t, s, 2, Command{Changes: []Change{{TaskDesired: &TaskDesired{Task: id(5), Desired: weft.TaskShutdown}}}})
	<-sub.C()
	c := sub.Take()
	for _, x := range []struct {
		what string
		set  map[weft.ID]struct{}
		id   weft.ID
	}{{"tasks", c.Tasks, id(5)}, {"services", c.Services, id(4)}, {"nodes", c.Nodes, id(3)}, {"networks", c.Networks, id(2)}, {"task nodes", c.TaskNodes, id(3)}} {
		if _, ok := x.set[x.id]; !ok {
			t.Errorf("%s lack %s", x.what, x.id)
		}
	}
	if !c.Cluster || c.All {
		t.Errorf("cluster %v, all %v", c.Cluster, c.All)
	}
	apply(t, s, 3, Command{Changes: []Change{{NodeStatus: &NodeStatus{Node: id(3), Listeners: &[]weft.Listener{{Protocol: weft.TCP, Port: 22}}}}}})
	if c := sub.Take(); len(c.Nodes) != 0 {
		t.Error("new listeners count as a change of the node")
	}
	old := s.View()
	apply(t, s, 4, Command{Changes: []Change{{Delete: &Ref{Kind: KindTask, ID: id(5)}}}})
	if _, ok := old.Task(id(5)); !ok || old.Index() != 3 {
		t.Error("a view changed under its reader")
	}
}
