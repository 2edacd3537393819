//go:build lab

package lab

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Ports that this test publishes: 80 and 7/udp of the task, and the one that the
// client sends from.
const (
	portMesh, portMeshEcho = 8121, 8122
	portMeshClient         = 20007
)

// TestLabMeshKeepsClients: whichever node a client asks, and whether that node
// runs the task or not, the task sees the client's own address; also where the
// same port of the client is used through all of them at once.
func TestLabMeshKeepsClients(t *testing.T) {
	r := newRig(t, "t-mesh")
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--replicas", "1",
		"--publish", fmt.Sprintf("%d:80", portMesh), "--publish", fmt.Sprintf("%d:7/udp", portMeshEcho), "--publish", fmt.Sprintf("%d:7/tcp", portMeshEcho), "weft/whoami")...)
	where := ""
	r.eventually("the one task", func() error {
		web, err := r.replicas("web", three...)
		if err == nil && len(web) != 1 {
			err = fmt.Errorf("%d run", len(web))
		}
		if err == nil {
			where = web[0].host
		}
		return err
	})
	t.Logf("the task runs on %s", where)
	for _, h := range three {
		r.eventually("port of "+h, func() error { _, err := r.get(t.Context(), h, portMesh); return err })
		out, err := r.get(t.Context(), h, portMesh)
		if want := `"client":"` + ClientAddr.String() + ":"; err != nil || !strings.Contains(out, want) {
			t.Errorf("HTTP through %s: %q, %v; want %s", h, out, err, want)
		}
	}
	families := map[netip.Addr]func(Host) netip.Addr{
		ClientAddr:  func(h Host) netip.Addr { return h.Addr },
		ClientAddr6: func(h Host) netip.Addr { return h.Addr6 },
	}
	for client, of := range families {
		for _, network := range []string{"tcp", "udp"} {
			var open []net.Conn
			for _, h := range three {
				to := netip.AddrPortFrom(of(r.host(h)), portMeshEcho)
				var c net.Conn
				r.eventually(fmt.Sprintf("%s to %s", network, to), func() (err error) {
					c, err = r.meshDial(network, client, to)
					return err
				})
				defer c.Close()
				open = append(open, c)
				r.meshSeen(c, h, client)
			}
			for i, c := range open { // all of them are open, from one port
				if network == "udp" {
					r.meshSeen(c, three[i]+" again", client)
				} else if err := meshEcho(c); err != nil {
					t.Errorf("%s through %s again: %v", network, three[i], err)
				}
			}
		}
	}
}

// meshDial opens a connection from one port of the client, whatever else is open
// from there.
func (r *rig) meshDial(network string, from netip.Addr, to netip.AddrPort) (c net.Conn, err error) {
	d := net.Dialer{Timeout: askLimit, Control: func(_, _ string, c syscall.RawConn) error {
		var opt error
		err := c.Control(func(fd uintptr) {
			if opt = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); opt == nil {
				opt = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			}
		})
		if err == nil {
			err = opt
		}
		return err
	}}
	d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, portMeshClient))
	if network == "udp" {
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, portMeshClient))
	}
	err = within(r.clientNS(), func() error {
		c, err = d.DialContext(r.t.Context(), network, to.String())
		return err
	})
	return c, err
}

// meshSeen reads the line with which the task says whom it sees. A datagram has to
// ask for it.
func (r *rig) meshSeen(c net.Conn, by string, want netip.Addr) {
	r.t.Helper()
	network := c.RemoteAddr().Network()
	var line string
	var err error
	for range 3 { // a datagram may be lost
		if err = c.SetDeadline(time.Now().Add(askLimit)); err != nil {
			break
		}
		if network == "udp" {
			if _, err = c.Write([]byte("\n")); err != nil {
				continue
			}
		}
		if line, err = bufio.NewReaderSize(c, 1<<16).ReadString('\n'); err == nil || network == "tcp" {
			break
		}
	}
	var seen struct{ Client netip.AddrPort }
	if err == nil {
		err = json.Unmarshal([]byte(line), &seen)
	}
	if err != nil || seen.Client.Addr().Unmap() != want {
		r.t.Errorf("%s through %s: the task sees %s, %v; want %s", network, by, seen.Client, err, want)
	}
}

func meshEcho(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(askLimit)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("still here\n")); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && line != "still here\n" {
		err = fmt.Errorf("echo %q", line)
	}
	return err
}
