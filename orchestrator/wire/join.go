package wire

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Bounds of a join.
const (
	joinDialTimeout = 5 * time.Second
	// handshakeTimeout bounds the handshake of a join with one who is there, and a
	// server's: a busy manager takes its time, and has as long as it gives itself.
	handshakeTimeout = 10 * time.Second
	// joinTimeout bounds the leader's decision, which waits for a majority,
	// and an election before it.
	joinTimeout = 30 * time.Second
	// maxJoinAnswer: managers, pools and certificates are some kilobytes.
	maxJoinAnswer = 1 << 20
)

// JoinParams is a node's wish to become a member.
type JoinParams struct {
	Remotes      []string // HOST[:PORT] of managers, tried in order; default port weft.ClusterPort
	Token        string
	Hostname     string
	Advertise    netip.AddrPort // an unspecified address = the one that the manager sees; invalid = that at weft.ClusterPort
	DataPath     netip.Addr     // invalid = as Advertise
	Availability weft.Availability
	Now          func() time.Time // nil = time.Now
}

// Joined is a new membership. Bundle can be saved and used.
type Joined struct {
	AdmitResponse
	Bundle ca.Bundle
	Via    netip.AddrPort // the manager that answered
}

// Join makes this node a member: it finds a manager that proves to be of the
// token's cluster, shows the token and gets a certificate. It blocks for at
// most joinDialTimeout for each address that does not answer, handshakeTimeout for
// each that is no manager, and joinTimeout for the one that is.
//
// Errors: weft.ErrInvalid for a malformed token or one of another cluster
// (then also ca.ErrOtherCluster); the manager's own words when it refused the
// token; weft.ErrUnavailable, with every address and its cause, when no
// manager could be reached.
func Join(ctx context.Context, p JoinParams) (Joined, error) {
	if p.Now == nil {
		p.Now = time.Now
	}
	tok, err := ca.ParseToken(p.Token)
	if err != nil {
		return Joined{}, err
	}
	if len(p.Remotes) == 0 {
		return Joined{}, fmt.Errorf("join cluster: give the address of at least one manager: %w", weft.ErrInvalid)
	}
	remotes := make([]string, len(p.Remotes))
	for i, r := range p.Remotes {
		if remotes[i], err = withPort(r); err != nil {
			return Joined{}, err
		}
	}
	key, csr, err := ca.NewCSR()
	if err != nil {
		return Joined{}, err
	}
	var failed []string
	otherCluster := false
	for _, remote := range remotes {
		c, err := dialJoin(ctx, remote, ca.JoinConfig(tok, p.Now))
		if err != nil {
			if ctx.Err() != nil {
				return Joined{}, fmt.Errorf("join cluster at %s: %w", remote, ctx.Err())
			}
			otherCluster = otherCluster || errors.Is(err, ca.ErrOtherCluster)
			failed = append(failed, remote+": "+err.Error())
			continue
		}
		// From here on the request may have been carried out: no other
		// manager is asked, lest the node be admitted twice.
		return askToJoin(ctx, c, tok, p, ca.Bundle{Key: key, Cert: csr})
	}
	causes := strings.Join(failed, "; ")
	if otherCluster {
		return Joined{}, fmt.Errorf("join cluster: %w than the manager at that address; ask for the token with 'weft swarm join-token' there (%s): %w", ca.ErrOtherCluster, causes, weft.ErrInvalid)
	}
	return Joined{}, fmt.Errorf("join cluster: no manager could be reached (%s); check addresses and ports, that weft runs there and that no firewall is in between: %w", causes, weft.ErrUnavailable)
}

func withPort(remote string) (string, error) {
	if a, err := netip.ParseAddr(strings.Trim(remote, "[]")); err == nil {
		return netip.AddrPortFrom(a, weft.ClusterPort).String(), nil
	}
	host, port, err := net.SplitHostPort(remote)
	if err != nil && !strings.Contains(remote, ":") {
		host, port, err = remote, strconv.Itoa(int(weft.ClusterPort)), nil
	}
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || n == 0 || host == "" {
		return "", fmt.Errorf("manager address %q must be HOST or HOST:PORT: %w", remote, weft.ErrInvalid)
	}
	return net.JoinHostPort(host, port), nil
}

// dialJoin has a limit for each of the two steps, where tls.Dialer has one for both. cfg
// checks the manager by its certificate's root and names no server.
func dialJoin(ctx context.Context, remote string, cfg *tls.Config) (*tls.Conn, error) {
	plain, err := (&net.Dialer{Timeout: joinDialTimeout}).DialContext(ctx, "tcp", remote)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	c := tls.Client(plain, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		plain.Close()
		return nil, err
	}
	return c, nil
}

// askToJoin sends the request and checks the answer. b holds the key, and the
// request in the place of the certificate.
func askToJoin(ctx context.Context, c *tls.Conn, tok ca.Token, p JoinParams, b ca.Bundle) (Joined, error) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	remote := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	lost := func(err error) error {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("join cluster at %s: no answer to the request, which may yet have been carried out; try again, and remove the node that 'weft node ls' then shows as down: %w: %w", remote, err, weft.ErrUnavailable)
	}
	c.SetDeadline(time.Now().Add(joinTimeout))
	req := AdmitRequest{
		Version: ProtocolVersion, Token: tok.String(), CSR: b.Cert, Hostname: p.Hostname,
		Advertise: p.Advertise, DataPath: p.DataPath, Availability: p.Availability,
	}
	if err := writeFrame(c, req); err != nil {
		return Joined{}, lost(err)
	}
	var ans joinAnswer
	if err := readFrame(c, maxJoinAnswer, &ans); err != nil {
		return Joined{}, lost(err)
	}
	switch {
	case ans.Error != nil:
		return Joined{}, fromWire(*ans.Error)
	case ans.Admit == nil:
		return Joined{}, fmt.Errorf("join cluster at %s: the answer is empty: %w", remote, weft.ErrUnavailable)
	}
	j := Joined{AdmitResponse: *ans.Admit, Via: remote, Bundle: ca.Bundle{Cert: ans.Admit.Cert, Key: b.Key, CA: ans.Admit.CACert}}
	creds, err := ca.NewCredentials(j.Bundle, p.Now)
	if err != nil {
		return Joined{}, fmt.Errorf("join cluster at %s: %w", remote, err)
	}
	digest, err := ca.DigestOf(j.CACert)
	if err != nil || digest != tok.Digest {
		return Joined{}, fmt.Errorf("join cluster at %s: the answer's certificate authority is not the token's: %w", remote, weft.ErrForbidden)
	}
	if id := creds.Identity(); id.Node != j.Node || id.Role != j.Role || id.Cluster != j.Cluster.ID {
		return Joined{}, fmt.Errorf("join cluster at %s: the answer names %s %s, its certificate %s %s: %w", remote, j.Role, j.Node, id.Role, id.Node, weft.ErrForbidden)
	}
	return j, nil
}

// joinServer is the manager's side.
type joinServer struct {
	admit AdmitFunc
	slots chan struct{} // one token per admission under way; never closed
}

// serveJoin reads one request, answers it and closes. Until the request is
// read the connection can be evicted like one in handshake.
func (s *Server) serveJoin(ctx context.Context, c *tls.Conn, end func() bool) error {
	if s.join.admit == nil {
		end()
		return fmt.Errorf("nodes do not join here: %w", weft.ErrUnavailable)
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	c.SetDeadline(time.Now().Add(s.cfg.HandshakeTimeout))
	var req AdmitRequest
	err := readFrame(c, maxJoin, &req)
	if !end() {
		return errEvicted
	}
	if err != nil && !errors.Is(err, weft.ErrInvalid) {
		return err // it sent nothing whole: nobody to answer to
	}
	c.SetDeadline(time.Now().Add(joinTimeout))
	var ans joinAnswer
	if err == nil {
		ans.Admit, err = s.admit(ctx, req, c.RemoteAddr())
	}
	if err != nil {
		w, _ := toWire(err)
		ans = joinAnswer{Error: &w}
	}
	s.mux.joins.Add(1)
	if err := writeFrame(c, ans); err != nil {
		return err
	}
	c.Close()
	return nil
}

func (s *Server) admit(ctx context.Context, req AdmitRequest, from net.Addr) (*AdmitResponse, error) {
	if req.Version != ProtocolVersion {
		return nil, fmt.Errorf("admit node %s: it speaks protocol version %d, this cluster %d; run the same release of weft on all nodes: %w", req.Hostname, req.Version, ProtocolVersion, weft.ErrUnsupported)
	}
	select {
	case s.join.slots <- struct{}{}:
		defer func() { <-s.join.slots }()
	default:
		return nil, fmt.Errorf("admit node %s: too many nodes are joining at once; try again: %w", req.Hostname, weft.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	remote, err := netip.ParseAddrPort(from.String())
	if err != nil {
		return nil, fmt.Errorf("admit node %s from %s: %w: %w", req.Hostname, from, err, weft.ErrInvalid)
	}
	resp, err := s.join.admit(ctx, req, remote.Addr().Unmap())
	if err != nil {
		return nil, err
	}
	return &resp, nil
}

// AdmitVia is the join handler of a manager: local admits when this manager
// leads, else c forwards to the one that does.
func AdmitVia(local Membership, c *Client) AdmitFunc {
	return func(ctx context.Context, r AdmitRequest, remote netip.Addr) (AdmitResponse, error) {
		resp, err := local.Admit(ctx, r, remote)
		if _, ok := asNotLeader(err); ok {
			return c.Admit(ctx, r, remote)
		}
		return resp, err
	}
}

// RenewVia is AdmitVia for this node's own certificate. A manager that leads signs
// without a connection, so that the only manager of a cluster can replace a
// certificate that has expired: no connection would be made with it.
func RenewVia(local Membership, c *Client, node weft.ID) func(ctx context.Context, csr []byte) (cert []byte, err error) {
	return func(ctx context.Context, csr []byte) ([]byte, error) {
		cert, err := local.Renew(ctx, node, csr)
		if _, ok := asNotLeader(err); ok {
			return c.Renew(ctx, node, csr)
		}
		return cert, err
	}
}

// A frame is a length (4 bytes, big endian) and that many bytes of CBOR.

func writeFrame(w io.Writer, v any) error {
	b, err := encode(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

func readFrame(r io.Reader, limit uint32, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return fmt.Errorf("read length of message: %w", err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > limit {
		return fmt.Errorf("read message: it has %d bytes, the limit is %d: %w", n, limit, weft.ErrInvalid)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return fmt.Errorf("read message of %d bytes: %w", n, err)
	}
	return decode(b, v)
}
