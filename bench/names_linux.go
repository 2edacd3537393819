package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	miekg "github.com/miekg/dns"
)

// Servers that bench names compares. Those of names have their number behind.
const (
	serverEcho  = "echo"       // sends each packet back, one call of the kernel to read and one to write
	serverBurst = "echo-burst" // the same with recvmmsg and sendmmsg
	serverWeft  = "weft"
	serverCore  = "coredns" // with its table of hosts
)

// coreDNS is where the bench finds its peer.
const coreDNS = "bin/coredns"

var nameCounts = []int{1, 1000, 100_000}

// Metrics of bench names.
const (
	perCPU   = "questions" // that are answered in a second of the server's CPU time
	halfLoad = "p99 at half load"
)

// Our own choices for the load.
const (
	nameSockets = 4   // that ask at the same time
	nameWindow  = 32  // questions of a socket under way
	nameLoad    = 1e9 // nanoseconds of full load, and of half
	nameWait    = 500 * time.Millisecond
)

// namesBench: the resolver on loopback, beside a bare echo and CoreDNS.
func namesBench() benchmark {
	var cases []string
	for _, kind := range []string{serverWeft, serverCore} {
		for _, n := range nameCounts {
			cases = append(cases, fmt.Sprintf("%s-%d", kind, n))
		}
	}
	cases = append([]string{serverBurst}, cases...)
	return benchmark{
		Name:    "names",
		About:   fmt.Sprintf("the resolver: questions (A, by UDP on loopback, %d sockets with %d under way each) that are answered in a second of the server's CPU time, with 1 to 100,000 names, against a server that echoes packets one by one; and the latency while half of what it can do is asked of it", nameSockets, nameWindow),
		Linked:  true,
		Choices: choices{Cases: cases, Usual: cases, Metrics: []string{perCPU, halfLoad}},
		Prepare: prepareNames,
	}
}

func prepareNames(ctx context.Context, r *rig) (plan, error) {
	dir, err := os.MkdirTemp("", "weft-bench-names")
	if err != nil {
		return plan{}, fmt.Errorf("make folder for zone files: %w", err)
	}
	var servers []*nameServer
	closeAll := func(context.Context) error {
		var errs []error
		for _, s := range servers {
			errs = append(errs, s.close())
		}
		return errors.Join(append(errs, os.RemoveAll(dir))...)
	}
	add := func(kind string) (variant, error) {
		s, err := startNames(ctx, kind, dir)
		if err != nil {
			return variant{}, err
		}
		servers = append(servers, s)
		return variant{kind, func(ctx context.Context) (sample, error) { return s.measure(ctx, r.metrics) }}, nil
	}
	p := plan{Restless: true, Close: closeAll, Limits: nameLimits(r.cases, r.metrics)}
	for _, m := range []metric{{perCPU, "1/CPU-s", true}, {halfLoad, "ms", false}} {
		if slices.Contains(r.metrics, m.Name) {
			p.Metrics = append(p.Metrics, m)
		}
	}
	p.Baseline, err = add(serverEcho)
	for _, kind := range r.cases {
		var v variant
		if err == nil {
			v, err = add(kind)
		}
		p.Cases = append(p.Cases, v)
		if n, isWeft := strings.CutPrefix(kind, serverWeft); isWeft {
			for _, over := range []string{serverBurst, serverCore + n} {
				if slices.Contains(r.cases, over) {
					p.Pairs = append(p.Pairs, pair{kind, over})
				}
			}
		}
	}
	if err != nil {
		return plan{}, errors.Join(err, closeAll(ctx))
	}
	return p, nil
}

// nameLimits are those of the cases that are measured: 0.95 of an echo written the
// same way, more than one that reads and writes one by one, 1.7 of CoreDNS.
func nameLimits(cases, metrics []string) []limit {
	var out []limit
	for _, n := range nameCounts {
		weft, core := fmt.Sprintf("%s-%d", serverWeft, n), fmt.Sprintf("%s-%d", serverCore, n)
		if !slices.Contains(cases, weft) {
			continue
		}
		out = append(out, limit{Case: weft, Metric: perCPU, Over: serverEcho, Least: 1}, limit{Case: weft, Metric: halfLoad, Most: 1})
		if slices.Contains(cases, serverBurst) {
			out = append(out, limit{Case: weft, Metric: perCPU, Over: serverBurst, Least: 0.95})
		}
		if slices.Contains(cases, core) {
			out = append(out, limit{Case: weft, Metric: perCPU, Over: core, Least: 1.7})
		}
	}
	return slices.DeleteFunc(out, func(l limit) bool { return !slices.Contains(metrics, l.Metric) })
}

// nameServer is a server in a process of its own.
type nameServer struct {
	cmd   *exec.Cmd
	stdin io.Closer // it ends when this is closed
	addr  string
	kind  string
	asked [][]byte // questions, in random order
}

func startNames(ctx context.Context, kind, dir string) (*nameServer, error) {
	name, number, _ := strings.Cut(kind, "-")
	n, err := strconv.Atoi(number)
	if err != nil {
		n = 1
	}
	s := &nameServer{kind: kind, asked: questions(n)}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	s.cmd = exec.Command(self, namesWord, kind)
	if name == serverCore {
		if s.cmd, s.addr, err = coreCommand(dir, n); err != nil {
			return nil, err
		}
	}
	s.cmd.Stderr = os.Stderr
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start %s: %w", kind, err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", kind, err)
	}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", kind, err)
	}
	if s.addr == "" {
		line, err := bufio.NewReader(out).ReadString('\n')
		if s.addr = strings.TrimSpace(line); err != nil {
			return nil, errors.Join(fmt.Errorf("%s did not start: %w", kind, err), s.close())
		}
	} else {
		go io.Copy(io.Discard, out) // ends with the process, which close waits for
	}
	if err := s.await(ctx); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// coreCommand is CoreDNS with n names in a file of hosts.
func coreCommand(dir string, n int) (*exec.Cmd, string, error) {
	bin, err := filepath.Abs(coreDNS)
	if err == nil {
		_, err = os.Stat(bin)
	}
	if err != nil {
		return nil, "", fmt.Errorf("%w: build it with `go build -C bench/peers/dns -o ../../../%s .`, or leave its cases out with -case", err, coreDNS)
	}
	free, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, "", err
	}
	defer free.Close()
	addr := free.LocalAddr().String()
	var hosts strings.Builder
	for i := range n {
		fmt.Fprintf(&hosts, "%s %s\n", nameAddr(i), benchName(i))
	}
	file, conf := filepath.Join(dir, fmt.Sprintf("hosts-%d", n)), filepath.Join(dir, fmt.Sprintf("Corefile-%d", n))
	text := fmt.Sprintf(".:%d {\n  bind 127.0.0.1\n  hosts %s\n}\n", netip.MustParseAddrPort(addr).Port(), file)
	if err := errors.Join(os.WriteFile(file, []byte(hosts.String()), 0o600), os.WriteFile(conf, []byte(text), 0o600)); err != nil {
		return nil, "", err
	}
	return exec.Command(bin, "-conf", conf), addr, nil
}

// close ends the server: weft's by the end of its input, CoreDNS by a signal.
func (s *nameServer) close() error {
	s.stdin.Close()
	if strings.HasPrefix(s.kind, serverCore) {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		return nil
	}
	return s.cmd.Wait()
}

func benchName(i int) string { return fmt.Sprintf("svc%d", i) }

func nameAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

// questions are a few thousand, of n names.
func questions(n int) [][]byte {
	out := make([][]byte, 4096)
	for i := range out {
		m := new(miekg.Msg)
		m.SetQuestion(benchName(rand.IntN(n))+".", miekg.TypeA)
		b, err := m.Pack()
		if err != nil {
			panic(err) // of names made here
		}
		out[i] = b
	}
	return out
}

// await blocks until the server answers its first question right.
func (s *nameServer) await(ctx context.Context) error {
	c, err := net.Dial("udp", s.addr)
	if err != nil {
		return err
	}
	defer c.Close()
	for ctx.Err() == nil {
		if _, err := s.ask(c, make([]byte, 2048), 0, 1); err == nil {
			return nil
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// ask sends k questions from the i-th on and reads their answers; it returns how
// many came. A missing or a wrong answer is an error.
func (s *nameServer) ask(c net.Conn, buf []byte, i, k int) (int, error) {
	for n := range k {
		q := s.asked[(i+n)%len(s.asked)]
		binary.BigEndian.PutUint16(buf, uint16(i+n))
		copy(buf[2:], q[2:])
		if _, err := c.Write(buf[:len(q)]); err != nil {
			return 0, err
		}
	}
	c.SetReadDeadline(time.Now().Add(nameWait))
	for n := range k {
		size, err := c.Read(buf)
		if err != nil {
			return n, fmt.Errorf("%s answered %d of %d questions: %w", s.kind, n, k, err)
		}
		if isEcho := strings.HasPrefix(s.kind, serverEcho); !isEcho && (size < 12 || buf[3]&15 != 0 || binary.BigEndian.Uint16(buf[6:]) != 1) {
			return n, fmt.Errorf("%s gave no address: %x", s.kind, buf[:size])
		}
	}
	return k, nil
}

// measure asks all the server can do, then half of it, if that is among the metrics.
func (s *nameServer) measure(ctx context.Context, metrics []string) (sample, error) {
	before, err := ranFor(s.cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	answered, err := s.flood(ctx)
	if err != nil {
		return nil, err
	}
	took := time.Since(start)
	after, err := ranFor(s.cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	out := sample{}
	if slices.Contains(metrics, perCPU) {
		out[perCPU] = float64(answered) / (after - before).Seconds()
	}
	if slices.Contains(metrics, halfLoad) {
		late, err := s.trickle(ctx, float64(answered)/took.Seconds()/2)
		if err != nil {
			return nil, err
		}
		out[halfLoad] = late.Seconds() * 1e3
	}
	return out, nil
}

// flood keeps nameWindow questions under way on each socket. A lost one is left
// behind: sockets on loopback lose when their queue is full.
func (s *nameServer) flood(ctx context.Context) (int, error) {
	var wg sync.WaitGroup
	counts, errs := make([]int, nameSockets), make([]error, nameSockets)
	end := time.Now().Add(nameLoad)
	for k := range nameSockets {
		wg.Go(func() {
			c, err := net.Dial("udp", s.addr)
			if err != nil {
				errs[k] = err
				return
			}
			defer c.Close()
			buf := make([]byte, 2048)
			for i := k * 1024; time.Now().Before(end) && ctx.Err() == nil; i += nameWindow {
				n, err := s.ask(c, buf, i, nameWindow)
				if counts[k] += n; err != nil {
					errs[k] = err
					return
				}
			}
		})
	}
	wg.Wait()
	total := 0
	for _, n := range counts {
		total += n
	}
	return total, errors.Join(errs...)
}

// trickle asks rate questions a second, a few at a time, and gives the time until
// the last of them is answered that one group in a hundred exceeds.
func (s *nameServer) trickle(ctx context.Context, rate float64) (time.Duration, error) {
	c, err := net.Dial("udp", s.addr)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	const group = 8 // questions that are sent together
	gap := time.Duration(group / rate * 1e9)
	buf := make([]byte, 2048)
	var all []time.Duration
	due := time.Now()
	for end := due.Add(nameLoad); due.Before(end); due = due.Add(gap) {
		if wait := time.Until(due); wait > 0 {
			if err := pause(ctx, wait); err != nil {
				return 0, err
			}
		} else {
			due = time.Now()
		}
		sent := time.Now()
		if _, err := s.ask(c, buf, len(all)*group, group); err != nil {
			return 0, err
		}
		all = append(all, time.Since(sent))
	}
	slices.Sort(all)
	return all[len(all)*99/100], nil
}

// ranFor is what the threads of a process have run, to the nanosecond
// (/proc/PID/task/TID/schedstat). Go ends no thread.
func ranFor(pid int) (time.Duration, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(files) == 0 {
		return 0, fmt.Errorf("read CPU time of process %d: no threads: %w", pid, err)
	}
	var sum time.Duration
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return 0, fmt.Errorf("read CPU time: %w", err)
		}
		first, _, _ := strings.Cut(string(b), " ")
		n, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read CPU time of %s: %w", f, err)
		}
		sum += time.Duration(n)
	}
	return sum, nil
}
