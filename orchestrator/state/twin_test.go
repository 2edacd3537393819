package state

import (
	"bytes"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// drawChange draws a change over few ids, so that most hit something.
func drawChange(t *rapid.T, index uint64) Change {
	n := rapid.IntRange(1, 4)
	lock := func(label string) uint64 { return rapid.Uint64Range(0, index).Draw(t, label) }
	node := func() weft.ID { return id(100 + n.Draw(t, "node")) }
	task := func() weft.ID { return id(300 + n.Draw(t, "task")) }
	states := []weft.TaskState{weft.TaskNew, weft.TaskPending, weft.TaskAssigned, weft.TaskRunning, weft.TaskComplete, weft.TaskShutdown, weft.TaskFailed, weft.TaskRemove}
	switch rapid.IntRange(0, 11).Draw(t, "kind") {
	case 0:
		x := testNode(100 + n.Draw(t, "id"))
		x.Meta.Index = lock("lock")
		return Change{Node: x}
	case 1:
		k := n.Draw(t, "id")
		x := testNetwork(400+k, uint32(4096+n.Draw(t, "vni")))
		x.Meta.Index = lock("lock")
		return Change{Network: x}
	case 2, 3:
		var nets []weft.ID
		for range rapid.IntRange(0, 2).Draw(t, "nets") {
			nets = append(nets, id(400+n.Draw(t, "net")))
		}
		x := testService(200+n.Draw(t, "id"), nets...)
		x.Meta.Index = lock("lock")
		x.SpecVersion = rapid.Uint64Range(1, 3).Draw(t, "version")
		x.Spec.Replicas = x.SpecVersion
		return Change{Service: x}
	case 4, 5:
		x := testTask(300+n.Draw(t, "id"), 200+n.Draw(t, "service"), "")
		x.SpecVersion = rapid.Uint64Range(1, 3).Draw(t, "version")
		x.Status.State = rapid.SampledFrom(states[:3]).Draw(t, "state")
		if x.Status.State == weft.TaskAssigned {
			x.Node = node()
		}
		return Change{Task: x}
	case 6:
		return Change{TaskStatus: &TaskStatus{Task: task(), Node: node(), Status: weft.TaskStatus{State: rapid.SampledFrom(states).Draw(t, "state"), At: t0}}}
	case 7:
		return Change{TaskDesired: &TaskDesired{Task: task(), Desired: rapid.SampledFrom(states).Draw(t, "state")}}
	case 8:
		return Change{TaskAssign: &TaskAssign{Task: task(), Node: node()}}
	case 9:
		return Change{TaskAttach: &TaskAttach{Task: task(), Attachments: []weft.Attachment{{Network: id(401)}}}}
	case 10:
		st := rapid.SampledFrom([]weft.NodeState{weft.NodeReady, weft.NodeDown}).Draw(t, "state")
		session := &NodeSession{Port: rapid.SampledFrom([]uint16{0, 2377, 4377}).Draw(t, "port")}
		return Change{NodeStatus: &NodeStatus{Node: node(), State: &st, Session: session, DropManager: rapid.Bool().Draw(t, "drop")}}
	default:
		k := rapid.SampledFrom([]Kind{KindNode, KindService, KindNetwork, KindTask}).Draw(t, "delete")
		base := map[Kind]int{KindNode: 100, KindService: 200, KindTask: 300, KindNetwork: 400}[k]
		return Change{Delete: &Ref{Kind: k, ID: id(base + n.Draw(t, "id"))}}
	}
}

// TestTwins applies random entries to two state machines, of which one goes
// through a snapshot after each: results, states and bytes must be equal, the
// invariants must hold, and the feed must have named every difference.
func TestTwins(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := New(), New()
		sub := a.Subscribe()
		defer sub.Close()
		sub.Take()
		for index := uint64(1); index <= 30; index++ {
			var cmds []Command
			for range rapid.IntRange(1, 3).Draw(t, "commands") {
				c := Command{At: t0.Add(time.Duration(index) * time.Second)}
				for range rapid.IntRange(1, 3).Draw(t, "changes") {
					c.Changes = append(c.Changes, drawChange(t, index-1))
				}
				cmds = append(cmds, c)
			}
			entry, err := EncodeEntry(cmds)
			if err != nil {
				t.Fatal(err)
			}
			before := a.View()
			ra, err := a.Apply(index, entry)
			if err != nil {
				t.Fatal(err)
			}
			rb, err := b.Apply(index, entry)
			if err != nil {
				t.Fatal(err)
			}
			for i := range ra {
				if (ra[i] == nil) != (rb[i] == nil) || ra[i] != nil && ra[i].Error() != rb[i].Error() {
					t.Fatalf("command %d: %v and %v", i, ra[i], rb[i])
				}
			}
			bytesA := persist(t, a)
			if !bytes.Equal(bytesA, persist(t, b)) {
				t.Fatal("states differ")
			}
			c := New()
			if err := c.Restore(bytes.NewReader(bytesA)); err != nil {
				t.Fatal(err)
			}
			b = c
			checkInvariants(t, a.View())
			ch := sub.Take()
			checkFeed(t, before, a.View(), &ch)
		}
	})
}

func checkInvariants(t *rapid.T, v *Snapshot) {
	used := map[[2]string]bool{}
	for _, s := range v.Services() {
		used[[2]string{string(s.ID), num(s.SpecVersion)}] = true
		if spec, ok := v.Spec(s.ID, s.SpecVersion); !ok || !reflect.DeepEqual(spec.Spec, s.Spec) {
			t.Fatalf("spec version %d of service %s is missing or another", s.SpecVersion, s.ID)
		}
		for _, n := range s.Spec.Networks {
			if _, ok := v.Network(n.Network); !ok {
				t.Fatalf("service %s is on network %s, which is gone", s.ID, n.Network)
			}
		}
	}
	for _, k := range v.Tasks() {
		used[[2]string{string(k.Service), num(k.SpecVersion)}] = true
		if _, ok := v.Spec(k.Service, k.SpecVersion); !ok {
			t.Fatalf("task %s has no spec", k.ID)
		}
		if !slices.ContainsFunc(v.TasksOfService(k.Service), func(x weft.Task) bool { return x.ID == k.ID }) {
			t.Fatalf("task %s is not in the index of its service", k.ID)
		}
		if k.Node != "" && !slices.ContainsFunc(v.TasksOfNode(k.Node), func(x weft.Task) bool { return x.ID == k.ID }) {
			t.Fatalf("task %s is not in the index of its node", k.ID)
		}
	}
	for _, s := range v.Services() {
		for _, x := range v.Specs(s.ID) {
			if !used[[2]string{string(x.Service), num(x.Version)}] {
				t.Fatalf("spec version %d of service %s has no user", x.Version, s.ID)
			}
		}
	}
}

// checkFeed compares two views slowly with what the feed says.
func checkFeed(t *rapid.T, old, now *Snapshot, c *Changed) {
	named := func(kind string, set map[weft.ID]struct{}, ids []weft.ID, get func(*Snapshot, weft.ID) any) {
		for _, i := range ids {
			if _, ok := set[i]; !ok && !reflect.DeepEqual(get(old, i), get(now, i)) {
				t.Fatalf("%s %s changed and the feed does not say so", kind, i)
			}
		}
	}
	ids := func(base int) (out []weft.ID) {
		for n := range 5 {
			out = append(out, id(base+n))
		}
		return out
	}
	named("node", c.Nodes, ids(100), func(v *Snapshot, i weft.ID) any { x, _ := v.Node(i); return x })
	named("service", c.Services, ids(200), func(v *Snapshot, i weft.ID) any { x, _ := v.Service(i); return x })
	named("task", c.Tasks, ids(300), func(v *Snapshot, i weft.ID) any { x, _ := v.Task(i); return x })
	named("network", c.Networks, ids(400), func(v *Snapshot, i weft.ID) any { x, _ := v.Network(i); return x })
	named("tasks of node", c.TaskNodes, ids(100), func(v *Snapshot, i weft.ID) any { return v.TasksOfNode(i) })
}

func FuzzDecodeEntry(f *testing.F) {
	b, err := EncodeEntry(goldenCommands())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{EntryVersion, 0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		// Whatever a log holds, two members do the same with it.
		x, y := New(), New()
		rx, ex := x.Apply(1, b)
		ry, ey := y.Apply(1, b)
		if (ex == nil) != (ey == nil) || len(rx) != len(ry) || !bytes.Equal(persist(t, x), persist(t, y)) {
			t.Fatalf("%v %v, %v %v", ex, ey, rx, ry)
		}
	})
}

func FuzzRestore(f *testing.F) {
	s := New()
	b, err := EncodeEntry(goldenCommands())
	if err != nil {
		f.Fatal(err)
	}
	if _, err := s.Apply(1, b); err != nil {
		f.Fatal(err)
	}
	f.Add(persist(f, s))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := New()
		if s.Restore(bytes.NewReader(b)) != nil {
			return
		}
		again := New()
		if err := again.Restore(bytes.NewReader(persist(t, s))); err != nil {
			t.Fatalf("what was restored cannot be stored: %v", err)
		}
	})
}
