package wire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Finding the leader; our own choices.
const (
	// electionPause between two rounds over all managers: an election takes
	// 0.3 to 0.7 s.
	electionPause = 100 * time.Millisecond
	// maxHops of redirects in a row, before the managers are asked one by one.
	maxHops = 5
)

// ClientConfig says whom a client asks.
type ClientConfig struct {
	Credentials *ca.Credentials
	// Managers are the cluster ports of the managers as last told; called
	// at each search, from many goroutines.
	Managers func() []netip.AddrPort
	Log      *slog.Logger
	// FindLeader bounds the search for a leader: longer rides out slower
	// elections, shorter fails sooner when a majority is gone. It does not
	// bound the call once the leader has it. Default 3 s.
	FindLeader time.Duration
}

// Validate names the first field that is wrong.
func (c ClientConfig) Validate() error {
	switch {
	case c.Credentials == nil:
		return fmt.Errorf("wire client: Credentials is missing: %w", weft.ErrInvalid)
	case c.Managers == nil:
		return fmt.Errorf("wire client: Managers is missing: %w", weft.ErrInvalid)
	case c.Log == nil:
		return fmt.Errorf("wire client: Log is missing: %w", weft.ErrInvalid)
	case c.FindLeader < 0:
		return fmt.Errorf("wire client: FindLeader must not be negative: %w", weft.ErrInvalid)
	}
	return nil
}

// Client is Control, Dispatcher and Membership everywhere: it asks the leader.
//
// A call that no manager has begun is tried again until FindLeader is over;
// then it fails with weft.ErrUnavailable and exactly weft.NoLeader as text.
// A call whose connection was lost after it had left is repeated only when it
// changes nothing; else the error (weft.ErrUnavailable) says that it may have
// been carried out.
type Client struct {
	cfg   ClientConfig
	conns *conns

	// mu guards: leader.
	mu     sync.Mutex
	leader netip.AddrPort // that answered last; invalid = unknown
}

// NewClient checks the configuration. It dials nothing.
func NewClient(cfg ClientConfig) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.FindLeader == 0 {
		cfg.FindLeader = 3 * time.Second
	}
	return &Client{cfg: cfg, conns: newConns(cfg.Credentials)}, nil
}

// Run closes all connections when ctx ends. Calls may be made before it runs;
// after it they fail with weft.ErrUnavailable.
func (c *Client) Run(ctx context.Context) error { return c.conns.run(ctx) }

// search is the state of one search for the leader.
type search struct {
	deadline time.Time
	next     netip.AddrPort   // to be asked now
	round    []netip.AddrPort // still to be asked in this round
	hops     int
	failed   []netip.AddrPort // did not answer in this round
	cause    error            // newest, for the log
}

// toLeader runs try against one manager after the other until one has an
// answer. safe: the call changes nothing, so it may be repeated.
func (c *Client) toLeader(ctx context.Context, safe bool, try func(context.Context, *grpc.ClientConn, *attempt) error) error {
	s := search{deadline: time.Now().Add(c.cfg.FindLeader), next: c.knownLeader()}
	for {
		if !s.next.IsValid() && !c.advance(ctx, &s) {
			return c.noLeader(ctx, &s)
		}
		addr := s.next
		s.next = netip.AddrPort{}
		v, err := c.tryAt(ctx, addr, try)
		switch v {
		case answered:
			c.setLeader(addr)
			return err
		case abandoned:
			return fmt.Errorf("ask the leader: %w", err)
		case unknown:
			c.forgetLeader(addr)
			if !safe {
				return textError(fmt.Sprintf("the connection to the leader %s was lost before it answered; the request may or may not have been carried out: look before you repeat it (%v)", addr, err), weft.ErrUnavailable)
			}
			s.failed = append(s.failed, addr)
		case untouched:
			c.forgetLeader(addr)
			s.failed = append(s.failed, addr)
		case redirected:
			c.forgetLeader(addr)
			nl, _ := asNotLeader(err)
			// A leader that is known to be dead is named until the next
			// election: do not run in circles.
			if nl.Leader.IsValid() && nl.Leader != addr && s.hops < maxHops && !slices.Contains(s.failed, nl.Leader) {
				s.hops++
				s.next = nl.Leader
			}
		}
		s.cause = fmt.Errorf("manager %s: %w", addr, err)
		if time.Now().After(s.deadline) {
			return c.noLeader(ctx, &s)
		}
	}
}

// advance chooses the next manager of the round, or begins a new round after a
// pause. It reports false when time is up.
func (c *Client) advance(ctx context.Context, s *search) bool {
	if len(s.round) == 0 {
		first := s.cause == nil
		if !first && (time.Until(s.deadline) < electionPause || !pause(ctx, electionPause)) {
			return false
		}
		s.round = slices.Clone(c.cfg.Managers())
		if len(s.round) == 0 {
			s.cause = errors.New("no manager is known")
			return c.advanceLater(ctx, s)
		}
		s.hops, s.failed = 0, nil
	}
	s.next, s.round = s.round[0], s.round[1:]
	return true
}

// advanceLater waits for a first manager to become known.
func (c *Client) advanceLater(ctx context.Context, s *search) bool {
	for time.Until(s.deadline) > electionPause && pause(ctx, electionPause) {
		if m := c.cfg.Managers(); len(m) > 0 {
			s.next, s.round = m[0], slices.Clone(m[1:])
			return true
		}
	}
	return false
}

func (c *Client) tryAt(ctx context.Context, addr netip.AddrPort, try func(context.Context, *grpc.ClientConn, *attempt) error) (verdict, error) {
	t := target{addr: addr, peer: ca.Peer{Manager: true}}
	cc, err := c.conns.get(t)
	if err != nil {
		return answered, err
	}
	a := &attempt{}
	err = try(context.WithValue(ctx, attemptKey{}, a), cc, a)
	if err == nil {
		return answered, nil
	}
	var own *callerError
	if errors.As(err, &own) {
		return answered, own.err
	}
	v, err := judge(ctx, a, err)
	if v == untouched {
		cc.ResetConnectBackoff() // the search has a pace of its own
	}
	return v, err
}

// noLeader is the answer when the search is over. Its causes go to the log:
// the text is fixed.
func (c *Client) noLeader(ctx context.Context, s *search) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("ask the leader: %w", ctx.Err())
	}
	c.cfg.Log.Warn("no leader found", weft.KeyErr, s.cause)
	return textError(weft.NoLeader, weft.ErrUnavailable)
}

func (c *Client) knownLeader() netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leader
}

func (c *Client) setLeader(a netip.AddrPort) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leader = a
}

func (c *Client) forgetLeader(a netip.AddrPort) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leader == a {
		c.leader = netip.AddrPort{}
	}
}

// callerError is an error of the caller's own function, which is passed
// through as it is.
type callerError struct{ err error }

func (e *callerError) Error() string { return e.err.Error() }
func (e *callerError) Unwrap() error { return e.err }

// ask makes a call that changes something.
func ask[Ans, Req any](ctx context.Context, c *Client, method string, r Req) (Ans, error) {
	return unaryCall[Ans](ctx, c, false, method, r)
}

// read makes a call that changes nothing.
func read[Ans, Req any](ctx context.Context, c *Client, method string, r Req) (Ans, error) {
	return unaryCall[Ans](ctx, c, true, method, r)
}

func unaryCall[Ans, Req any](ctx context.Context, c *Client, safe bool, method string, r Req) (Ans, error) {
	var ans Ans
	err := c.toLeader(ctx, safe, func(ctx context.Context, cc *grpc.ClientConn, a *attempt) error {
		ans = *new(Ans) // of this try only
		return cc.Invoke(ctx, method, &r, &ans, grpc.Trailer(&a.trailer))
	})
	return ans, err
}

// openStream begins a call that is answered with many messages. The stream
// ends with ctx: cancel it when done, or read to the end.
func openStream[Req any](ctx context.Context, cc *grpc.ClientConn, method string, r Req) (grpc.ClientStream, error) {
	s, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return nil, err
	}
	if err := s.SendMsg(&r); err != nil && !errors.Is(err, io.EOF) { // EOF: the cause comes by RecvMsg
		return nil, err
	}
	return s, s.CloseSend()
}

// eachMessage passes every message of a stream to f and returns at its end,
// or at f's first error with a callerError.
func eachMessage[Msg any](s grpc.ClientStream, a *attempt, f func(Msg) error) error {
	for {
		var m Msg
		err := s.RecvMsg(&m)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			a.trailer = s.Trailer()
			return err
		}
		if err := f(m); err != nil {
			return &callerError{err}
		}
	}
}
