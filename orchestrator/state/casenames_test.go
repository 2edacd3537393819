package state

import (
	"bytes"
	"errors"
	"testing"

	"github.com/weftnet/weft"
)

// TestNamesOfOneMeaning: logs and snapshots that hold names which differ in case only
// are read as they are; the leader refuses new ones.
func TestNamesOfOneMeaning(t *testing.T) {
	service := func(n int, name string) *weft.Service { x := testService(n); x.Spec.Name = name; return x }
	network := func(n int, name string) *weft.Network {
		x := testNetwork(n, uint32(5000+n))
		x.Spec.Name = name
		return x
	}
	s := New()
	if err := errors.Join(apply(t, s, 1,
		Command{Changes: []Change{{Service: service(1, "Web")}}}, Command{Changes: []Change{{Service: service(2, "web")}}}, Command{Changes: []Change{{Service: service(3, "other")}}},
		Command{Changes: []Change{{Network: network(4, "Front")}}}, Command{Changes: []Change{{Network: network(5, "front")}}},
	)...); err != nil {
		t.Fatal(err)
	}
	restored := New()
	if err := restored.Restore(bytes.NewReader(persist(t, s))); err != nil {
		t.Fatal(err)
	}
	for what, v := range map[string]*Snapshot{"the log": s.View(), "the snapshot": restored.View()} {
		for _, c := range []struct {
			name        string
			exact, like weft.ID // services; "" = none
		}{
			{"Web", id(1), id(1)}, {"web", id(2), id(2)}, {"WEB", "", id(1)}, {"other", id(3), id(3)}, {"OTHER", "", id(3)}, {"we", "", ""}, {"webb", "", ""},
		} {
			exact, _ := v.ServiceByName(c.name)
			like, _ := v.ServiceCalled(c.name)
			if exact.ID != c.exact || like.ID != c.like {
				t.Errorf("%s: %s is %q, called so is %q; want %q, %q", what, c.name, exact.ID, like.ID, c.exact, c.like)
			}
		}
		for _, c := range []struct {
			name        string
			exact, like weft.ID
		}{{"Front", id(4), id(4)}, {"front", id(5), id(5)}, {"FRONT", "", id(4)}, {"fron", "", ""}} {
			exact, _ := v.NetworkByName(c.name)
			like, _ := v.NetworkCalled(c.name)
			if exact.ID != c.exact || like.ID != c.like {
				t.Errorf("%s: network %s is %q, called so is %q; want %q, %q", what, c.name, exact.ID, like.ID, c.exact, c.like)
			}
		}
	}
	// One of them goes, the other stays; both can be edited.
	edit := service(2, "web")
	edit.Meta.Index, edit.SpecVersion = 1, 2
	if err := errors.Join(apply(t, restored, 2, Command{Changes: []Change{{Service: edit}}}, Command{Changes: []Change{{Delete: &Ref{Kind: KindService, ID: id(1)}}}})...); err != nil {
		t.Fatal(err)
	}
	if v, _ := restored.View().ServiceCalled("WEB"); v.ID != id(2) || v.SpecVersion != 2 {
		t.Errorf("after the removal WEB is %+v", v)
	}
}
