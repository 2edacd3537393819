package ca

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/weftnet/weft"
)

// Application protocols of the cluster port (RFC 7301).
const (
	ProtoGRPC = "h2"        // RFC 9113 section 3.2: HTTP/2 over TLS
	ProtoRaft = "weft-raft" // between managers
	ProtoJoin = "weft-join" // the only one without a client certificate
)

// Bundle is a node's identity as bytes.
type Bundle struct {
	Cert []byte // PEM, the node's certificate
	Key  []byte // PEM, PKCS #8; a secret
	CA   []byte // PEM, the root
}

// Credentials is a node's identity in use. A Renewal replaces its certificate
// while connections are made; those that stand keep the one they were made
// with.
type Credentials struct {
	id      Identity
	root    *x509.Certificate
	roots   *x509.CertPool
	now     func() time.Time
	current atomic.Pointer[tls.Certificate]
}

// NewCredentials checks that certificate, key and root belong together. now is
// the clock against which peers' certificates are judged, usually time.Now. It
// does not refuse an expired certificate of its own: peers will, and a node
// must be able to start and say so.
func NewCredentials(b Bundle, now func() time.Time) (*Credentials, error) {
	root, err := parseCert(b.CA)
	if err != nil {
		return nil, fmt.Errorf("read the cluster's certificate authority: %w", err)
	}
	c := &Credentials{root: root, roots: x509.NewCertPool(), now: now}
	c.roots.AddCert(root)
	cert, id, err := c.check(b)
	if err != nil {
		return nil, err
	}
	c.id = id
	c.current.Store(cert)
	return c, nil
}

// Identity of this node.
func (c *Credentials) Identity() Identity { return c.id }

// CA is the root certificate (PEM).
func (c *Credentials) CA() []byte { return encodeBlock(blockCert, c.root.Raw) }

// Validity of the certificate in use.
func (c *Credentials) Validity() (notBefore, notAfter time.Time) {
	leaf := c.current.Load().Leaf
	return leaf.NotBefore, leaf.NotAfter
}

// replace puts a renewed identity to use and into dir. It must be of the same
// node, role and cluster and under the same root, else weft.ErrInvalid. It is
// judged before it is saved and saved before it is used: when that fails, the old
// one stays in both places.
func (c *Credentials) replace(b Bundle, dir string) error {
	cert, id, err := c.check(b)
	if err != nil {
		return err
	}
	if id != c.id {
		return fmt.Errorf("replace certificate: the new one is for %s %s of cluster %s, this node is %s %s of cluster %s: %w",
			id.Role, id.Node, id.Cluster, c.id.Role, c.id.Node, c.id.Cluster, weft.ErrInvalid)
	}
	if err := Save(dir, b); err != nil {
		return err
	}
	c.current.Store(cert)
	return nil
}

// Expired is nil while the certificate in use is good by the clock of the
// credentials; then it is weft.ErrUnavailable and says what to do, because no
// other node talks to this one any more.
func (c *Credentials) Expired() error {
	_, notAfter := c.Validity()
	if !c.now().After(notAfter) {
		return nil
	}
	return fmt.Errorf("the certificate of this node expired on %s and other nodes refuse it: if the clock of this host is right, leave ('weft swarm leave --force') and join again: %w", notAfter.UTC().Format(time.DateTime+" MST"), weft.ErrUnavailable)
}

// check verifies a bundle against the root and makes a chain of it. The chain
// carries the root, because a joining node knows only the root's digest.
func (c *Credentials) check(b Bundle) (*tls.Certificate, Identity, error) {
	leaf, err := parseCert(b.Cert)
	if err != nil {
		return nil, Identity{}, fmt.Errorf("read node certificate: %w", err)
	}
	id, err := IdentityOf(leaf)
	if err != nil {
		return nil, Identity{}, err
	}
	key, err := parseKey(b.Key)
	if err != nil {
		return nil, Identity{}, fmt.Errorf("read key of node %s: %w", id.Node, err)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return nil, Identity{}, fmt.Errorf("read certificate of node %s: key and certificate do not belong together: %w", id.Node, weft.ErrInvalid)
	}
	if err := leaf.CheckSignatureFrom(c.root); err != nil {
		return nil, Identity{}, fmt.Errorf("check certificate of node %s: it is not signed by the cluster's authority: %w: %w", id.Node, err, weft.ErrInvalid)
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw, c.root.Raw}, PrivateKey: key, Leaf: leaf}, id, nil
}

// ServerConfig is the TLS of the cluster port: TLS 1.3 only; h2 and weft-raft
// demand a certificate of this cluster, weft-raft a manager's; weft-join asks
// for none. A client that offers no known protocol is refused before any
// certificate is sent.
func (c *Credentials) ServerConfig() *tls.Config {
	member := c.base()
	member.NextProtos = []string{ProtoGRPC, ProtoRaft}
	// RequireAny, because the verification by name and time below replaces
	// the standard one.
	member.ClientAuth = tls.RequireAnyClientCert
	member.ClientCAs = c.roots
	member.VerifyConnection = func(s tls.ConnectionState) error {
		id, err := c.Verify(s.PeerCertificates, x509.ExtKeyUsageClientAuth)
		if err == nil && s.NegotiatedProtocol == ProtoRaft && id.Role != weft.RoleManager {
			err = fmt.Errorf("accept raft connection: node %s is a worker: %w", id.Node, weft.ErrForbidden)
		}
		return err
	}
	join := c.base()
	join.NextProtos = []string{ProtoJoin}
	outer := c.base()
	outer.NextProtos = []string{ProtoGRPC, ProtoRaft, ProtoJoin}
	outer.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		switch {
		case slices.Contains(h.SupportedProtos, ProtoGRPC), slices.Contains(h.SupportedProtos, ProtoRaft):
			return member, nil
		case slices.Contains(h.SupportedProtos, ProtoJoin):
			return join, nil
		}
		return nil, fmt.Errorf("the client offers none of %s, %s, %s by ALPN: %w", ProtoGRPC, ProtoRaft, ProtoJoin, weft.ErrForbidden)
	}
	return outer
}

// Peer is what a client demands of the server beyond membership of the
// cluster. The zero Peer demands nothing more.
type Peer struct {
	Node    weft.ID // "" = any
	Manager bool    // the server must be a manager
}

// ClientConfig is the TLS of a connection to a node of this cluster over one
// protocol (ProtoGRPC or ProtoRaft). The server is known by root, cluster and
// p, never by host name.
func (c *Credentials) ClientConfig(proto string, p Peer) *tls.Config {
	cfg := c.base()
	cfg.NextProtos = []string{proto}
	cfg.InsecureSkipVerify = true // replaced by VerifyConnection: nodes have ids, not host names
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		id, err := c.Verify(s.PeerCertificates, x509.ExtKeyUsageServerAuth)
		switch {
		case err != nil:
			return err
		case s.NegotiatedProtocol != proto:
			return fmt.Errorf("node %s does not speak %s: %w", id.Node, proto, weft.ErrUnavailable)
		case p.Node != "" && p.Node != id.Node:
			return fmt.Errorf("expected node %s, met node %s: %w", p.Node, id.Node, weft.ErrForbidden)
		case p.Manager && id.Role != weft.RoleManager:
			return fmt.Errorf("expected a manager, met worker %s: %w", id.Node, weft.ErrForbidden)
		}
		return nil
	}
	return cfg
}

// base is common to all: no resumption, so that each connection proves its
// certificate anew, and the certificate in use is looked up each time.
func (c *Credentials) base() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Time:                   c.now,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current.Load(), nil },
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.current.Load(), nil },
	}
}

// Verify proves a peer's chain against the cluster's root at the present time
// and returns who the peer is. What does not belong to this cluster, has
// expired or is not yet valid is weft.ErrForbidden.
func (c *Credentials) Verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) (Identity, error) {
	if len(chain) == 0 {
		return Identity{}, fmt.Errorf("verify peer: it has no certificate: %w", weft.ErrForbidden)
	}
	id, err := verify(chain[0], c.roots, usage, c.now())
	if err != nil {
		return Identity{}, err
	}
	if id.Cluster != c.id.Cluster {
		return Identity{}, fmt.Errorf("verify node %s: it belongs to cluster %s, not to %s: %w", id.Node, id.Cluster, c.id.Cluster, weft.ErrForbidden)
	}
	return id, nil
}

func verify(leaf *x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, now time.Time) (Identity, error) {
	_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &unknown):
		return Identity{}, fmt.Errorf("verify certificate of %q: it is of another cluster: %w: %w", leaf.Subject.CommonName, err, weft.ErrForbidden)
	case err != nil:
		return Identity{}, fmt.Errorf("verify certificate of %q: %w: %w", leaf.Subject.CommonName, err, weft.ErrForbidden)
	}
	return IdentityOf(leaf)
}

// ErrOtherCluster: the server that was met belongs to another cluster than
// the join token.
var ErrOtherCluster = errors.New("the join token is of another cluster")

// JoinConfig is the TLS of a joining node, which has only a token: the server
// must send its root, the root must have the token's digest, and the
// certificate under it must be a manager's, so that no worker can collect
// tokens. Another root is ErrOtherCluster.
func JoinConfig(t Token, now func() time.Time) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		Time:               now,
		NextProtos:         []string{ProtoJoin},
		InsecureSkipVerify: true, // replaced by VerifyConnection: only the root's digest is known
		VerifyConnection: func(s tls.ConnectionState) error {
			if s.NegotiatedProtocol != ProtoJoin {
				return fmt.Errorf("the server does not speak %s: it is no weft manager: %w", ProtoJoin, weft.ErrUnavailable)
			}
			i := slices.IndexFunc(s.PeerCertificates, func(c *x509.Certificate) bool { return sha256.Sum256(c.Raw) == t.Digest })
			if i < 1 {
				return fmt.Errorf("verify manager %q: %w: %w", s.PeerCertificates[0].Subject.CommonName, ErrOtherCluster, weft.ErrInvalid)
			}
			roots := x509.NewCertPool()
			roots.AddCert(s.PeerCertificates[i])
			id, err := verify(s.PeerCertificates[0], roots, x509.ExtKeyUsageServerAuth, now())
			if err == nil && id.Role != weft.RoleManager {
				err = fmt.Errorf("verify manager: node %s is a worker; give the address of a manager: %w", id.Node, weft.ErrForbidden)
			}
			return err
		},
	}
}

// certBlocks is every certificate in b, for files that hold more than one.
func certBlocks(b []byte) [][]byte {
	var out [][]byte
	for {
		var blk *pem.Block
		if blk, b = pem.Decode(b); blk == nil {
			return out
		}
		if blk.Type == blockCert {
			out = append(out, encodeBlock(blockCert, blk.Bytes))
		}
	}
}
