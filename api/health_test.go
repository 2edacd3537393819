package api

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/weftnet/weft"
)

func TestHealthIsShown(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		health weft.Health
		text   string
		want   *container.Health
	}{
		{weft.Health{}, "Up 3 minutes", nil},
		{weft.Health{Status: weft.HealthStarting}, "Up 3 minutes (health: starting)", &container.Health{Status: container.Starting}},
		{weft.Health{Status: weft.HealthUnhealthy, FailingStreak: 3}, "Up 3 minutes (unhealthy)", &container.Health{Status: container.Unhealthy, FailingStreak: 3}},
		{weft.Health{Status: weft.HealthHealthy, Log: []weft.HealthResult{{Start: now, End: now.Add(time.Second), ExitCode: 2, Output: "x"}}},
			"Up 3 minutes (healthy)", &container.Health{Status: container.Healthy, Log: []*container.HealthcheckResult{{Start: now, End: now.Add(time.Second), ExitCode: 2, Output: "x"}}}},
	} {
		ct := weft.Container{State: weft.ContainerState{Status: running, StartedAt: now.Add(-3 * time.Minute), Health: c.health},
			Spec: weft.ContainerSpec{Health: weft.HealthCheck{Test: []string{"CMD", "true"}, Retries: 3}}}
		if got := containerSummary(&ct, "", now); got.Status != c.text || string(got.Health.Status) != healthWord(&c.health) {
			t.Errorf("%+v: %q, %+v", c.health, got.Status, got.Health)
		}
		got := inspectContainer(&ct, nil)
		if h := got.Config.Healthcheck; h == nil || h.Retries != 3 || strings.Join(h.Test, " ") != "CMD true" {
			t.Errorf("check %+v", h)
		}
		h := got.State.Health
		if (h == nil) != (c.want == nil) {
			t.Fatalf("%+v: %+v", c.health, h)
		}
		if h == nil {
			continue
		}
		if h.Status != c.want.Status || h.FailingStreak != c.want.FailingStreak || h.Log == nil || len(h.Log) != len(c.want.Log) || len(h.Log) == 1 && *h.Log[0] != *c.want.Log[0] {
			t.Errorf("%+v: %+v", c.health, h)
		}
		for _, word := range []string{"none", "starting", "healthy", "unhealthy"} {
			call := &call{Request: httptest.NewRequest("GET", `/containers/json`, nil), query: map[string][]string{"filters": {`{"health":["` + word + `"]}`}}}
			f, err := call.filters("health")
			if err != nil {
				t.Fatal(err)
			}
			if got := keepContainer(f, &ct); got != (word == healthWord(&c.health)) {
				t.Errorf("%+v passes the filter %s: %v", c.health, word, got)
			}
		}
	}
}
