package orchestrator

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/weftnet/weft"
)

// TestFarNameserversOfInternalServices: a nameserver that no task would ever ask is
// refused, when a service is made and when it moves to such networks.
func TestFarNameserversOfInternalServices(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m, ctx := r.managers[0], r.ctx
		for i, spec := range []weft.NetworkSpec{{Name: "inner", Internal: true}, {Name: "inner6", Internal: true, IPv6: true}, {Name: "outer"}} {
			spec.Subnets = []weft.Subnet{{Prefix: netip.MustParsePrefix(fmt.Sprintf("10.77.%d.0/24", i))}}
			if spec.IPv6 {
				spec.Subnets = append(spec.Subnets, weft.Subnet{Prefix: netip.MustParsePrefix("fd00:77::/64")})
			}
			_, err := m.CreateNetwork(ctx, spec)
			r.must(err)
		}
		const field = "TaskTemplate.ContainerSpec.DNSConfig.Nameservers"
		n := 0
		create := func(servers []string, networks ...weft.ID) (weft.Service, error) {
			n++
			s := webSpec(fmt.Sprintf("s%d", n), 0)
			s.Ports = []weft.PortSpec{{Target: 80}} // the mesh's network is no way out
			for _, a := range servers {
				s.Container.DNS.Nameservers = append(s.Container.DNS.Nameservers, netip.MustParseAddr(a))
			}
			for _, id := range networks {
				s.Networks = append(s.Networks, weft.NetworkTarget{Network: id})
			}
			return m.CreateService(ctx, s)
		}
		for _, c := range []struct {
			servers  []string
			networks []weft.ID
			words    []string // of the refusal; nil = it is taken
		}{
			{[]string{"192.0.2.1"}, []weft.ID{"inner"}, []string{field + "[0]", "192.0.2.1", "internal", "10.77.0.0/24"}},
			{[]string{"10.77.2.1"}, []weft.ID{"inner", "inner6"}, []string{field + "[0]", "10.77.0.0/24 or 10.77.1.0/24 or fd00:77::/64"}},
			{[]string{"10.77.0.9", "192.0.2.1"}, []weft.ID{"inner"}, []string{field + "[1]", "192.0.2.1"}},
			{[]string{"10.77.0.9"}, []weft.ID{"inner"}, nil},
			{[]string{"::ffff:10.77.0.9", "fd00:77::5"}, []weft.ID{"inner", "inner6"}, nil},
			{[]string{"192.0.2.1"}, []weft.ID{"inner", "outer"}, nil},
			{[]string{"192.0.2.1"}, []weft.ID{"outer"}, nil},
			{[]string{"192.0.2.1"}, nil, nil},
			{nil, []weft.ID{"inner"}, nil},
		} {
			_, err := create(c.servers, c.networks...)
			if c.words == nil {
				r.must(err)
				continue
			}
			wantErr(t, fmt.Sprint(c.servers, c.networks), err, weft.ErrInvalid, c.words...)
		}
		s, err := create([]string{"192.0.2.1"}, "inner", "outer")
		r.must(err)
		up := s.Spec
		up.Networks = up.Networks[:1]
		_, err = m.UpdateService(ctx, s.ID, s.Meta.Index, up)
		wantErr(t, "leaving the way out", err, weft.ErrInvalid, field+"[0]", s.Spec.Name)
	})
}
