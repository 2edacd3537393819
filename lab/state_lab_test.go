//go:build lab

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// What the cluster must remember, and what a host must forget.

// answer is what a daemon said to an API call.
type answer struct {
	status int
	body   []byte
	took   time.Duration
}

// message is the text of an error.
func (a answer) message() string {
	var m struct{ Message string }
	if json.Unmarshal(a.body, &m) != nil {
		return string(a.body)
	}
	return m.Message
}

// call speaks to the API of a host without the delay of a command.
func (r *rig) call(ctx context.Context, host, method, path string, body any) (answer, error) {
	sock := r.host(host).Paths.Socket
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", sock)
	}}}
	b, err := json.Marshal(body)
	if err != nil {
		return answer{}, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://weft/v1.51"+path, bytes.NewReader(b))
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	began := time.Now()
	resp, err := c.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, text, time.Since(began)}, err
}

// memory is what must survive: objects by their ids, and the tokens.
func (r *rig) memory(host string) (map[string][]string, error) {
	m := map[string][]string{}
	for what, args := range map[string][]string{
		"nodes":    {"node", "ls", "-q"},
		"services": {"service", "ls", "--format", "{{.ID}} {{.Name}}"},
		"tasks":    {"service", "ps", "-q", "--no-trunc", "web"},
		"worker":   {"swarm", "join-token", "-q", "worker"},
		"manager":  {"swarm", "join-token", "-q", "manager"},
		"cluster":  {"info", "-f", "{{.Swarm.Cluster.ID}}"},
	} {
		out, err := r.run(r.t.Context(), r.on(host, args...)...)
		if err != nil {
			return nil, err
		}
		m[what] = strings.Split(strings.TrimSpace(out), "\n")
		slices.Sort(m[what])
	}
	return m, nil
}

// remembers waits until a host tells the same as before.
func (r *rig) remembers(what, host string, before map[string][]string) {
	r.t.Helper()
	r.eventually(what, func() error {
		now, err := r.memory(host)
		if err != nil {
			return err
		}
		for k, was := range before {
			if !slices.Equal(now[k], was) {
				return fmt.Errorf("%s were %q, are %q", k, was, now[k])
			}
		}
		return nil
	})
}

// writer makes networks one after the other and notes which were acknowledged.
type writer struct {
	mu    sync.Mutex // guards: the rest
	acked []string
	// refused counts answers that said that nothing was done, unclear those
	// that could not say.
	refused, unclear int
	// wrong are answers that must not be.
	wrong []string
	gap   time.Duration // the longest between two acknowledgements
	last  time.Time
}

// write goes on until ctx ends.
func (w *writer) write(ctx context.Context, r *rig, host string) {
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("ack-%s-%d", host, i)
		a, err := r.call(context.WithoutCancel(ctx), host, http.MethodPost, "/networks/create", map[string]any{"Name": name, "Driver": "overlay"})
		w.note(name, a, err)
		if pause(ctx, 50*time.Millisecond) != nil {
			return
		}
	}
}

func (w *writer) note(name string, a answer, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case err != nil: // the daemon was dead, or died under the call
		w.unclear++
	case a.status == http.StatusCreated:
		w.acked = append(w.acked, name)
		w.gap, w.last = max(w.gap, time.Since(w.last)), time.Now()
	case a.status == http.StatusServiceUnavailable && a.message() == weft.NoLeader:
		w.refused++
	case a.status == http.StatusServiceUnavailable:
		w.unclear++
	default:
		w.wrong = append(w.wrong, fmt.Sprintf("%s: %d %s", name, a.status, a.message()))
	}
}

// leader is the host that leads by the word of another.
func (r *rig) leader(ask string) (string, error) {
	out, err := r.run(r.t.Context(), r.on(ask, "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")...)
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 && f[1] == "Leader" {
			return f[0], nil
		}
	}
	return "", errors.Join(fmt.Errorf("no leader in %q", out), err)
}

func (r *rig) mustLeader(ask string) (leader string) {
	r.t.Helper()
	r.eventually("a leader", func() (err error) { leader, err = r.leader(ask); return err })
	return leader
}

// TestFaultsState kills managers while three clients write, with one manager and
// with three: 2 rounds; soak: 20.
func TestFaultsState(t *testing.T) {
	t.Run("1", func(t *testing.T) { stateSurvives(t, "flt-state1", 1, 2) })
	t.Run("3", func(t *testing.T) { stateSurvives(t, "flt-state3", 3, 2) })
}

// TestSoakState is TestFaultsState in its long form.
func TestSoakState(t *testing.T) {
	soak(t)
	stateSurvives(t, "flt-state-s1", 1, 20)
	stateSurvives(t, "flt-state-s3", 3, 20)
}

func stateSurvives(t *testing.T, lab string, managers, n int) {
	r := newRig(t, lab, "--managers", fmt.Sprint(managers))
	r.web(8092)
	before, err := r.memory("h1")
	if err != nil {
		t.Fatal(err)
	}
	w := &writer{last: time.Now()}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, h := range three {
		wg.Go(func() { w.write(ctx, r, h) })
	}
	defer func() { stop(); wg.Wait() }()
	deaths := 0
	die := func(hosts ...string) {
		for _, h := range hosts {
			r.killDaemon(h)
			deaths++
		}
		if err := pause(ctx, time.Second); err != nil {
			t.Fatal(err)
		}
		var up sync.WaitGroup
		for _, h := range hosts {
			up.Go(func() {
				if _, err := r.run(ctx, r.weft, "lab", "start", "--name", r.name, h); err != nil {
					t.Error(err)
				}
			})
		}
		up.Wait()
	}
	for range n {
		leader := r.mustLeader("h1")
		die(leader)
		r.remembers("after the death of the leader", "h1", before)
		if managers > 1 {
			leader = r.mustLeader("h1")
			follower := three[(slices.Index(three, leader)+1)%3]
			die(follower)
			r.remembers("after the death of a follower", follower, before)
		}
		die(three...)
		r.remembers("after the death of all", three[managers-1], before)
	}
	stop()
	wg.Wait()
	for _, s := range w.wrong {
		t.Errorf("a write was answered by %s", s)
	}
	out := strings.Fields(r.must(r.on("h2", "network", "ls", "--format", "{{.Name}}")...))
	lost := without(w.acked, out)
	if len(lost) > 0 || len(w.acked) == 0 {
		t.Errorf("of %d acknowledged writes were lost: %q", len(w.acked), lost)
	}
	t.Logf("%d managers, %d deaths in %d rounds: %d writes acknowledged, %d of them lost; %d refused, %d unclear; longest time without one %s",
		managers, deaths, n, len(w.acked), len(lost), w.refused, w.unclear, w.gap.Round(time.Millisecond))
}

// TestFaultsNoMajority: without a majority every call answers with the one
// sentence, soon; with it again, they work.
func TestFaultsNoMajority(t *testing.T) {
	r := newRig(t, "flt-quorum", "--managers", "3")
	leader := r.mustLeader("h1")
	rest := slices.DeleteFunc(slices.Clone(three), func(h string) bool { return h == leader })
	for _, alone := range []string{leader, rest[0]} {
		others := slices.DeleteFunc(slices.Clone(three), func(h string) bool { return h == alone })
		for _, h := range others {
			r.killDaemon(h)
		}
		// Until the lease of the leader has run out, a write may be under way
		// and rightly says so; a read comes after that.
		if a, err := r.call(t.Context(), alone, http.MethodGet, "/nodes", nil); err != nil || a.status != http.StatusServiceUnavailable {
			t.Errorf("first read without a majority: %d %s, %v", a.status, a.message(), err)
		}
		var mu sync.Mutex // guards: slowest
		var slowest time.Duration
		var calls sync.WaitGroup
		for _, c := range []struct {
			method, path string
			body         any
		}{
			{http.MethodGet, "/nodes", nil}, {http.MethodGet, "/services", nil}, {http.MethodGet, "/tasks", nil},
			{http.MethodGet, "/swarm", nil}, {http.MethodGet, "/networks", nil}, {http.MethodGet, "/services/web", nil},
			{http.MethodPost, "/networks/create", map[string]any{"Name": "x", "Driver": "overlay"}},
			{http.MethodPost, "/services/create", map[string]any{"Name": "x", "TaskTemplate": map[string]any{"ContainerSpec": map[string]any{"Image": "weft/whoami"}}}},
			{http.MethodDelete, "/services/web", nil}, {http.MethodDelete, "/nodes/x", nil},
		} {
			calls.Go(func() {
				a, err := r.call(t.Context(), alone, c.method, c.path, c.body)
				if err != nil {
					t.Errorf("%s %s: %v", c.method, c.path, err)
					return
				}
				mu.Lock()
				slowest = max(slowest, a.took)
				mu.Unlock()
				if a.status != http.StatusServiceUnavailable || a.message() != weft.NoLeader || a.took > 5*time.Second {
					t.Errorf("%s %s on %s answered %d %q after %s, want 503 %q within 5 s", c.method, c.path, alone, a.status, a.message(), a.took, weft.NoLeader)
				}
			})
		}
		calls.Wait()
		began := time.Now()
		r.must(r.weft, "lab", "start", "--name", r.name, others[0])
		r.eventually("two of three work", func() error {
			a, err := r.call(t.Context(), alone, http.MethodGet, "/nodes", nil)
			if err == nil && a.status != http.StatusOK {
				err = errors.New(a.message())
			}
			return err
		})
		t.Logf("%s alone: slowest refusal %s; back %s after a second manager was started", alone, slowest.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
		r.must(r.weft, "lab", "start", "--name", r.name, others[1])
	}
}

// TestFaultsLeave: a host that leaves keeps nothing of the cluster, and joins
// again.
func TestFaultsLeave(t *testing.T) {
	r := besideRig(t, "flt-leave", "--managers", "3", "--hosts", "4")
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "--publish", "8093:80", "weft/whoami")...)
	four := append(slices.Clone(three), "h4")
	whole := func() error {
		web, err := r.replicas("web", four...)
		if err == nil && len(web) != 4 {
			err = fmt.Errorf("%d of 4 run", len(web))
		}
		return err
	}
	r.eventually("a task on every host", whole)
	for _, c := range []struct {
		host, role string
		args       []string
	}{
		{"h4", "worker", nil}, {"h3", "manager", []string{"--force"}},
	} {
		if len(c.args) > 0 {
			if _, err := r.run(t.Context(), r.on(c.host, "swarm", "leave")...); err == nil {
				t.Error("a manager left without force")
			}
		}
		id := strings.TrimSpace(r.must(r.on(c.host, "info", "-f", "{{.Swarm.NodeID}}")...))
		began := time.Now()
		r.must(r.on(c.host, append([]string{"swarm", "leave"}, c.args...)...)...)
		t.Logf("%s %s left in %s", c.role, c.host, time.Since(began).Round(time.Millisecond))
		r.forgot(c.host, id)
		r.eventually("the others answer without it", func() error {
			return askOnce(t.Context(), r.clientNS(), ask(fmt.Sprintf("%s:8093", r.host("h1").Addr)))
		})
		for range 12 { // no balancer has it any more
			if err := askOnce(t.Context(), r.clientNS(), ask(fmt.Sprintf("%s:8093", r.host("h2").Addr))); err != nil {
				t.Errorf("published port after %s left: %v", c.host, err)
			}
		}
		if out := r.must(r.on("h1", "node", "ls", "--format", "{{.Hostname}} {{.Status}}")...); !strings.Contains(out, c.host+" Down") {
			t.Errorf("node ls after %s left: %q", c.host, out)
		}
		token := r.must(r.on("h1", "swarm", "join-token", "-q", c.role)...)
		r.must(r.on(c.host, "swarm", "join", "--token", token, "--advertise-addr", r.host(c.host).Addr.String(), r.host("h1").Addr.String()+":2377")...)
		r.eventually(c.host+" takes part again", whole)
		r.eventually("port of "+c.host, func() error {
			return askOnce(t.Context(), r.clientNS(), ask(fmt.Sprintf("%s:8093", r.host(c.host).Addr)))
		})
	}
}

// forgot checks that nothing of the cluster is left on a host, which was node id in it;
// "" = nobody knows.
func (r *rig) forgot(host, id string) {
	r.t.Helper()
	r.eventually(host+" has forgotten the cluster", func() error {
		left, err := r.inventory(host)
		if err != nil {
			return err
		}
		left = slices.DeleteFunc(left, func(s string) bool { return s == "link lo" || s == "link "+hostLink })
		h := r.host(host)
		for _, name := range []string{"member.json", "pki/*", "raft/*", "agent/*"} {
			files, err := filepath.Glob(filepath.Join(h.Paths.DataRoot, name))
			if err != nil {
				return err
			}
			left = append(left, files...)
		}
		if id != "" {
			groups, err := groupsOf([]string{id})
			if err != nil {
				return err
			}
			left = append(left, groups...)
		}
		tables, err := nftTables(h.Paths.NetNS)
		if left = append(left, tables...); err != nil || len(left) > 0 {
			return errors.Join(fmt.Errorf("left: %q", left), err)
		}
		return nil
	})
}

// nftTables lists the nftables tables of a network namespace (linux
// nf_tables.h: NFT_MSG_GETTABLE, attribute NFTA_TABLE_NAME).
func nftTables(ns string) (names []string, err error) {
	err = within(ns, func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		req := []byte{20, 0, 0, 0, unix.NFT_MSG_GETTABLE, unix.NFNL_SUBSYS_NFTABLES, 1, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
		if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return err
		}
		for {
			b := make([]byte, 64<<10)
			n, _, err := unix.Recvfrom(fd, b, 0)
			if err != nil {
				return err
			}
			for b = b[:n]; len(b) >= 20; {
				size := int(b[0]) | int(b[1])<<8
				if b[4] == unix.NLMSG_DONE || size < 20 || size > len(b) {
					return nil
				}
				if attr := b[20:size]; len(attr) > 4 && attr[2] == unix.NFTA_TABLE_NAME {
					end := int(attr[0]) | int(attr[1])<<8
					names = append(names, "nft table "+string(bytes.TrimRight(attr[4:end], "\x00")))
				}
				b = b[min((size+3)&^3, len(b)):]
			}
		}
	})
	return names, err
}
