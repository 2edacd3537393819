package agent

import (
	"slices"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// TestHostnameIsTheTasksOwn: a task finds itself by its hostname, also where others
// have the same, and nobody else finds anyone by it.
func TestHostnameIsTheTasksOwn(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		other := testTask(3, front)
		other.Service = testID("s2")
		all := full(testTask(1, front), testTask(2, front), other)
		all.Specs[0].Spec.Container.Hostname = "box"
		agent := testSpec(1)
		agent.Service, agent.Spec.Name = other.Service, "agent"
		all.Specs = append(all.Specs, agent)
		all.Services = append(all.Services, wire.ServiceView{ID: other.Service, Name: "agent", Networks: []weft.NetworkTarget{{Network: front.ID}}})
		kill := r.start()
		(<-r.leader.sessions).send <- all
		settle(time.Second)
		for _, k := range all.Tasks {
			r.wantState(k.ID, weft.TaskRunning)
		}
		kill()

		// The next daemon has all names before it opens the resolvers.
		q := new(miekg.Msg)
		q.SetQuestion("box.front.", miekg.TypeA)
		var err error
		if r.sockets.query, err = q.Pack(); err != nil {
			t.Fatal(err)
		}
		r.sockets.answers = make(chan []byte, len(all.Tasks))
		r.start()
		var got []string
		for range all.Tasks {
			m := new(miekg.Msg)
			if err := m.Unpack(<-r.sockets.answers); err != nil {
				t.Fatal(err)
			}
			words := miekg.RcodeToString[m.Rcode]
			for _, rr := range m.Answer {
				words += " " + rr.(*miekg.A).A.String()
			}
			got = append(got, words)
		}
		slices.Sort(got)
		if want := []string{"NOERROR 10.0.16.1", "NOERROR 10.0.16.2", "NXDOMAIN"}; !slices.Equal(got, want) {
			t.Errorf("box.front is %q to the three tasks, want %q", got, want)
		}
	})
}
