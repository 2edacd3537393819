package main

import (
	"testing"

	"github.com/moby/moby/api/types/swarm"
)

// TestFollowUpdate: an update that goes back is an error for who asked for the
// update, and what was asked for for who asked for the rollback.
func TestFollowUpdate(t *testing.T) {
	for _, c := range []struct {
		states   []swarm.UpdateState
		rollback bool
		updating bool   // after the last state
		back     string // likewise
		err      string
	}{
		{[]swarm.UpdateState{swarm.UpdateStateUpdating}, false, true, "", ""},
		{[]swarm.UpdateState{swarm.UpdateStateUpdating, swarm.UpdateStateCompleted}, false, false, "", ""},
		{[]swarm.UpdateState{swarm.UpdateStatePaused}, false, false, "", "update paused: why"},
		{[]swarm.UpdateState{swarm.UpdateStateUpdating, swarm.UpdateStateRollbackStarted}, false, true, "why", ""},
		{[]swarm.UpdateState{swarm.UpdateStateRollbackStarted, swarm.UpdateStateRollbackCompleted}, false, false, "why", ""},
		{[]swarm.UpdateState{swarm.UpdateStateRollbackCompleted}, false, false, "the update was rolled back", ""},
		{[]swarm.UpdateState{swarm.UpdateStateRollbackStarted, swarm.UpdateStateRollbackPaused}, false, false, "why", "rollback paused: why"},
		{[]swarm.UpdateState{swarm.UpdateStateRollbackStarted, swarm.UpdateStateRollbackCompleted}, true, false, "", ""},
		{[]swarm.UpdateState{swarm.UpdateStateRollbackStarted}, true, true, "", ""},
		{[]swarm.UpdateState{swarm.UpdateStateRollbackPaused}, true, false, "", "rollback paused: why"},
	} {
		back, updating, got := "", false, ""
		for _, s := range c.states {
			var err error
			if updating, err = followUpdate(&swarm.UpdateStatus{State: s, Message: "why"}, waiting{rollback: c.rollback}, &back); err != nil {
				got = err.Error()
			}
		}
		if updating != c.updating || back != c.back || got != c.err {
			t.Errorf("%+v: updating %v, back %q, error %q", c, updating, back, got)
		}
	}
	if updating, err := followUpdate(nil, waiting{}, new(string)); updating || err != nil {
		t.Errorf("without a status: %v, %v", updating, err)
	}
}
