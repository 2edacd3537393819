package dns

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestManyConnections: one task with 10,000 connections holds a bounded number,
// and others do not notice.
func TestManyConnections(t *testing.T) {
	const n, othersLimit = 10_000, 50 * time.Millisecond
	// Some are the server's, and what else is open.
	if has := openFiles(t); has < n+300 {
		netnstest.Missing(t, "files", fmt.Errorf("the limit of open files is %d, %d are needed (ulimit -Hn)", has, n+300))
	}
	began := time.Now()
	// Nobody's connection ends for want of a question while the others come.
	var log strings.Builder
	r := newRig(t, Config{TCPIdle: time.Hour, Log: slog.New(slog.NewTextHandler(&log, nil))}, nil)
	r.stop()
	r.serve(View{Networks: []weft.ID{blue}, Self: Task{Names: []string{"flood.1.aaa"}}})
	flooded, stop := r.tcp, r.stop
	defer stop()
	r.serve(View{Networks: []weft.ID{blue}})
	defer r.stop()
	var took []time.Duration
	var conns []net.Conn
	for i := range n {
		c, err := net.Dial("tcp", flooded)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		defer c.Close() // not before the end
		c.(*net.TCPConn).SetLinger(0)
		conns = append(conns, c)
		if i%100 == 0 {
			for _, network := range []string{"tcp", "udp"} {
				start := time.Now()
				r.want(network, "web.", "NOERROR 10.1.0.2")
				took = append(took, time.Since(start))
			}
		}
	}
	if m := median(took); m > othersLimit {
		t.Errorf("others wait %v in the median of %d, want under %v", m, len(took), othersLimit)
	}
	// They are accepted in their order: when the last is closed all were seen.
	for i, c := range conns {
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		if i < maxTCPConns {
			continue
		}
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("connection %d: %v, want it closed", i, err)
		}
	}
	if got, want := r.s.Stats().Refused, uint64(n-maxTCPConns); got != want {
		t.Errorf("%d connections of %d refused, want %d", got, n, want)
	}
	// Nobody writes the log any more.
	stop()
	r.stop()
	lines := strings.Count(log.String(), "\n")
	if !strings.Contains(log.String(), "container=flood.1.aaa limit=\"TCP connections\" most=16") || lines > 1+int(time.Since(began)/noteEvery) {
		t.Errorf("operators are told %d times, want once in %v: %s", lines, noteEvery, log.String())
	}
}

// openFiles raises the limit of open files as far as it may be, until the test's end,
// and returns it.
func openFiles(t *testing.T) int {
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	now := unix.Rlimit{Cur: was.Max, Max: was.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &was) })
	return int(min(now.Cur, 1<<20))
}
