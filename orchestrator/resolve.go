package orchestrator

import (
	"fmt"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// Names are resolved as Docker does: exact id, then name as it is written, then
// unique prefix of an id.

func findService(v *state.Snapshot, ref string) (weft.Service, error) {
	if s, ok := v.Service(weft.ID(ref)); ok {
		return s, nil
	}
	if s, ok := v.ServiceByName(ref); ok {
		return s, nil
	}
	return only("service", ref, v.ServicesByPrefix)
}

func findNetwork(v *state.Snapshot, ref string) (weft.Network, error) {
	if n, ok := v.Network(weft.ID(ref)); ok {
		return n, nil
	}
	if n, ok := v.NetworkByName(ref); ok {
		return n, nil
	}
	return only("network", ref, v.NetworksByPrefix)
}

func only[T any](kind, ref string, byPrefix func(string) []T) (T, error) {
	var zero T
	if ref == "" {
		return zero, fmt.Errorf("%s reference is empty: %w", kind, weft.ErrInvalid)
	}
	switch found := byPrefix(ref); len(found) {
	case 0:
		return zero, fmt.Errorf("%s %s %w", kind, ref, weft.ErrNotFound)
	case 1:
		return found[0], nil
	default:
		return zero, fmt.Errorf("%s %s is ambiguous: %d ids begin with it, give more characters: %w", kind, ref, len(found), weft.ErrConflict)
	}
}

// nameTaken is the refusal of a name that DNS does not tell from have.
func nameTaken(kind, have, want string) error {
	if have == want {
		return fmt.Errorf("%s with name %s already exists: %w", kind, want, weft.ErrConflict)
	}
	return fmt.Errorf("%s with name %s already exists, and %s differs from it in case only, which names in DNS do not: choose another name: %w", kind, have, want, weft.ErrConflict)
}

// serviceNetworks are the networks that the tasks of a service are on, in the
// order of Service.VIPs: the ingress network first when it answers on ports.
func serviceNetworks(v *state.Snapshot, spec *weft.ServiceSpec) ([]weft.Network, error) {
	var out []weft.Network
	if spec.HasIngressPorts() {
		n, ok := v.Ingress()
		if !ok {
			return nil, fmt.Errorf("the ingress network %w", weft.ErrNotFound)
		}
		out = append(out, n)
	}
	for _, t := range spec.Networks {
		n, ok := v.Network(t.Network)
		if !ok {
			return nil, fmt.Errorf("network %s %w", t.Network, weft.ErrNotFound)
		}
		out = append(out, n)
	}
	return out, nil
}
