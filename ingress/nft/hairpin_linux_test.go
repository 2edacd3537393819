package nft

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/sandbox"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// TestTasksAskTheirHost: a task asks a port in mode host at its own host's addresses as
// anybody does, whether another task answers there or the very one that asks. The
// sandboxes are real: what they let a task's kernel learn matters.
func TestTasksAskTheirHost(t *testing.T) {
	m := newMesh(t, 1)
	maker, err := sandbox.New(sandbox.Config{Node: "tasks", NetNSDir: m.dir, FilesDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	t.Cleanup(func() { must(t, maker.Close(context.Background())) })
	table := ingress.Table{Ingress: m.hosts[0].entry}
	var boxes []sandbox.Sandbox
	for range 2 {
		sb, err := maker.Make(t.Context(), sandbox.Spec{Task: weft.NewID(), Hostname: "h", Gateway: true})
		must(t, err)
		t.Cleanup(func() { must(t, maker.Destroy(context.Background(), sb.Task)) })
		boxes = append(boxes, sb)
		m.serve(sb.NetNS, string(sb.Task))
	}
	bridge, subnet, err := maker.Gateway(t.Context())
	must(t, err)
	table.Gateway = ingress.Gateway{Bridge: bridge, Subnet: subnet}
	b := []ingress.Backend{{Task: boxes[0].Task, Addr: boxes[0].GatewayAddr.Addr()}}
	for p, target := range map[weft.Protocol]uint16{weft.TCP: 80, weft.UDP: 7} {
		table.Published = append(table.Published, ingress.Published{Service: "h", Protocol: p, Port: 8080, Target: target, Host: true, Backends: b})
	}
	must(t, m.hosts[0].e.Apply(t.Context(), table))
	for i, from := range boxes {
		for _, to := range []string{"192.0.2.1:8080", netip.AddrPortFrom(subnet.Addr().Next(), 8080).String()} {
			for range 3 { // what comes first may teach a wrong way
				for _, network := range []string{"tcp", "udp"} {
					var c net.Conn
					err := netns.Do(from.NetNS, func() (err error) {
						c, err = net.DialTimeout(network, to, 3*time.Second)
						return err
					})
					name := ""
					if err == nil {
						defer c.Close()
						name, _, err = greeted(c, network == "udp")
					}
					if err == nil && network == "tcp" {
						err = echo(c)
					}
					if err != nil || name != string(boxes[0].Task) {
						t.Errorf("task %d asks %s by %s: %q answered, %v", i, to, network, name, err)
					}
				}
			}
		}
	}
}
