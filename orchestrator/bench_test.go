package orchestrator

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/state"
	"github.com/weftnet/weft/orchestrator/wire"
)

// BenchmarkCommit is one small command to one manager with its log on disk, by
// one caller and by 64 at once.
func BenchmarkCommit(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			id := weft.NewID()
			m, err := New(Config{Dir: b.TempDir(), Node: id, Addr: managerAddr(1), Stream: tcpStream{l}, CA: fakeCA{}, Log: testLog(),
				Bootstrap: &Bootstrap{Cluster: testCluster(), Node: weft.Node{ID: id}},
				Logs:      func(context.Context, weft.Node) (wire.Agent, error) { return nil, weft.ErrUnavailable },
				Timing:    Timing{Heartbeat: 100 * time.Millisecond}})
			if err != nil {
				b.Fatal(err)
			}
			ctx, stop := context.WithCancel(b.Context())
			done := make(chan error, 1)
			go func() { done <- m.Run(ctx) }()
			if err := m.Await(ctx); err != nil {
				b.Fatal(err)
			}
			t, err := m.leading()
			if err != nil {
				b.Fatal(err)
			}
			if t.raft.State() != raft.Leader {
				b.Fatal("no leader")
			}
			listeners := []weft.Listener{{Protocol: weft.TCP, Port: 22}}
			b.SetParallelism(callers)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := t.prop.one(ctx, []state.Change{{NodeStatus: &state.NodeStatus{Node: id, Listeners: &listeners}}}); err != nil {
						b.Error(err)
					}
				}
			})
			b.StopTimer()
			stop()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		})
	}
}
