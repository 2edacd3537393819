package api

import (
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"

	"github.com/weftnet/weft"
)

// honourHealth are the fields of a service's health check.
func honourHealth(r ruleSet) {
	r.honour("TaskTemplate.ContainerSpec.Healthcheck.", "Test", "Interval", "Timeout", "StartPeriod", "StartInterval", "Retries")
}

func checkHealth(h *container.HealthConfig, bad badFunc) {
	badIf(healthCheck(h).Validate("TaskTemplate.ContainerSpec.Healthcheck"), bad)
}

// badIf takes the fault of a value that checks itself, and names its field.
func badIf(err error, bad badFunc) {
	if err != nil {
		path, text, _ := strings.Cut(weft.Text(err), ": ")
		bad(path, "%s", text)
	}
}

// healthCheck converts the check of a request; nil is the image's.
func healthCheck(h *container.HealthConfig) weft.HealthCheck {
	if h == nil {
		return weft.HealthCheck{}
	}
	return weft.HealthCheck{
		Test: slices.Clone(h.Test), Interval: h.Interval, Timeout: h.Timeout,
		StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries,
	}
}

// dockerHealthCheck is healthCheck backwards.
func dockerHealthCheck(h weft.HealthCheck) *container.HealthConfig {
	if h.Equal(weft.HealthCheck{}) {
		return nil
	}
	return &container.HealthConfig{
		Test: slices.Clone(h.Test), Interval: h.Interval, Timeout: h.Timeout,
		StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries,
	}
}

// dockerHealth is the state of a container's check; nil without one.
func dockerHealth(h *weft.Health) *container.Health {
	if h.Status == "" {
		return nil
	}
	out := &container.Health{Status: container.HealthStatus(h.Status), FailingStreak: h.FailingStreak, Log: []*container.HealthcheckResult{}}
	for _, r := range h.Log {
		out.Log = append(out.Log, &container.HealthcheckResult{Start: r.Start, End: r.End, ExitCode: r.ExitCode, Output: r.Output})
	}
	return out
}

// healthText is what `docker ps` says behind "Up 3 minutes".
func healthText(h *weft.Health) string {
	switch h.Status {
	case "":
		return ""
	case weft.HealthStarting:
		return " (health: starting)"
	}
	return " (" + string(h.Status) + ")"
}

// healthWord is what containers are filtered by.
func healthWord(h *weft.Health) string {
	if h.Status == "" {
		return string(container.NoHealthcheck)
	}
	return string(h.Status)
}
