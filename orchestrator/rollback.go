package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// RollbackService implements wire.Services.
func (m *Manager) RollbackService(ctx context.Context, id weft.ID, index uint64) (weft.Service, error) {
	return write(m, ctx, func(ctx context.Context, t *term) (weft.Service, error) { return t.rollbackService(ctx, id, index) })
}

// rollbackService is the way back that a person asks for: the two specifications
// change places, so that asking again brings the newer one back.
func (t *term) rollbackService(ctx context.Context, id weft.ID, index uint64) (weft.Service, error) {
	release, err := t.edit(ctx)
	if err != nil {
		return weft.Service{}, err
	}
	defer release()
	v := t.store.View()
	old, err := lockedService(v, id, index)
	if err != nil {
		return weft.Service{}, err
	}
	return t.goBack(ctx, v, old, &old.Spec, weft.MessageRollbackAsked)
}

// goBack gives a service its previous specification; previous is what it can go
// back to afterwards. The turn to edit is the caller's, v was taken in it.
func (t *term) goBack(ctx context.Context, v *state.Snapshot, old weft.Service, previous *weft.ServiceSpec, message string) (weft.Service, error) {
	if old.Previous == nil {
		return weft.Service{}, fmt.Errorf("service %s does not have a previous spec: %w", old.ID, weft.ErrInvalid)
	}
	spec, err := settleSpec(v, *old.Previous)
	if err != nil {
		return weft.Service{}, fmt.Errorf("roll back service %s: %w", old.Spec.Name, err)
	}
	svc := old
	svc.Spec, svc.Previous, svc.SpecVersion = spec, previous, old.SpecVersion+1
	svc.Update = weft.UpdateStatus{State: weft.RollbackRunning, StartedAt: time.Now().UTC().Round(0), Message: message}
	return t.replaceService(ctx, v, old, svc)
}

// rollback is the way back of an update that has failed. Nobody can go forward
// again from there. What the previous specification asks for may be gone (a network,
// a port): then the update is paused and says so.
func (p *pass) rollback(ctx context.Context, seen weft.Service, why string) error {
	release, err := p.edit(ctx)
	if err != nil {
		return fmt.Errorf("roll back service %s: %w", seen.Spec.Name, err)
	}
	defer release()
	v := p.store.View()
	old, ok := v.Service(seen.ID)
	if !ok || old.Meta.Index != seen.Meta.Index || old.Update != seen.Update {
		return nil // it has changed since this pass looked: the next one looks again
	}
	_, err = p.goBack(ctx, v, old, nil, "update rolled back "+why)
	if err == nil || ctx.Err() != nil || errors.Is(err, weft.ErrUnavailable) || errors.Is(err, weft.ErrOutOfSequence) {
		return err
	}
	st := old.Update
	st.State, st.Message = weft.UpdatePaused, fmt.Sprintf("update paused %s; it cannot be rolled back: %s", why, weft.Text(err))
	return p.prop.one(ctx, []state.Change{{ServiceUpdate: &state.ServiceUpdate{Service: old.ID, SpecVersion: old.SpecVersion, Update: st}}})
}
