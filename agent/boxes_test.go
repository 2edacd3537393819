package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// keptBoxes is what the maker was last asked to keep, and how often it was asked.
func (r *rig) keptBoxes() (text string, keeps int) {
	r.boxes.mu.Lock()
	defer r.boxes.mu.Unlock()
	var out []string
	for _, s := range r.boxes.kept {
		out = append(out, fmt.Sprint(s.Task.Short()[:2], s.VIPs, s.Gateway))
	}
	return strings.Join(out, " "), r.boxes.keeps
}

func (r *rig) wantKept(when, want string) {
	r.t.Helper()
	if got, _ := r.keptBoxes(); got != want {
		r.t.Errorf("%s: kept %q, want %q", when, got, want)
	}
}

func (r *rig) failKeep(err error) {
	r.boxes.mu.Lock()
	defer r.boxes.mu.Unlock()
	r.boxes.keepErr = err
}

// TestSandboxesAreKept: what surrounds the tasks is read at the start, every
// boxesGap, and at once when the leader wishes it differently.
func TestSandboxesAreKept(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		kill, s := r.running(testTask(1, front), testTask(2, front))
		settle(boxesGap + planeMinGap)
		r.wantKept("running", "t1[10.0.16.200] true t2[10.0.16.200] true")
		_, before := r.keptBoxes()
		settle(4 * boxesGap)
		if _, now := r.keptBoxes(); now-before < 3 || now-before > 4 {
			t.Errorf("read %d times in four gaps", now-before)
		}

		// A wish of its own is carried out at once; one that goes with its service is
		// none: the task ends with the addresses that its flows have.
		vip := weft.VIP{Network: front.ID, Addr: netip.MustParsePrefix("10.0.16.201/20")}
		s.send <- wire.Assignments{Seq: 2, Services: []wire.ServiceView{{ID: svc, Name: "web", VIPs: []weft.VIP{vip}, Networks: []weft.NetworkTarget{{Network: front.ID}}}}}
		settle(2 * planeMinGap)
		r.wantKept("another service address", "t1[10.0.16.201] true t2[10.0.16.201] true")
		s.send <- wire.Assignments{Seq: 3, GoneServices: []weft.ID{svc}}
		settle(2 * boxesGap)
		r.wantKept("the service is gone", "t1[10.0.16.201] true t2[10.0.16.201] true")

		// A daemon that comes back without knowing the service leaves them alone.
		kill()
		r.start()
		settle(boxesGap)
		r.wantKept("adopted without a service", "")
	})
}

// TestAdoptedSandboxesAreKept: the first reading is the first thing that loops do,
// and a task that ends is not read any more.
func TestAdoptedSandboxesAreKept(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		one := testTask(1, front)
		kill, _ := r.running(one, testTask(2, front))
		kill()
		r.boxes.keeps = 0
		r.start()
		if text, keeps := r.keptBoxes(); keeps != 1 || text != "t1[10.0.16.200] true t2[10.0.16.200] true" {
			t.Errorf("kept %q in %d readings", text, keeps)
		}
		session := <-r.leader.sessions
		session.send <- full(desired(one, weft.TaskShutdown), testTask(2, front))
		settle(3 * boxesGap)
		r.wantKept("one has ended", "t2[10.0.16.200] true")
	})
}

// TestFailedKeepIsToldOnce, and tasks do not wait for it.
func TestFailedKeepIsToldOnce(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.failKeep(errors.New("a foreign link has the name"))
		r.running(testTask(1, front))
		settle(4 * boxesGap)
		if n := strings.Count(r.log.String(), "keep sandboxes"); n != 1 {
			t.Errorf("logged %d times:\n%s", n, r.log.String())
		}
		r.failKeep(nil)
		settle(2 * boxesGap)
		if n := strings.Count(r.log.String(), "sandboxes are kept again"); n != 1 {
			t.Errorf("recovery logged %d times", n)
		}
	})
}

// TestKeptSpecIsMadeSpec: what is kept is what was made, or a first reading would
// change every sandbox; also of a service that is on no network.
func TestKeptSpecIsMadeSpec(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		lone := testTask(2, front)
		lone.Attachments = nil
		lone.Service = testID("lone")
		spec := testSpec(1)
		spec.Service = lone.Service
		_, s := r.running(testTask(1, front))
		s.send <- wire.Assignments{Seq: 2, Tasks: []weft.Task{lone}, Specs: []weft.SpecVersion{spec}}
		settle(2 * boxesGap)
		r.boxes.mu.Lock()
		defer r.boxes.mu.Unlock()
		if len(r.boxes.kept) != 2 || len(r.boxes.made) != 2 {
			t.Fatalf("kept %+v, made %+v", r.boxes.kept, r.boxes.made)
		}
		for _, k := range r.boxes.kept {
			if !reflect.DeepEqual(k, r.boxes.made[k.Task]) {
				t.Errorf("kept %+v, made %+v", k, r.boxes.made[k.Task])
			}
		}
	})
}
