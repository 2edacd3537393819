package wire

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// admitter is a leader's Membership with one token.
type admitter struct {
	*recorder
	c     *testCluster
	token string

	// mu guards: remote, request.
	mu      sync.Mutex
	remote  netip.Addr
	request AdmitRequest
}

func newAdmitter(c *testCluster) *admitter {
	tok, err := ca.NewToken(c.root.Cert)
	if err != nil {
		c.t.Fatal(err)
	}
	return &admitter{recorder: &recorder{}, c: c, token: tok.String()}
}

func (a *admitter) Admit(ctx context.Context, r AdmitRequest, remote netip.Addr) (AdmitResponse, error) {
	if err := a.note(ctx, "Admit"); err != nil {
		return AdmitResponse{}, err
	}
	if !ca.Match(r.Token, a.token) {
		return AdmitResponse{}, fmt.Errorf("admit node %s: the join token is not valid any more: %w", r.Hostname, weft.ErrForbidden)
	}
	a.mu.Lock()
	a.remote, a.request = remote, r
	a.mu.Unlock()
	id := ca.Identity{Node: weft.NewID(), Role: weft.RoleWorker, Cluster: a.c.id}
	cert, err := ca.Sign(a.c.root, r.CSR, id, time.Now())
	if err != nil {
		return AdmitResponse{}, err
	}
	return AdmitResponse{Node: id.Node, Role: id.Role, Cert: cert, CACert: a.c.root.Cert, Addr: remote,
		Managers: []NodeView{{ID: id.Node, Hostname: "m1"}}, Cluster: ClusterView{ID: a.c.id, GossipKey: []byte("k")}}, nil
}

func TestJoin(t *testing.T) {
	c := newTestCluster(t)
	adm := newAdmitter(c)
	leader := c.serve(ServerConfig{Join: adm.Admit, Membership: adm})
	dead := deadAddr(t)
	j, err := Join(soon(t), JoinParams{
		Remotes: []string{dead.String(), leader.addr.String()}, Token: adm.token + "\n", Hostname: "h2",
		Advertise: netip.MustParseAddrPort("10.99.0.2:2377"), DataPath: netip.MustParseAddr("10.99.1.2"), Availability: weft.AvailabilityDrain,
	})
	if err != nil {
		t.Fatal(err)
	}
	if j.Via != leader.addr || j.Cluster.ID != c.id || string(j.Cluster.GossipKey) != "k" || len(j.Managers) != 1 {
		t.Errorf("joined %+v", j)
	}
	want := AdmitRequest{Version: 1, Token: adm.token, CSR: adm.request.CSR, Hostname: "h2", Advertise: netip.MustParseAddrPort("10.99.0.2:2377"),
		DataPath: netip.MustParseAddr("10.99.1.2"), Availability: weft.AvailabilityDrain}
	if !reflect.DeepEqual(adm.request, want) || adm.remote != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("the leader saw %+v from %s", adm.request, adm.remote)
	}
	// The new identity works.
	creds, err := ca.NewCredentials(j.Bundle, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.client(creds, leader.addr).Depart(soon(t), j.Node); err != nil {
		t.Errorf("call with the new identity: %v", err)
	}
}

// TestJoinThroughFollower: any manager takes the request.
func TestJoinThroughFollower(t *testing.T) {
	c := newTestCluster(t)
	adm := newAdmitter(c)
	leader := c.serve(ServerConfig{Membership: adm})
	follower := &recorder{err: &NotLeader{Leader: leader.addr}}
	fc := c.creds(weft.RoleManager)
	srv := c.serve(ServerConfig{Credentials: fc, Join: AdmitVia(follower, c.client(fc, leader.addr))})
	j, err := Join(soon(t), JoinParams{Remotes: []string{srv.addr.String()}, Token: adm.token})
	if err != nil {
		t.Fatal(err)
	}
	if !j.Node.Valid() || adm.remote != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("joined as %q from %s", j.Node, adm.remote)
	}
	adm.recorder.err = &NotLeader{}
	_, err = Join(soon(t), JoinParams{Remotes: []string{srv.addr.String()}, Token: adm.token})
	mustBeNoLeader(t, err)
}

// TestRenewVia: a manager that leads signs for itself without a connection, even
// when none could be made; any other asks the leader.
func TestRenewVia(t *testing.T) {
	c := newTestCluster(t)
	leader := &recorder{cert: []byte("from the leader")}
	srv := c.serve(ServerConfig{Membership: leader})
	creds := c.creds(weft.RoleManager)
	self := creds.Identity().Node
	local := &recorder{cert: []byte("from here")}
	cert, err := RenewVia(local, c.client(c.credsAt(weft.RoleManager, time.Now().Add(-2*ca.Lifetime)), srv.addr), self)(soon(t), []byte("csr"))
	if err != nil || string(cert) != "from here" || len(leader.seen()) != 0 {
		t.Errorf("where this manager leads: %q, %v, the other saw %v", cert, err, leader.seen())
	}
	if want := []recorded{{"Renew", []any{self, []byte("csr")}}}; !reflect.DeepEqual(local.seen(), want) {
		t.Errorf("it saw %v", local.seen())
	}
	for name, refusal := range map[string]error{"another leads": &NotLeader{Leader: srv.addr}, "no leader is known": &NotLeader{}} {
		cert, err = RenewVia(&recorder{err: refusal}, c.client(creds, srv.addr), self)(soon(t), []byte("csr"))
		if err != nil || string(cert) != "from the leader" {
			t.Errorf("where %s: %q, %v", name, cert, err)
		}
	}
	local.err = weft.ErrForbidden
	if _, err := RenewVia(local, c.client(creds, srv.addr), self)(soon(t), []byte("csr")); !errors.Is(err, weft.ErrForbidden) {
		t.Errorf("a refusal of the leader: %v", err)
	}
}

func TestJoinRefused(t *testing.T) {
	c, other := newTestCluster(t), newTestCluster(t)
	adm := newAdmitter(c)
	srv := c.serve(ServerConfig{Join: adm.Admit})
	worker := c.serve(ServerConfig{Credentials: c.creds(weft.RoleWorker), Join: adm.Admit})
	rotated, foreign := newAdmitter(c).token, newAdmitter(other).token
	dead := deadAddr(t)
	http, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer http.Close()
	go func() { // ends with the listener
		for {
			conn, err := http.Accept()
			if err != nil {
				return
			}
			conn.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			conn.Close()
		}
	}()
	for _, k := range []struct {
		name, token string
		remotes     []string
		is          error
		text        string
	}{
		{"malformed token", "SWMTKN-1-abc", []string{srv.addr.String()}, weft.ErrInvalid, "read join token"},
		{"token of another cluster", foreign, []string{srv.addr.String()}, ca.ErrOtherCluster, "of another cluster"},
		{"rotated token", rotated, []string{srv.addr.String()}, weft.ErrForbidden, "not valid any more"},
		{"no remote", adm.token, nil, weft.ErrInvalid, "at least one manager"},
		{"bad remote", adm.token, []string{"h1:port"}, weft.ErrInvalid, `"h1:port"`},
		{"port zero", adm.token, []string{"h1:0"}, weft.ErrInvalid, `"h1:0"`},
		{"empty remote", adm.token, []string{""}, weft.ErrInvalid, `""`},
		{"nobody there", adm.token, []string{dead.String(), "weft.invalid:2377"}, weft.ErrUnavailable, dead.String()},
		{"no weft there", adm.token, []string{http.Addr().String()}, weft.ErrUnavailable, http.Addr().String()},
		{"a worker there", adm.token, []string{worker.addr.String()}, weft.ErrUnavailable, "is a worker"},
	} {
		before := len(adm.seen())
		_, err := Join(soon(t), JoinParams{Remotes: k.remotes, Token: k.token, Hostname: "h9"})
		if !errors.Is(err, k.is) || !strings.Contains(err.Error(), k.text) {
			t.Errorf("%s: %v", k.name, err)
		}
		if err != nil && (strings.Contains(err.Error(), k.token[len(k.token)-3:]) && len(k.token) > 50) {
			t.Errorf("%s: the error repeats the token: %v", k.name, err)
		}
		if asked := len(adm.seen()) - before; asked > 0 && k.name != "rotated token" {
			t.Errorf("%s: the token was shown", k.name)
		}
	}
}

// TestJoinGarbage: what strangers send after the handshake.
func TestJoinGarbage(t *testing.T) {
	c := newTestCluster(t)
	adm := newAdmitter(c)
	srv := c.serve(ServerConfig{Join: adm.Admit})
	for name, send := range map[string][]byte{
		"too long":      binary.BigEndian.AppendUint32(nil, maxJoin+1),
		"no CBOR":       {0, 0, 0, 3, 0xff, 0xff, 0xff},
		"empty":         {0, 0, 0, 0},
		"other version": {0, 0, 0, 1, 0xa0},
	} {
		conn, err := tls.Dial("tcp", srv.addr.String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ca.ProtoJoin}})
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Write(send); err != nil {
			t.Fatal(err)
		}
		var ans joinAnswer
		if err := readFrame(conn, maxJoinAnswer, &ans); err != nil || ans.Error == nil || ans.Admit != nil {
			t.Errorf("%s: answer %+v, %v", name, ans, err)
		}
		conn.Close()
	}
	if len(adm.seen()) != 0 {
		t.Error("garbage reached Admit")
	}
}

// TestJoinsAreBounded: those above the bound are told to come again.
func TestJoinsAreBounded(t *testing.T) {
	c := newTestCluster(t)
	adm := newAdmitter(c)
	inside, release := make(chan struct{}), make(chan struct{})
	adm.onCall = func(context.Context) { inside <- struct{}{}; <-release }
	srv := c.serve(ServerConfig{Join: adm.Admit, MaxJoins: 1})
	p := JoinParams{Remotes: []string{srv.addr.String()}, Token: adm.token}
	first := make(chan error, 1)
	go func() { _, err := Join(soon(t), p); first <- err }()
	<-inside
	if _, err := Join(soon(t), p); !errors.Is(err, weft.ErrUnavailable) || !strings.Contains(err.Error(), "try again") {
		t.Errorf("second: %v", err)
	}
	close(release)
	if err := <-first; err != nil {
		t.Errorf("first: %v", err)
	}
}

// TestJoinAnswerLost: the node learns that it may have been admitted, and no
// other manager is asked.
func TestJoinAnswerLost(t *testing.T) {
	c := newTestCluster(t)
	adm, second := newAdmitter(c), newAdmitter(c)
	srv := c.serve(ServerConfig{Join: adm.Admit})
	other := c.serve(ServerConfig{Join: second.Admit})
	p := newProxy(t, srv.addr)
	adm.onCall = func(context.Context) { p.cut() }
	_, err := Join(soon(t), JoinParams{Remotes: []string{p.addr.String(), other.addr.String()}, Token: adm.token})
	if !errors.Is(err, weft.ErrUnavailable) || !strings.Contains(err.Error(), "may yet have been carried out") {
		t.Errorf("error %v", err)
	}
	if len(second.seen()) != 0 {
		t.Error("a second manager was asked")
	}
}

func TestWithPort(t *testing.T) {
	for in, want := range map[string]string{
		"h1": "h1:2377", "h1:99": "h1:99", "10.99.0.1": "10.99.0.1:2377", "10.99.0.1:1": "10.99.0.1:1",
		"fd00::1": "[fd00::1]:2377", "[fd00::1]": "[fd00::1]:2377", "[fd00::1]:9": "[fd00::1]:9",
	} {
		if got, err := withPort(in); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}
