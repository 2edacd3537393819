package bpf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan/netns"
)

// A task sees its client's own address, by whichever node the client comes and
// whether that one has the task; and what is open goes on past the host's stack.
// Hosts with nftables alone and those with eBPF are one mesh.
func TestPublishedPastTheHost(t *testing.T) {
	for name, c := range map[string]struct {
		under6 bool
		fast   []int
	}{
		"both hosts":            {false, []int{0, 1}},
		"the entry":             {false, []int{0}},
		"the other one":         {false, []int{1}},
		"over an IPv6 underlay": {true, []int{0, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newMeshRig(t, c.under6, c.fast...)
			b := r.task(1, 11)
			r.apply(meshPorts(b)...)
			r.serve(b)
			type flow struct {
				network, what string
				c             net.Conn
			}
			var open []flow
			for i, h := range r.hosts {
				for client, host := range h.addrs {
					for _, network := range []string{"tcp", "udp"} {
						what := fmt.Sprintf("%s of %s by host %d", network, client, i)
						conn, task, seen, err := r.open(network, join(host, 30000), 0)
						if err != nil || task != string(b.Task) || seen.Addr().String() != client {
							t.Errorf("%s: %q saw %s, %v", what, task, seen, err)
							continue
						}
						if h.mesh != nil {
							open = append(open, flow{network, what, conn})
						}
					}
				}
				if h.mesh != nil {
					if got := len(r.flows(i)); got != 4 {
						t.Errorf("host %d knows %d flows, want 4", i, got)
					}
				}
			}
			for range 2 {
				for _, f := range open {
					if err := again(f.network, f.c, string(b.Task)); err != nil {
						t.Errorf("%s, once more: %v", f.what, err)
					}
				}
				r.forget()
			}
		})
	}
}

// Two flows that are one to the backend: the host has forgotten the first and gives
// the second the same port. It gets another one, and both go on.
func TestPublishedOnePortTwice(t *testing.T) {
	r := newMeshRig(t, false, 0, 1)
	b := r.task(1, 11)
	r.apply(meshPorts(b)...)
	r.serve(b)
	for client := range r.hosts[0].addrs {
		var open []net.Conn
		ports := map[uint16]bool{}
		for _, h := range r.hosts {
			for _, port := range []int{30000, 30002} {
				c, _, seen, err := r.open("tcp", join(h.addrs[client], port), 20000)
				if err != nil || seen.Addr().String() != client {
					t.Fatalf("port %d of %s: seen as %s, %v", port, h.addrs[client], seen, err)
				}
				open = append(open, c)
				ports[seen.Port()] = true
				r.forget()
			}
		}
		for _, c := range open {
			if err := again("tcp", c, ""); err != nil {
				t.Errorf("%s to %s: %v", client, c.RemoteAddr(), err)
			}
		}
		if len(ports) < 2 {
			t.Errorf("the task saw %s with the ports %v, and could not tell its connections apart", client, ports)
		}
	}
}

// The first datagram to a node whose neighbour the host has to look for first is
// not lost.
func TestPublishedFirstDatagram(t *testing.T) {
	r := newMeshRig(t, false, 0)
	b := r.task(1, 11)
	r.apply(meshPorts(b)...)
	r.serve(b)
	r.hosts[0].do(t, func() error {
		l, err := netlink.LinkByName("under0")
		if err != nil {
			return err
		}
		near, err := netlink.NeighList(l.Attrs().Index, netlink.FAMILY_V4)
		for _, n := range near {
			err = errors.Join(err, netlink.NeighDel(&n))
		}
		return err
	})
	c, err := r.dial("udp", join(r.hosts[0].addrs[meshClient], 30009), 0)
	must(t, err)
	if _, err := say(c, "x"); err != nil {
		t.Error(err)
	}
	if got := len(r.flows(0)); got != 1 {
		t.Errorf("host 0 knows %d flows, want 1", got)
	}
}

// Datagrams in pieces arrive, and what goes wrong on the way is said, although the
// host knows nothing of the flow.
func TestPublishedPiecesAndErrors(t *testing.T) {
	r := newMeshRig(t, false, 0, 1)
	b := r.task(1, 11)
	ports := append(meshPorts(b), ingress.Published{Service: "web", Protocol: weft.UDP, Port: 30012, Target: 12, Backends: []ingress.Backend{b}},
		ingress.Published{Service: "web", Protocol: weft.UDP, Port: 30013, Target: 13, Backends: []ingress.Backend{b}})
	r.apply(ports...)
	r.serve(b)
	for i, h := range r.hosts {
		for client, host := range h.addrs {
			c, err := r.dial("udp", join(host, 30009), 0)
			must(t, err)
			for n, size := range []int{100, 4000, 8000, 100} {
				got, err := say(c, strings.Repeat("x", size))
				if errors.Is(err, syscall.EMSGSIZE) { // its own pieces were too large for the overlay: now it knows
					got, err = say(c, strings.Repeat("x", size))
				}
				if err != nil || len(got) != size {
					t.Errorf("datagram %d, %d bytes by %s and back: %d, %v", n, size, host, len(got), err)
				}
				r.forget()
			}
			nobody, err := r.dial("udp", join(host, 30012), 0)
			must(t, err)
			for range 2 {
				if _, err := say(nobody, "x"); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("a port by %s where the task has no socket: %v, want refused", host, err)
				}
				r.forget()
			}
			r.wantClientsErrors(client, host)
		}
		if got := len(r.flows(i)); got < 6 {
			t.Errorf("host %d knows %d flows, want 6 at least", i, got)
		}
		// The way to the client narrows: the task learns it.
		h.do(t, func() error {
			l, err := netlink.LinkByName("out0")
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(l, 1290)
		})
		r.apply(ports...)
		for _, host := range h.addrs {
			c, err := r.dial("udp", join(host, 30009), 0)
			must(t, err)
			if _, err = say(c, "x"); err != nil {
				t.Errorf("one byte by %s on a way of 1290: %v", host, err)
			}
			r.forget()
			got := ""
			for range 3 { // the first answer is too large, and lost
				if got, err = say(c, "1350"); err == nil {
					break
				}
			}
			if len(got) != 1350 {
				t.Errorf("1350 bytes by %s on a way of 1290: %d, %v", host, len(got), err)
			}
		}
	}
}

// wantClientsErrors: a task that has connected its socket to the client learns
// that the client's is closed.
func (r *meshRig) wantClientsErrors(client, host string) {
	r.t.Helper()
	var task net.PacketConn
	ns := filepath.Join(r.dir, "task11")
	must(r.t, netns.Do(ns, func() (err error) {
		task, err = net.ListenPacket("udp", ":13")
		return err
	}))
	c, err := r.dial("udp", join(host, 30013), 0)
	must(r.t, err)
	_, err = c.Write([]byte("x"))
	must(r.t, err)
	must(r.t, task.SetReadDeadline(time.Now().Add(2*time.Second)))
	_, from, err := task.ReadFrom(make([]byte, 10))
	must(r.t, errors.Join(err, task.Close(), c.Close()))
	r.forget()
	own := "10.0.16.11"
	if strings.Contains(client, ":") {
		own = "fd16::11"
	}
	must(r.t, netns.Do(ns, func() error {
		answer, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(own), Port: 13}, from.(*net.UDPAddr))
		if err != nil {
			return err
		}
		defer answer.Close()
		if _, err := say(answer, "x"); !errors.Is(err, syscall.ECONNREFUSED) {
			r.t.Errorf("the task that answers the closed socket of %s by %s: %v, want refused", client, host, err)
		}
		return nil
	}))
}

// Segments are clamped to what fits the way to the client, on the answer that the
// host does not see, too.
func TestPublishedSegments(t *testing.T) {
	r := newMeshRig(t, false, 0)
	b := r.task(1, 11)
	r.hosts[0].do(t, func() error {
		l, err := netlink.LinkByName("out0")
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(l, 1290)
	})
	r.apply(meshPorts(b)...)
	r.serve(b)
	for client, headers := range map[string]int{meshClient: 40, meshClient6: 60} {
		c, _, _, err := r.open("tcp", join(r.hosts[0].addrs[client], 30000), 0)
		must(t, err)
		raw, err := c.(*net.TCPConn).SyscallConn()
		must(t, err)
		var mss int
		must(t, raw.Control(func(fd uintptr) { mss, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) }))
		const timestamps = 12 // RFC 7323, with padding
		if err != nil || mss != 1290-headers-timestamps {
			t.Errorf("%s sends segments of %d bytes, %v; want %d", client, mss, err, 1290-headers-timestamps)
		}
		// And in bulk, both ways.
		r.forget()
		text := strings.Repeat("0123456789", 20000)
		go func() { io.WriteString(c, text) }()
		must(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
		got := make([]byte, len(text))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
			t.Errorf("%d bytes to %s and back: %v", len(text), client, err)
		}
	}
}

// A backend that drains keeps what is open and gets nothing new, not even from a
// port that was used with it; when it goes, its flows end and datagrams move.
func TestPublishedDrains(t *testing.T) {
	r := newMeshRig(t, false, 0, 1)
	far, near := r.task(1, 11), r.task(0, 12)
	r.apply(meshPorts(far, near)...)
	r.serve(far)
	r.serve(near)
	type flow struct {
		network string
		c       net.Conn
		to      string
	}
	var open []flow
	host := r.hosts[0].addrs[meshClient]
	ports := map[string][]int{}
	for from := 20000; from < 20040; from++ {
		for _, network := range []string{"tcp", "udp"} {
			c, task, _, err := r.open(network, join(host, 30000), from)
			must(t, err)
			if network == "tcp" && from%2 == 0 {
				ports[task] = append(ports[task], from)
				must(t, c.(*net.TCPConn).SetLinger(0))
				must(t, c.Close())
				continue
			}
			open = append(open, flow{network, c, task})
		}
	}
	if len(ports) != 2 {
		t.Fatalf("20 connections went to %v", ports)
	}
	far.Draining = true
	r.apply(meshPorts(far, near)...)
	for _, f := range open {
		if err := again(f.network, f.c, f.to); err != nil {
			t.Errorf("%s to %s, which drains: %v", f.network, f.to, err)
		}
	}
	for _, from := range ports[string(far.Task)] {
		if _, task, _, err := r.open("tcp", join(host, 30000), from); err != nil || task != string(near.Task) {
			t.Errorf("a new connection from port %d went to %q, %v", from, task, err)
		}
	}
	r.apply(meshPorts(near)...)
	for _, f := range open {
		err := again(f.network, f.c, string(near.Task))
		switch {
		case f.network == "udp" && err != nil:
			t.Errorf("datagrams to %s do not go on to %s: %v", f.to, near.Task, err)
		case f.network == "tcp" && (err == nil) != (f.to == string(near.Task)):
			t.Errorf("a connection to %s after %s is gone: %v", f.to, far.Task, err)
		}
	}
	r.apply()
	if _, err := os.Stat(r.hosts[0].mesh.path()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing is published, and there is %v", err)
	}
}

// What the host lets through nobody, or the nft engine hides, is no flow.
func TestPublishedThroughTheHost(t *testing.T) {
	r := newMeshRig(t, false, 0, 1)
	b := r.task(1, 11)
	ports := meshPorts(b)
	ports[1].HideClient = true
	r.apply(ports...)
	r.serve(b)
	h := r.hosts[0]
	if _, _, seen, err := r.open("tcp", join(h.addrs[meshClient], 30002), 0); err != nil || seen.Addr() != h.leg.Addr.Addr() {
		t.Errorf("a hidden client is seen as %s, %v", seen, err)
	}
	if got := r.flows(0); len(got) != 0 {
		t.Errorf("its flow goes past the host: %v", got)
	}
	c, _, _, err := r.open("tcp", join(h.addrs[meshClient], 30000), 0)
	must(t, err)
	h.do(t, func() error { return writeProc("net/ipv4/conf/out0/forwarding", "0") })
	r.patience = 2 * time.Second // in vain
	if c, err := r.dial("tcp", join(h.addrs[meshClient], 30000), 0); err == nil {
		t.Errorf("the host forwards nothing, and there is a connection from %s", c.LocalAddr())
	}
	if got := r.flows(0); len(got) != 1 {
		t.Errorf("flows past a host that forwards nothing: %v", got)
	}
	if err := again("tcp", c, ""); err != nil {
		t.Errorf("what was open: %v", err)
	}
	// The host's own client, and one who is answered by another link.
	h.do(t, func() error {
		d := net.Dialer{Timeout: 2 * time.Second}
		c, err := d.DialContext(t.Context(), "tcp", join(h.addrs[meshClient], 30000))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = say(c, "")
		return errors.Join(err, again("tcp", c, ""))
	})
}

// TestPublishedRepairs: whatever is damaged, the next pass mends and counts once,
// and what is open goes on.
func TestPublishedRepairs(t *testing.T) {
	r := newMeshRig(t, false, 0)
	b := r.task(1, 11)
	r.apply(meshPorts(b)...)
	r.serve(b)
	h := r.hosts[0]
	change := func(name string, f func(*ebpf.Map) error) func() error {
		return func() error {
			m, err := ebpf.LoadPinnedMap(h.mesh.path(name), nil)
			if err != nil {
				return err
			}
			defer m.Close()
			return f(m)
		}
	}
	for _, c := range []struct {
		name  string
		spoil func() error
		want  string
		ends  bool // flows are lost with it
	}{
		{"nothing", func() error { return nil }, "", false},
		{"link unpinned", func() error { return os.Remove(h.mesh.path("links", "leg-in")) }, "hook wrong", false},
		{"no ports", change(meshMapPublished, func(m *ebpf.Map) error { return m.Put(uint32(30000/64), uint64(0)) }), "published ports wrong", false},
		{"another leg", change(meshMapEntry, func(m *ebpf.Map) error { return m.Put(uint32(0), entryValue{}) }), "entry wrong", false},
		{"route gone", change(meshMapReaches, func(m *ebpf.Map) error {
			var k reachKey
			if err := m.NextKey(nil, &k); err != nil {
				return err
			}
			return m.Delete(k)
		}), "routes wrong", false},
		{"program unpinned", func() error {
			pins, err := filepath.Glob(h.mesh.path("progs", meshProgToLeg+"-*"))
			if err != nil || len(pins) != 1 {
				return fmt.Errorf("pins %v, %v", pins, err)
			}
			return os.Remove(pins[0])
		}, "program missing", false},
		{"flows unpinned", func() error { return os.Remove(h.mesh.path(meshMapRequests)) }, "map missing", true},
		{"all pins gone", func() error { return os.RemoveAll(h.mesh.path()) }, "map missing", true},
	} {
		conn, _, _, err := r.open("tcp", join(h.addrs[meshClient], 30000), 0)
		must(t, err)
		must(t, c.spoil())
		h.repaired = nil
		r.apply(meshPorts(b)...)
		if got := strings.Join(h.repaired, ","); got != c.want {
			t.Errorf("%s: repairs %q, want %q", c.name, got, c.want)
		}
		if err := again("tcp", conn, ""); err != nil && !c.ends {
			t.Errorf("%s: what was open: %v", c.name, err)
		}
		conn, _, _, err = r.open("tcp", join(h.addrs[meshClient], 30000), 0)
		must(t, err)
		r.forget()
		if err := again("tcp", conn, ""); err != nil {
			t.Errorf("%s: past the host after the repair: %v", c.name, err)
		}
		h.repaired = nil
		r.apply(meshPorts(b)...)
		if len(h.repaired) > 0 {
			t.Errorf("%s: repaired again: %v", c.name, h.repaired)
		}
	}
}

// TestPublishedAdoption: a new process takes over what it finds, and while it knows
// less than the one before it, it ends nothing.
func TestPublishedAdoption(t *testing.T) {
	r := newMeshRig(t, false, 0)
	b := r.task(1, 11)
	r.apply(meshPorts(b)...)
	r.serve(b)
	h := r.hosts[0]
	c, _, _, err := r.open("tcp", join(h.addrs[meshClient], 30000), 0)
	must(t, err)
	r.forget()
	id := func() (out ebpf.ProgramID) {
		pins, err := filepath.Glob(h.mesh.path("progs", meshProgFromOutside+"-*"))
		must(t, err)
		p, err := ebpf.LoadPinnedProgram(pins[0], nil)
		must(t, err)
		defer p.Close()
		info, err := p.Info()
		must(t, err)
		out, _ = info.ID()
		return out
	}
	before := id()
	table := nft.New(r.dir)
	h.mesh = r.newMesh(0, table)
	h.mesh.patience = time.Hour
	h.engine = h.mesh
	h.do(t, func() error { return h.engine.Probe(t.Context()) })
	other := meshPorts(b)[2:]
	for _, ports := range [][]ingress.Published{nil, other, meshPorts(b)} {
		r.apply(ports...)
		if err := again("tcp", c, ""); err != nil {
			t.Errorf("with %d of its ports known: %v", len(ports), err)
		}
	}
	if after := id(); after != before {
		t.Errorf("program %d was replaced by %d of the same build", before, after)
	}
	h.mesh.patience = 0
	r.apply(other...)
	if err := again("tcp", c, ""); err == nil {
		t.Error("a connection to a port that is no more goes on")
	}
	if len(h.repaired) > 0 {
		t.Errorf("repaired: %v", h.repaired)
	}
}
