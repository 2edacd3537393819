package ca

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// shake runs one handshake over a pipe and tells what each side thinks of it.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	a, b := net.Pipe()
	deadline := time.Now().Add(10 * time.Second)
	a.SetDeadline(deadline)
	b.SetDeadline(deadline)
	done := make(chan error, 1)
	go func() {
		defer a.Close()
		s := tls.Server(a, server)
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte("x"))
		}
		done <- err
	}()
	c := tls.Client(b, client)
	clientErr = c.Handshake()
	if clientErr == nil {
		// TLS 1.3: the server's refusal arrives with the first read.
		_, clientErr = io.ReadFull(c, make([]byte, 1))
	}
	b.Close()
	return <-done, clientErr
}

func credentials(t *testing.T, r Root, id Identity, signedAt, now time.Time) *Credentials {
	t.Helper()
	c, err := NewCredentials(signed(t, r, id, signedAt), at(now))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestHandshakes(t *testing.T) {
	root, otherRoot := newRoot(t), newRoot(t)
	cluster := weft.NewID()
	ident := func(r weft.Role) Identity { return Identity{weft.NewID(), r, cluster} }
	mgr := credentials(t, root, ident(weft.RoleManager), testNow, testNow)
	wrk := credentials(t, root, ident(weft.RoleWorker), testNow, testNow)
	foreign := credentials(t, otherRoot, ident(weft.RoleManager), testNow, testNow)
	sameRootOtherCluster := credentials(t, root, Identity{weft.NewID(), weft.RoleManager, weft.NewID()}, testNow, testNow)
	expired := credentials(t, root, ident(weft.RoleManager), testNow.Add(-Lifetime-time.Minute), testNow)
	future := credentials(t, root, ident(weft.RoleManager), testNow.Add(2*time.Hour), testNow)
	tok, err := NewToken(root.Cert)
	if err != nil {
		t.Fatal(err)
	}
	otherTok, err := NewToken(otherRoot.Cert)
	if err != nil {
		t.Fatal(err)
	}
	bare := func(protos ...string) *tls.Config { return &tls.Config{InsecureSkipVerify: true, NextProtos: protos} }
	old := bare(ProtoGRPC)
	old.MaxVersion = tls.VersionTLS12

	for _, k := range []struct {
		name          string
		server        *Credentials
		client        *tls.Config
		server_, text string // text expected in the server's or, with server_ "", the client's error; both "" = works
	}{
		{name: "worker to manager by h2", server: mgr, client: wrk.ClientConfig(ProtoGRPC, Peer{Manager: true})},
		{name: "manager to worker by h2", server: wrk, client: mgr.ClientConfig(ProtoGRPC, Peer{Node: wrk.id.Node})},
		{name: "manager by raft", server: mgr, client: mgr.ClientConfig(ProtoRaft, Peer{Manager: true})},
		{name: "join", server: mgr, client: JoinConfig(tok, at(testNow))},
		{name: "worker by raft", server: mgr, client: wrk.ClientConfig(ProtoRaft, Peer{}), server_: "is a worker"},
		{name: "client of another cluster", server: mgr, client: trustAny(foreign.ClientConfig(ProtoGRPC, Peer{})), server_: "of another cluster"},
		{name: "client of another cluster under this root", server: mgr, client: trustAny(sameRootOtherCluster.ClientConfig(ProtoGRPC, Peer{})), server_: "belongs to cluster"},
		{name: "server of another cluster", server: foreign, client: wrk.ClientConfig(ProtoGRPC, Peer{}), text: "of another cluster"},
		{name: "server of another cluster under this root", server: sameRootOtherCluster, client: wrk.ClientConfig(ProtoGRPC, Peer{}), text: "belongs to cluster"},
		{name: "expired client", server: mgr, client: expired.ClientConfig(ProtoGRPC, Peer{}), server_: "expired"},
		{name: "client not valid yet", server: mgr, client: future.ClientConfig(ProtoGRPC, Peer{}), server_: "not yet valid"},
		{name: "expired server", server: expired, client: wrk.ClientConfig(ProtoGRPC, Peer{}), text: "expired"},
		{name: "wrong node", server: mgr, client: wrk.ClientConfig(ProtoGRPC, Peer{Node: wrk.id.Node}), text: "met node"},
		{name: "worker where a manager must be", server: wrk, client: mgr.ClientConfig(ProtoGRPC, Peer{Manager: true}), text: "expected a manager"},
		{name: "no certificate by h2", server: mgr, client: bare(ProtoGRPC), server_: "certificate"},
		{name: "no certificate by raft", server: mgr, client: bare(ProtoRaft), server_: "certificate"},
		{name: "join and h2 offered together", server: mgr, client: bare(ProtoJoin, ProtoGRPC), server_: "certificate"},
		{name: "no ALPN", server: mgr, client: bare(), server_: "ALPN"},
		{name: "unknown ALPN", server: mgr, client: bare("http/1.1"), server_: "ALPN"},
		{name: "TLS 1.2", server: mgr, client: old, server_: "unsupported versions"},
		{name: "join with the token of another cluster", server: mgr, client: JoinConfig(otherTok, at(testNow)), text: "token is of another cluster"},
		{name: "join at a worker", server: wrk, client: JoinConfig(tok, at(testNow)), text: "is a worker"},
		{name: "join at an expired manager", server: expired, client: JoinConfig(tok, at(testNow)), text: "expired"},
	} {
		t.Run(k.name, func(t *testing.T) {
			se, ce := shake(t, k.server.ServerConfig(), k.client)
			switch {
			case k.server_ == "" && k.text == "":
				if se != nil || ce != nil {
					t.Errorf("server: %v; client: %v", se, ce)
				}
			case k.server_ != "" && (se == nil || !strings.Contains(se.Error(), k.server_) || ce == nil):
				t.Errorf("server: %v, want %q; client: %v", se, k.server_, ce)
			case k.text != "" && (ce == nil || !strings.Contains(ce.Error(), k.text)):
				t.Errorf("client: %v, want %q", ce, k.text)
			}
		})
	}
}

// trustAny is a client that does not check its server, as an attacker.
func trustAny(c *tls.Config) *tls.Config {
	c.VerifyConnection = nil
	return c
}

func TestReplace(t *testing.T) {
	root := newRoot(t)
	id := Identity{weft.NewID(), weft.RoleManager, weft.NewID()}
	now, dir := testNow, t.TempDir()
	c, err := NewCredentials(signed(t, root, id, testNow), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	server, client := c.ServerConfig(), c.ClientConfig(ProtoGRPC, Peer{})
	now = testNow.Add(Lifetime + time.Hour)
	if se, ce := shake(t, server, client); se == nil && ce == nil {
		t.Fatal("an expired certificate was accepted")
	}
	if err := c.replace(signed(t, root, id, now), dir); err != nil {
		t.Fatal(err)
	}
	saved, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	// The configurations made before the change use the new certificate.
	if se, ce := shake(t, server, client); se != nil || ce != nil {
		t.Fatalf("after the change: server %v, client %v", se, ce)
	}
	other := id
	other.Role = weft.RoleWorker
	foreign := signed(t, newRoot(t), id, now)
	mixed := signed(t, root, id, now)
	mixed.Key = foreign.Key
	for name, b := range map[string]Bundle{"other role": signed(t, root, other, now), "other root": foreign, "other key": mixed, "nothing": {}} {
		if err := c.replace(b, dir); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("replace by one of %s: %v", name, err)
		}
	}
	if se, ce := shake(t, server, client); se != nil || ce != nil {
		t.Errorf("after refused changes: server %v, client %v", se, ce)
	}
	if now, err := Load(dir); err != nil || !reflect.DeepEqual(now, saved) {
		t.Errorf("a refused change went to disk (%v)", err)
	}
}
