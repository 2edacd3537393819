package gossip

import (
	"crypto/ecdsa"
	"crypto/tls"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// authority signs the nodes of one test.
type authority struct {
	t       testing.TB
	root    ca.Root
	cluster weft.ID
}

func newAuthority(t testing.TB) *authority {
	root, err := ca.NewRoot("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t, root, weft.NewID()}
}

// of is the identity of a node.
func (a *authority) of(id weft.ID) *testIdentity {
	c, err := ca.NewCredentials(a.bundle(id), time.Now)
	if err != nil {
		a.t.Fatal(err)
	}
	return &testIdentity{c: c}
}

// bundle is what a node proves itself by.
func (a *authority) bundle(id weft.ID) ca.Bundle {
	key, csr, err := ca.NewCSR()
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := ca.Sign(a.root, csr, ca.Identity{Node: id, Role: weft.RoleWorker, Cluster: a.cluster}, time.Now())
	if err != nil {
		a.t.Fatal(err)
	}
	return ca.Bundle{Cert: cert, Key: key, CA: a.root.Cert}
}

// testIdentity is the Identity of certificates, as the daemon makes it; it can be
// renewed.
type testIdentity struct {
	mu sync.Mutex // guards: c
	c  *ca.Credentials
}

func (i *testIdentity) now() *ca.Credentials {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.c
}

func (i *testIdentity) renew(a *authority) {
	next := a.of(i.now().Identity().Node).c
	i.mu.Lock()
	defer i.mu.Unlock()
	i.c = next
}

func (i *testIdentity) Certificate() []byte             { return i.now().Certificate() }
func (i *testIdentity) Sign(d [32]byte) ([]byte, error) { return i.now().Sign(d) }
func (i *testIdentity) ServerTLS() *tls.Config          { return i.now().GossipConfig() }
func (i *testIdentity) ClientTLS(peer weft.ID) *tls.Config {
	return i.now().ClientConfig(ca.ProtoGossip, ca.Peer{Node: peer})
}

func (i *testIdentity) Trust(cert []byte) (weft.ID, *ecdsa.PublicKey, error) {
	id, key, err := i.now().Trust(cert)
	return id.Node, key, err
}

// unproven is a prover that takes every owner's word from everybody.
type unproven struct{}

func (unproven) Certificate() []byte  { return nil }
func (unproven) Sign([32]byte) []byte { return nil }

func (unproven) Trust(weft.ID, []byte) (Checker, error) {
	return func([32]byte, []byte) bool { return true }, nil
}
