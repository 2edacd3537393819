package bpf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestPlanSockets: every task has its networks in their order, eight at most and
// none of which another of the task has a service of the same address, and every
// backend its addresses by family, whichever comes first.
func TestPlanSockets(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		cookies := map[string]uint64{"/a": 1, "/b": 2, "/c": 3} // "/gone" has none
		var networks []ingress.Network
		slow := map[uint64][]uint32{}
		vips := map[uint32]string{} // of networks with services
		for vni := uint32(1); vni <= rapid.Uint32Range(0, 12).Draw(r, "networks"); vni++ {
			n := ingress.Network{VNI: vni}
			for _, p := range []string{"/a", "/b", "/c", "/gone"} {
				if rapid.Bool().Draw(r, p) {
					n.Tasks = append(n.Tasks, p)
				}
			}
			if rapid.Bool().Draw(r, "has services") {
				vips[vni] = fmt.Sprintf("10.0.0.%d", rapid.Uint32Range(1, 20).Draw(r, "service"))
				n.Services = []ingress.Service{{VIP: netip.MustParseAddr(vips[vni]), Backends: []ingress.Backend{
					{Addr: netip.MustParseAddr("10.0.0.1"), Addr6: netip.MustParseAddr("fd00::1"), MAC: []byte{2, 0, 0, 0, 0, byte(vni)}},
					{Addr: netip.MustParseAddr("fd00::2"), MAC: []byte{2, 0, 0, 0, 1, byte(vni)}},
				}}}
			}
			networks = append(networks, n)
		}
		for p, c := range cookies {
			for _, n := range networks {
				is := len(n.Services) > 0 && slices.Contains(n.Tasks, p)
				for _, o := range networks {
					if o.VNI != n.VNI && slices.Contains(o.Tasks, p) && vips[o.VNI] == vips[n.VNI] {
						is = false
					}
				}
				if is && len(slow[c]) < maxTaskNets {
					slow[c] = append(slow[c], n.VNI)
				}
			}
		}
		shuffled := rapid.Permutation(networks).Draw(r, "order")
		got := planSockets(shuffled, func(p string) (uint64, bool) { c, ok := cookies[p]; return c, ok })
		if len(got.tasks) != len(slow) {
			r.Fatalf("tasks %v, want %v", got.tasks, slow)
		}
		for c, want := range slow {
			if v := got.tasks[c]; fmt.Sprint(v.VNI[:v.Count]) != fmt.Sprint(want) {
				r.Fatalf("task %d has %v, want %v", c, v.VNI[:v.Count], want)
			}
		}
		for k, v := range got.backends {
			v4, v6 := netip.AddrFrom16(v.V4).Unmap(), netip.AddrFrom16(v.V6)
			if k.MAC[4] == 0 && (v4.String() != "10.0.0.1" || v6.String() != "fd00::1") || k.MAC[4] == 1 && (v.V4 != [16]byte{} || v6.String() != "fd00::2") {
				r.Fatalf("backend %v has %v and %v", k, v4, v6)
			}
		}
	})
}

// socketBed is a bed whose client's sockets are balanced.
type socketBed struct {
	*bed
	t        *testing.T
	e        *Engine
	client   string
	backends []ingress.Backend
	got      []string // kinds of repairs
}

func newSocketBed(t *testing.T) *socketBed {
	b := newBed(t, "")
	cgroup := placeOf(t, b.nodes[0])
	s := &socketBed{bed: b, t: t, backends: []ingress.Backend{b.backend(0, 11), b.backend(0, 12), b.backend(1, 13)}}
	_, s.client = b.task(0, 50)
	b.apply()
	s.e = s.engine(cgroup)
	t.Cleanup(func() { must(t, s.e.Close(context.Background())) })
	return s
}

func (s *socketBed) engine(cgroup string) *Engine {
	s.t.Helper()
	e, err := New(Config{Node: s.nodes[0], Dir: s.mount(0), Cgroup: cgroup, Repaired: func(r weft.Repair) { s.got = append(s.got, r.Kind) }})
	must(s.t, err)
	must(s.t, e.Probe(s.t.Context()))
	if n := e.Note(); n != "" {
		netnstest.Missing(s.t, "root", fmt.Errorf("%s: %w", n, weft.ErrUnsupported))
	}
	return e
}

func (s *socketBed) table(backends ...ingress.Backend) ingress.Table {
	n := ingress.Network{VNI: vni, NetNS: s.dir, Bridge: "none", Tasks: []string{s.client}}
	for _, text := range []string{vipText, vip6Text} {
		vip := netip.MustParseAddr(text)
		n.Services = append(n.Services, ingress.Service{ID: "web", VIP: vip, MAC: weft.VIPMAC("web", vip), Backends: backends})
	}
	return ingress.Table{Networks: []ingress.Network{n}}
}

func (s *socketBed) apply(backends ...ingress.Backend) {
	s.t.Helper()
	must(s.t, s.e.Apply(s.t.Context(), s.table(backends...)))
}

// connect opens a connection to the service; it says who answered.
func (s *socketBed) connect() (net.Conn, string) {
	s.t.Helper()
	f, err := openFlow(s.t, s.client, "tcp", netip.MustParseAddrPort(vipText+":80"))
	must(s.t, err)
	return f.c, f.name
}

// TestSocketsTCP: a connection to a service address is one to a backend, and its
// own end does not know.
func TestSocketsTCP(t *testing.T) {
	s := newSocketBed(t)
	s.apply(s.backends...)
	count := map[string]int{}
	for range 60 {
		c, name := s.connect()
		if c.RemoteAddr().String() != vipText+":80" {
			t.Fatalf("connected to %s", c.RemoteAddr())
		}
		count[name]++
		c.Close()
	}
	for _, b := range s.backends {
		if count[string(b.Task)] < 5 { // 20 are expected: less than 5 is one in 100,000
			t.Errorf("connections by backend: %v", count)
		}
	}
	if flows := s.flows(); flows != 0 {
		t.Errorf("%d flows at the veth: their packets cost something", flows)
	}
	// Who drains keeps what is open and gets no more.
	open := map[string]net.Conn{}
	for len(open) < len(s.backends) {
		c, name := s.connect()
		open[name] = c
	}
	last := s.backends[2]
	last.Draining = true
	s.apply(s.backends[0], s.backends[1], last)
	for range 20 {
		if c, name := s.connect(); name == string(last.Task) {
			t.Fatal("a draining backend got a connection")
		} else {
			c.Close()
		}
	}
	for name, c := range open {
		must(t, c.SetDeadline(time.Now().Add(silence)))
		if _, err := c.Write([]byte("ping")); err != nil {
			t.Errorf("the connection to %s: %v", name, err)
		}
		if _, err := c.Read(make([]byte, 4)); err != nil {
			t.Errorf("the connection to %s: %v", name, err)
		}
	}
	// One that is gone ends its connections at once, and only those, once the
	// process is not new any more.
	s.e.sockets.sweepAt = time.Now()
	s.apply(s.backends[0], s.backends[1])
	for name, c := range open {
		must(t, c.SetDeadline(time.Now().Add(silence)))
		_, err := c.Write([]byte("ping"))
		if err == nil {
			_, err = c.Read(make([]byte, 4))
		}
		if isGone := name == string(last.Task); isGone != (err != nil) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the connection to %s: %v", name, err)
		}
	}
	// Nobody: refused by the veth, as ever.
	s.apply()
	if _, err := openFlow(t, s.client, "tcp", netip.MustParseAddrPort(vipText+":80")); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a service without backends: %v", err)
	}
}

// flows counts what the program at the veth has balanced.
func (s *socketBed) flows() int {
	n := 0
	for _, name := range []string{balanceMapFlows, balanceMapPassing} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(s.e.dir, "balance", name), nil)
		must(s.t, err)
		var k flowKey
		var v struct{ A, B uint32 }
		for it := m.Iterate(); it.Next(&k, &v); {
			n++
		}
		m.Close()
	}
	return n
}

// TestReleaseWaits: a new process ends no connection by what it does not know yet,
// and then those of all that was lost meanwhile.
func TestReleaseWaits(t *testing.T) {
	a, b := keep{{VNI: 1}: {{2, 1}: true}}, keep{{VNI: 1}: {}}
	s := sockets{patience: releaseAfter}
	start := time.Now()
	for i, c := range []struct {
		before, now keep
		after       time.Duration
		want        bool
	}{
		{nil, b, 0, false},
		{a, b, time.Second, false},
		{b, b, releaseAfter - 1, false},
		{b, b, releaseAfter, true},
		{b, b, releaseAfter + 1, false},
		{a, b, releaseAfter + 2, true},
		{b, a, releaseAfter + 3, false},
	} {
		if got := s.mayRelease(c.before, c.now, start.Add(c.after)); got != c.want {
			t.Errorf("step %d: %v, want %v", i, got, c.want)
		}
	}
}

// TestSocketsUDP: datagrams of one socket stay with one backend, whose answers come
// from the service; when it goes, the next ones go to another.
func TestSocketsUDP(t *testing.T) {
	s := newSocketBed(t)
	s.apply(s.backends...)
	to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(vipText + ":7"))
	open := func() net.PacketConn {
		var c net.PacketConn
		must(t, netns.Do(s.client, func() (err error) { c, err = net.ListenPacket("udp4", ":0"); return err }))
		t.Cleanup(func() { c.Close() })
		return c
	}
	ask := func(c net.PacketConn) string {
		t.Helper()
		must(t, c.SetDeadline(time.Now().Add(silence)))
		_, err := c.WriteTo([]byte("x"), to)
		must(t, err)
		buf := make([]byte, 1500)
		n, from, err := c.ReadFrom(buf)
		must(t, err)
		if from.String() != vipText+":7" {
			t.Fatalf("the answer came from %s", from)
		}
		name, _, _ := strings.Cut(string(buf[:n]), " ")
		return name
	}
	c := open()
	first := ask(c)
	for range 20 {
		if name := ask(c); name != first {
			t.Fatalf("one socket was answered by %s and %s", first, name)
		}
	}
	seen := map[string]bool{}
	for range 40 {
		seen[ask(open())] = true
	}
	if len(seen) != 3 {
		t.Errorf("answers of %v", seen)
	}
	var left []ingress.Backend
	for _, b := range s.backends {
		if string(b.Task) != first {
			left = append(left, b)
		}
	}
	s.apply(left...)
	if name := ask(c); name == first {
		t.Errorf("%s is gone and was sent to", name)
	}
}

// TestSocketsAskedDirectly: one socket asks a service and its backend by turns, and
// each answer comes from whom it has asked.
func TestSocketsAskedDirectly(t *testing.T) {
	s := newSocketBed(t)
	s.apply(s.backends[0])
	var c net.PacketConn
	must(t, netns.Do(s.client, func() (err error) { c, err = net.ListenPacket("udp4", ":0"); return err }))
	defer c.Close()
	for range 3 {
		for _, a := range []netip.Addr{netip.MustParseAddr(vipText), s.backends[0].Addr} {
			to := netip.AddrPortFrom(a, 7)
			must(t, c.SetDeadline(time.Now().Add(silence)))
			_, err := c.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(to))
			must(t, err)
			if _, from, err := c.ReadFrom(make([]byte, 100)); err != nil || from.String() != to.String() {
				t.Errorf("%s was asked, and the answer came from %v, %v", to, from, err)
			}
		}
	}
}

// TestSocketsOfIPv6: the same over IPv6, and for IPv4 on a socket of IPv6.
func TestSocketsOfIPv6(t *testing.T) {
	s := newSocketBed(t)
	s.apply(s.backends...)
	seen := map[string]bool{}
	for range 40 {
		var c net.Conn
		must(t, netns.Do(s.client, func() (err error) {
			c, err = net.DialTimeout("tcp6", "["+vip6Text+"]:80", silence)
			return err
		}))
		if c.RemoteAddr().String() != "["+vip6Text+"]:80" {
			t.Fatalf("connected to %s", c.RemoteAddr())
		}
		must(t, c.SetDeadline(time.Now().Add(silence)))
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		must(t, err)
		name, _, _ := strings.Cut(string(buf[:n]), " ")
		seen[name] = true
		c.Close()
	}
	if len(seen) != 3 {
		t.Errorf("answers of %v", seen)
	}
	var pc net.PacketConn
	must(t, netns.Do(s.client, func() (err error) { pc, err = net.ListenPacket("udp", "[::]:0"); return err }))
	defer pc.Close()
	for _, to := range []string{"[" + vip6Text + "]:7", vipText + ":7"} {
		must(t, pc.SetDeadline(time.Now().Add(silence)))
		_, err := pc.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
		must(t, err)
		_, from, err := pc.ReadFrom(make([]byte, 100))
		must(t, err)
		if from.String() != to {
			t.Errorf("the answer from %s came from %s", to, from)
		}
	}
	mapped := func() (peer unix.Sockaddr, err error) {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrInet6{Port: 80, Addr: netip.MustParseAddr(vipText).As16()}); err != nil {
			return nil, err
		}
		return unix.Getpeername(fd)
	}
	var peer unix.Sockaddr
	must(t, netns.Do(s.client, func() (err error) { peer, err = mapped(); return err }))
	if p, ok := peer.(*unix.SockaddrInet6); !ok || netip.AddrFrom16(p.Addr).Unmap().String() != vipText || s.flows() != 0 {
		t.Errorf("an IPv4 address on a socket of IPv6: the peer is %+v, %d flows at the veth", peer, s.flows())
	}
}

// TestSocketsAreThoseOfTasks: sockets of other namespaces, and to other addresses,
// are none of ours.
func TestSocketsAreThoseOfTasks(t *testing.T) {
	s := newSocketBed(t)
	_, stranger := s.task(0, 51)
	s.bed.apply()
	s.apply(s.backends...)
	f, err := openFlow(t, stranger, "tcp", netip.MustParseAddrPort(vipText+":80"))
	must(t, err)
	f.c.Close()
	if s.flows() != 1 {
		t.Errorf("%d flows at the veth, want that of the stranger", s.flows())
	}
	direct := netip.AddrPortFrom(s.backends[0].Addr, 80)
	if f, err = openFlow(t, s.client, "tcp", direct); err != nil || f.c.RemoteAddr().String() != direct.String() {
		t.Errorf("directly: %v, %v", f, err)
	}
	// The namespace's number is its own, not its file's.
	must(t, netns.Remove(s.client))
	_, err = netns.Create(filepath.Dir(s.client), filepath.Base(s.client))
	must(t, err)
	old, _ := s.e.sockets.cookies[s.client]
	if now, ok := s.e.sockets.cookie(s.client); !ok || now == old.cookie {
		t.Errorf("a new namespace of an old name has cookie %d, the old one had %d", now, old.cookie)
	}
	// Its file's inode may be that of one that has gone, made at another time.
	c := s.e.sockets.cookies[s.client]
	want := c.cookie
	c.cookie, c.made.Sec = 7, c.made.Sec-1
	s.e.sockets.cookies[s.client] = c
	if now, ok := s.e.sockets.cookie(s.client); !ok || now != want {
		t.Errorf("the cookie of a namespace with the inode of another is %d, want %d", now, want)
	}
	// Of tasks that are gone nothing is kept.
	s.apply(s.backends...)
	s.e.sockets.cookies["/gone"] = netnsCookie{}
	s.apply(s.backends...)
	if n := len(s.e.sockets.cookies); n != 1 {
		t.Errorf("%d cookies are kept of one task", n)
	}
}

// TestSocketsOutliveTheDaemon: the next process finds everything as it was, mends
// what was damaged once, and Close leaves nothing.
func TestSocketsOutliveTheDaemon(t *testing.T) {
	s := newSocketBed(t)
	s.apply(s.backends...)
	links := func() map[string]link.ID {
		out := map[string]link.ID{}
		for name := range socketAttach {
			l, err := link.LoadPinnedLink(filepath.Join(s.e.dir, "balance", "sockets", name), nil)
			must(t, err)
			info, err := l.Info()
			must(t, errors.Join(err, l.Close()))
			out[name] = info.ID
		}
		return out
	}
	before := links()
	s.e = s.engine(s.e.sockets.cgroup)
	s.apply(s.backends...)
	s.apply(s.backends...)
	for name, id := range links() {
		if before[name] != id {
			t.Errorf("the link of %s was made anew", name)
		}
	}
	if len(s.got) > 0 {
		t.Errorf("repairs %v of nothing", s.got)
	}
	sockets := filepath.Join(s.e.dir, "balance", "sockets")
	mapOf := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(filepath.Join(s.e.dir, "balance", name), nil)
		must(t, err)
		t.Cleanup(func() { m.Close() })
		return m
	}
	cookie, _ := s.e.sockets.cookie(s.client)
	for _, c := range []struct {
		name  string
		spoil func() error
		want  string
	}{
		{"link gone", func() error { return os.Remove(filepath.Join(sockets, socketProgConnect4)) }, "hook wrong"},
		{"all pins of sockets gone", func() error { return os.RemoveAll(sockets) }, "hook wrong"},
		{"task gone", func() error { return mapOf(socketMapTasks).Delete(cookie) }, "task sockets missing"},
		{"backend wrong", func() error {
			return mapOf(socketMapBackends).Put(backendKey{VNI: vni, MAC: vxlan.MACOf(s.backends[0].MAC)}, backendValue{})
		}, "backend wrong"},
		{"stray task", func() error { return mapOf(socketMapTasks).Put(uint64(7), taskValue{}) }, "task sockets stray"},
		{"map gone", func() error { return os.Remove(filepath.Join(s.e.dir, "balance", socketMapTasks)) }, "map missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			must(t, c.spoil())
			s.got = nil
			s.apply(s.backends...)
			s.apply(s.backends...)
			if got := strings.Join(s.got, ","); got != c.want {
				t.Errorf("repaired %q, want %q", got, c.want)
			}
			conn, _ := s.connect()
			if conn.RemoteAddr().String() != vipText+":80" || s.flows() != 0 {
				t.Errorf("connected to %s, %d flows at the veth", conn.RemoteAddr(), s.flows())
			}
			conn.Close()
		})
	}
	// By number: others of this machine may have programs of the same names there.
	ours := map[ebpf.ProgramID]bool{}
	for name := range socketAttach {
		l, err := link.LoadPinnedLink(filepath.Join(sockets, name), nil)
		must(t, err)
		info, err := l.Info()
		must(t, errors.Join(err, l.Close()))
		ours[info.Program] = true
	}
	attached := func() int {
		n := 0
		for _, at := range socketAttach {
			dir, err := os.Open(s.e.sockets.cgroup)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			must(t, err)
			found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: at})
			must(t, errors.Join(err, dir.Close()))
			for _, p := range found.Programs {
				if ours[p.ID] {
					n++
				}
			}
		}
		return n
	}
	if n := attached(); n != len(socketAttach) {
		t.Errorf("%d programs are attached", n)
	}
	must(t, s.e.Close(t.Context()))
	if n := attached(); n != 0 {
		t.Errorf("%d programs are still attached", n)
	}
	s.apply(s.backends...) // for the cleanup
}

// placeOf is CgroupOf, with the test's process in that place as a task's would be:
// where there is only the unified tree it is not the top.
func placeOf(t *testing.T, node weft.ID) string {
	t.Helper()
	dir, err := CgroupOf(node)
	if err != nil {
		netnstest.Missing(t, "root", err)
	}
	if filepath.Dir(dir) == cgroupRoot { // the top of a tree beside the older ones
		return dir
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	_, former, ok := strings.Cut(strings.TrimSpace(string(own)), "::")
	if !ok {
		t.Fatalf("a unified tree alone, and the process is in %q", own)
	}
	enter := func(dir string) {
		must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0))
	}
	must(t, os.MkdirAll(dir, 0o755))
	enter(dir)
	t.Cleanup(func() {
		enter(filepath.Join(cgroupRoot, former))
		must(t, os.Remove(dir))
	})
	return dir
}
