package orchestrator

import (
	"net/netip"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
)

// TestNamesOfOneMeaningAreRefused: DNS does not tell names apart that differ in case
// only, so no second one is made. Two that an older version has made go on, and
// references are as exact as Docker's.
func TestNamesOfOneMeaningAreRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.boot(1)
		m, ctx := r.managers[0], r.ctx
		net, err := m.CreateNetwork(ctx, weft.NetworkSpec{Name: "Front"})
		r.must(err)
		create := func(name, network string) (weft.Service, error) {
			s := webSpec(name, 1)
			s.Networks = []weft.NetworkTarget{{Network: weft.ID(network)}}
			return m.CreateService(ctx, s)
		}
		web, err := create("Web", "Front")
		r.must(err)
		for _, name := range []string{"web", "WEB", "wEb"} {
			_, err := create(name, "Front")
			wantErr(t, name, err, weft.ErrConflict, "service with name Web already exists", name, "case", "choose another name")
		}
		_, err = create("Web", "Front")
		wantErr(t, "the same name", err, weft.ErrConflict, "service with name Web already exists")
		_, err = m.CreateNetwork(ctx, weft.NetworkSpec{Name: "front"})
		wantErr(t, "front", err, weft.ErrConflict, "network with name Front already exists", "front", "case")
		_, err = m.CreateNetwork(ctx, weft.NetworkSpec{Name: "INGRESS"})
		wantErr(t, "INGRESS", err, weft.ErrConflict, "network with name ingress already exists")
		_, err = create("other", "front")
		wantErr(t, "a network by another case", err, weft.ErrNotFound, "network front not found")
		_, err = m.Service(ctx, "web")
		wantErr(t, "a service by another case", err, weft.ErrNotFound, "service web not found")

		// As an older version has left them.
		twin := web
		twin.ID, twin.Meta, twin.VIPs, twin.Spec.Name = weft.NewID(), weft.Meta{}, nil, "web"
		twin.Spec.EndpointMode = weft.EndpointDNSRR
		pair := net
		pair.ID, pair.Meta, pair.VNI, pair.Spec.Name, pair.Spec.Subnets = weft.NewID(), weft.Meta{}, net.VNI+1, "front", nil
		lead, err := r.leader().leading()
		r.must(err)
		r.must(lead.prop.one(ctx, []state.Change{{Service: &twin}, {Network: &pair}}))
		for name, id := range map[string]weft.ID{"Web": web.ID, "web": twin.ID} {
			s, err := m.Service(ctx, name)
			r.must(err)
			if s.ID != id || s.Spec.Name != name {
				t.Errorf("%s is service %s, %s", name, s.ID, s.Spec.Name)
			}
			up := s.Spec
			up.Labels = map[string]string{"a": "b"}
			after, err := m.UpdateService(ctx, id, s.Meta.Index, up)
			r.must(err)
			up.Name = "WEB"
			_, err = m.UpdateService(ctx, id, after.Meta.Index, up)
			wantErr(t, "renaming "+name, err, weft.ErrInvalid, "Name", "WEB")
		}
		_, err = create("WEB", "front")
		wantErr(t, "a third", err, weft.ErrConflict, "WEB")
		// So do networks that are called as none is any more.
		_, err = m.CreateNetwork(ctx, weft.NetworkSpec{Name: "tail."})
		wantErr(t, "a dot at the end", err, weft.ErrInvalid, "Name", "tail.", "leave that dot out")
		tail := net
		tail.ID, tail.Meta, tail.VNI, tail.Spec.Name = weft.NewID(), weft.Meta{}, net.VNI+2, "tail."
		tail.Spec.Subnets = []weft.Subnet{{Prefix: netip.MustParsePrefix("10.77.0.0/24"), Gateway: netip.MustParseAddr("10.77.0.1")}}
		r.must(lead.prop.one(ctx, []state.Change{{Network: &tail}}))
		_, err = create("behind", "tail.")
		r.must(err)
		// The last of a name frees it.
		r.must(m.RemoveService(ctx, web.ID))
		_, err = create("Web", "Front")
		wantErr(t, "while one is left", err, weft.ErrConflict, "service with name web already exists")
		r.must(m.RemoveService(ctx, twin.ID))
		_, err = create("Web", "Front")
		r.must(err)
	})
}
