package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/netstate"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/orchestrator/ca"
	"github.com/weftnet/weft/orchestrator/wire"
)

// BenchmarkNameEverywhere: from the moment at which a node knows that a task can serve
// to its name in the resolvers of five nodes, with real gossip on sockets, and a
// kernel that takes no time.
func BenchmarkNameEverywhere(b *testing.B) {
	nodes := newSpread(b, 5)
	var took []time.Duration
	for b.Loop() {
		b.StopTimer()
		owner := nodes[len(took)%len(nodes)].agent.plane
		task := testTask(100, front)
		task.ID = testID(fmt.Sprintf("u%d", len(took)))
		owner.attach(netstate.LocalTask{Task: task, NetNS: "/ns/u", State: weft.EndpointStarting})
		nodes.await(b, task.ID, true, false)
		sleep(b.Context(), 20*time.Millisecond) // for what the container takes to start
		b.StartTimer()
		began := time.Now()
		owner.setReady(task.ID)
		nodes.await(b, task.ID, true, true)
		took = append(took, time.Since(began))
		b.StopTimer()
		owner.detach(task.ID)
		nodes.await(b, task.ID, false, false)
		b.StartTimer()
	}
	slices.Sort(took)
	for _, q := range []struct {
		at   float64
		name string
	}{{0, "best"}, {0.5, "median"}, {0.9, "p90"}, {1, "worst"}} {
		b.ReportMetric(float64(took[int(q.at*float64(len(took)-1))])/1e6, q.name+"-ms")
	}
}

// spread is a cluster of agents without a leader.
type spread []*rig

// await blocks until every node names a task, as ready or not, or does not.
func (s spread) await(b *testing.B, task weft.ID, named, ready bool) {
	b.Helper()
	id := weft.ContainerID(task)[:12]
	for _, r := range s {
		for end := time.Now().Add(20 * time.Second); ; sleep(b.Context(), 50*time.Microsecond) {
			isNamed, isReady := false, false
			for _, svc := range r.agent.plane.names.last().Networks[front.ID].Services {
				for _, t := range svc.Tasks {
					if slices.Contains(t.Names, id) {
						isNamed, isReady = true, t.Ready
					}
				}
			}
			if isNamed == named && isReady == ready {
				break
			}
			if time.Now().After(end) {
				b.Fatalf("on node %s task %s is named: %t, ready: %t", r.agent.cfg.Node, task, isNamed, isReady)
			}
		}
	}
}

// newSpread runs n agents that know each other, each with a task on front.
func newSpread(b *testing.B, n int) spread {
	root, err := ca.NewRoot("test", time.Now())
	if err != nil {
		b.Fatal(err)
	}
	cluster := weft.NewID()
	all := full()
	all.Nodes = nil
	for i := range n {
		all.Nodes = append(all.Nodes, wire.NodeView{ID: spreadID(i), Hostname: fmt.Sprint("n", i), Addr: spreadAddr(i), DataPath: spreadAddr(i)})
	}
	g, ctx := errgroup.WithContext(b.Context())
	ctx, stop := context.WithCancel(ctx)
	b.Cleanup(func() {
		stop()
		if err := g.Wait(); err != nil {
			b.Error(err)
		}
	})
	var s spread
	var seed netip.AddrPort
	for i := range n {
		at := freeGossipPort(b, spreadAddr(i))
		if i == 0 {
			seed = at
		}
		table, err := gossip.New(gossip.Config{
			Node: spreadID(i), Bind: at, Advertise: at, VTEP: spreadAddr(i), Keys: weft.GossipRing{Sends: weft.GossipKey{Key: make([]byte, 32)}},
			Identity: spreadIdentity(b, root, ca.Identity{Node: spreadID(i), Role: weft.RoleWorker, Cluster: cluster}),
			Seeds:    func() []netip.AddrPort { return []netip.AddrPort{seed} }, Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			b.Fatal(err)
		}
		r := newRig(b)
		cfg := r.config()
		cfg.Node, cfg.VTEP, cfg.Gossip = spreadID(i), spreadAddr(i), table
		if r.agent, err = New(cfg); err != nil {
			b.Fatal(err)
		}
		r.agent.listen = r.sockets.listen
		g.Go(func() error { return table.Run(ctx) })
		g.Go(func() error { return r.agent.Run(ctx) })
		session := <-r.leader.sessions
		session.send <- all
		own := testTask(1+i, front)
		own.Node = cfg.Node
		r.agent.plane.attach(netstate.LocalTask{Task: own, NetNS: "/ns/own", State: weft.EndpointReady})
		s = append(s, r)
	}
	for i := range n {
		s.await(b, testTask(1+i, front).ID, true, true)
	}
	return s
}

func spreadID(i int) weft.ID { return testID(fmt.Sprint("n", i)) }

func spreadAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, byte(2 + i)}) }

// freeGossipPort is one that is free on TCP and UDP.
func freeGossipPort(b *testing.B, ip netip.Addr) netip.AddrPort {
	for range 20 {
		l, err := net.Listen("tcp", netip.AddrPortFrom(ip, 0).String())
		if err != nil {
			b.Fatal(err)
		}
		at := l.Addr().(*net.TCPAddr).AddrPort()
		u, err := net.ListenPacket("udp", at.String())
		l.Close()
		if err == nil {
			u.Close()
			return at
		}
	}
	b.Fatalf("no free port on %s", ip)
	return netip.AddrPort{}
}

// certified is gossip.Identity, as the daemon makes it.
type certified struct{ c *ca.Credentials }

func spreadIdentity(b *testing.B, root ca.Root, id ca.Identity) gossip.Identity {
	key, csr, err := ca.NewCSR()
	if err != nil {
		b.Fatal(err)
	}
	cert, err := ca.Sign(root, csr, id, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	c, err := ca.NewCredentials(ca.Bundle{Cert: cert, Key: key, CA: root.Cert}, time.Now)
	if err != nil {
		b.Fatal(err)
	}
	return certified{c}
}

func (i certified) Certificate() []byte             { return i.c.Certificate() }
func (i certified) Sign(d [32]byte) ([]byte, error) { return i.c.Sign(d) }
func (i certified) ServerTLS() *tls.Config          { return i.c.GossipConfig() }
func (i certified) ClientTLS(peer weft.ID) *tls.Config {
	return i.c.ClientConfig(ca.ProtoGossip, ca.Peer{Node: peer})
}

func (i certified) Trust(cert []byte) (weft.ID, *ecdsa.PublicKey, error) {
	id, key, err := i.c.Trust(cert)
	return id.Node, key, err
}
