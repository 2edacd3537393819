package bpf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/netns"
)

// BenchmarkTraffic measures what packets cost: operations per CPU-second of
// client, server and the kernel's softirq thread, both ends on one core, paths
// interleaved, as ratios to raw host to host of the same round. It reports
// medians; "again" is the baseline once more: the noise. Run it with -benchtime 1x.
//
// The hosts are two namespaces joined by a veth. Modes: RR is one byte there and
// 48 back on one connection, CRR the same on a new connection each time, PPS
// datagrams of 18 bytes, TP bulk TCP.
func BenchmarkTraffic(b *testing.B) { traffic(b, nil) }

// BenchmarkTrafficWithoutTunnelOffload is BenchmarkTraffic over links that cut
// large packets of TCP but not those inside VXLAN, as many network cards are.
func BenchmarkTrafficWithoutTunnelOffload(b *testing.B) {
	traffic(b, map[string]bool{"tx-udp_tnl-segmentation": false, "tx-udp_tnl-csum-segmentation": false, "rx-gro": true})
}

// traffic measures with some features of both links switched.
func traffic(b *testing.B, features map[string]bool) {
	paths := trafficPaths(b, features)
	const rounds = 9
	got := map[string][]float64{}
	for b.Loop() {
		for range rounds {
			for _, mode := range modes {
				base := 0.0
				for i, p := range paths {
					v := measure(b, p, mode)
					if i == 0 {
						base = v
						continue
					}
					key := mode.name + "-" + p.name
					got[key] = append(got[key], v/base)
				}
			}
		}
	}
	for key, vs := range got {
		slices.Sort(vs)
		b.ReportMetric(vs[len(vs)/2], key)
		b.Logf("%-12s %.2f (%.2f..%.2f)", key, vs[len(vs)/2], vs[0], vs[len(vs)-1])
	}
}

// path is a way from one namespace to an address in another.
type path struct {
	name     string
	from, to string // namespaces
	addr     netip.Addr
}

// trafficPaths makes two hosts joined by a veth and each kind of path on them.
func trafficPaths(b *testing.B, features map[string]bool) []path {
	b.Helper()
	hosts := rig(b, plan{hosts: 2, direct: true})
	for _, h := range hosts {
		must(b, h.inHost("under0", func(l netlink.Link) error { return setFeatures(l, features) }))
	}
	out := []path{
		{"raw", hosts[0].path, hosts[1].path, hosts[1].vtep()},
		{"again", hosts[0].path, hosts[1].path, hosts[1].vtep()},
	}
	dir, err := os.MkdirTemp("/run", "traffic")
	must(b, err)
	routed := routedTasks(b, hosts, dir)
	out = append(out, path{"routed", routed[0].NetNS, routed[1].NetNS, routed[1].Addr.Addr()})
	ports := map[*testHost][]vxlan.Port{hosts[0]: {hosts[0].task(1, false)}, hosts[1]: {hosts[1].task(1, false)}}
	plain := map[*testHost][]vxlan.Port{hosts[0]: {hosts[0].task(3, false)}, hosts[1]: {hosts[1].task(3, false)}}
	id, plainID := weft.NewID(), weft.NewID()
	for _, h := range hosts {
		n := network(h, plainID, 1450, plain)
		n.VNI, n.Native, n.Peers[0].Native = testVNI+2, true, true
		must(b, h.apply(state(network(h, id, 1450, ports), n)))
	}
	out = append(out, path{"ebpf", ports[hosts[0]][0].NetNS, ports[hosts[1]][0].NetNS, ports[hosts[1]][0].Addr.Addr()},
		path{"native", plain[hosts[0]][0].NetNS, plain[hosts[1]][0].NetNS, plain[hosts[1]][0].Addr.Addr()})
	id = weft.NewID()
	bridged := map[*testHost][]vxlan.Port{hosts[0]: {hosts[0].task(2, false)}, hosts[1]: {hosts[1].task(2, false)}}
	for _, h := range hosts {
		k, err := linux.New(linux.Config{Node: h.node + "b", NetNSDir: h.dir, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
		must(b, err)
		n := network(h, id, 1450, bridged)
		n.VNI, n.Port = testVNI+1, testPort+1
		must(b, h.ns.Do(func() error { return k.Apply(b.Context(), state(n)) }))
		b.Cleanup(func() { must(b, h.ns.Do(func() error { return k.Apply(context.Background(), vxlan.State{}) })) })
	}
	return append(out, path{"bridge", bridged[hosts[0]][0].NetNS, bridged[hosts[1]][0].NetNS, bridged[hosts[1]][0].Addr.Addr()})
}

// routedTasks are namespaces behind a veth that their host routes, without any
// overlay.
func routedTasks(b *testing.B, hosts []*testHost, dir string) []vxlan.Port {
	b.Helper()
	var out []vxlan.Port
	for i, h := range hosts {
		ns, err := netns.Create(dir, fmt.Sprintf("r%d", i))
		must(b, err)
		b.Cleanup(func() { netns.Remove(filepath.Join(dir, fmt.Sprintf("r%d", i))) })
		far, err := netns.Open(ns)
		must(b, err)
		defer far.Close()
		gw, task := netip.AddrFrom4([4]byte{10, 101, byte(i), 1}), netip.AddrFrom4([4]byte{10, 101, byte(i), 2})
		other := &net.IPNet{IP: net.IPv4(10, 101, byte(1-i), 0), Mask: net.CIDRMask(24, 32)}
		must(b, h.ns.Do(func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "routed"
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(far.FD())}); err != nil {
				return err
			}
			return errors.Join(configure("routed", gw), writeSysctl("/proc/sys/net/ipv4/ip_forward", "1"),
				netlink.RouteAdd(&netlink.Route{Dst: other, Gw: hosts[1-i].vtep().AsSlice()}))
		}))
		must(b, far.Do(func() error {
			return errors.Join(configure("eth0", task), netlink.RouteAdd(&netlink.Route{Dst: other, Gw: gw.AsSlice()}))
		}))
		b.Cleanup(func() { must(b, h.inHost("routed", netlink.LinkDel)) })
		out = append(out, vxlan.Port{NetNS: ns, Addr: netip.PrefixFrom(task, 24)})
	}
	return out
}

func configure(name string, a netip.Addr) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(l), netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(24, 32)}}))
}

// mode is a pattern of traffic on blocking sockets, without the runtime's poller:
// what is measured is the kernel.
type mode struct {
	name   string
	kind   int // of socket
	client func(s *side, until time.Time) int
	server func(s *side) int
}

// side is one end. A client's operations end with its deadline, a server's with
// the client.
type side struct {
	fd   int
	addr unix.Sockaddr
	buf  []byte
	done chan struct{} // closed by measure when the client has ended
	ops  int
	cpu  time.Duration
}

var modes = []mode{
	{"RR", unix.SOCK_STREAM, (*side).rr, (*side).answerOne},
	{"CRR", unix.SOCK_STREAM, (*side).crr, (*side).answerAll},
	{"PPS", unix.SOCK_DGRAM, (*side).send, (*side).receive},
	{"TP", unix.SOCK_STREAM, (*side).push, (*side).pull},
}

// span is how long one path is loaded at a time.
const span = 150 * time.Millisecond

// measure gives operations per CPU-second.
func measure(b *testing.B, p path, m mode) float64 {
	b.Helper()
	const core = 1
	at := &unix.SockaddrInet4{Port: 7100, Addr: p.addr.As4()}
	server, client := &side{addr: at, buf: make([]byte, 1<<18), done: make(chan struct{})}, &side{addr: at, buf: make([]byte, 1<<17)}
	must(b, netns.Do(p.to, func() (err error) { server.fd, err = listen(m.kind, at); return err }))
	defer unix.Close(server.fd)
	soft := softirq(core)
	var wg sync.WaitGroup
	run := func(s *side, ns string, f func() int) {
		wg.Go(func() {
			err := netns.Do(ns, func() error {
				s.ops, s.cpu = pinned(core, f)
				return nil
			})
			if err != nil {
				b.Error(err)
			}
			if s == client {
				close(server.done)
			}
		})
	}
	run(server, p.to, func() int { return m.server(server) })
	run(client, p.from, func() int { return m.client(client, time.Now().Add(span)) })
	wg.Wait()
	ops := client.ops
	if m.kind == unix.SOCK_DGRAM || m.name == "TP" {
		ops = server.ops // what has arrived
	}
	if ops < 10 {
		b.Fatalf("%s over %s: %d operations", m.name, p.name, ops)
	}
	return float64(ops) / (client.cpu + server.cpu + softirq(core) - soft).Seconds()
}

func listen(kind int, at unix.Sockaddr) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind, 0)
	if err != nil {
		return -1, err
	}
	// A receive limit ends a server whose client is gone.
	tv := unix.NsecToTimeval(int64(20 * time.Millisecond))
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, at),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	if err == nil && kind == unix.SOCK_STREAM {
		err = unix.Listen(fd, 128)
	}
	return fd, err
}

// pinned runs f on one core and gives what it did and the thread's CPU time.
func pinned(core int, f func() int) (int, time.Duration) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var old, set unix.CPUSet
	unix.SchedGetaffinity(0, &old)
	set.Set(core)
	unix.SchedSetaffinity(0, &set)
	defer unix.SchedSetaffinity(0, &old)
	before := threadTime()
	n := f()
	return n, threadTime() - before
}

func threadTime() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano())
}

// softirq is the CPU time of a core's softirq thread.
func softirq(core int) time.Duration {
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, f := range names {
		if s, err := os.ReadFile(f); err != nil || strings.TrimSpace(string(s)) != fmt.Sprintf("ksoftirqd/%d", core) {
			continue
		}
		s, _ := os.ReadFile(strings.TrimSuffix(f, "comm") + "schedstat")
		var ns int64
		fmt.Sscan(string(s), &ns)
		return time.Duration(ns)
	}
	return 0
}

func (s *side) dial(kind int) bool {
	fd, err := unix.Socket(unix.AF_INET, kind, 0)
	if err != nil {
		return false
	}
	s.fd = fd
	tv := unix.NsecToTimeval(int64(time.Second))
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	if kind == unix.SOCK_STREAM {
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	return unix.Connect(fd, s.addr) == nil
}

// ask sends a byte and waits for 48.
func (s *side) ask() bool {
	if _, err := unix.Write(s.fd, s.buf[:1]); err != nil {
		return false
	}
	n, err := unix.Read(s.fd, s.buf[:48])
	return err == nil && n == 48
}

func (s *side) rr(until time.Time) (n int) {
	defer func() { unix.Close(s.fd) }()
	for ok := s.dial(unix.SOCK_STREAM); ok && (n%32 != 0 || time.Now().Before(until)); n++ {
		ok = s.ask()
	}
	return n
}

func (s *side) crr(until time.Time) (n int) {
	for ok := true; ok && (n%8 != 0 || time.Now().Before(until)); n++ {
		ok = s.dial(unix.SOCK_STREAM) && s.ask()
		unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		unix.Close(s.fd)
	}
	return n
}

func (s *side) send(until time.Time) (n int) {
	defer func() { unix.Close(s.fd) }()
	if !s.dial(unix.SOCK_DGRAM) {
		return 0
	}
	for ; n%64 != 0 || time.Now().Before(until); n++ {
		unix.Write(s.fd, s.buf[:18])
	}
	return n
}

func (s *side) push(until time.Time) (n int) {
	defer func() { unix.Close(s.fd) }()
	for ok := s.dial(unix.SOCK_STREAM); ok && time.Now().Before(until); {
		k, err := unix.Write(s.fd, s.buf)
		n, ok = n+k, err == nil
	}
	return n
}

// accept waits for a connection as long as there is a client.
func (s *side) accept() (int, bool) {
	for {
		fd, _, err := unix.Accept(s.fd)
		if err == nil {
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
			return fd, true
		}
		select {
		case <-s.done:
			return 0, false
		default:
		}
	}
}

func (s *side) answerOne() (n int) {
	fd, ok := s.accept()
	for ; ok; n++ {
		k, err := unix.Read(fd, s.buf[:1])
		if ok = err == nil && k == 1; ok {
			unix.Write(fd, s.buf[:48])
		}
	}
	unix.Close(fd)
	return n
}

func (s *side) answerAll() (n int) {
	for fd, ok := s.accept(); ok; fd, ok = s.accept() {
		if k, err := unix.Read(fd, s.buf[:1]); err == nil && k == 1 {
			unix.Write(fd, s.buf[:48])
			n++
		}
		unix.Close(fd)
	}
	return n
}

func (s *side) receive() (n int) {
	for {
		if _, err := unix.Read(s.fd, s.buf); err == nil {
			n++
			continue
		}
		select {
		case <-s.done:
			return n
		default:
		}
	}
}

func (s *side) pull() (n int) {
	fd, ok := s.accept()
	for ok {
		k, err := unix.Read(fd, s.buf)
		n, ok = n+k, err == nil && k > 0
	}
	unix.Close(fd)
	return n
}
