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
	release, err := t.edit(ctx)
	if err != nil {
		return none, err
	}
	defer release()
	v := t.store.View()
	if other, taken := v.NetworkCalled(spec.Name); taken {
		return none, nameTaken("network", other.Spec.Name, spec.Name)
	}
	var changes []state.Change
	if spec.IPv6 {
		changes = withULA(v)
	}
	if spec.Subnets, err = chooseSubnets(v, &spec, changes); err != nil {
		return none, err
	}
	vni, err := chooseVNI(v)
	if err != nil {
		return none, fmt.Errorf("network %s: choose VNI: %w", spec.Name, err)
	}
	n := weft.Network{ID: weft.NewID(), Spec: spec, VNI: vni}
	if err := t.prop.one(ctx, append(changes, state.Change{Network: &n})); err != nil {
		return none, fmt.Errorf("create network %s: %w", spec.Name, err)
	}
	n, ok := t.store.View().Network(n.ID)
	if !ok {
		return none, fmt.Errorf("network %s was removed at once: %w", spec.Name, weft.ErrNotFound)
	}
	return n, nil
}

// withULA is the change that gives a cluster its IPv6 range, if it is older than
// those: the random bits are drawn here and stored by the command.
func withULA(v *state.Snapshot) []state.Change {
	c, _ := v.Cluster()
	if c.ULA.IsValid() {
		return nil
	}
	c.ULA = weft.NewULA()
	return []state.Change{{Cluster: &c}}
}

// chooseSubnets gives a network a subnet of each family that it is to have, IPv4
// first. first are changes that go before it and may bring the cluster's IPv6
// range.
func chooseSubnets(v *state.Snapshot, spec *weft.NetworkSpec, first []state.Change) ([]weft.Subnet, error) {
	c, _ := v.Cluster()
	for _, f := range first {
		c = *f.Cluster
	}
	var out []weft.Subnet
	for _, is6 := range []bool{false, true} {
		if is6 && !spec.IPv6 || !is6 && spec.NoIPv4 {
			continue
		}
		s, given, err := givenSubnet(v, spec, is6)
		if err == nil && !given {
			s, err = chooseSubnet(v, &c, is6)
		}
		if err != nil {
			return nil, fmt.Errorf("network %s: %w", spec.Name, err)
		}
		out = append(out, s)
	}
	return out, nil
}

// givenSubnet is the subnet of a family that a person gave, checked against what
// is in use.
func givenSubnet(v *state.Snapshot, spec *weft.NetworkSpec, is6 bool) (s weft.Subnet, given bool, err error) {
	i := slices.IndexFunc(spec.Subnets, func(s weft.Subnet) bool { return s.Prefix.Addr().Is6() == is6 })
	if i < 0 {
		return s, false, nil
	}
	s = spec.Subnets[i]
	if err := ipam.CheckSubnet(s.Prefix, usedPrefixes(v)); err != nil {
		return s, true, fmt.Errorf("IPAM.Config[%d].Subnet: %w", i, err)
	}
	if !s.Gateway.IsValid() {
		s.Gateway = s.Prefix.Addr().Next()
	}
	return s, true, nil
}

func chooseSubnet(v *state.Snapshot, c *weft.Cluster, is6 bool) (weft.Subnet, error) {
	pick := ipam.Pools{Prefixes: c.AddrPools, MaskLength: c.MaskLength}.Pick
	if is6 {
		pick = func(used []netip.Prefix) (netip.Prefix, error) { return ipam.Pick6(c.ULA, used) }
	}
	var in []netip.Prefix
	for _, u := range usedPrefixes(v) {
		in = append(in, u.Prefix)
	}
	careful := slices.Clone(in)
	for _, n := range v.RestingNetworks() {
		for _, s := range n.Subnets {
			careful = append(careful, s.Prefix)
		}
	}
	p, err := pick(careful)
	if err != nil {
		if p, soon := pick(in); soon == nil {
			return weft.Subnet{}, fmt.Errorf("choose subnet: %s is free but rests: its network was removed a moment ago and nodes may hold tunnels of it, for %s at most; try again, or give the subnet: %w",
				p, restBound, weft.ErrUnavailable)
		}
		return weft.Subnet{}, fmt.Errorf("choose subnet: %w", err)
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
