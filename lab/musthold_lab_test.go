//go:build lab

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// TestLabMustHold: at least 1,000 short connections from 100 ports of a client, and one move
// of a service's only task; soak: 20,000 from 2,000, and ten moves.
func TestLabMustHold(t *testing.T) { mustHold(t, "t-must", mustSize{1000, 100, 1}) }

// TestSoakMustHold is its long form.
func TestSoakMustHold(t *testing.T) {
	soak(t)
	mustHold(t, "t-must", mustSize{20_000, 2000, 10})
}

type mustSize struct{ connections, ports, moves int }

const (
	mustWeb, mustLone, mustRange = 8161, 8162, "10000-20000"
	// mustFirst is the first of the client's ports, below those that kernels choose.
	mustFirst = 21_000
	// mustPlaces open connections at a time.
	mustPlaces = 8
	// mustEvery is how often the one UDP port sends.
	mustEvery = 50 * time.Millisecond
	// mustGap is the longest silence once the new task runs.
	mustGap = 2 * time.Second
	// mustSYN is how long after a backend has been removed it may still be asked.
	mustSYN = time.Second
)

func mustHold(t *testing.T, lab string, size mustSize) {
	r := newRig(t, lab)
	result := newSoakResult(t)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	for _, args := range [][]string{
		{"--name", "client", "--mode", "global"},
		{"--name", "web", "--replicas", "3", "--publish", fmt.Sprintf("%d:80", mustWeb)},
		{"--name", "lone", "--constraint", "node.hostname==h1", "--publish", fmt.Sprintf("%d:7/udp", mustLone), "--publish", fmt.Sprintf("%d:80", mustLone)},
	} {
		r.must(append(append(r.on("h1", "service", "create", "-d", "--network", "front"), args...), "weft/whoami")...)
	}
	r.mustShort(result, size)
	r.mustMove(result, size.moves)
	r.mustHaveRange(result)
}

// clientOn is the client task of a host, once it runs.
func (r *rig) clientOn(host string) (p replica) {
	r.t.Helper()
	r.eventually("client of "+host, func() error {
		all, err := r.replicas("client", host)
		if err == nil && len(all) != 1 {
			err = fmt.Errorf("%d run", len(all))
		}
		if err == nil {
			p = all[0]
		}
		return err
	})
	return p
}

// short counts connections.
type short struct {
	mu       sync.Mutex // guards: all below
	done     int
	slow     int // slower than 200 ms
	slowest  time.Duration
	resent   int
	last     map[string]time.Time // when a task was last reached, by its host name
	failures []string
}

// mustShort opens short connections from few ports, half to the service address
// and half to the published port, and takes one of three backends away meanwhile.
func (r *rig) mustShort(result *soakResult, size mustSize) {
	r.t.Helper()
	var vip string
	r.eventually("VIP of web", func() (err error) { vip, err = r.vip("web"); return err })
	task := r.clientOn("h1").ns()
	var web []replica
	r.eventually("three backends everywhere", func() (err error) {
		if web, err = r.replicas("web", three...); err != nil || len(web) != 3 {
			return fmt.Errorf("%d run: %w", len(web), err)
		}
		seen := map[string]bool{}
		for range 20 {
			s := &short{last: map[string]time.Time{}}
			s.open(r.t.Context(), task, vip+":80", 0)
			s.open(r.t.Context(), r.clientNS(), fmt.Sprintf("%s:%d", r.host("h2").Addr, mustWeb), 0)
			for name := range s.last {
				seen[name] = true
			}
		}
		if len(seen) != 3 {
			return fmt.Errorf("%d answer", len(seen))
		}
		return nil
	})
	s := &short{last: map[string]time.Time{}}
	ctx, cancel := context.WithCancel(r.t.Context())
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	half, enough := make(chan struct{}), make(chan struct{})
	began := time.Now()
	for i := range mustPlaces {
		ns, addr := task, vip+":80"
		if i%2 != 0 {
			ns, addr = r.clientNS(), fmt.Sprintf("%s:%d", r.host(three[i/2%3]).Addr, mustWeb)
		}
		each, ports := size.connections/mustPlaces, size.ports/mustPlaces
		g.Go(func() error {
			for n := 0; n < each || ctx.Err() == nil && !isClosed(enough); n++ {
				if n == each/2 && i == 0 {
					close(half)
				}
				s.open(ctx, ns, addr, mustFirst+i*ports+n%ports)
			}
			return nil
		})
	}
	<-half
	r.must(r.on("h1", "service", "scale", "-d", "web=2")...)
	removed := time.Now()
	time.AfterFunc(2*mustSYN, func() { close(enough) }) // that it is not asked any more has to be seen
	if err := g.Wait(); err != nil {
		r.t.Fatal(err)
	}
	took := time.Since(began)
	var gone replica
	r.eventually("one backend has gone", func() error {
		left, err := r.replicas("web", three...)
		if err != nil || len(left) != 2 {
			return fmt.Errorf("%d run: %w", len(left), err)
		}
		for _, p := range web {
			if p.id != left[0].id && p.id != left[1].id {
				gone = p
			}
		}
		return nil
	})
	late := s.last[gone.id[:12]].Sub(removed)
	result.printf("%d short connections from %d ports in %s, one of 3 backends removed: %d failed, %d slower than 200 ms, slowest %s, %d segments sent again; the removed one was last reached %s after the command, the last connection opened %s after",
		s.done, size.ports, took.Round(time.Millisecond), len(s.failures), s.slow, s.slowest.Round(time.Millisecond), s.resent, late.Round(time.Millisecond), (took - removed.Sub(began)).Round(time.Millisecond))
	if len(s.failures) > 0 {
		r.t.Errorf("%d of %d short connections failed: %q", len(s.failures), s.done, s.failures[:min(5, len(s.failures))])
	}
	if s.resent > 0 {
		r.t.Errorf("%d segments of short connections were sent again", s.resent)
	}
	if late > mustSYN {
		r.t.Errorf("the removed backend was reached %s later, want at most %s", late, mustSYN)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// open opens one connection from a port of the namespace, 0 = any, asks who is
// there, and lets the server close it.
func (s *short) open(ctx context.Context, ns, addr string, port int) {
	d := net.Dialer{Timeout: 2 * askLimit, LocalAddr: &net.TCPAddr{Port: port}, Control: func(_, _ string, c syscall.RawConn) error {
		var opt error
		err := c.Control(func(fd uintptr) { opt = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		return errors.Join(err, opt)
	}}
	var c net.Conn
	began := time.Now()
	err := within(ns, func() (err error) { began = time.Now(); c, err = d.DialContext(ctx, "tcp", addr); return err })
	took := time.Since(began)
	var who struct{ Host string }
	resent := 0
	if err == nil {
		who.Host, resent, err = answered(c.(*net.TCPConn))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done++
	s.slowest = max(s.slowest, took)
	s.resent += resent
	if took > 200*time.Millisecond {
		s.slow++
	}
	if err != nil {
		s.failures = append(s.failures, fmt.Sprintf("%s from %d: %v", addr, port, err))
	} else if s.last[who.Host].Before(began) {
		s.last[who.Host] = began
	}
}

// answered asks by HTTP, to the end, and says how many segments of c were sent again.
func answered(c *net.TCPConn) (host string, resent int, err error) {
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * askLimit)); err != nil {
		return "", 0, err
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return "", 0, err
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return "", 0, err
	}
	_, body, _ := strings.Cut(string(b), "\r\n\r\n")
	var who struct{ Host string }
	if err := json.Unmarshal([]byte(body), &who); err != nil {
		return "", 0, fmt.Errorf("answer %q: %w", b, err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return "", 0, err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, failed = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); failed == nil {
			resent = int(info.Total_retrans)
		}
	})
	return who.Host, resent, errors.Join(err, failed)
}

// steady is one UDP port that sends all the time, and who answers it.
type steady struct {
	name string
	pc   net.PacketConn
	to   net.Addr // nil: pc is a net.Conn to it

	mu    sync.Mutex           // guards: all below
	first map[string]time.Time // first answer of a task, by its host name
	sent  int
}

func (s *steady) run(ctx context.Context) error {
	done := make(chan struct{})
	go func() { // ends with the socket
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, _, err := s.pc.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			var who struct{ Host string }
			if line, _, _ := strings.Cut(string(buf[:n]), "\n"); err != nil || json.Unmarshal([]byte(line), &who) != nil {
				continue // an error about a datagram while there was no task
			}
			s.mu.Lock()
			if s.first[who.Host].IsZero() {
				s.first[who.Host] = time.Now()
			}
			s.mu.Unlock()
		}
	}()
	tick := time.NewTicker(mustEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
			s.mu.Lock()
			s.sent++
			s.mu.Unlock()
			// Refused while there is no task.
			if c, ok := s.pc.(net.Conn); ok && s.to == nil {
				c.Write([]byte("x"))
			} else {
				s.pc.WriteTo([]byte("x"), s.to)
			}
		}
	}
	err := s.pc.Close()
	<-done
	return err
}

// mustMove moves the only task of a service while one UDP port after the other
// keeps sending, from a task by the service address and from outside by each node.
func (r *rig) mustMove(result *soakResult, moves int) {
	r.t.Helper()
	var vip string
	r.eventually("VIP of lone", func() (err error) { vip, err = r.vip("lone"); return err })
	var all []*steady
	add := func(name, ns string, to netip.AddrPort) {
		s := &steady{name: name, to: net.UDPAddrFromAddrPort(to), first: map[string]time.Time{}}
		if err := within(ns, func() (err error) {
			s.pc, err = net.ListenPacket("udp4", fmt.Sprintf("0.0.0.0:%d", mustFirst-1-len(all)))
			return err
		}); err != nil {
			r.t.Fatal(err)
		}
		all = append(all, s)
	}
	service := netip.AddrPortFrom(netip.MustParseAddr(vip), 7)
	add("service address", r.clientOn("h1").ns(), service)
	// A socket that is connected names its service once; engines follow it otherwise.
	connected := &steady{name: "service address, connected", first: map[string]time.Time{}}
	if err := within(r.clientOn("h2").ns(), func() (err error) {
		c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(service))
		connected.pc = c
		return err
	}); err != nil {
		r.t.Fatal(err)
	}
	all = append(all, connected)
	for _, h := range three {
		add("port of "+h, r.clientNS(), netip.AddrPortFrom(r.host(h).Addr, mustLone))
	}
	ctx, cancel := context.WithCancel(r.t.Context())
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range all {
		g.Go(func() error { return s.run(ctx) })
	}
	longest := time.Duration(0)
	for i := range moves + 1 { // the first is where it begins
		at := three[i%3]
		if i > 0 {
			r.must(r.on("h1", "service", "update", "-d", "--constraint-rm", "node.hostname=="+three[(i-1)%3], "--constraint-add", "node.hostname=="+at, "lone")...)
		}
		var p replica
		r.eventually("lone on "+at, func() error {
			list, err := r.replicas("lone", at)
			if err == nil && len(list) != 1 {
				err = fmt.Errorf("%d run", len(list))
			}
			if err == nil {
				p = list[0]
			}
			return err
		})
		out := r.must(r.on(at, "inspect", "-f", "{{.State.StartedAt}}", p.id)...)
		ready, err := time.Parse(time.RFC3339Nano, out)
		if err != nil {
			r.t.Fatal(err)
		}
		for _, s := range all {
			r.eventually(s.name+" is answered from "+at, func() error {
				s.mu.Lock()
				defer s.mu.Unlock()
				if s.first[p.id[:12]].IsZero() {
					return fmt.Errorf("%d datagrams, answers by %v", s.sent, s.first)
				}
				return nil
			})
			gap := s.first[p.id[:12]].Sub(ready)
			if i > 0 {
				longest = max(longest, gap)
				if gap > mustGap {
					r.t.Errorf("%s: the new task on %s answers %s after it runs, want at most %s", s.name, at, gap, mustGap)
				}
			}
		}
	}
	cancel()
	if err := g.Wait(); err != nil {
		r.t.Error(err)
	}
	result.printf("%d moves of a service's only task under %d UDP ports that send every %s: the new one answers each at most %s after it runs", moves, len(all), mustEvery, longest.Round(time.Millisecond))
}

// mustHaveRange publishes 10,001 ports at once, and asks one of them of each node.
func (r *rig) mustHaveRange(result *soakResult) {
	r.t.Helper()
	r.must(r.on("h1", "service", "create", "-d", "--name", "media", "--publish", mustRange+":"+mustRange+"/udp", "weft/whoami", "--echo", ":15000")...)
	s := map[string]*steady{}
	ctx, cancel := context.WithCancel(r.t.Context())
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	for i, h := range three {
		u := &steady{name: h, to: net.UDPAddrFromAddrPort(netip.AddrPortFrom(r.host(h).Addr, 15000)), first: map[string]time.Time{}}
		if err := within(r.clientNS(), func() (err error) {
			u.pc, err = net.ListenPacket("udp4", fmt.Sprintf("0.0.0.0:%d", mustFirst-100-i))
			return err
		}); err != nil {
			r.t.Fatal(err)
		}
		s[h] = u
		g.Go(func() error { return u.run(ctx) })
	}
	var p replica
	r.eventually("media runs", func() error {
		list, err := r.replicas("media", three...)
		if err == nil && len(list) != 1 {
			err = fmt.Errorf("%d run", len(list))
		}
		if err == nil {
			p = list[0]
		}
		return err
	})
	ready, err := time.Parse(time.RFC3339Nano, r.must(r.on(p.host, "inspect", "-f", "{{.State.StartedAt}}", p.id)...))
	if err != nil {
		r.t.Fatal(err)
	}
	longest := time.Duration(0)
	for _, h := range three {
		r.eventually("port 15000 of "+h, func() error {
			s[h].mu.Lock()
			defer s[h].mu.Unlock()
			if s[h].first[p.id[:12]].IsZero() {
				return fmt.Errorf("%d datagrams, answers by %v", s[h].sent, s[h].first)
			}
			longest = max(longest, s[h].first[p.id[:12]].Sub(ready))
			return nil
		})
	}
	cancel()
	if err := g.Wait(); err != nil {
		r.t.Error(err)
	}
	result.printf("a range of 10,001 UDP ports answers by all nodes %s after its task runs", longest.Round(time.Millisecond))
	if longest > mustGap {
		r.t.Errorf("the range answers %s after its task runs, want at most %s", longest, mustGap)
	}
}
