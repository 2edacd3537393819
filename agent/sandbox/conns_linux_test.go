package sandbox

import (
	"context"
	"net"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft/vxlan/netns"
)

// TestConnectionsOfATask: those with the host count, in every state in which the
// task still owes something; its own listeners and talks with itself do not.
func TestConnectionsOfATask(t *testing.T) {
	m, ctx := maker(t), context.Background()
	box, err := m.Make(ctx, spec())
	must(t, err)
	want := func(what string, n int) {
		t.Helper()
		if got, err := Connections(box.NetNS); err != nil || got != n {
			t.Fatalf("%s: %d connections, %v, want %d", what, got, err, n)
		}
	}
	var task net.Listener
	must(t, netns.Do(box.NetNS, func() (err error) { task, err = net.Listen("tcp", ":0"); return err }))
	defer task.Close()
	_, port, err := net.SplitHostPort(task.Addr().String())
	must(t, err)
	want("listening", 0)
	talk := func(dial func() (net.Conn, error)) (client, server *net.TCPConn) {
		c, err := dial()
		must(t, err)
		s, err := task.Accept()
		must(t, err)
		t.Cleanup(func() { c.Close(); s.Close() })
		return c.(*net.TCPConn), s.(*net.TCPConn)
	}
	inside := func(host string) func() (net.Conn, error) {
		return func() (c net.Conn, err error) {
			err = netns.Do(box.NetNS, func() (err error) { c, err = net.Dial("tcp", net.JoinHostPort(host, port)); return err })
			return c, err
		}
	}
	talk(inside("127.0.0.1"))
	want("talking to itself over loopback", 0)
	talk(inside(box.GatewayAddr.Addr().String()))
	want("talking to itself over its own address", 0)
	client, server := talk(func() (net.Conn, error) {
		return net.Dial("tcp", net.JoinHostPort(box.GatewayAddr.Addr().String(), port))
	})
	want("the host has connected", 1)
	must(t, client.CloseWrite())
	if _, err := server.Read(make([]byte, 1)); err == nil {
		t.Fatal("read more than was sent")
	}
	want("the host has no more to say, the task has", 1)
	must(t, server.Close())
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Fatal("read more than was sent")
	}
	must(t, client.Close())
	want("both have closed", 0)
	if _, err := Connections(box.NetNS + "-none"); err == nil {
		t.Error("no error about a namespace that is not there")
	}
}

// TestOutsideAgainstSlowTwin: a connection counts if its state does, no end is
// loopback, and the other end is not there.
func TestOutsideAgainstSlowTwin(t *testing.T) {
	addrs := []netip.AddrPort{
		netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("[::1]:1"), netip.MustParseAddrPort("10.0.0.1:1"),
		netip.MustParseAddrPort("10.0.0.1:2"), netip.MustParseAddrPort("10.0.0.2:1"), netip.MustParseAddrPort("[fd00::1]:1"),
	}
	rapid.Check(t, func(t *rapid.T) {
		var all []conn
		for range rapid.IntRange(0, 8).Draw(t, "sockets") {
			all = append(all, conn{
				uint8(rapid.IntRange(1, 12).Draw(t, "state")), rapid.SampledFrom(addrs).Draw(t, "local"), rapid.SampledFrom(addrs).Draw(t, "remote"),
			})
		}
		want := 0
		for _, c := range all {
			counts := map[uint8]bool{1: true, 3: true, 4: true, 8: true, 9: true, 11: true, 12: true}[c.state]
			for _, o := range all {
				counts = counts && (o.local != c.remote || o.remote != c.local)
			}
			if counts && !c.local.Addr().IsLoopback() && !c.remote.Addr().IsLoopback() {
				want++
			}
		}
		if got := outside(all); got != want {
			t.Fatalf("%d, want %d", got, want)
		}
	})
}
