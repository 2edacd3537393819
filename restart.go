package weft

import (
	"maps"
	"slices"
)

// NeedsRestart reports whether tasks of the old specification must be replaced
// to run the new one. Name, labels, number of replicas, restart policy and
// parameters of updates and rollbacks concern the leader only; everything else
// concerns the task, its addresses or its place. An absent list and an empty one
// are equal: codecs do not keep them apart.
func NeedsRestart(old, new *ServiceSpec) bool {
	return old.Mode != new.Mode ||
		old.ForceUpdate != new.ForceUpdate ||
		old.Limits != new.Limits ||
		old.Reservations != new.Reservations ||
		old.EndpointMode != new.EndpointMode ||
		!slices.Equal(old.Constraints, new.Constraints) ||
		!slices.EqualFunc(old.Ports, new.Ports, PortSpec.sameWish) ||
		!slices.EqualFunc(old.Networks, new.Networks, sameTarget) ||
		!sameContainer(&old.Container, &new.Container)
}

func sameTarget(a, b NetworkTarget) bool {
	return a.Network == b.Network && slices.Equal(a.Aliases, b.Aliases)
}

func sameContainer(a, b *ContainerSpec) bool {
	return a.Image == b.Image &&
		slices.Equal(a.Entrypoint, b.Entrypoint) &&
		slices.Equal(a.Args, b.Args) &&
		slices.Equal(a.Env, b.Env) &&
		a.Dir == b.Dir &&
		a.User == b.User &&
		a.Hostname == b.Hostname &&
		maps.Equal(a.Labels, b.Labels) &&
		slices.Equal(a.Mounts, b.Mounts) &&
		a.StopSignal == b.StopSignal &&
		a.StopGrace == b.StopGrace &&
		a.TTY == b.TTY &&
		a.ReadOnly == b.ReadOnly &&
		a.Health.Equal(b.Health) &&
		a.DNS.Equal(b.DNS) &&
		slices.EqualFunc(a.Hosts, b.Hosts, HostEntry.Equal)
}
