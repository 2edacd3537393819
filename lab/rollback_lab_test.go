//go:build lab

package lab

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	rollbackPort = 8094
	rollbackRate = 60
)

// TestLabRollback: an update to a health check that cannot succeed goes back by
// itself, and one that went well goes back when it is asked for. All by the docker
// command; no request fails meanwhile, from inside or outside.
func TestLabRollback(t *testing.T) {
	r := newRig(t, "t-back")
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "client", "--network", "front", "weft/whoami")...)
	r.createRolledBack()
	var clients []replica
	var vip string
	r.eventually("all tasks run", func() (err error) {
		if clients, err = r.replicas("client", three...); err == nil && len(clients) != 1 {
			err = fmt.Errorf("%d clients run", len(clients))
		}
		if err == nil {
			vip, err = r.vip("web")
		}
		if err == nil && len(r.tasksOf("web")) != 2 {
			err = errors.New("web does not run")
		}
		return err
	})
	before := r.tasksOf("web")
	places := []place{{clients[0].ns(), ask(vip + ":80")}}
	for _, h := range three {
		places = append(places, place{r.clientNS(), ask(fmt.Sprintf("%s:%d", r.host(h).Addr, rollbackPort))})
	}
	for i, p := range places {
		r.eventually(fmt.Sprintf("first answer at place %d", i), func() error { return askOnce(t.Context(), p.ns, p.ask) })
	}
	requests := &flow{name: "requests", rate: rollbackRate}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	began := time.Now()
	g.Go(func() error { return requests.run(ctx, places) })

	r.must(r.on("h1", "service", "update", "-d", "--health-cmd", "cannot-succeed", "--health-interval", "200ms", "--health-retries", "2", "--health-start-period", "0s",
		"--update-failure-action", "rollback", "web")...)
	r.updated("rollback_completed rollback completed")
	if got := r.tasksOf("web"); strings.Join(got, " ") != strings.Join(before, " ") {
		t.Errorf("tasks %q serve, before %q did", got, before)
	}
	if out := r.must(r.on("h1", "service", "inspect", "-f", "{{.Spec.TaskTemplate.ContainerSpec.Healthcheck.Test}} {{.Spec.UpdateConfig.FailureAction}}", "web")...); out != "[CMD /weft whoami get http://127.0.0.1/healthz] pause" {
		t.Errorf("the specification has %q", out)
	}
	if out := r.must(r.on("h1", "service", "ps", "--no-trunc", "web")...); !regexp.MustCompile(`Shutdown +Failed .*"unhealthy container: 2 checks in a row failed`).MatchString(out) {
		t.Errorf("service ps says\n%s", out)
	}
	if out, err := r.run(t.Context(), r.on("h1", "service", "rollback", "-d", "web")...); err == nil || !strings.Contains(out+err.Error(), "does not have a previous spec") {
		t.Errorf("a second way back: %s, %v", out, err)
	}

	r.must(r.on("h1", "service", "update", "-d", "--env-add", "V=2", "web")...)
	r.updated("completed update completed")
	r.must(r.on("h1", "service", "rollback", "-d", "web")...)
	r.updated("rollback_completed rollback completed")
	if out := r.must(r.on("h1", "service", "inspect", "-f", "{{.Spec.TaskTemplate.ContainerSpec.Env}} {{.PreviousSpec.TaskTemplate.ContainerSpec.Env}}", "web")...); strings.TrimSpace(out) != "[V=1] [V=2]" {
		t.Errorf("environment %q", out)
	}
	took := time.Since(began)
	cancel()
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("in %s: %s", took.Round(100*time.Millisecond), requests)
	requests.mustNotHaveFailed(t, began, always)
	if requests.sent == 0 {
		t.Error("nothing was asked")
	}
}

// createRolledBack makes the service with a check that succeeds once the server
// answers: without one a task is led to as soon as its process is there. The image
// has no shell, so the check is a command, for which docker has no option.
func (r *rig) createRolledBack() {
	r.t.Helper()
	front := r.must(r.on("h1", "network", "inspect", "-f", "{{.ID}}", "front")...)
	second := int64(time.Second)
	policy := map[string]any{"Parallelism": 2, "Order": "start-first", "Monitor": second / 2, "FailureAction": "pause"}
	spec := map[string]any{
		"Name": "web",
		"TaskTemplate": map[string]any{
			"ContainerSpec": map[string]any{
				"Image": "weft/whoami", "Args": []string{"--linger", "1s"}, "Env": []string{"V=1"},
				"Healthcheck": map[string]any{
					"Test": []string{"CMD", "/weft", "whoami", "get", "http://127.0.0.1/healthz"}, "Interval": 5 * second, "Timeout": 5 * second,
					"StartPeriod": 30 * second, "StartInterval": second / 4, "Retries": 5,
				},
			},
			"Networks": []map[string]any{{"Target": front}},
		},
		"Mode":         map[string]any{"Replicated": map[string]any{"Replicas": 2}},
		"UpdateConfig": policy, "RollbackConfig": policy,
		"EndpointSpec": map[string]any{"Ports": []map[string]any{{"Protocol": "tcp", "TargetPort": 80, "PublishedPort": rollbackPort}}},
	}
	if a, err := r.call(r.t.Context(), "h1", http.MethodPost, "/services/create", spec); err != nil || a.status != http.StatusCreated {
		r.t.Fatalf("create service: %d %s, %v", a.status, a.message(), err)
	}
}

// tasksOf are the ids of the running tasks of a service, by slot.
func (r *rig) tasksOf(service string) []string {
	r.t.Helper()
	out := r.must(r.on("h1", "service", "ps", "--no-trunc", "-f", "desired-state=running", "--format", "{{.Name}} {{.ID}} {{.CurrentState}}", service)...)
	var ids []string
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "Running" {
			ids = append(ids, f[1])
		}
	}
	return ids
}

// updated waits for the end of an update of web.
func (r *rig) updated(want string) {
	r.t.Helper()
	r.eventually(want, func() error {
		out, err := r.run(r.t.Context(), r.on("h1", "service", "inspect", "-f", "{{.UpdateStatus.State}} {{.UpdateStatus.Message}}", "web")...)
		if err == nil && strings.TrimSpace(out) != want {
			err = errors.New(strings.TrimSpace(out))
		}
		return err
	})
}
