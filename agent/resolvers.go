package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/dns"
)

// resolverRetry is the pause before a resolver that could not be opened, or
// that has failed, is opened again.
const resolverRetry = time.Second

// openSockets opens a resolver's sockets in the namespace at nsPath; listenIn
// is the real one.
type openSockets func(ctx context.Context, nsPath string) (net.PacketConn, net.Listener, error)

// dialInside opens a socket to a nameserver in the namespace at nsPath; dialIn is the
// real one.
type dialInside func(ctx context.Context, nsPath, network, address string) (net.Conn, error)

// resolvers keeps one pair of sockets open in each task's namespace and serves
// names on it. Its methods may be called from any goroutine; all servers end
// with the context given to newResolvers, and wait returns when they have.
type resolvers struct {
	ctx    context.Context // of all servers; ends with the agent
	server *dns.Server
	listen openSockets
	dial   dialInside
	log    *slog.Logger
	wg     sync.WaitGroup

	// mu guards: open.
	mu   sync.Mutex
	open map[weft.ID]*resolver
}

// resolver is one task's.
type resolver struct {
	task   weft.ID
	nsPath string
	view   dns.View
	cancel context.CancelFunc
	done   chan struct{} // closed by its goroutine, when its sockets are closed
}

func newResolvers(ctx context.Context, server *dns.Server, listen openSockets, dial dialInside, log *slog.Logger) *resolvers {
	return &resolvers{ctx: ctx, server: server, listen: listen, dial: dial, log: log, open: map[weft.ID]*resolver{}}
}

// ensure opens the sockets of a task unless they are open.
func (r *resolvers) ensure(task weft.ID, nsPath string, view dns.View) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.open[task]; ok {
		return nil
	}
	pc, ln, err := r.listen(r.ctx, nsPath)
	if err != nil {
		return fmt.Errorf("open resolver of task %s: %w", task, err)
	}
	r.startLocked(&resolver{task: task, nsPath: nsPath, view: view}, pc, ln)
	return nil
}

// resume is ensure for a container that runs already: what fails is tried again
// until it works.
func (r *resolvers) resume(task weft.ID, nsPath string, view dns.View) {
	err := r.ensure(task, nsPath, view)
	if err == nil {
		return
	}
	r.log.Warn("reopen resolver, trying again", weft.KeyTask, task, weft.KeyErr, err)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.startLocked(&resolver{task: task, nsPath: nsPath, view: view}, nil, nil)
}

func (r *resolvers) startLocked(s *resolver, pc net.PacketConn, ln net.Listener) {
	ctx, cancel := context.WithCancel(r.ctx)
	s.view.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return r.dial(ctx, s.nsPath, network, address)
	}
	s.cancel, s.done = cancel, make(chan struct{})
	r.open[s.task] = s
	r.wg.Go(func() {
		defer close(s.done)
		r.serve(ctx, s, pc, ln)
	})
}

// serve answers one task until ctx ends; without sockets, or when they fail, it
// opens new ones.
func (r *resolvers) serve(ctx context.Context, s *resolver, pc net.PacketConn, ln net.Listener) {
	for {
		var err error
		if pc == nil {
			pc, ln, err = r.listen(ctx, s.nsPath)
		}
		if err == nil {
			err = r.server.Serve(ctx, s.view, pc, ln) // it closes both
			pc, ln = nil, nil
		}
		if ctx.Err() != nil {
			return
		}
		r.log.Error("resolver ended, opening a new one", weft.KeyTask, s.task, weft.KeyErr, err)
		if !sleep(ctx, resolverRetry) {
			return
		}
	}
}

// close ends the resolver of a task and returns when its sockets are closed:
// they hold the task's namespace.
func (r *resolvers) close(task weft.ID) {
	r.mu.Lock()
	s, ok := r.open[task]
	delete(r.open, task)
	r.mu.Unlock()
	if ok {
		s.cancel()
		<-s.done
	}
}

func (r *resolvers) wait() { r.wg.Wait() }
