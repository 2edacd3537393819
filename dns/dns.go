// Package dns answers the names of a cluster to its containers and forwards
// all others to the host's resolvers.
//
// It owns the immutable lookup tables (Snapshot), the decision what a name
// means to a task (pure), the forwarding policy with its cache, and the server
// loop on sockets that others opened: the package never enters a namespace. It
// does not know where records come from.
//
// One Server serves all tasks of a node. The agent calls Serve once per task,
// each call in a goroutine of its own, and Update whenever Records have changed. Answers to cluster names take no lock: they read the Snapshot
// through one atomic pointer.
package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weftnet/weft"
)

// Numbers of standards.
const (
	// minUDPSize is what every client takes without EDNS (RFC 1035 section
	// 4.2.1).
	minUDPSize = 512
	// ednsSize is what we offer upstream: it never fragments on an IPv6
	// path of minimal MTU (RFC 9715 section 3.1 names 1232 as common).
	ednsSize = 1232
)

// Our own choices.
const (
	// vipTTL is the lifetime in seconds of an answer that a changing set of
	// tasks does not touch; taskTTL of one that it does. Proxies and virtual
	// machines of languages that cache names must not hold a dead address
	// for long; addresses rest at least as long as they may.
	vipTTL  = uint32(weft.ServiceNameTTL / time.Second)
	taskTTL = uint32(weft.TaskNameTTL / time.Second)
	// maxUDPAnswer bounds an answer on UDP even if the client takes more:
	// loopback has no fragments, but a bigger answer is better off on TCP.
	maxUDPAnswer = 4096
	// maxUDPQuery bounds a query on UDP. A real one has under 300 bytes.
	maxUDPQuery = 1024
	// maxTCPQuery bounds one on TCP: who may keep a connection waiting for
	// the rest of a question must not hold 64 KiB by it.
	maxTCPQuery = 4096
	// maxTCPConns and maxPipelined bound what one task can hold open: a
	// connection costs two goroutines' stacks at most, a pipelined query one.
	maxTCPConns  = 16
	maxPipelined = 16
	// maxTaskForwards bounds one task's forwards under way, so that a
	// runaway task meets its own limit before the node's.
	maxTaskForwards = 128
	// acceptPause follows an accept that failed: what it lacks does not come back
	// by asking at once, and a client's handshake is done already.
	acceptPause = 50 * time.Millisecond
)

// Config of a Server. The zero value of every field but Log means its default.
type Config struct {
	Log *slog.Logger
	// ResolvConf is the host's resolver file. It is looked at again at most
	// once a second, when a name is forwarded. Default "/etc/resolv.conf".
	ResolvConf string
	// Exclude are nameservers never forwarded to because they would lead
	// back here. Default 127.0.0.11.
	Exclude []netip.Addr
	// Dial opens the way to an upstream on the host's side: an overlay that
	// covers an upstream's address must not cut it off. Those that are near a
	// task are asked by its View. Default: a net.Dialer. It must be safe for
	// concurrent use.
	Dial Dial
	// TryTimeout bounds one question to one upstream, Timeout all of them
	// together; afterwards the client gets SERVFAIL. Defaults 1.5 s and 4 s:
	// the usual client gives up after 5 s.
	TryTimeout time.Duration
	Timeout    time.Duration
	// MaxForwards bounds external questions under way on the node; more get
	// SERVFAIL at once. Default 1024.
	MaxForwards int
	// CacheEntries bounds the cache of external answers, shared by the
	// node's tasks. Default 4096; an entry takes some 500 bytes, 4 KiB and its
	// name at most.
	CacheEntries int
	// TCPIdle closes a TCP connection without a query. Default 10 s
	// (RFC 7766 section 6.2.3 asks for seconds).
	TCPIdle time.Duration
}

// Dial opens a socket to a nameserver, network "udp" or "tcp".
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

func (c *Config) setDefaults() {
	if c.ResolvConf == "" {
		c.ResolvConf = "/etc/resolv.conf"
	}
	if c.Exclude == nil {
		c.Exclude = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 11})}
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{}).DialContext
	}
	if c.TryTimeout == 0 {
		c.TryTimeout = 1500 * time.Millisecond
	}
	if c.Timeout == 0 {
		c.Timeout = 4 * time.Second
	}
	if c.MaxForwards == 0 {
		c.MaxForwards = 1024
	}
	if c.CacheEntries == 0 {
		c.CacheEntries = 4096
	}
	if c.TCPIdle == 0 {
		c.TCPIdle = 10 * time.Second
	}
}

// Validate reports the first field out of its bounds, wrapping
// weft.ErrInvalid.
func (c Config) Validate() error {
	switch {
	case c.Log == nil:
		return fmt.Errorf("dns config: Log is nil: %w", weft.ErrInvalid)
	case c.TryTimeout < 0 || c.Timeout < 0 || c.TCPIdle < 0:
		return fmt.Errorf("dns config: a timeout is negative: %w", weft.ErrInvalid)
	case c.MaxForwards < 0 || c.CacheEntries < 0:
		return fmt.Errorf("dns config: MaxForwards or CacheEntries is negative: %w", weft.ErrInvalid)
	}
	return nil
}

// Server answers for all tasks of a node. Its methods may be called from any
// goroutine.
type Server struct {
	cfg   Config
	snap  atomic.Pointer[Snapshot]
	fwd   *forwarder
	past  past
	stats counters
	// bursts are *burst that no session reads into.
	bursts sync.Pool

	// mu guards build.
	mu    sync.Mutex
	build *builder
}

// New checks cfg and returns a Server with an empty Snapshot. It does no I/O
// and starts nothing.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.setDefaults()
	s := &Server{cfg: cfg, build: newBuilder(), past: past{names: map[string]time.Time{}}, bursts: sync.Pool{New: func() any { return newBurst() }}}
	s.fwd = newForwarder(cfg, &s.stats)
	s.snap.Store(s.build.last)
	return s, nil
}

// Update makes r the source of all answers from now on. A question under way is
// answered wholly from the old or wholly from the new. What r shares with the last
// ones costs a look; r must not be written any more.
func (s *Server) Update(r Records) {
	s.mu.Lock()
	defer s.mu.Unlock()
	snap := s.build.update(r)
	if old := s.snap.Swap(snap); old != snap {
		s.past.turn(old, snap, time.Now())
	}
}

// HostSearch are the search domains of the host's resolver file as it is now; none
// if it cannot be read. It may block for as long as reading the file takes.
func (s *Server) HostSearch() []string { return s.fwd.up.searchDomains(time.Now()) }

// Stats are counts since the Server was made.
type Stats struct {
	Queries   uint64 // well-formed questions
	Local     uint64 // answered from the Snapshot, NXDOMAIN and NODATA included
	Forwarded uint64 // external questions, cache hits included
	CacheHits uint64
	Malformed uint64 // packets dropped because they are no question
	Refused   uint64 // connections or questions over a limit
	Upstream  uint64 // tries of an upstream that failed
	ServFail  uint64 // external questions no upstream answered in time
}

type counters struct {
	queries, local, forwarded, cacheHits, malformed, refused, upstream, servFail atomic.Uint64
}

// Stats returns the present counts; they are not read in one instant.
func (s *Server) Stats() Stats {
	c := &s.stats
	return Stats{
		Queries: c.queries.Load(), Local: c.local.Load(), Forwarded: c.forwarded.Load(),
		CacheHits: c.cacheHits.Load(), Malformed: c.malformed.Load(), Refused: c.refused.Load(),
		Upstream: c.upstream.Load(), ServFail: c.servFail.Load(),
	}
}
