package gossip

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"log/slog"
	"math/big"

	"github.com/weftnet/weft"
)

// Identity is who this node is by its certificate, and how others prove who they
// are. Its methods are called from several goroutines at a time.
type Identity interface {
	// Certificate is the one in use, in DER; it may change between calls.
	Certificate() []byte
	// Sign returns the signature of a digest by the certificate's key: both
	// numbers of ECDSA P-256, 32 bytes each.
	Sign(digest [32]byte) ([]byte, error)
	// Trust proves a certificate and returns whose it is, and its key.
	Trust(cert []byte) (weft.ID, *ecdsa.PublicKey, error)
	// ServerTLS accepts nodes of this cluster only.
	ServerTLS() *tls.Config
	// ClientTLS accepts one node only.
	ClientTLS(peer weft.ID) *tls.Config
}

// Prover makes the proofs of own tables and checks those of others.
type Prover interface {
	// Certificate is this node's, in DER. It may change between calls.
	Certificate() []byte
	// Sign returns the proof of a digest by the key of the certificate, proofBytes or none.
	Sign(digest [32]byte) []byte
	// Trust checks that a certificate is good and the owner's.
	Trust(owner weft.ID, cert []byte) (Checker, error)
}

// Checker reports whether an owner has signed a digest.
type Checker func(digest [32]byte, proof []byte) bool

// digestOf is what an owner signs of a state: whose it is, which, and all of its
// content as it is on the wire.
func digestOf(owner, network weft.ID, s stamp, content []byte) [32]byte {
	sum := sha256.Sum256(content)
	b := append([]byte("weft gossip 2\x00"), sum[:]...)
	return sha256.Sum256(appendStamp(appendID(appendID(b, owner), network), s))
}

// proven is the Prover of an Identity.
type proven struct {
	id  Identity
	log *slog.Logger
}

func (p proven) Certificate() []byte { return p.id.Certificate() }

func (p proven) Sign(digest [32]byte) []byte {
	sig, err := p.id.Sign(digest)
	if err != nil {
		p.log.Error("endpoints of this node are not signed, others will refuse them", weft.KeyErr, err)
		return nil
	}
	return sig
}

func (p proven) Trust(owner weft.ID, cert []byte) (Checker, error) {
	id, key, err := p.id.Trust(cert)
	if err == nil && id != owner {
		err = fmt.Errorf("the certificate of node %s does not prove tables of node %s: %w", id, owner, weft.ErrForbidden)
	}
	if err != nil {
		p.log.Warn("endpoints of a node are refused", weft.KeyPeer, owner, weft.KeyErr, err)
		return nil, err
	}
	return func(digest [32]byte, proof []byte) bool {
		return len(proof) == proofBytes &&
			ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(proof[:proofBytes/2]), new(big.Int).SetBytes(proof[proofBytes/2:]))
	}, nil
}
