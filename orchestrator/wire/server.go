package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Times of the server; our own choices.
const (
	// stopGrace is what calls get to end by themselves when the node stops.
	stopGrace = 2 * time.Second
	// maxConnAge cuts standing connections now and then, so that a renewed
	// certificate replaces the one the connection was made with. Streams on
	// it end with weft.ErrUnavailable and are opened again.
	maxConnAge      = 12 * time.Hour
	maxConnAgeGrace = time.Minute
	// A client pings every 10 s while it has a call open (see dial); twice
	// as often is tolerated.
	minPing = 5 * time.Second
	// A client that is gone without a word is noticed within serverPing +
	// pingTimeout.
	serverPing  = 10 * time.Second
	pingTimeout = 3 * time.Second
)

// AdmitFunc admits a node that came by ALPN weft-join; see Membership.Admit.
type AdmitFunc func(ctx context.Context, r AdmitRequest, remote netip.Addr) (AdmitResponse, error)

// ServerConfig says what a node serves on its cluster port. A nil
// implementation is not served: callers meet weft.ErrUnavailable, or, on
// Raft and join, a closed connection.
type ServerConfig struct {
	Credentials *ca.Credentials
	Control     Control    // managers
	Dispatcher  Dispatcher // managers
	Membership  Membership // managers
	Agent       Agent      // every node
	Raft        *Raft      // managers
	Join        AdmitFunc  // managers; see AdmitVia
	// Check is asked on every call after the certificate was found good; an
	// error refuses the call with its text. A manager refuses removed nodes
	// here, whose certificates live on. nil = the certificate suffices.
	Check func(ctx context.Context, caller ca.Identity) error
	Now   func() time.Time // nil = time.Now
	Log   *slog.Logger
	// HandshakeTimeout bounds the TLS handshake, and the request of a
	// joining node: longer tolerates slower links, and lets idle attackers
	// hold more sockets. Default 10 s.
	HandshakeTimeout time.Duration
	// MaxHandshakes bounds connections that have proven nothing yet; the
	// oldest makes room for a new one. Default 256.
	MaxHandshakes int
	// MaxJoins bounds admissions under way; more are told to come again.
	// Default 32.
	MaxJoins int
}

// Validate names the first field that is wrong.
func (c ServerConfig) Validate() error {
	switch {
	case c.Credentials == nil:
		return fmt.Errorf("wire server: Credentials is missing: %w", weft.ErrInvalid)
	case c.Log == nil:
		return fmt.Errorf("wire server: Log is missing: %w", weft.ErrInvalid)
	case c.HandshakeTimeout < 0, c.MaxHandshakes < 0, c.MaxJoins < 0:
		return fmt.Errorf("wire server: HandshakeTimeout, MaxHandshakes and MaxJoins must not be negative: %w", weft.ErrInvalid)
	}
	return nil
}

func (c ServerConfig) withDefaults() ServerConfig {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = handshakeTimeout
	}
	if c.MaxHandshakes == 0 {
		c.MaxHandshakes = 256
	}
	if c.MaxJoins == 0 {
		c.MaxJoins = 32
	}
	return c
}

// Listen opens the cluster port. A port that is taken is weft.ErrConflict.
func Listen(ctx context.Context, addr netip.AddrPort) (net.Listener, error) {
	lc := net.ListenConfig{Control: resendSoon}
	lc.SetMultipathTCP(false) // which Go would choose, takes no such setting, and nobody here dials
	ln, err := lc.Listen(ctx, "tcp", addr.String())
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("listen on cluster port %d/tcp (%s): another process holds it; stop that process (ss -ltnp 'sport = :%d' names it) or choose another port with --listen-addr: %w: %w",
			addr.Port(), addr, addr.Port(), err, weft.ErrConflict)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("listen on cluster port %s: this host has no address %s; give one of its own with --listen-addr: %w: %w", addr, addr.Addr(), err, weft.ErrInvalid)
	case err != nil:
		return nil, fmt.Errorf("listen on cluster port %s: %w", addr, err)
	}
	return ln, nil
}

// Server serves one node's cluster port. Make it with NewServer.
type Server struct {
	cfg  ServerConfig
	tls  *tls.Config
	mux  *mux
	join joinServer
}

// NewServer checks the configuration. It starts nothing.
func NewServer(cfg ServerConfig) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	return &Server{
		cfg:  cfg,
		tls:  cfg.Credentials.ServerConfig(),
		mux:  newMux(cfg.MaxHandshakes),
		join: joinServer{admit: cfg.Join, slots: make(chan struct{}, cfg.MaxJoins)},
	}, nil
}

// Stats counts what came to the port since the start.
func (s *Server) Stats() Stats { return s.mux.stats() }

// Run serves ln until ctx ends, then closes it, ends all calls (their contexts
// are cancelled) and returns nil; it returns an error when accepting fails for
// good. It owns ln. Run may be called once.
func (s *Server) Run(ctx context.Context, ln net.Listener) error {
	serving, cancel := context.WithCancel(ctx)
	defer cancel()
	g := s.newGRPC(serving)
	calls := newQueue(ln.Addr())
	var eg errgroup.Group
	eg.Go(func() error {
		// Serve returns when calls is closed, below.
		if err := g.Serve(calls); err != nil && !errors.Is(err, grpc.ErrServerStopped) && !errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("serve calls: %w", err)
		}
		return nil
	})
	eg.Go(func() error {
		defer cancel() // without a port the rest has no purpose
		return s.accept(serving, ln, calls)
	})
	eg.Go(func() error {
		<-serving.Done()
		err := ignoreClosed(ln.Close())
		stopGRPC(g)
		return errors.Join(err, calls.Close())
	})
	return eg.Wait()
}

// stopGRPC lets calls end for stopGrace and then cuts them.
func stopGRPC(g *grpc.Server) {
	t := time.AfterFunc(stopGrace, g.Stop)
	defer t.Stop()
	g.GracefulStop()
}

func (s *Server) newGRPC(serving context.Context) *grpc.Server {
	g := grpc.NewServer(
		grpc.Creds(handshaken{}),
		grpc.ForceServerCodecV2(codec{}),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxSendMsgSize(maxAnswer),
		grpc.MaxConcurrentStreams(1024), // of one connection, that is of one node
		grpc.MaxHeaderListSize(64<<10),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: serverPing, Timeout: pingTimeout,
			MaxConnectionAge: maxConnAge, MaxConnectionAgeGrace: maxConnAgeGrace,
		}),
	)
	gd := &guard{now: s.cfg.Now, check: s.cfg.Check, serving: serving}
	if s.cfg.Control != nil {
		g.RegisterService(controlDesc(), &bound[Control]{impl: s.cfg.Control, guard: gd})
	}
	if s.cfg.Dispatcher != nil {
		g.RegisterService(dispatcherDesc(), &bound[Dispatcher]{impl: s.cfg.Dispatcher, guard: gd})
	}
	if s.cfg.Membership != nil {
		g.RegisterService(membershipDesc(), &bound[Membership]{impl: s.cfg.Membership, guard: gd})
	}
	if s.cfg.Agent != nil {
		g.RegisterService(agentDesc(), &bound[Agent]{impl: s.cfg.Agent, guard: gd})
	}
	return g
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
