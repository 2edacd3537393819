//go:build lab

package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Ports of this test beside the usual ones: the cluster ports of h1, h2 and h3,
// and a published one.
const (
	portH1, portH2, portH3 = 6377, 4377, 5377
	portPublished          = 8097
)

// TestLabPortElsewhere forms a cluster in which no node has the usual cluster port,
// with what the commands print, and does what needs a way from the leader to the
// others.
func TestLabPortElsewhere(t *testing.T) {
	r := besideRig(t, "t-port")
	for _, h := range []string{"h3", "h2", "h1"} {
		r.must(r.on(h, "swarm", "leave", "--force")...)
	}
	h1, h2, h3 := r.host("h1").Addr, r.host("h2").Addr, r.host("h3").Addr
	at := func(a fmt.Stringer, port int) string { return fmt.Sprintf("%s:%d", a, port) }

	// A listen address alone, on all addresses and on one, and both.
	worker := r.joinCommand(r.must(r.weftOn("h1", "swarm", "init", "--listen-addr", at(addrAll{}, portH1))...))
	worker.wants(t, "swarm init", at(h1, portH1))
	r.must(r.weftOn("h2", worker.with("--listen-addr", at(addrAll{}, portH2))...)...)
	manager := r.joinCommand(r.must(r.on("h1", "swarm", "join-token", "manager")...))
	manager.wants(t, "docker swarm join-token", at(h1, portH1))
	r.must(r.on("h3", manager.with("--listen-addr", at(h3, portH3))...)...)

	// Everything that shows a manager shows where it is.
	for _, h := range []struct{ name, addr string }{{"h1", at(h1, portH1)}, {"h3", at(h3, portH3)}} {
		if out := r.must(r.on("h1", "node", "inspect", "--format", "{{.ManagerStatus.Addr}} {{.ManagerStatus.Reachability}}", h.name)...); out != h.addr+" reachable" {
			t.Errorf("node inspect %s: %s, want %s", h.name, out, h.addr)
		}
	}
	for _, h := range three {
		r.eventually("managers' addresses on "+h, func() error {
			out, err := r.run(t.Context(), r.on(h, "info", "--format", "{{range .Swarm.RemoteManagers}}{{.Addr}} {{end}}")...)
			if err == nil && !(strings.Contains(out, at(h1, portH1)+" ") && strings.Contains(out, at(h3, portH3)+" ") && len(strings.Fields(out)) == 2) {
				err = errors.New(out)
			}
			return err
		})
	}
	fromH3 := r.joinCommand(r.must(r.weftOn("h3", "swarm", "join-token", "worker")...))
	fromH3.wants(t, "join-token on h3", at(h3, portH3))

	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--publish", fmt.Sprintf("%d:80", portPublished), "weft/whoami")...)
	r.logsOfAll("web", "at first")

	// The same node comes back at its port.
	for _, h := range []string{"h2", "h3"} {
		r.killDaemon(h)
		r.must(r.weft, "lab", "start", "--name", r.name, h)
	}
	r.logsOfAll("web", "after restarts")

	// No service takes a node's port, no node a service's, none another's address.
	for _, p := range []struct {
		port int
		want string
	}{{portH2, "cluster port of node h2"}, {portH3, "cluster port of node h3"}, {2377, "weft itself"}} {
		_, err := r.run(t.Context(), r.on("h1", "service", "create", "-d", "--name", "thief", "--publish", fmt.Sprintf("%d:80", p.port), "weft/whoami")...)
		wantRefusal(t, fmt.Sprint("publish ", p.port), err, p.want)
	}
	r.must(r.on("h2", "swarm", "leave")...)
	_, err := r.run(t.Context(), r.on("h2", fromH3.with("--listen-addr", at(addrAll{}, portPublished))...)...)
	wantRefusal(t, "join with a published port", err, "ListenAddr", "service web", "--listen-addr")
	_, err = r.run(t.Context(), r.on("h2", manager.with("--advertise-addr", h3.String(), "--data-path-addr", h2.String())...)...)
	wantRefusal(t, "join with the address of h3", err, "AdvertiseAddr", h3.String(), "node h3")

	// A join that fails after the leader has agreed leaves nothing behind, on
	// either side: the next one needs nobody's help.
	nodes := r.must(r.on("h1", "node", "ls", "-q", "--filter", "membership=accepted")...)
	state := filepath.Join(r.host("h2").Paths.DataRoot, "agent")
	if err := errors.Join(os.MkdirAll(state, 0o700), os.WriteFile(filepath.Join(state, "assignments.json"), []byte(`{"Version":99}`), 0o600)); err != nil {
		t.Fatal(err)
	}
	_, err = r.run(t.Context(), r.on("h2", manager.with()...)...)
	wantRefusal(t, "join of a host with another release's state", err, "assignments.json has version 99")
	r.forgot("h2", "")
	if out := r.must(r.on("h1", "info", "--format", "{{.Swarm.Managers}}")...); out != "2" {
		t.Errorf("the cluster has %s managers after a third has failed to join, want 2", out)
	}
	if now := r.must(r.on("h1", "node", "ls", "--format", "{{.Hostname}} {{.Status}}")...); strings.Count(now, "h2 Ready") != 0 || strings.Count(now, "\n") != strings.Count(nodes, "\n")+1 {
		t.Errorf("nodes after a join that failed:\n%s", now)
	}

	// The text of a manager elsewhere admits, to the usual port as well.
	// A new service: of the old one a task is remembered that nobody has any more.
	r.must(r.weftOn("h2", fromH3.with()...)...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "late", "--mode", "global", "weft/whoami")...)
	r.logsOfAll("late", "after h2 came back")
}

// addrAll prints as every address of a host.
type addrAll struct{}

func (addrAll) String() string { return "0.0.0.0" }

// weftOn is weft's own command line on a host.
func (r *rig) weftOn(host string, args ...string) []string {
	return append([]string{r.weft, "--host", r.on(host)[2]}, args...)
}

// joinText is a printed join command.
type joinText struct{ token, addr string }

var joinForm = regexp.MustCompile(`(?:weft|docker) swarm join --token (SWMTKN-1-\S+) (\S+)`)

func (r *rig) joinCommand(text string) joinText {
	r.t.Helper()
	m := joinForm.FindStringSubmatch(text)
	if m == nil {
		r.t.Fatalf("no join command in %q", text)
	}
	return joinText{m[1], m[2]}
}

func (j joinText) wants(t *testing.T, what, addr string) {
	t.Helper()
	if j.addr != addr {
		t.Errorf("%s prints %s, want %s", what, j.addr, addr)
	}
}

// with is the command with options.
func (j joinText) with(options ...string) []string {
	return append(append([]string{"swarm", "join"}, options...), "--token", j.token, j.addr)
}

// logsOfAll waits until a task on each host is heard, by both managers.
func (r *rig) logsOfAll(service, when string) {
	r.t.Helper()
	for _, asked := range []string{"h1", "h3"} {
		r.eventually(fmt.Sprintf("logs of %s by %s %s", service, asked, when), func() error {
			// The image writes to stderr, and docker prints that on its own.
			args := r.on(asked, "service", "logs", service)
			out, err := exec.CommandContext(r.t.Context(), args[0], args[1:]...).CombinedOutput()
			for _, h := range three {
				if !strings.Contains(string(out), "@"+h+" ") {
					err = errors.Join(err, fmt.Errorf("nothing from %s", h))
				}
			}
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return err
		})
	}
}

func wantRefusal(t *testing.T, what string, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: it was done", what)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %v; want %q", what, err, w)
		}
	}
}
