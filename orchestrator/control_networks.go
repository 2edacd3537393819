package orchestrator

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/orchestrator/state"
)

// Networks implements wire.Networks.
func (m *Manager) Networks(ctx context.Context) ([]weft.Network, error) {
	return read(m, ctx, func(v *state.Snapshot, _ *term) ([]weft.Network, error) { return v.Networks(), nil })
}

// CreateNetwork implements wire.Networks.
func (m *Manager) CreateNetwork(ctx context.Context, spec weft.NetworkSpec) (weft.Network, error) {
	return write(m, ctx, func(ctx context.Context, t *term) (weft.Network, error) { return t.createNetwork(ctx, spec) })
}

// RemoveNetwork implements wire.Networks.
func (m *Manager) RemoveNetwork(ctx context.Context, id weft.ID) error {
	_, err := write(m, ctx, func(ctx context.Context, t *term) (struct{}, error) {
		return struct{}{}, t.removeNetwork(ctx, id)
	})
	return err
}

func (t *term) createNetwork(ctx context.Context, spec weft.NetworkSpec) (weft.Network, error) {
	var none weft.Network
	if spec.Driver == "" {
		spec.Driver = weft.DriverOverlay
	}
	if err := spec.Validate(); err != nil {
		return none, err
	}
	if spec.Ingress {
		return none, fmt.Errorf("network %s: Ingress: the cluster makes its own ingress network: %w", spec.Name, weft.ErrUnsupported)
	}
	if len(spec.Subnets) > 1 {
		return none, fmt.Errorf("network %s: IPAM.Config[1]: only one subnet per network is supported: %w", spec.Name, weft.ErrUnsupported)
	}
	release, err := t.edit(ctx)
	if err != nil {
		return none, err
	}
	defer release()
	v := t.store.View()
	if _, taken := v.NetworkByName(spec.Name); taken {
		return none, fmt.Errorf("network with name %s already exists: %w", spec.Name, weft.ErrConflict)
	}
	subnet, err := chooseSubnet(v, &spec)
	if err != nil {
		return none, err
	}
	spec.Subnets = []weft.Subnet{subnet}
	vni, err := chooseVNI(v)
	if err != nil {
		return none, fmt.Errorf("network %s: choose VNI: %w", spec.Name, err)
	}
	n := weft.Network{ID: weft.NewID(), Spec: spec, VNI: vni}
	if err := t.prop.one(ctx, []state.Change{{Network: &n}}); err != nil {
		return none, fmt.Errorf("create network %s: %w", spec.Name, err)
	}
	n, ok := t.store.View().Network(n.ID)
	if !ok {
		return none, fmt.Errorf("network %s was removed at once: %w", spec.Name, weft.ErrNotFound)
	}
	return n, nil
}

func chooseSubnet(v *state.Snapshot, spec *weft.NetworkSpec) (weft.Subnet, error) {
	used := usedPrefixes(v)
	if len(spec.Subnets) == 1 && spec.Subnets[0].Prefix.IsValid() {
		s := spec.Subnets[0]
		if err := ipam.CheckSubnet(s.Prefix, used); err != nil {
			return s, fmt.Errorf("network %s: IPAM.Config[0].Subnet: %w", spec.Name, err)
		}
		if !s.Gateway.IsValid() {
			s.Gateway = s.Prefix.Addr().Next()
		}
		if !s.Prefix.Contains(s.Gateway) || s.Gateway == s.Prefix.Addr() {
			return s, fmt.Errorf("network %s: IPAM.Config[0].Gateway: %s is not an address of a host in subnet %s: %w", spec.Name, s.Gateway, s.Prefix, weft.ErrInvalid)
		}
		return s, nil
	}
	if len(spec.Subnets) == 1 && spec.Subnets[0].Gateway.IsValid() {
		return weft.Subnet{}, fmt.Errorf("network %s: IPAM.Config[0].Gateway: a gateway needs a subnet: %w", spec.Name, weft.ErrInvalid)
	}
	c, _ := v.Cluster()
	pools := ipam.Pools{Prefixes: c.AddrPools, MaskLength: c.MaskLength}
	var in []netip.Prefix
	for _, u := range used {
		in = append(in, u.Prefix)
	}
	careful := slices.Clone(in)
	for _, n := range v.RestingNetworks() {
		for _, s := range n.Subnets {
			careful = append(careful, s.Prefix)
		}
	}
	p, err := pools.Pick(careful)
	if err != nil {
		if p, soon := pools.Pick(in); soon == nil {
			return weft.Subnet{}, fmt.Errorf("network %s: choose subnet: %s is free but rests: its network was removed a moment ago and nodes may hold tunnels of it, for %s at most; try again, or give the subnet: %w",
				spec.Name, p, restBound, weft.ErrUnavailable)
		}
		return weft.Subnet{}, fmt.Errorf("network %s: choose subnet: %w", spec.Name, err)
	}
	return weft.Subnet{Prefix: p, Gateway: p.Addr().Next()}, nil
}

func chooseVNI(v *state.Snapshot) (uint32, error) {
	used := map[uint32]bool{weft.IngressVNI: true}
	for _, n := range v.Networks() {
		used[n.VNI] = true
	}
	for _, n := range v.RestingNetworks() {
		used[n.VNI] = true
	}
	return ipam.PickVNI(used)
}

func (t *term) removeNetwork(ctx context.Context, id weft.ID) error {
	release, err := t.edit(ctx)
	if err != nil {
		return err
	}
	defer release()
	v := t.store.View()
	n, ok := v.Network(id)
	if !ok {
		return fmt.Errorf("network %s %w", id, weft.ErrNotFound)
	}
	if n.Spec.Ingress {
		return fmt.Errorf("network %s is the routing mesh's own and cannot be removed: %w", n.Spec.Name, weft.ErrForbidden)
	}
	if users := v.NetworkUsers(id); len(users) > 0 {
		return state.InUse(n.Spec.Name, users)
	}
	if err := t.prop.one(ctx, []state.Change{{Delete: &state.Ref{Kind: state.KindNetwork, ID: id}}}); err != nil {
		return fmt.Errorf("remove network %s: %w", n.Spec.Name, err)
	}
	return nil
}
