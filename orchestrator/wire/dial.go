package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Times of connections; our own choices.
const (
	// connectTimeout of one address. A round trip round the earth is 0.3 s
	// and a handshake takes two; a manager that is switched off must not use
	// up the time in which another could answer.
	connectTimeout = time.Second
	// clientPing is gRPC's minimum. A leader that vanished without a word is
	// noticed after clientPing + pingTimeout, or after pingTimeout when a
	// request is waiting (it is TCP_USER_TIMEOUT too).
	clientPing = 10 * time.Second
)

// target is a server: an address and what its certificate must say.
type target struct {
	addr netip.AddrPort
	peer ca.Peer
}

// conns keeps one connection per target.
type conns struct {
	creds *ca.Credentials

	// mu guards: open, closed.
	mu     sync.Mutex
	open   map[target]*grpc.ClientConn
	closed bool
}

func newConns(creds *ca.Credentials) *conns {
	return &conns{creds: creds, open: make(map[target]*grpc.ClientConn)}
}

var errClientStopped = fmt.Errorf("this node is stopping: %w", weft.ErrUnavailable)

// get is the connection to t; it dials when it is first used.
func (c *conns) get(t target) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClientStopped
	}
	if cc := c.open[t]; cc != nil {
		return cc, nil
	}
	c.sweepLocked()
	cc, err := grpc.NewClient("passthrough:///"+t.addr.String(),
		grpc.WithTransportCredentials(&tlsCreds{cfg: c.creds.ClientConfig(ca.ProtoGRPC, t.peer)}),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return dialer(0).DialContext(ctx, "tcp", addr)
		}),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.MaxCallRecvMsgSize(maxAnswer), grpc.MaxCallSendMsgSize(maxRequest)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: connectTimeout, Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: clientPing, Timeout: pingTimeout}),
		grpc.WithStatsHandler(sentWatch{}),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", t.addr, err)
	}
	c.open[t] = cc
	return cc, nil
}

// sweepLocked closes connections without a transport: they carry no call, or
// one that will fail as never sent and is tried again.
func (c *conns) sweepLocked() {
	for t, cc := range c.open {
		if st := cc.GetState(); st == connectivity.TransientFailure || st == connectivity.Idle {
			delete(c.open, t)
			cc.Close()
		}
	}
}

// run closes all connections when ctx ends; calls after that fail.
func (c *conns) run(ctx context.Context) error {
	<-ctx.Done()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	var err error
	for t, cc := range c.open {
		delete(c.open, t)
		err = errors.Join(err, cc.Close())
	}
	return err
}

// tlsCreds are the client's gRPC credentials. gRPC's own would set host names
// and hide the cause of a failed handshake.
type tlsCreds struct{ cfg *tls.Config }

func (t *tlsCreds) ClientHandshake(ctx context.Context, _ string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	tc := tls.Client(c, t.cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, nil, err
	}
	info, err := infoOf(tc.ConnectionState().PeerCertificates[0])
	if err != nil {
		tc.Close()
		return nil, nil, err
	}
	return tc, info, nil
}

func (t *tlsCreds) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials only call")
}

func (t *tlsCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
func (t *tlsCreds) Clone() credentials.TransportCredentials { return &tlsCreds{cfg: t.cfg} }
func (t *tlsCreds) OverrideServerName(string) error         { return nil }

// attempt is what became known of one try of a call.
type attempt struct {
	sent    atomic.Bool // a header left this process: the call may have been carried out
	trailer metadata.MD
}

type attemptKey struct{}

// sentWatch notes in a call's attempt that it left this process.
type sentWatch struct{}

func (sentWatch) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutHeader); ok {
		if a, ok := ctx.Value(attemptKey{}).(*attempt); ok {
			a.sent.Store(true)
		}
	}
}
func (sentWatch) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (sentWatch) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (sentWatch) HandleConn(context.Context, stats.ConnStats)                       {}

// verdict of one try.
type verdict int

const (
	answered   verdict = iota // the called method spoke: err is its answer
	redirected                // not carried out; err is NotLeader
	untouched                 // the call surely was not carried out; another server may do
	unknown                   // the connection was lost after the call had left
	abandoned                 // the caller's context ended
)

// judge says what a failed try means. err is gRPC's error.
func judge(ctx context.Context, a *attempt, err error) (verdict, error) {
	if far := fromTrailer(a.trailer); far != nil {
		if _, ok := asNotLeader(far); ok {
			return redirected, far
		}
		return answered, far
	}
	st := status.Convert(err)
	switch {
	case ctx.Err() != nil:
		return abandoned, ctx.Err()
	case st.Code() == codes.ResourceExhausted:
		// Larger than the limits at the top of codec.go, or than those of
		// the server: no other manager has others.
		return answered, textError("the message is too large: "+st.Message(), weft.ErrInvalid)
	case !a.sent.Load():
		return untouched, textError(st.Message(), weft.ErrUnavailable)
	case st.Code() == codes.Unimplemented:
		return untouched, textError("the call is not served there: "+st.Message(), weft.ErrUnavailable)
	case st.Code() == codes.Internal:
		// Broken framing, or an answer that cannot be decoded: repeating
		// brings the same.
		return answered, textError("the answer cannot be read; the request may have been carried out: "+st.Message(), weft.ErrUnavailable)
	}
	return unknown, textError(st.Message(), weft.ErrUnavailable)
}
