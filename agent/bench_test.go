package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/netstate"
	"github.com/weftnet/weft/dns"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/orchestrator/wire"
	"github.com/weftnet/weft/vxlan"
)

// many is a leader's first message about services with a published port and a task
// each, on three nodes, of which nodeA is one; others are the endpoints of the rest.
func many(services int) (a wire.Assignments, others map[weft.ID][]weft.Endpoint) {
	a = full()
	a.Services, a.Specs = nil, nil
	a.Networks = append(a.Networks, weft.Network{ID: mesh, VNI: weft.IngressVNI, Spec: weft.NetworkSpec{
		Name: "ingress", Ingress: true, Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.255.0.0/16")}},
	}})
	a.Nodes = append(a.Nodes, wire.NodeView{ID: testID("c"), Hostname: "c", Addr: vtepC, DataPath: vtepC})
	for i := range a.Nodes {
		a.Nodes[i].IngressAddr = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 255, 255, byte(1 + i)}), 16)
	}
	others = map[weft.ID][]weft.Endpoint{}
	for i := range services {
		s, spec, t := oneOfMany(i)
		a.Services = append(a.Services, s)
		if t.Node == nodeA {
			a.Specs, a.Tasks = append(a.Specs, spec), append(a.Tasks, t)
			continue
		}
		others[t.Node] = append(others[t.Node], readyEndpoint(t))
	}
	return a, others
}

var (
	mesh  = testID("i")
	vtepC = netip.MustParseAddr("10.99.0.3")
)

func oneOfMany(i int) (wire.ServiceView, weft.SpecVersion, weft.Task) {
	p := weft.PortSpec{Protocol: weft.TCP, Target: 80, Published: uint16(10000 + i)}
	s := wire.ServiceView{
		ID: testID(fmt.Sprintf("s%05d", i)), Name: fmt.Sprint("svc", i), Ports: []weft.PortSpec{p},
		VIPs: []weft.VIP{{Network: mesh, Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 255, byte(100 + i/250), byte(1 + i%250)}), 16)}},
	}
	spec := testSpec(1)
	spec.Service, spec.Spec.Name, spec.Spec.Ports = s.ID, s.Name, s.Ports
	t := testTask(1, front)
	t.ID, t.Service, t.Node = testID(fmt.Sprintf("t%05d", i)), s.ID, []weft.ID{nodeA, nodeB, testID("c")}[i%3]
	t.Attachments = []weft.Attachment{{Network: mesh, Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 255, byte(1 + i/250), byte(1 + i%250)}), 16)}}
	return s, spec, t
}

func readyEndpoint(t weft.Task) weft.Endpoint {
	return weft.Endpoint{Network: mesh, Task: t.ID, Service: t.Service, Slot: t.Slot, Addr: t.Attachments[0].Addr.Addr(), State: weft.EndpointReady}
}

// BenchmarkModelOneMore is one more service among 2,000 in what a node knows of the
// leader, on disk.
func BenchmarkModelOneMore(b *testing.B) {
	const services = 2000
	first, _ := many(services)
	m, err := newModel().apply(first)
	if err != nil {
		b.Fatal(err)
	}
	path, file := filepath.Join(b.TempDir(), "assignments.json"), &modelFile{}
	if err := file.save(path, m, first); err != nil {
		b.Fatal(err)
	}
	began := cpuTime(b)
	for i := services; b.Loop(); i++ {
		s, _, _ := oneOfMany(i)
		next := wire.Assignments{Seq: m.Seq + 1, Services: []wire.ServiceView{s}}
		if m, err = m.apply(next); err != nil {
			b.Fatal(err)
		}
		if err := file.save(path, m, next); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpuTime(b)-began).Microseconds())/1000/float64(b.N), "cpu-ms/op")
}

// BenchmarkLookOneMore is what the plane does, the kernel apart, when one more
// service and its endpoint on another node have come to 2,000 with one each.
func BenchmarkLookOneMore(b *testing.B) {
	const services = 2000
	first, others := many(services)
	m, err := newModel().apply(first)
	if err != nil {
		b.Fatal(err)
	}
	names, err := dns.New(dns.Config{Log: slog.New(slog.DiscardHandler), ResolvConf: "/dev/null"})
	if err != nil {
		b.Fatal(err)
	}
	paths := newFakePaths()
	paths.link.Store(1500)
	table := newFakeTable(&journal{})
	for node, list := range others {
		table.set(gossip.Member{ID: node, Addr: m.Nodes[node].Addr, VTEP: m.Nodes[node].DataPath}, list...)
	}
	p := newPlane(Config{
		Node: nodeA, VTEP: vtepA, NetNSDir: "/ns", Underlay: paths, Names: names, Log: slog.New(slog.DiscardHandler),
		Sandbox: &fakeBoxes{}, HostAddrs: func() ([]weft.HostAddr, error) { return hostAddrs, nil },
	}, benchTable{table})
	p.overlay, p.balancer = noKernel{}, noBalancer{}
	for _, t := range m.Tasks {
		p.attach(netstate.LocalTask{Task: t, NetNS: "/ns/" + string(t.ID), State: weft.EndpointReady})
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- p.run(ctx) }()
	change := func(m *model) {
		p.setModel(m)
		if err := p.wait(ctx, p.generation(), nil); err != nil {
			b.Fatal(err)
		}
	}
	change(m)
	began := cpuTime(b)
	for i := services; b.Loop(); i++ {
		s, _, t := oneOfMany(i)
		t.Node = nodeB
		next := wire.Assignments{Seq: m.Seq + 1, Services: []wire.ServiceView{s}}
		if m, err = m.apply(next); err != nil {
			b.Fatal(err)
		}
		others[nodeB] = append(others[nodeB], readyEndpoint(t))
		table.set(gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB}, others[nodeB]...)
		change(m)
	}
	b.ReportMetric(float64((cpuTime(b)-began).Microseconds())/1000/float64(b.N), "cpu-ms/op")
	cancel()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}

// benchTable is a fakeTable that keeps no journal.
type benchTable struct{ *fakeTable }

func (benchTable) Publish([]weft.Endpoint) {}
func (benchTable) Attach([]weft.ID)        {}

type noKernel struct{}

func (noKernel) Read(context.Context) (vxlan.State, error) { return vxlan.State{}, nil }
func (noKernel) Apply(context.Context, vxlan.State) error  { return nil }

type noBalancer struct{ *fakeBalancer }

func (noBalancer) Apply(context.Context, ingress.Table) error { return nil }

// cpuTime is the processor time that this process has had.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
