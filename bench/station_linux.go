package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/netns"
)

// trafficEnv keeps the runtime from sending its threads signals.
const trafficEnv = "GODEBUG=asyncpreemptoff=1"

// station is one end of a path: a generator that runs as a process.
type station struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// start starts cmd, which runs a generator, and waits until it is ready.
func start(cmd *exec.Cmd) (*station, error) {
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start traffic generator: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start traffic generator: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start traffic generator: %w", err)
	}
	s := &station{cmd: cmd, in: in, out: bufio.NewScanner(out)}
	if _, err := s.expect("ready"); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// generator is one end in a network namespace, on one core or on any.
func generator(ctx context.Context, ns string, core int, args ...string) (*station, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start traffic generator: %w", err)
	}
	cmd := exec.CommandContext(ctx, self, append([]string{trafficWord}, args...)...)
	cmd.Env, cmd.Stderr = append(os.Environ(), trafficEnv), os.Stderr
	var s *station
	err = netns.Do(ns, func() error {
		return onThread(core, func() error { s, err = start(cmd); return err })
	})
	return s, err
}

// onThread calls f on a core, where what it starts stays. The calling goroutine
// has its thread to itself.
func onThread(core int, f func() error) error {
	if core == noCore {
		return f()
	}
	var old, set unix.CPUSet
	set.Set(core)
	if err := errors.Join(unix.SchedGetaffinity(0, &old), unix.SchedSetaffinity(0, &set)); err != nil {
		return fmt.Errorf("run on core %d: %w", core, err)
	}
	return errors.Join(f(), unix.SchedSetaffinity(0, &old))
}

// expect reads one line, which must begin with word, and gives the rest.
func (s *station) expect(word string) (string, error) {
	if !s.out.Scan() {
		return "", fmt.Errorf("the traffic generator ended: %w", errors.Join(s.out.Err(), io.ErrUnexpectedEOF))
	}
	rest, ok := strings.CutPrefix(s.out.Text(), word)
	if !ok {
		return "", fmt.Errorf("the traffic generator said %q, want %q", s.out.Text(), word)
	}
	return rest, nil
}

// run has the client do count operations, and calls around, if set, before and
// after the measured part.
func (s *station) run(p pattern, count int, around func()) (spell, error) {
	if _, err := fmt.Fprintln(s.in, p, count); err != nil {
		return spell{}, fmt.Errorf("tell the traffic generator: %w", err)
	}
	if _, err := s.expect("warm"); err != nil {
		return spell{}, err
	}
	if around != nil {
		around()
	}
	if _, err := fmt.Fprintln(s.in); err != nil {
		return spell{}, fmt.Errorf("tell the traffic generator: %w", err)
	}
	rest, err := s.expect("done")
	if err != nil {
		return spell{}, err
	}
	if around != nil {
		around()
	}
	return parseSpell(rest)
}

// parseSpell reads "OPS ELAPSED IDLE", times in nanoseconds.
func parseSpell(text string) (spell, error) {
	var ops int
	var elapsed, idle int64
	if n, err := fmt.Sscan(text, &ops, &elapsed, &idle); err != nil || n != 3 || ops < 1 || elapsed < 1 || idle < 0 {
		return spell{}, fmt.Errorf("the traffic generator measured %q: want operations, nanoseconds and idle nanoseconds", text)
	}
	return spell{Ops: ops, Elapsed: time.Duration(elapsed), Idle: time.Duration(idle)}, nil
}

// close ends the process: its standard input does.
func (s *station) close() error {
	err := s.in.Close()
	werr := s.cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(werr, &exit) {
		werr = fmt.Errorf("traffic generator: %w", exit)
	}
	return errors.Join(err, werr)
}

// way is a path that is ready for traffic.
type way struct {
	name           string
	server, client *station // server is nil where somebody else runs it
}

// open starts both ends of a path between namespaces.
func (p path) open(ctx context.Context, core int) (*way, error) {
	listen := p.addr
	if p.listen.IsValid() {
		listen = p.listen
	}
	server, err := generator(ctx, p.to, core, "serve", listen.String())
	if err != nil {
		return nil, fmt.Errorf("path %s: %w", p.name, err)
	}
	words := []string{"ask", p.addr.String()}
	if p.own.IsValid() {
		words = append(words, p.own.String())
	}
	client, err := generator(ctx, p.from, core, words...)
	if err != nil {
		return nil, fmt.Errorf("path %s: %w", p.name, errors.Join(err, server.close()))
	}
	return &way{name: p.name, server: server, client: client}, nil
}

func (w *way) close() error {
	err := w.client.close()
	if w.server != nil {
		err = errors.Join(err, w.server.close())
	}
	return err
}
