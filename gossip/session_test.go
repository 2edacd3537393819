package gossip

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft/orchestrator/ca"
)

// TestSessionsProveOwnership: over a session a node pushes what its certificate
// owns and nothing else, and who has no certificate of the cluster has none.
func TestSessionsProveOwnership(t *testing.T) {
	addr, authority := freePort(t), newAuthority(t)
	g, err := New(Config{
		Node: nodeID(1), Bind: addr, Advertise: addr, VTEP: testVTEP(1), Keys: testKeys(), Identity: authority.of(nodeID(1)), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	dial := func(cfg *tls.Config) (*tls.Conn, error) {
		for {
			raw, err := net.Dial("tcp", addr.String())
			if err != nil { // it does not listen yet
				continue
			}
			c := tls.Client(raw, cfg)
			c.SetDeadline(time.Now().Add(10 * time.Second))
			if err := c.Handshake(); err != nil {
				return nil, err
			}
			return c, nil
		}
	}
	two, three := authority.of(nodeID(2)), authority.of(nodeID(3))
	good := three.ClientTLS(nodeID(1))
	nobody := good.Clone()
	nobody.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }
	otherProto := good.Clone()
	otherProto.NextProtos = []string{ca.ProtoRaft}
	stranger := newAuthority(t).of(nodeID(3)).ClientTLS(nodeID(1))
	stranger.VerifyConnection = nil // it would refuse us first
	for name, cfg := range map[string]*tls.Config{"no certificate": nobody, "another cluster": stranger, "another protocol": otherProto} {
		c, err := dial(cfg)
		if err == nil { // in TLS 1.3 the client hears of it when it reads
			_, err = c.Read(make([]byte, 1))
		}
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v, want the session refused", name, err)
		}
	}
	for limit := time.Now().Add(20 * time.Second); g.Stats().SessionsBad != 3; runtime.Gosched() {
		if time.Now().After(limit) {
			t.Fatalf("%d of 3 sessions are counted as refused", g.Stats().SessionsBad)
		}
	}
	if _, err := dial(three.ClientTLS(nodeID(2))); err == nil {
		t.Error("node 1 is taken for node 2")
	}

	c, err := dial(good)
	if err != nil {
		t.Fatal(err)
	}
	say := func(m message) {
		b := encode(nil, m)
		if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
			t.Fatal(err)
		}
	}
	push := func(owner int, cert, signer *testIdentity) {
		att := attachment{cert: cert.Certificate()}.encode()
		s := stamp{1, 1}
		proof, err := signer.Sign(digestOf(nodeID(owner), "", s, att))
		if err != nil {
			t.Fatal(err)
		}
		say(&update{noTree, "", nodeID(owner), s, 0, 1, body{proof, bodyAttached, stamp{}, att}.encode()})
	}
	push(2, three, three) // node 3 in the name of node 2, with its own certificate
	push(2, two, three)   // and with that of node 2
	push(3, three, three) // its own
	known := func(owner int) bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.core.peers[nodeID(owner)] != nil
	}
	for limit := time.Now().Add(20 * time.Second); !known(3); runtime.Gosched() {
		if time.Now().After(limit) {
			t.Fatal("node 3 cannot push its own")
		}
	}
	if n := g.Stats().Refused; n != 2 || known(2) {
		t.Errorf("%d of 2 pushes in the name of another are refused; it is known: %v", n, known(2))
	}
	if _, err := c.Write([]byte{0xff, 0xff, 0xff, 0xff}); err != nil { // a message of 4 GiB
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("a message over the limit: %v, want the session closed", err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestSessionsAreKept: what goes by stream to one member goes by one session.
func TestSessionsAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		defer c.close()
		for _, r := range c.nodes {
			r.Publish(nil)
		}
		time.Sleep(time.Second)
		for i := range 10 {
			e := endpoints(4000)
			for n := range e {
				e[n].Slot += uint64(i) // each is another
			}
			c.nodes[1].Publish(e)
			c.await(5*time.Second, "a big table", func() bool {
				for _, r := range c.nodes {
					all, _ := r.Snapshot()
					if len(all) != len(e) || all[0].Slot < uint64(i) {
						return false
					}
				}
				return true
			})
		}
		for n, r := range c.nodes {
			if s := r.Stats(); s.Sessions > 2 {
				t.Errorf("node %d dialled %d sessions to two members", n, s.Sessions)
			}
		}
	})
}

// TestRenewedCertificate: a new certificate, with a new key, costs nothing.
func TestRenewedCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 4)
		defer c.close()
		for n, r := range c.nodes {
			r.Publish(endpoints(n))
		}
		c.await(time.Second, "all tables", func() bool { return c.allHave(1, 1) && c.allHave(4, 4) })
		c.nodes[1].cfg.Identity.(*testIdentity).renew(c.ca)
		for i := range 20 { // while it is told
			c.nodes[1].Publish(endpoints(5 + i%2))
			c.await(3*time.Second, "a table after the renewal", func() bool { return c.allHave(1, 5+i%2) })
			time.Sleep(100 * time.Millisecond)
		}
		c.start(5).Publish(endpoints(1)) // it never knew the old one
		c.await(5*time.Second, "a node that joins", func() bool { return c.allHave(1, 6) && c.allHave(5, 1) })
	})
}
