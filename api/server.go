package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/weftnet/weft"
)

// Config is what a Server stands on. All back ends are required.
type Config struct {
	Swarm      Swarm
	Services   ServiceStore
	Tasks      TaskStore
	Nodes      NodeStore
	Networks   NetworkStore
	Containers ContainerStore
	Images     ImageStore
	Repairs    RepairLog
	Drains     DrainLog
	Ways       WayLog

	// Version is the release shown as server version; empty = weft.Version.
	Version string
	// Log gets one debug record per request and an error record for every
	// answer of status 500. Required.
	Log *slog.Logger
	// InterfaceAddrs lists the addresses of a host interface, for
	// `--advertise-addr eth0`; nil = ask the kernel.
	InterfaceAddrs func(name string) ([]netip.Addr, error)
}

// Validate names what is missing.
func (c *Config) Validate() error {
	for _, f := range []struct {
		name   string
		isGood bool
	}{
		{"Swarm", c.Swarm != nil}, {"Services", c.Services != nil}, {"Tasks", c.Tasks != nil},
		{"Nodes", c.Nodes != nil}, {"Networks", c.Networks != nil},
		{"Containers", c.Containers != nil}, {"Images", c.Images != nil}, {"Repairs", c.Repairs != nil}, {"Drains", c.Drains != nil}, {"Ways", c.Ways != nil}, {"Log", c.Log != nil},
	} {
		if !f.isGood {
			return fmt.Errorf("api.Config.%s is not set: %w", f.name, weft.ErrInvalid)
		}
	}
	return nil
}

// Server answers the Engine API. It is an http.Handler, safe for concurrent
// use; Serve runs it on a listener.
type Server struct {
	cfg    Config
	routes []route
	rules  fieldRules
	execs  execTable
	// running counts handlers and detached execs, so that Serve can wait for
	// those that net/http no longer knows (hijacked connections).
	running sync.WaitGroup
}

var _ http.Handler = (*Server)(nil)

// New checks cfg and makes a server. It does no I/O and starts nothing.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Version == "" {
		cfg.Version = weft.Version
	}
	if cfg.InterfaceAddrs == nil {
		cfg.InterfaceAddrs = interfaceAddrs
	}
	s := &Server{cfg: cfg, rules: newFieldRules(), execs: execTable{byID: map[string]*execEntry{}}}
	s.routes = s.makeRoutes()
	return s, nil
}

// Times and sizes of our own choice.
const (
	// headerTimeout bounds how long a client may take to send its request
	// line and headers; local clients need milliseconds.
	headerTimeout = 10 * time.Second
	// shutdownTimeout is how long Serve waits for answers under way after
	// its context has ended (which ends streams at once).
	shutdownTimeout = 3 * time.Second
	// maxBody is the largest JSON body: a service with a thousand
	// environment variables has about 100 KB. Image archives are streams and
	// have no bound here.
	maxBody = 4 << 20
)

type lifetimeKey struct{}

// Serve answers requests on l until ctx ends, then ends all streams, waits for
// the handlers and closes l. It returns nil when ctx ended. Call it once per
// listener; several listeners may be served at the same time.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	base := context.WithValue(ctx, lifetimeKey{}, ctx)
	hs := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTimeout,
		BaseContext:       func(net.Listener) context.Context { return base },
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
	failed := make(chan error, 1) // closed never; holds the one result of hs.Serve
	go func() { failed <- hs.Serve(l) }()

	select {
	case err := <-failed:
		return fmt.Errorf("serve api on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	err := hs.Shutdown(grace)
	if errors.Is(err, context.DeadlineExceeded) {
		s.cfg.Log.Warn("api requests did not end in time", weft.KeyErr, err)
		err = hs.Close()
	}
	if serr := <-failed; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	s.running.Wait()
	return err
}

// lifetime is the context of the server that took the request: work that
// outlives its request (a detached exec) ends with it.
func lifetime(r *http.Request) context.Context {
	if ctx, ok := r.Context().Value(lifetimeKey{}).(context.Context); ok {
		return ctx
	}
	return context.WithoutCancel(r.Context())
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.running.Add(1)
	defer s.running.Done()
	start := time.Now()
	sw := &statusWriter{ResponseWriter: w}
	defer func() {
		if p := recover(); p != nil {
			if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(p)
			}
			s.cfg.Log.Error("api handler panicked", "path", r.URL.Path, weft.KeyErr, p, "stack", string(debug.Stack()))
			if sw.status == 0 {
				writeError(sw, errors.New("internal error: the daemon's log has the details"))
			}
		}
	}()

	h := w.Header()
	h.Set("Api-Version", maxVersion.String())
	h.Set("Docker-Experimental", "false")
	h.Set("Ostype", "linux")
	h.Set("Server", "Weft/"+s.cfg.Version+" (linux)")

	err := s.dispatch(sw, r)
	if err != nil {
		status := statusOf(err)
		if status == http.StatusInternalServerError {
			s.cfg.Log.Error("api request failed", "method", r.Method, "path", r.URL.Path, weft.KeyErr, err)
		}
		if sw.status == 0 {
			writeError(sw, err)
		}
	}
	s.cfg.Log.Debug("api request", "method", r.Method, "path", r.URL.Path,
		"status", sw.status, "took", time.Since(start))
}

// statusWriter remembers whether an answer has begun.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController reach Flush and Hijack.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// interfaceAddrs asks the kernel for the addresses of a link.
func interfaceAddrs(name string) ([]netip.Addr, error) {
	ifc, err := net.InterfaceByName(name)
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", name, err)
	}
	list, err := ifc.Addrs()
	if err != nil {
		return nil, fmt.Errorf("list addresses of interface %s: %w", name, err)
	}
	var out []netip.Addr
	for _, a := range list {
		p, err := netip.ParsePrefix(strings.TrimSpace(a.String()))
		if err != nil {
			return nil, fmt.Errorf("parse address of interface %s: %w", name, err)
		}
		out = append(out, p.Addr().Unmap())
	}
	return out, nil
}
