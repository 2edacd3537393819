package state

import (
	"bytes"
	"errors"
	"net/netip"
	"reflect"
	"testing"

	"github.com/weftnet/weft"
)

// TestGoldenPorts: what came with ranges, bound ports and mode host.
func TestGoldenPorts(t *testing.T) {
	s := New()
	apply(t, s, 1, goldenCommands()...)
	svc, _ := s.View().Service(id(4))
	addr := netip.MustParseAddr("10.99.0.1")
	svc.Spec.Labels = map[string]string{"weft.publish.10000-20000.ip": "10.99.0.1", "weft.publish.10000-20000.allow": "10.0.0.0/8", "weft.publish.90.interface": "eth0"}
	svc.Spec.Ports = []weft.PortSpec{
		{Protocol: weft.UDP, Target: 10000, Published: 10000, Count: 10001, IPs: []netip.Addr{addr}, Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
		{Name: "http", Protocol: weft.TCP, Target: 80, Mode: weft.PublishHost},
		{Protocol: weft.SCTP, Target: 90, Published: 90, Interface: "eth0"},
	}
	svc.Ports, svc.SpecVersion = svc.Spec.Ports, svc.SpecVersion+1
	own := svc.Spec.HostPorts()
	own[0].Published = 32000
	pending := testTask(6, 4, "")
	pending.SpecVersion, pending.Status.State, pending.Attachments = 2, weft.TaskPending, nil
	listeners := []weft.Listener{{Protocol: weft.TCP, Port: 22, Addr: netip.IPv6Unspecified()}, {Protocol: weft.UDP, Port: 53, Addr: addr}}
	node, _ := s.View().Node(id(3))
	node.Description.Addrs = []weft.HostAddr{{Interface: "eth0", Addr: addr}}
	b, err := EncodeEntry([]Command{{At: t0, Changes: []Change{
		{Service: &svc}, {Task: pending}, {TaskAssign: &TaskAssign{Task: id(6), Node: id(3), Ports: own}},
		{NodeStatus: &NodeStatus{Node: id(3), Listeners: &listeners, Description: &node.Description}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	errs, err := s.Apply(7, golden(t, "entry-v1-ports.cbor", b))
	if err != nil || errors.Join(errs...) != nil {
		t.Fatal(err, errs)
	}
	r := New()
	if err := r.Restore(bytes.NewReader(golden(t, "snapshot-v2-ports.cbor", persist(t, s)))); err != nil {
		t.Fatal(err)
	}
	got, _ := r.View().Service(id(4))
	task, _ := r.View().Task(id(6))
	n, _ := r.View().Node(id(3))
	if !reflect.DeepEqual(got.Ports, svc.Ports) || !reflect.DeepEqual(task.Ports, own) || task.Node != id(3) ||
		!reflect.DeepEqual(n.Status.Listeners, listeners) || !reflect.DeepEqual(n.Description, node.Description) {
		t.Errorf("service %+v\ntask %+v\nnode %+v", got.Ports, task, n)
	}
}
