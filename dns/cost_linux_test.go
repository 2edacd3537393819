package dns

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	miekg "github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// BenchmarkBurst is what a full burst costs the server, by the CPU time of its thread:
// with one name and with many, beside an echo that reads and writes the same way. All
// of them take turns, one burst each, so that what else the machine does falls on all.
// The ratios are CPU time of the echo by that of the resolver.
func BenchmarkBurst(b *testing.B) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	counts := []int{1, 1000, 100_000}
	steps := []step{newStep(b, nil, 1)}
	for _, n := range counts {
		r := Network{Name: "blue"}
		for i := range n {
			r.Services = append(r.Services, Service{Name: fmt.Sprintf("svc%d", i), VIP: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})}})
		}
		s, err := New(Config{Log: slog.New(slog.DiscardHandler), ResolvConf: "/dev/null"})
		if err != nil {
			b.Fatal(err)
		}
		s.Update(Records{Networks: map[weft.ID]Network{blue: r}})
		steps = append(steps, newStep(b, &session{s: s, view: compile(&View{Networks: []weft.ID{blue}})}, n))
	}
	took := make([][]time.Duration, len(steps))
	for b.Loop() {
		for i := range steps {
			took[i] = append(took[i], steps[i].run(b))
		}
	}
	median := func(all []time.Duration) float64 {
		slices.Sort(all)
		return float64(all[len(all)/2]) / burstSize
	}
	for i, n := range counts {
		more := slices.Clone(took[i+1])
		for k := range more {
			more[k] -= took[0][k]
		}
		b.ReportMetric(median(more), fmt.Sprintf("ns-more-with-%d", n))
	}
	b.ReportMetric(median(took[0]), "ns/question-echoed")
}

// step is one burst to and from a server.
type step struct {
	client, server int // sockets
	questions      [][]byte
	asks           *burst
	serve          func()
}

// newStep is the step of t's server; nil = of the echo.
func newStep(b *testing.B, t *session, names int) step {
	open := func() (int, *unix.SockaddrInet4) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			b.Fatal(err)
		}
		at, err := unix.Getsockname(fd)
		if err != nil {
			b.Fatal(err)
		}
		return fd, at.(*unix.SockaddrInet4)
	}
	s := step{asks: newBurst()}
	var to *unix.SockaddrInet4
	s.client, _ = open()
	s.server, to = open()
	if err := unix.Connect(s.client, to); err != nil {
		b.Fatal(err)
	}
	for range 4096 {
		m := new(miekg.Msg)
		m.SetQuestion(fmt.Sprintf("svc%d.", rand.IntN(names)), miekg.TypeA)
		packet, err := m.Pack()
		if err != nil {
			b.Fatal(err)
		}
		s.questions = append(s.questions, packet)
	}
	room := newBurst()
	var sc scope
	s.serve = func() {
		n, errno := room.recv(uintptr(s.server))
		if errno != 0 || n != burstSize {
			b.Fatalf("%d questions came: %v", n, errno)
		}
		if t == nil {
			for i := range n {
				room.reply(i, room.packet(i))
			}
		} else {
			t.answerBurst(context.Background(), (*net.UDPConn)(nil), room, n, &sc)
		}
		room.send(uintptr(s.server))
	}
	return s
}

func (s *step) run(b *testing.B) time.Duration {
	for i := range burstSize {
		q := s.questions[rand.IntN(len(s.questions))]
		s.asks.outVec[i].Base = unsafe.SliceData(q)
		s.asks.outVec[i].SetLen(len(q))
	}
	s.asks.replies = burstSize
	s.asks.send(uintptr(s.client))
	start := threadTime()
	s.serve()
	took := threadTime() - start
	if n, errno := s.asks.recv(uintptr(s.client)); errno != 0 || n != burstSize {
		b.Fatalf("%d answers came: %v", n, errno)
	}
	return took
}

func threadTime() time.Duration {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}
