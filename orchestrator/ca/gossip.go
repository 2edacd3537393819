package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"

	"github.com/weftnet/weft"
)

// ProtoGossip is spoken on the gossip port, between all nodes (RFC 7301).
const ProtoGossip = "weft-gossip"

// SignatureBytes is the length of what Sign returns: both numbers of an ECDSA
// signature, 32 bytes each, big endian.
const SignatureBytes = 64

// GossipConfig is the TLS of the gossip port: TLS 1.3 only, with a certificate
// of this cluster. Its client is ClientConfig(ProtoGossip, …).
func (c *Credentials) GossipConfig() *tls.Config {
	cfg := c.base()
	cfg.NextProtos = []string{ProtoGossip}
	cfg.ClientAuth = tls.RequireAnyClientCert // verified below, by name and time
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		_, err := c.Verify(s.PeerCertificates, x509.ExtKeyUsageClientAuth)
		if err == nil && s.NegotiatedProtocol != ProtoGossip {
			err = fmt.Errorf("the client does not speak %s: %w", ProtoGossip, weft.ErrForbidden)
		}
		return err
	}
	return cfg
}

// Certificate is the certificate in use, in DER, and Sign signs by its key: what
// Trust makes of the certificate verifies it. A Renewal may come in between.
func (c *Credentials) Certificate() []byte { return c.current.Load().Leaf.Raw }

// Sign signs a SHA-256 digest.
func (c *Credentials) Sign(digest [32]byte) ([]byte, error) {
	cert := c.current.Load()
	key, ok := cert.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("sign for node %s: its key is not ECDSA: %w", c.id.Node, weft.ErrInvalid)
	}
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return nil, fmt.Errorf("sign for node %s: %w", c.id.Node, err)
	}
	out := make([]byte, SignatureBytes)
	r.FillBytes(out[:SignatureBytes/2])
	s.FillBytes(out[SignatureBytes/2:])
	return out, nil
}

// Trust proves a certificate (DER) as Verify does and returns its holder and key.
func (c *Credentials) Trust(der []byte) (Identity, *ecdsa.PublicKey, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return Identity{}, nil, fmt.Errorf("read certificate of a node: %w: %w", err, weft.ErrForbidden)
	}
	id, err := c.Verify([]*x509.Certificate{cert}, x509.ExtKeyUsageClientAuth)
	if err != nil {
		return Identity{}, nil, err
	}
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return Identity{}, nil, fmt.Errorf("verify node %s: its key is not ECDSA P-256: %w", id.Node, weft.ErrForbidden)
	}
	return id, key, nil
}
