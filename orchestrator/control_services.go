package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/reconcile"
	"github.com/weftnet/weft/orchestrator/state"
)

// Services implements wire.Services.
func (m *Manager) Services(ctx context.Context) ([]weft.Service, error) {
	return read(m, ctx, func(v *state.Snapshot, _ *term) ([]weft.Service, error) { return v.Services(), nil })
}

// Service implements wire.Services.
func (m *Manager) Service(ctx context.Context, ref string) (weft.Service, error) {
	return read(m, ctx, func(v *state.Snapshot, _ *term) (weft.Service, error) { return findService(v, ref) })
}

// CreateService implements wire.Services.
func (m *Manager) CreateService(ctx context.Context, spec weft.ServiceSpec) (weft.Service, error) {
	return write(m, ctx, func(ctx context.Context, t *term) (weft.Service, error) { return t.createService(ctx, spec) })
}

// UpdateService implements wire.Services.
func (m *Manager) UpdateService(ctx context.Context, id weft.ID, index uint64, spec weft.ServiceSpec) (weft.Service, error) {
	return write(m, ctx, func(ctx context.Context, t *term) (weft.Service, error) {
		return t.updateService(ctx, id, index, spec)
	})
}

// RemoveService implements wire.Services. The service is gone when it returns;
// its tasks stop afterwards.
func (m *Manager) RemoveService(ctx context.Context, id weft.ID) error {
	_, err := write(m, ctx, func(ctx context.Context, t *term) (struct{}, error) {
		return struct{}{}, t.removeService(ctx, id)
	})
	return err
}

func (t *term) createService(ctx context.Context, spec weft.ServiceSpec) (weft.Service, error) {
	var none weft.Service
	release, err := t.edit(ctx)
	if err != nil {
		return none, err
	}
	defer release()
	v := t.store.View()
	if spec, err = settleSpec(v, spec); err != nil {
		return none, err
	}
	if other, taken := v.ServiceCalled(spec.Name); taken {
		return none, nameTaken("service", other.Spec.Name, spec.Name)
	}
	c, _ := v.Cluster()
	svc := weft.Service{ID: weft.NewID(), Spec: spec, SpecVersion: 1}
	if svc.Ports, err = choosePorts(v, c, &spec, nil); err != nil {
		return none, err
	}
	if err := t.checkRoom(v, svc.ID, &spec, nil); err != nil {
		return none, err
	}
	if svc.VIPs, err = t.chooseVIPs(v, &svc, nil); err != nil {
		return none, err
	}
	if err := t.prop.one(ctx, []state.Change{{Service: &svc}}); err != nil {
		t.alloc.release(t.store.View(), svc.ID)
		return none, fmt.Errorf("create service %s: %w", spec.Name, err)
	}
	return t.stored(svc.ID, spec.Name)
}

func (t *term) stored(id weft.ID, name string) (weft.Service, error) {
	s, ok := t.store.View().Service(id)
	if !ok {
		return s, fmt.Errorf("service %s was removed at once: %w", name, weft.ErrNotFound)
	}
	return s, nil
}

func (t *term) updateService(ctx context.Context, id weft.ID, index uint64, spec weft.ServiceSpec) (weft.Service, error) {
	var none weft.Service
	release, err := t.edit(ctx)
	if err != nil {
		return none, err
	}
	defer release()
	v := t.store.View()
	old, err := lockedService(v, id, index)
	if err != nil {
		return none, err
	}
	if spec, err = settleSpec(v, spec); err != nil {
		return none, err
	}
	switch {
	case spec.Name != old.Spec.Name:
		return none, fmt.Errorf("update service %s: Name: a service cannot be renamed to %s; create a new one: %w", old.Spec.Name, spec.Name, weft.ErrInvalid)
	case spec.Mode != old.Spec.Mode:
		return none, fmt.Errorf("update service %s: Mode: the mode of a service cannot be changed; create a new one: %w", old.Spec.Name, weft.ErrInvalid)
	}
	svc := old
	svc.Spec, svc.Previous, svc.SpecVersion = spec, &old.Spec, old.SpecVersion+1
	svc.Update = weft.UpdateStatus{}
	if reconcile.NeedsRestart(&old.Spec, &spec) {
		svc.Update = weft.UpdateStatus{State: weft.UpdateRunning, StartedAt: time.Now().UTC().Round(0), Message: weft.MessageUpdateRunning}
	}
	return t.replaceService(ctx, v, old, svc)
}

// replaceService stores a service with another specification, with the ports and
// addresses that follow. The turn to edit is the caller's, v was taken in it.
func (t *term) replaceService(ctx context.Context, v *state.Snapshot, old, svc weft.Service) (weft.Service, error) {
	var none weft.Service
	var err error
	c, _ := v.Cluster()
	if svc.Ports, err = choosePorts(v, c, &svc.Spec, &old); err != nil {
		return none, err
	}
	if err := t.checkRoom(v, svc.ID, &svc.Spec, &old.Spec); err != nil {
		return none, err
	}
	if svc.VIPs, err = t.chooseVIPs(v, &svc, old.VIPs); err != nil {
		return none, err
	}
	if err := t.prop.one(ctx, []state.Change{{Service: &svc}}); err != nil {
		t.alloc.release(t.store.View(), svc.ID, attachments(old.VIPs)...)
		return none, fmt.Errorf("update service %s: %w", svc.Spec.Name, err)
	}
	t.alloc.release(t.store.View(), svc.ID, attachments(svc.VIPs)...)
	return t.stored(svc.ID, svc.Spec.Name)
}

// lockedService is a service that nobody has changed since index.
func lockedService(v *state.Snapshot, id weft.ID, index uint64) (weft.Service, error) {
	old, ok := v.Service(id)
	if !ok {
		return old, fmt.Errorf("service %s %w", id, weft.ErrNotFound)
	}
	if old.Meta.Index != index {
		return old, fmt.Errorf("update service %s: it was read at %d and has changed at %d: %w", old.Spec.Name, index, old.Meta.Index, weft.ErrOutOfSequence)
	}
	return old, nil
}

func (t *term) removeService(ctx context.Context, id weft.ID) error {
	release, err := t.edit(ctx)
	if err != nil {
		return err
	}
	defer release()
	s, ok := t.store.View().Service(id)
	if !ok {
		return fmt.Errorf("service %s %w", id, weft.ErrNotFound)
	}
	if err := t.prop.one(ctx, []state.Change{{Delete: &state.Ref{Kind: state.KindService, ID: id}}}); err != nil {
		return fmt.Errorf("remove service %s: %w", s.Spec.Name, err)
	}
	t.alloc.release(t.store.View(), id)
	return nil
}

// settleSpec fills in defaults, resolves the names of networks and validates.
func settleSpec(v *state.Snapshot, spec weft.ServiceSpec) (weft.ServiceSpec, error) {
	spec.Defaults()
	if err := spec.Validate(); err != nil {
		return spec, err
	}
	spec.Networks = slices.Clone(spec.Networks)
	seen, isInternal := map[weft.ID]bool{}, len(spec.Networks) > 0
	var subnets []netip.Prefix
	for i, n := range spec.Networks {
		net, err := findNetwork(v, string(n.Network))
		if err != nil {
			return spec, fmt.Errorf("service %s: TaskTemplate.Networks[%d].Target: %w", spec.Name, i, err)
		}
		if net.Spec.Ingress {
			return spec, fmt.Errorf("service %s: TaskTemplate.Networks[%d].Target: network %s is the routing mesh's own; publish ports instead: %w", spec.Name, i, net.Spec.Name, weft.ErrForbidden)
		}
		if seen[net.ID] {
			return spec, fmt.Errorf("service %s: TaskTemplate.Networks[%d].Target: network %s is named twice: %w", spec.Name, i, net.Spec.Name, weft.ErrInvalid)
		}
		seen[net.ID] = true
		spec.Networks[i].Network = net.ID
		isInternal = isInternal && net.Spec.Internal
		for _, s := range net.Spec.Subnets {
			subnets = append(subnets, s.Prefix)
		}
	}
	if isInternal {
		if err := spec.Container.DNS.CheckInternal("TaskTemplate.ContainerSpec.DNSConfig", subnets); err != nil {
			return spec, fmt.Errorf("service %s: %w", spec.Name, err)
		}
	}
	return spec, checkWayIn(v, &spec)
}

// chooseVIPs gives a service an address per network; old ones stay.
func (t *term) chooseVIPs(v *state.Snapshot, svc *weft.Service, old []weft.VIP) ([]weft.VIP, error) {
	if svc.Spec.EndpointMode != weft.EndpointVIP {
		return nil, nil
	}
	networks, err := serviceNetworks(v, &svc.Spec)
	if err != nil {
		return nil, err
	}
	have := map[weft.ID]weft.VIP{}
	for _, o := range old {
		have[o.Network] = o
	}
	var missing []weft.Network
	for _, n := range networks {
		if _, ok := have[n.ID]; !ok {
			missing = append(missing, n)
		}
	}
	fresh, err := t.alloc.attach(svc.ID, missing)
	if err != nil {
		var full *fullError
		if errors.As(err, &full) {
			err = t.explainFull(v, full.net, "its virtual address")
		}
		return nil, fmt.Errorf("choose virtual address of service %s: %w", svc.Spec.Name, err)
	}
	for _, f := range fresh {
		have[f.Network] = weft.VIP(f)
	}
	var vips []weft.VIP
	for _, n := range networks {
		vips = append(vips, have[n.ID])
	}
	return vips, nil
}

func attachments(vips []weft.VIP) []weft.Attachment {
	out := make([]weft.Attachment, len(vips))
	for i, v := range vips {
		out[i] = weft.Attachment(v)
	}
	return out
}
