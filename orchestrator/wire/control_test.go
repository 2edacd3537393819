package wire

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

func testTime(n int) time.Time {
	return time.Date(2026, 1, 2, 3, 4, n%60, 123456789+n, time.UTC)
}

// TestControlConformance: every method of Control, Dispatcher, Membership and
// Agent carries its arguments there and its answer back, unchanged.
func TestControlConformance(t *testing.T) {
	c := newTestCluster(t)
	rec := &recorder{
		cluster: filled[weft.Cluster](), service: filled[weft.Service](), tasks: filled[weft.TaskList](),
		node: filled[weft.Node](), network: filled[weft.Network](),
		logs: []weft.LogRecord{filled[weft.LogRecord](), {Line: []byte("\xff not UTF-8\n")}},
		sets: []Assignments{filled[Assignments](), {Seq: 2}}, admitted: filled[AdmitResponse](), cert: []byte("cert"),
	}
	srv := c.serve(ServerConfig{Control: rec, Dispatcher: rec, Membership: rec, Agent: rec})
	creds := c.creds(weft.RoleManager)
	self := creds.Identity().Node
	cl := c.client(creds, srv.addr)
	peers := NewPeers(creds)
	c.runUntilEnd(peers.Run)
	ctx := soon(t)
	id, spec := weft.NewID(), filled[weft.ServiceSpec]()
	cluster := rec.cluster
	cluster.CAKey = nil

	logs := func(call func(func(weft.LogRecord) error) error) (out []weft.LogRecord, err error) {
		err = call(func(r weft.LogRecord) error { out = append(out, r); return nil })
		return out, err
	}
	filter, opts := filled[weft.TaskFilter](), filled[weft.LogOptions]()
	req, rep, adm := filled[SessionRequest](), filled[Report](), filled[AdmitRequest]()
	req.Version = ProtocolVersion
	cases := []struct {
		method string
		args   []any
		call   func() (any, error)
		want   any
	}{
		{"Services", nil, func() (any, error) { return cl.Services(ctx) }, []weft.Service{rec.service, rec.service}},
		{"Service", []any{"web"}, func() (any, error) { return cl.Service(ctx, "web") }, rec.service},
		{"CreateService", []any{spec}, func() (any, error) { return cl.CreateService(ctx, spec) }, rec.service},
		{"UpdateService", []any{id, uint64(7), spec}, func() (any, error) { return cl.UpdateService(ctx, id, 7, spec) }, rec.service},
		{"RollbackService", []any{id, uint64(7)}, func() (any, error) { return cl.RollbackService(ctx, id, 7) }, rec.service},
		{"RemoveService", []any{id}, func() (any, error) { return nil, cl.RemoveService(ctx, id) }, nil},
		{"Tasks", []any{filter}, func() (any, error) { return cl.Tasks(ctx, filter) }, rec.tasks},
		{"TaskLogs", []any{[]weft.ID{id}, opts}, func() (any, error) {
			return logs(func(f func(weft.LogRecord) error) error { return cl.TaskLogs(ctx, []weft.ID{id}, opts, f) })
		}, rec.logs},
		{"Nodes", nil, func() (any, error) { return cl.Nodes(ctx) }, []weft.Node{rec.node}},
		{"UpdateNode", []any{id, uint64(8), filled[weft.NodeSpec]()}, func() (any, error) { return nil, cl.UpdateNode(ctx, id, 8, filled[weft.NodeSpec]()) }, nil},
		{"RemoveNode", []any{id, true}, func() (any, error) { return nil, cl.RemoveNode(ctx, id, true) }, nil},
		{"Networks", nil, func() (any, error) { return cl.Networks(ctx) }, []weft.Network{rec.network}},
		{"CreateNetwork", []any{filled[weft.NetworkSpec]()}, func() (any, error) { return cl.CreateNetwork(ctx, filled[weft.NetworkSpec]()) }, rec.network},
		{"RemoveNetwork", []any{id}, func() (any, error) { return nil, cl.RemoveNetwork(ctx, id) }, nil},
		{"Cluster", nil, func() (any, error) { return cl.Cluster(ctx) }, cluster},
		{"UpdateCluster", []any{uint64(9), filled[weft.ClusterUpdate]()}, func() (any, error) { return nil, cl.UpdateCluster(ctx, 9, filled[weft.ClusterUpdate]()) }, nil},
		{"Report", []any{self, rep}, func() (any, error) { return nil, cl.Report(ctx, self, rep) }, nil},
		{"Session", []any{self, req}, func() (any, error) {
			s, err := cl.OpenSession(ctx, req)
			if err != nil {
				return nil, err
			}
			a, err1 := s.Recv()
			b, err2 := s.Recv()
			return []Assignments{a, b}, errors.Join(err1, err2)
		}, rec.sets},
		{"Admit", []any{adm, adm.DataPath}, func() (any, error) { return cl.Admit(ctx, adm, adm.DataPath) }, rec.admitted},
		{"Renew", []any{self, []byte("csr")}, func() (any, error) { return cl.Renew(ctx, self, []byte("csr")) }, rec.cert},
		{"Depart", []any{self}, func() (any, error) { return nil, cl.Depart(ctx, self) }, nil},
		{"Logs", []any{id, opts}, func() (any, error) {
			a := peers.Agent(srv.cfg.Credentials.Identity().Node, srv.addr)
			return logs(func(f func(weft.LogRecord) error) error { return a.Logs(ctx, id, opts, f) })
		}, rec.logs},
		{"Drain", []any{self, id}, func() (any, error) {
			return nil, peers.Agent(srv.cfg.Credentials.Identity().Node, srv.addr).Drain(ctx, self, id)
		}, nil},
		{"Arrive", []any{self, id, []weft.ID{"n"}}, func() (any, error) {
			return nil, peers.Agent(srv.cfg.Credentials.Identity().Node, srv.addr).Arrive(ctx, self, id, []weft.ID{"n"})
		}, nil},
	}
	covered := map[string]bool{}
	for i, k := range cases {
		covered[k.method] = true
		got, err := k.call()
		if err != nil {
			t.Errorf("%s: %v", k.method, err)
			continue
		}
		if !reflect.DeepEqual(got, k.want) {
			t.Errorf("%s answered\n%+v, want\n%+v", k.method, got, k.want)
		}
		if last := rec.seen()[i]; !reflect.DeepEqual(last, recorded{k.method, k.args}) {
			t.Errorf("%s arrived as\n%+v, want\n%+v", k.method, last, k.args)
		}
	}
	mustCoverAll(t, covered)
}

// mustCoverAll: a method added to an interface must be added to the test too.
func mustCoverAll(t *testing.T, covered map[string]bool) {
	t.Helper()
	for _, iface := range []reflect.Type{reflect.TypeFor[Control](), reflect.TypeFor[Dispatcher](), reflect.TypeFor[Membership](), reflect.TypeFor[Agent]()} {
		for i := range iface.NumMethod() {
			if !covered[iface.Method(i).Name] {
				t.Errorf("%s.%s is not covered", iface, iface.Method(i).Name)
			}
		}
	}
}

// TestErrorsCrossTheWire: text unchanged, errors.Is true for what it was true
// for and for nothing else.
func TestErrorsCrossTheWire(t *testing.T) {
	c := newTestCluster(t)
	rec := &recorder{}
	srv := c.serve(ServerConfig{Control: rec})
	cl := c.client(c.creds(weft.RoleWorker), srv.addr)
	for _, s := range sentinels() {
		rec.err = fmt.Errorf("remove service %q: ünïcode and\nlines 100%%: %w", "web", s.err)
		for name, err := range map[string]error{
			"unary":  cl.RemoveService(soon(t), weft.NewID()),
			"stream": cl.TaskLogs(soon(t), nil, weft.LogOptions{}, func(weft.LogRecord) error { return nil }),
		} {
			if err == nil || err.Error() != rec.err.Error() {
				t.Errorf("%s %s: text %q, want %q", name, s.name, err, rec.err)
			}
			for _, o := range sentinels() {
				if got, want := errors.Is(err, o.err), errors.Is(rec.err, o.err); got != want {
					t.Errorf("%s %s: errors.Is(%s) = %v, want %v", name, s.name, o.name, got, want)
				}
			}
		}
	}
	rec.err = errors.New("no sentinel at all")
	if err := cl.RemoveService(soon(t), weft.NewID()); err == nil || err.Error() != rec.err.Error() || errors.Is(err, weft.ErrUnavailable) {
		t.Errorf("plain error came as %v", err)
	}
	rec.err = errors.Join(weft.ErrNotFound, weft.ErrConflict)
	if err := cl.RemoveService(soon(t), weft.NewID()); !errors.Is(err, weft.ErrNotFound) || !errors.Is(err, weft.ErrConflict) {
		t.Errorf("two sentinels came as %v", err)
	}
}

// TestClusterHidesSecrets from those who must not see them.
func TestClusterHidesSecrets(t *testing.T) {
	c := newTestCluster(t)
	srv := c.serve(ServerConfig{Control: &recorder{cluster: filled[weft.Cluster]()}})
	for role, tokens := range map[weft.Role]bool{weft.RoleManager: true, weft.RoleWorker: false} {
		got, err := c.client(c.creds(role), srv.addr).Cluster(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		if got.CAKey != nil || (got.Tokens != weft.JoinTokens{}) != tokens {
			t.Errorf("a %s got key %q and tokens %+v", role, got.CAKey, got.Tokens)
		}
	}
}

func TestStreamEndsWithContext(t *testing.T) {
	c := newTestCluster(t)
	ended := make(chan struct{})
	rec := &recorder{logs: []weft.LogRecord{{Line: []byte("a\n")}}, hold: true, sets: []Assignments{{Seq: 1, Full: true}}}
	rec.onCall = func(ctx context.Context) { context.AfterFunc(ctx, func() { ended <- struct{}{} }) }
	srv := c.serve(ServerConfig{Control: rec, Dispatcher: rec, Agent: rec})
	creds := c.creds(weft.RoleManager)
	cl := c.client(creds, srv.addr)

	ctx, cancel := context.WithCancel(soon(t))
	err := cl.TaskLogs(ctx, nil, weft.LogOptions{Follow: true}, func(weft.LogRecord) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("logs after cancel: %v", err)
	}
	<-ended // the server noticed

	ctx, cancel = context.WithCancel(soon(t))
	s, err := cl.OpenSession(ctx, SessionRequest{Version: ProtocolVersion})
	if err != nil {
		t.Fatal(err)
	}
	if a, err := s.Recv(); err != nil || a.Seq != 1 {
		t.Fatalf("first message %+v, %v", a, err)
	}
	cancel()
	if _, err := s.Recv(); !errors.Is(err, context.Canceled) {
		t.Errorf("session after cancel: %v", err)
	}
	<-ended

	stop := errors.New("enough")
	err = cl.TaskLogs(soon(t), nil, weft.LogOptions{Follow: true}, func(weft.LogRecord) error { return stop })
	if err != stop {
		t.Errorf("the consumer's own error came back as %v", err)
	}
	<-ended
}

// TestSlowConsumer: a sender waits for its receiver instead of filling memory.
func TestSlowConsumer(t *testing.T) {
	c := newTestCluster(t)
	rec := &recorder{}
	for range 4000 {
		rec.logs = append(rec.logs, weft.LogRecord{Line: make([]byte, 4<<10)})
	}
	sent := make(chan int, len(rec.logs))
	srv := c.serve(ServerConfig{Control: countingLogs{rec, sent}})
	cl := c.client(c.creds(weft.RoleWorker), srv.addr)
	release := make(chan struct{})
	got := 0
	done := make(chan error, 1)
	go func() {
		done <- cl.TaskLogs(soon(t), nil, weft.LogOptions{}, func(weft.LogRecord) error {
			if got == 0 {
				<-release
			}
			got++
			return nil
		})
	}()
	// The sender stops within some windows' worth: wait until it makes no
	// progress any more.
	for n, quiet := 0, false; !quiet; {
		select {
		case <-sent:
			if n++; n > len(rec.logs)/2 {
				t.Fatalf("%d records were sent to a receiver that took none", n)
			}
		case <-time.After(300 * time.Millisecond):
			quiet = true
		}
	}
	close(release)
	if err := <-done; err != nil || got != len(rec.logs) {
		t.Errorf("got %d of %d records, %v", got, len(rec.logs), err)
	}
}

type countingLogs struct {
	*recorder
	sent chan int
}

func (c countingLogs) TaskLogs(ctx context.Context, tasks []weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	return c.recorder.TaskLogs(ctx, tasks, o, func(r weft.LogRecord) error {
		err := f(r)
		c.sent <- 1
		return err
	})
}

// TestTooLarge: a request above the limit fails by name and at once, not as a
// missing leader.
func TestTooLarge(t *testing.T) {
	c := newTestCluster(t)
	rec := &recorder{}
	cl := c.client(c.creds(weft.RoleWorker), c.serve(ServerConfig{Control: rec}).addr)
	spec := weft.ServiceSpec{Labels: map[string]string{"x": strings.Repeat("x", maxRequest)}}
	if _, err := cl.CreateService(soon(t), spec); !errors.Is(err, weft.ErrInvalid) || !strings.Contains(err.Error(), "too large") {
		t.Errorf("error %v", err)
	}
	rec.service = weft.Service{Spec: weft.ServiceSpec{Labels: map[string]string{"x": strings.Repeat("x", maxAnswer)}}}
	if _, err := cl.Service(soon(t), "x"); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Errorf("answer above the limit: %v", err)
	}
}
