package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	overlay "github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/netns"
)

// slow is what went through host i's stack: towards tasks, and from them.
func (r *meshRig) slow(i int) (ways [2]uint64) {
	r.t.Helper()
	var err error
	ways[0], ways[1], err = r.hosts[i].mesh.Slow()
	must(r.t, err)
	return ways
}

// TestPublishedFastWay: after a flow's first packets none goes through the host's
// stack, in neither direction, wherever its task is. A flow that has to go there
// is counted both ways, so the test would see one.
func TestPublishedFastWay(t *testing.T) {
	r := newMeshRig(t, false, 0, 1)
	near, far := r.task(0, 11), r.task(1, 12)
	ports := meshPorts(near)
	for _, p := range meshPorts(far) {
		p.Port += 100
		ports = append(ports, p)
	}
	hidden := meshPorts(far)[0]
	hidden.Port, hidden.HideClient = 30200, true
	r.apply(append(ports, hidden)...)
	r.serve(near)
	r.serve(far)
	type flow struct {
		network, what string
		c             net.Conn
		task          ingress.Backend
	}
	var open []flow
	for i, h := range r.hosts {
		for client, host := range h.addrs {
			for port, task := range map[int]ingress.Backend{30000: near, 30100: far} {
				for _, network := range []string{"tcp", "udp"} {
					what := fmt.Sprintf("%s of %s to port %d of host %d", network, client, port, i)
					c, _, _, err := r.open(network, join(host, port), 0)
					if err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					open = append(open, flow{network, what, c, task})
				}
			}
		}
	}
	before := [2][2]uint64{r.slow(0), r.slow(1)}
	if before[0][0] < 8 || before[1][0] < 8 {
		t.Errorf("8 flows began by each host, which let in %v and %v packets", before[0], before[1])
	}
	for _, f := range open {
		for range 5 {
			if err := again(f.network, f.c, string(f.task.Task)); err != nil {
				t.Errorf("%s: %v", f.what, err)
			}
		}
		for i := range r.hosts {
			if now := r.slow(i); now != before[i] {
				t.Errorf("%s, open: through host %d's stack went %v packets before and %v after (to tasks, from them)", f.what, i, before[i], now)
				before[i] = now
			}
		}
	}
	c, _, _, err := r.open("tcp", join(r.hosts[0].addrs[meshClient], int(hidden.Port)), 0)
	must(t, err)
	opened := r.slow(0)
	must(t, again("tcp", c, ""))
	if now := r.slow(0); now[0] <= opened[0] || now[1] <= opened[1] {
		t.Errorf("a hidden client's packets went through the host, which counted %v before and %v after", opened, now)
	}
}

// shrink leaves room for few flows in each map of them: for as many datagrams, and for
// twice as many connections, of which a quarter may pass.
func (m *Mesh) shrink(room uint32) {
	whole := m.spec
	m.spec = func() (*ebpf.CollectionSpec, error) {
		spec, err := whole()
		if err != nil {
			return nil, err
		}
		for name, n := range map[string]uint32{
			meshMapRequests: 2 * room, meshMapAnswers: 2 * room, meshMapPassings: room / 4, meshMapRequestsUdp: room, meshMapAnswersUdp: room,
		} {
			spec.Maps[name].MaxEntries = n
		}
		return spec, nil
	}
}

// TestPublishedSilentAmongShort: what ends a silent connection is that others need
// its room. Those that have ended do not, nor datagrams, nor requests of clients
// that are not heard of again: many more than there is room for leave it alone, also
// where one of them has closed its half. Of what is pushed out, datagrams go on by
// the host's way and connections are reset.
func TestPublishedSilentAmongShort(t *testing.T) {
	const room = 256
	r := newMeshRig(t, false, 0)
	b := r.task(1, 11)
	r.hosts[0].mesh.shrink(room)
	halves := ingress.Published{Service: "web", Protocol: weft.TCP, Port: 30014, Target: 14, Backends: []ingress.Backend{b}}
	r.apply(append(meshPorts(b), halves)...)
	r.serve(b)
	host := join(r.hosts[0].addrs[meshClient], 30000)
	var silent, datagrams net.Conn
	for network, c := range map[string]*net.Conn{"tcp": &silent, "udp": &datagrams} {
		var err error
		*c, _, _, err = r.open(network, host, 0)
		must(t, err)
	}
	listens, asks := r.halfClosed(b, halves), r.halfClosed(b, halves)
	must(t, listens.client.CloseWrite())
	must(t, asks.task.CloseWrite())
	storms := map[string]func(int){
		"connections that have ended": func(int) {
			c, _, _, err := r.open("tcp", host, 0)
			must(t, err)
			must(t, c.Close())
		},
		"connections that were reset": func(int) {
			c, _, _, err := r.open("tcp", host, 0)
			must(t, err)
			must(t, c.(*net.TCPConn).SetLinger(0))
			must(t, c.Close())
		},
		"datagrams": func(int) {
			c, _, _, err := r.open("udp", host, 0) // it waits for its answer, or the task's buffer would be full
			must(t, err)
			must(t, c.Close())
		},
		"requests alone": r.knocker(host),
	}
	for what, one := range storms {
		for i := range 3 * room {
			one(i)
		}
		r.forget()
		if err := again("tcp", silent, ""); err != nil {
			t.Errorf("a silent connection among %d %s: %v", 3*room, what, err)
		}
	}
	if err := carry(listens.task, listens.client); err != nil {
		t.Errorf("to a silent client that has closed its half: %v", err)
	}
	if err := carry(asks.client, asks.task); err != nil {
		t.Errorf("to a silent task that has closed its half: %v", err)
	}
	for _, name := range []string{meshMapRequests, meshMapAnswers} {
		// Three are open, and each end of another one may be on its way yet.
		if n := len(r.dump(0, name)); n < 3 || n > room/4+8 {
			t.Errorf("%d connections are in map %s, want 3 and the %d that passed last", n, name, room/4)
		}
	}
	r.emptyFlows(0) // as if more were open than there is room for
	r.forget()
	if err := again("udp", datagrams, string(b.Task)); err != nil {
		t.Errorf("datagrams whose flow was pushed out: %v", err)
	}
	if err := again("tcp", silent, ""); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection whose flow was pushed out: %v, want a reset", err)
	}
}

// both are the ends of one connection.
type both struct{ client, task *net.TCPConn }

// halfClosed opens a connection to a published port of a task, whose end the test
// has, too.
func (r *meshRig) halfClosed(b ingress.Backend, p ingress.Published) both {
	r.t.Helper()
	var ln net.Listener
	must(r.t, netns.Do(filepath.Join(r.dir, string(b.Task)), func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprint(":", p.Target))
		return err
	}))
	defer ln.Close()
	must(r.t, ln.(*net.TCPListener).SetDeadline(time.Now().Add(r.patience)))
	c, err := r.dial("tcp", join(r.hosts[0].addrs[meshClient], int(p.Port)), 0)
	must(r.t, err)
	task, err := ln.Accept()
	must(r.t, err)
	r.t.Cleanup(func() { task.Close() })
	all := both{c.(*net.TCPConn), task.(*net.TCPConn)}
	must(r.t, errors.Join(carry(all.client, all.task), carry(all.task, all.client)))
	return all
}

// carry brings a byte from one end to the other.
func carry(from, to net.Conn) error {
	if _, err := from.Write([]byte("x")); err != nil {
		return err
	}
	if err := to.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err := io.ReadFull(to, make([]byte, 1))
	return err
}

// dump reads a map of flows of host i.
func (r *meshRig) dump(i int, name string) map[endsValue]turnValue {
	r.t.Helper()
	m, err := ebpf.LoadPinnedMap(r.hosts[i].mesh.path(name), nil)
	must(r.t, err)
	defer m.Close()
	all, err := overlay.Dump[endsValue, turnValue](m)
	must(r.t, err)
	return all
}

// emptyFlows makes host i forget all its flows.
func (r *meshRig) emptyFlows(i int) {
	r.t.Helper()
	for _, name := range meshFlows {
		m, err := ebpf.LoadPinnedMap(r.hosts[i].mesh.path(name), nil)
		must(r.t, err)
		all, err := overlay.Dump[endsValue, turnValue](m)
		must(r.t, err)
		for k := range all {
			must(r.t, m.Delete(k))
		}
		must(r.t, m.Close())
	}
}

// knocker sends requests for connections to an address from one that nobody has,
// so that each is answered and nobody says more.
func (r *meshRig) knocker(host string) func(i int) {
	to := netip.MustParseAddrPort(host)
	src, dst := netip.MustParseAddr("198.18.0.77").As4(), to.Addr().As4()
	fd := -1
	must(r.t, netns.Do(r.client, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		return err
	}))
	r.t.Cleanup(func() { unix.Close(fd) })
	return func(i int) {
		ip := append([]byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, unix.IPPROTO_TCP, 0, 0}, append(src[:], dst[:]...)...)
		tcp := binary.BigEndian.AppendUint16(nil, uint16(20000+i))
		tcp = binary.BigEndian.AppendUint16(tcp, to.Port())
		tcp = append(tcp, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 0x02, 0xff, 0xff, 0, 0, 0, 0) // RFC 9293: SYN
		sum := unix.IPPROTO_TCP + len(tcp)
		for b := range slices.Chunk(append(ip[12:20:20], tcp...), 2) {
			sum += int(b[0])<<8 | int(b[1])
		}
		for sum > 0xffff {
			sum = sum&0xffff + sum>>16
		}
		binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum))
		must(r.t, unix.Sendto(fd, append(ip, tcp...), 0, &unix.SockaddrInet4{Addr: dst}))
	}
}
