// Package ca is the cluster's certificate authority: the root, node
// certificates, join tokens, TLS configurations that trust them, and the file
// that keeps a node's identity.
//
// It owns who a peer is (Identity, from its certificate) and nothing of what a
// peer may do: orchestrator/wire decides that by role. It talks to no network
// and starts no goroutine; only Save, Load and a Renewal touch files. Time is
// always passed in, but for the pauses of a Renewal. All functions, and the
// methods of Credentials, are safe for concurrent use. The leader signs
// (orchestrator); every node verifies, and runs one Renewal.
package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"

	"github.com/weftnet/weft"
)

// Organisational units by which Docker names a node's role in its certificate.
const (
	unitWorker  = "swarm-worker"
	unitManager = "swarm-manager"
)

// Our own choices.
const (
	// Lifetime of a node certificate. It is renewed at half of it, so a node
	// may be cut off for a month and a half and still come back.
	Lifetime = 90 * 24 * time.Hour
	// rootLifetime outlives the machines: there is no rotation of the root yet.
	rootLifetime = 20 * 365 * 24 * time.Hour
	// backdate lets a node with a slow clock accept a fresh certificate.
	backdate = time.Hour
)

// PEM block types (RFC 7468 sections 5, 7 and 10).
const (
	blockCert = "CERTIFICATE"
	blockCSR  = "CERTIFICATE REQUEST"
	blockKey  = "PRIVATE KEY"
)

// Root is a certificate authority. Key is the cluster's greatest secret: it
// stays in the replicated state of the managers.
type Root struct {
	Cert []byte // PEM, one certificate
	Key  []byte // PEM, PKCS #8
}

// Identity is what a certificate says of its holder: CN is the node, OU the
// role, O the cluster, as in Docker's swarm certificates.
type Identity struct {
	Node    weft.ID
	Role    weft.Role
	Cluster weft.ID
}

// NewRoot makes a certificate authority (ECDSA P-256, valid for twenty years
// from now). clusterName appears in its subject for people to read.
func NewRoot(clusterName string, now time.Time) (Root, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Root{}, fmt.Errorf("make key of the cluster's certificate authority: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return Root{}, err
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "weft-ca", Organization: []string{clusterName}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(rootLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true, // it signs nodes, never another authority
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return Root{}, fmt.Errorf("sign the cluster's certificate authority: %w", err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return Root{}, err
	}
	return Root{Cert: encodeBlock(blockCert, der), Key: keyPEM}, nil
}

// NewCSR makes a key (PEM, PKCS #8) and a certificate request (PEM) for it.
// The request names nobody: the signer decides who its holder is.
func NewCSR() (key, csr []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make node key: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate request: %w", err)
	}
	if key, err = encodeKey(k); err != nil {
		return nil, nil, err
	}
	return key, encodeBlock(blockCSR, der), nil
}

// Sign makes id's certificate for the key of csr (PEM), valid for Lifetime
// from now but never longer than the root. Nothing of the request but its key
// is used. A request that is malformed, not signed by its own key, or not
// for ECDSA P-256 is weft.ErrInvalid.
func Sign(root Root, csr []byte, id Identity, now time.Time) ([]byte, error) {
	if err := id.validate(); err != nil {
		return nil, err
	}
	caCert, caKey, err := root.parse()
	if err != nil {
		return nil, err
	}
	if now.After(caCert.NotAfter) {
		return nil, fmt.Errorf("sign certificate of node %s: the cluster's certificate authority expired on %s: %w", id.Node, caCert.NotAfter.Format(time.DateOnly), weft.ErrUnavailable)
	}
	pub, err := requestKey(csr)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	notAfter := now.Add(Lifetime)
	if notAfter.After(caCert.NotAfter) {
		notAfter = caCert.NotAfter
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject: pkix.Name{
			CommonName:         string(id.Node),
			OrganizationalUnit: []string{unitOf(id.Role)},
			Organization:       []string{string(id.Cluster)},
		},
		DNSNames:              []string{string(id.Node)},
		NotBefore:             now.Add(-backdate),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, caCert, pub, caKey)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of node %s: %w", id.Node, err)
	}
	return encodeBlock(blockCert, der), nil
}

// IdentityOf reads the identity from a certificate. It proves nothing: call it
// only on certificates that were verified. A certificate that no weft root
// makes is weft.ErrForbidden.
func IdentityOf(c *x509.Certificate) (Identity, error) {
	s := c.Subject
	if len(s.OrganizationalUnit) != 1 || len(s.Organization) != 1 {
		return Identity{}, fmt.Errorf("read node certificate %q: it must have one role and one cluster: %w", s, weft.ErrForbidden)
	}
	id := Identity{Node: weft.ID(s.CommonName), Cluster: weft.ID(s.Organization[0])}
	switch s.OrganizationalUnit[0] {
	case unitWorker:
		id.Role = weft.RoleWorker
	case unitManager:
		id.Role = weft.RoleManager
	default:
		return Identity{}, fmt.Errorf("read node certificate %q: %q is no role: %w", s, s.OrganizationalUnit[0], weft.ErrForbidden)
	}
	if err := id.validate(); err != nil {
		return Identity{}, fmt.Errorf("read node certificate %q: %v: %w", s, err, weft.ErrForbidden) // whose fault it is, is the peer's: not ErrInvalid
	}
	return id, nil
}

// RenewAt is when a certificate should be replaced: at half of its life, moved
// by up to a twentieth of it either way so that nodes that joined together do
// not renew together. jitter is in [0, 1), drawn by the caller once per
// certificate.
func RenewAt(notBefore, notAfter time.Time, jitter float64) time.Time {
	life := notAfter.Sub(notBefore)
	return notBefore.Add(life*9/20 + time.Duration(float64(life/10)*min(max(jitter, 0), 1)))
}

func (id Identity) validate() error {
	if !id.Node.Valid() {
		return fmt.Errorf("node id %q must be 25 characters of 0-9a-z: %w", id.Node, weft.ErrInvalid)
	}
	if !id.Cluster.Valid() {
		return fmt.Errorf("cluster id %q must be 25 characters of 0-9a-z: %w", id.Cluster, weft.ErrInvalid)
	}
	if id.Role != weft.RoleWorker && id.Role != weft.RoleManager {
		return fmt.Errorf("role %d of node %s is unknown: %w", id.Role, id.Node, weft.ErrInvalid)
	}
	return nil
}

func unitOf(r weft.Role) string {
	if r == weft.RoleManager {
		return unitManager
	}
	return unitWorker
}

func (r Root) parse() (*x509.Certificate, crypto.Signer, error) {
	c, err := parseCert(r.Cert)
	if err != nil {
		return nil, nil, fmt.Errorf("read the cluster's certificate authority: %w", err)
	}
	if !c.IsCA {
		return nil, nil, fmt.Errorf("read the cluster's certificate authority: %q is not an authority: %w", c.Subject, weft.ErrInvalid)
	}
	k, err := parseKey(r.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("read key of the cluster's certificate authority: %w", err)
	}
	if !k.PublicKey.Equal(c.PublicKey) {
		return nil, nil, fmt.Errorf("read the cluster's certificate authority: key and certificate do not belong together: %w", weft.ErrInvalid)
	}
	return c, k, nil
}

// requestKey is the public key of a certificate request.
func requestKey(csr []byte) (*ecdsa.PublicKey, error) {
	der, err := decodeBlock(csr, blockCSR)
	if err != nil {
		return nil, fmt.Errorf("read certificate request: %w", err)
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("read certificate request: %w: %w", err, weft.ErrInvalid)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("check certificate request: it is not signed by its own key: %w: %w", err, weft.ErrInvalid)
	}
	pub, ok := req.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, fmt.Errorf("check certificate request: its key must be ECDSA P-256: %w", weft.ErrInvalid)
	}
	return pub, nil
}

func newSerial() (*big.Int, error) {
	// RFC 5280 section 4.1.2.2: positive, at most 20 octets.
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("draw certificate serial: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func encodeKey(k *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	return encodeBlock(blockKey, der), nil
}

func encodeBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// decodeBlock is the content of the first PEM block, which must be of kind.
func decodeBlock(b []byte, kind string) ([]byte, error) {
	blk, _ := pem.Decode(b)
	if blk == nil || blk.Type != kind {
		return nil, fmt.Errorf("expected a PEM block %q: %w", kind, weft.ErrInvalid)
	}
	return blk.Bytes, nil
}

func parseCert(b []byte) (*x509.Certificate, error) {
	der, err := decodeBlock(b, blockCert)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, weft.ErrInvalid)
	}
	return c, nil
}

func parseKey(b []byte) (*ecdsa.PrivateKey, error) {
	der, err := decodeBlock(b, blockKey)
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, weft.ErrInvalid)
	}
	e, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("private key must be ECDSA: %w", weft.ErrInvalid)
	}
	return e, nil
}
