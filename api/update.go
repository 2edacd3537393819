package api

import (
	"math"

	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

// honourUpdate are the fields of the policies of an update and of the way back.
func honourUpdate(r ruleSet) {
	for _, at := range []string{weft.FieldUpdate, weft.FieldRollback} {
		r.honour(at+".", "Parallelism", "Delay", "Monitor", "MaxFailureRatio")
		r[at+".Order"] = only("", swarm.UpdateOrderStopFirst, swarm.UpdateOrderStartFirst)
	}
	r[weft.FieldUpdate+".FailureAction"] = only("", swarm.UpdateFailureActionPause, swarm.UpdateFailureActionContinue, swarm.UpdateFailureActionRollback)
	r[weft.FieldRollback+".FailureAction"] = only("", swarm.UpdateFailureActionPause, swarm.UpdateFailureActionContinue)
}

func checkUpdate(at string, u *swarm.UpdateConfig, bad badFunc) {
	if u == nil {
		return
	}
	if u.Delay < 0 {
		bad(at+".Delay", "%s is negative", u.Delay)
	}
	if u.Monitor < 0 {
		bad(at+".Monitor", "%s is negative", u.Monitor)
	}
	if !(u.MaxFailureRatio >= 0 && u.MaxFailureRatio <= 1) {
		bad(at+".MaxFailureRatio", "%v: write a number from 0 to 1", u.MaxFailureRatio)
	}
}

// failureActions are Docker's words.
func failureActions() map[weft.UpdateFailure]swarm.FailureAction {
	return map[weft.UpdateFailure]swarm.FailureAction{
		weft.UpdatePause: swarm.UpdateFailureActionPause, weft.UpdateContinue: swarm.UpdateFailureActionContinue, weft.UpdateRollback: swarm.UpdateFailureActionRollback,
	}
}

// updateConfig converts a policy; nil is Docker's default.
func updateConfig(u *swarm.UpdateConfig) weft.UpdateConfig {
	if u == nil {
		return weft.DefaultUpdate
	}
	out := weft.UpdateConfig{
		Parallelism: u.Parallelism, Delay: u.Delay, Monitor: u.Monitor, StartFirst: u.Order == swarm.UpdateOrderStartFirst,
		// Docker's is of 32 bits: 0.1 shall be 0.1.
		MaxFailureRatio: math.Round(float64(u.MaxFailureRatio)*1e6) / 1e6,
	}
	if out.Monitor == 0 {
		out.Monitor = weft.DefaultUpdate.Monitor
	}
	for ours, word := range failureActions() {
		if u.FailureAction == word {
			out.OnFailure = ours
		}
	}
	return out
}

// dockerUpdate is updateConfig backwards.
func dockerUpdate(u weft.UpdateConfig) *swarm.UpdateConfig {
	out := &swarm.UpdateConfig{
		Parallelism: u.Parallelism, Delay: u.Delay, Monitor: u.Monitor, MaxFailureRatio: float32(u.MaxFailureRatio),
		FailureAction: failureActions()[u.OnFailure], Order: swarm.UpdateOrderStopFirst,
	}
	if u.StartFirst {
		out.Order = swarm.UpdateOrderStartFirst
	}
	return out
}

func dockerUpdateStatus(u weft.UpdateStatus) *swarm.UpdateStatus {
	state, ok := map[weft.UpdateState]swarm.UpdateState{
		weft.UpdateRunning: swarm.UpdateStateUpdating, weft.UpdatePaused: swarm.UpdateStatePaused, weft.UpdateDone: swarm.UpdateStateCompleted,
		weft.RollbackRunning: swarm.UpdateStateRollbackStarted, weft.RollbackPaused: swarm.UpdateStateRollbackPaused, weft.RollbackDone: swarm.UpdateStateRollbackCompleted,
	}[u.State]
	if !ok {
		return nil
	}
	out := &swarm.UpdateStatus{State: state, Message: u.Message, StartedAt: optionalTime(u.StartedAt)}
	if !u.State.IsRunning() && !u.State.IsPaused() {
		out.CompletedAt = optionalTime(u.EndedAt)
	}
	return out
}

// rollback says whether a call of update asks for the specification before: then
// the one it sends is ignored, by Docker's definition.
func (c *call) rollback() (bool, error) {
	switch v := c.query.Get("rollback"); v {
	case "", "none":
		return false, nil
	case "previous":
		return true, nil
	default:
		return false, invalidf("rollback: %q must be previous or none", v)
	}
}

// serviceRollback answers POST /services/{id}/update?rollback=previous.
func (s *Server) serviceRollback(c *call, old *weft.Service, index uint64) error {
	var ignored map[string]any
	if err := decode(c, &ignored); err != nil {
		return err
	}
	if old.Previous == nil {
		return invalidf("rpc error: code = FailedPrecondition desc = service %s does not have a previous spec", old.ID)
	}
	v, err := s.cfg.Services.RollbackService(c.Context(), old.ID, index)
	if err != nil {
		return err
	}
	return c.json(swarm.ServiceUpdateResponse{Warnings: warnings(&v.Spec)})
}
