//go:build lab

package lab

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestLabSockets: on the eBPF engine a task that connects to a service address is
// connected to a task of the service, on any host, and knows the service alone.
// When that task goes, its connection ends at once.
func TestLabSockets(t *testing.T) {
	r := newRig(t, "t-sock", "--hosts", "2", "--overlay-engine", "ebpf")
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "weft/whoami")...)
	var web []replica
	r.eventually("a task on each host", func() (err error) {
		if web, err = r.replicas("web", "h1", "h2"); err == nil && len(web) != 2 {
			err = fmt.Errorf("%d run", len(web))
		}
		return err
	})
	var vip string
	r.eventually("VIP of web", func() (err error) { vip, err = r.vip("web"); return err })
	open := map[string]net.Conn{} // by the address of the task at the other end
	r.eventually("connections from a task to both", func() error {
		c, to, err := dialSeen(web[0].ns(), vip+":7")
		if err != nil {
			return err
		}
		if c.RemoteAddr().String() != vip+":7" {
			t.Fatalf("the task sees %s, not the service", c.RemoteAddr())
		}
		if to == vip { // the host's first pass for this task is not over
			c.Close()
			return errors.New("balanced by packet")
		}
		if open[to] != nil {
			c.Close()
		} else {
			open[to] = c
			t.Cleanup(func() { c.Close() })
		}
		if len(open) < 2 {
			return fmt.Errorf("to %v only", to)
		}
		return nil
	})
	for _, p := range web {
		if open[p.addrs["front"]] == nil {
			t.Errorf("no connection to %s: %v", p.addrs["front"], open)
		}
	}
	gone := web[1]
	r.must(r.on("h2", "rm", "-f", r.containers("h2", "web")[0])...)
	began := time.Now()
	c := open[gone.addrs["front"]]
	if c == nil {
		t.Fatal("nothing to end")
	}
	c.SetDeadline(began.Add(10 * time.Second))
	for err := error(nil); err == nil; {
		if _, err = c.Write([]byte("x")); err == nil {
			_, err = c.Read(make([]byte, 1))
		}
		if e, ok := err.(net.Error); ok && e.Timeout() {
			t.Fatal("the connection to a task that is gone hangs")
		}
	}
	t.Logf("a connection ended %v after its task was removed", time.Since(began).Round(time.Millisecond))
}

// dialSeen connects from a namespace, and says where the kernel has the other end.
func dialSeen(ns, addr string) (c net.Conn, to string, err error) {
	err = within(ns, func() error {
		if c, err = net.DialTimeout("tcp4", addr, 2*time.Second); err != nil {
			return err
		}
		list, err := netlink.SocketDiagTCP(unix.AF_INET)
		if err != nil {
			return err
		}
		port := uint16(c.LocalAddr().(*net.TCPAddr).Port)
		i := slices.IndexFunc(list, func(s *netlink.Socket) bool { return s.ID.SourcePort == port && s.State == netlink.TCP_ESTABLISHED })
		if i < 0 {
			return fmt.Errorf("no socket with port %d", port)
		}
		to = list[i].ID.Destination.String()
		return nil
	})
	if err != nil && c != nil {
		c.Close()
	}
	return c, to, err
}
