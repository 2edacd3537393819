package ca

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"math/big"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

func TestSignAndTrust(t *testing.T) {
	root, cluster := newRoot(t), weft.NewID()
	node := func(r Root, cluster weft.ID, now time.Time) *Credentials {
		c, err := NewCredentials(signed(t, r, Identity{weft.NewID(), weft.RoleWorker, cluster}, now), at(testNow))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a, b := node(root, cluster, testNow), node(root, cluster, testNow)
	digest := sha256.Sum256([]byte("a table"))
	sig, err := a.Sign(digest)
	if err != nil || len(sig) != SignatureBytes {
		t.Fatalf("%d bytes, %v", len(sig), err)
	}
	valid := func(of *Credentials, digest [32]byte) bool {
		id, key, err := b.Trust(of.Certificate())
		if err != nil || id != of.Identity() {
			t.Fatalf("%+v, %v", id, err)
		}
		return ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:]))
	}
	if !valid(a, digest) || valid(b, digest) || valid(a, sha256.Sum256(nil)) {
		t.Error("a signature is not of its key and digest alone")
	}
	for name, other := range map[string]*Credentials{
		"another root":    node(newRoot(t), cluster, testNow),
		"another cluster": node(root, weft.NewID(), testNow),
		"expired":         node(root, cluster, testNow.Add(-Lifetime-2*time.Hour)),
	} {
		if _, _, err := b.Trust(other.Certificate()); !errors.Is(err, weft.ErrForbidden) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := b.Trust([]byte{1, 2, 3}); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("garbage: %v", err)
	}
	if _, _, err := b.Trust(root.Cert); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("the root itself: %v", err)
	}
}
