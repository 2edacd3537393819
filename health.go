package weft

import (
	"slices"
	"time"
)

// HealthCheck says how to find out whether a container can serve: a command run
// in it. The zero value is "as the image says". Fields as in Docker's HEALTHCHECK.
type HealthCheck struct {
	// Test is {"NONE"}, {"CMD", command, arguments…} or {"CMD-SHELL", line}; in
	// a service nothing stands for the image's.
	Test []string `json:",omitempty" cbor:",omitempty"`
	// Interval is the pause between two runs, Timeout the longest time of one.
	// Zeros of these four and of Retries stand for the image's, else Docker's.
	Interval time.Duration `json:",omitempty" cbor:",omitempty"`
	Timeout  time.Duration `json:",omitempty" cbor:",omitempty"`
	// StartPeriod is for a slow start: failures in it do not count until one run
	// has succeeded. In it the pause is StartInterval.
	StartPeriod   time.Duration `json:",omitempty" cbor:",omitempty"`
	StartInterval time.Duration `json:",omitempty" cbor:",omitempty"`
	// Retries in a row that failed make a container unhealthy.
	Retries int `json:",omitempty" cbor:",omitempty"`
}

// Kinds of HealthCheck.Test: Docker Engine API v1.47 HealthConfig.
const (
	HealthNone  = "NONE"
	HealthCmd   = "CMD"
	HealthShell = "CMD-SHELL"
)

// Docker's defaults: daemon/health.go of moby.
const (
	defaultHealthInterval      = 30 * time.Second
	defaultHealthTimeout       = 30 * time.Second
	defaultHealthStartInterval = 5 * time.Second
	defaultHealthRetries       = 3
	// minHealthTime is Docker's for all of its times.
	minHealthTime = time.Millisecond
)

// Of is the check of a container: what the service leaves open is the image's.
// ok is false when there is none.
func (h HealthCheck) Of(image HealthCheck) (check HealthCheck, ok bool) {
	if len(h.Test) == 0 {
		h.Test = image.Test
	}
	if len(h.Test) < 2 || h.Test[0] == HealthNone {
		return HealthCheck{}, false
	}
	first := func(d *time.Duration, others ...time.Duration) {
		for _, o := range others {
			if *d == 0 {
				*d = o
			}
		}
	}
	first(&h.Interval, image.Interval, defaultHealthInterval)
	first(&h.Timeout, image.Timeout, defaultHealthTimeout)
	first(&h.StartPeriod, image.StartPeriod)
	first(&h.StartInterval, image.StartInterval, defaultHealthStartInterval)
	if h.Retries == 0 {
		h.Retries = image.Retries
	}
	if h.Retries == 0 {
		h.Retries = defaultHealthRetries
	}
	return h, true
}

// Equal reports whether two checks are the same.
func (h HealthCheck) Equal(o HealthCheck) bool {
	return slices.Equal(h.Test, o.Test) && h.Interval == o.Interval && h.Timeout == o.Timeout &&
		h.StartPeriod == o.StartPeriod && h.StartInterval == o.StartInterval && h.Retries == o.Retries
}

// Validate refuses what cannot be run, by the path of the field below at.
func (h HealthCheck) Validate(field string) error {
	if len(h.Test) > 0 {
		switch kind := h.Test[0]; {
		case kind != HealthNone && kind != HealthCmd && kind != HealthShell:
			return invalid(field+".Test", "%q: begin with NONE, CMD or CMD-SHELL", kind)
		case kind == HealthNone && (len(h.Test) > 1 || h.Interval != 0 || h.Timeout != 0 || h.StartPeriod != 0 || h.StartInterval != 0 || h.Retries != 0):
			return invalid(field+".Test", "NONE leaves nothing to be set: leave the other fields out")
		case kind == HealthCmd && (len(h.Test) < 2 || h.Test[1] == ""):
			return invalid(field+".Test", "CMD without a command")
		case kind == HealthShell && (len(h.Test) != 2 || h.Test[1] == ""):
			return invalid(field+".Test", "CMD-SHELL takes one command line, here are %d", len(h.Test)-1)
		}
	}
	for _, f := range []struct {
		name string
		d    time.Duration
	}{{"Interval", h.Interval}, {"Timeout", h.Timeout}, {"StartPeriod", h.StartPeriod}, {"StartInterval", h.StartInterval}} {
		if f.d < 0 || f.d > 0 && f.d < minHealthTime {
			return invalid(field+"."+f.name, "%s: write at least 1ms, or 0 for the default", f.d)
		}
	}
	if h.Retries < 0 {
		return invalid(field+".Retries", "%d: must not be negative", h.Retries)
	}
	return nil
}

// HealthStatus is what a container's check has found.
type HealthStatus string

// Values of HealthStatus, Docker's words; "" = no check.
const (
	HealthStarting  HealthStatus = "starting"
	HealthHealthy   HealthStatus = "healthy"
	HealthUnhealthy HealthStatus = "unhealthy"
)

// Health is the state of a container's check.
type Health struct {
	Status HealthStatus
	// FailingStreak is the number of failures in a row that count.
	FailingStreak int
	Log           []HealthResult // the last ones, oldest first; never written once set
}

// HealthResult is one run of a check.
type HealthResult struct {
	Start, End time.Time
	ExitCode   int // 0 = healthy; -1 = it did not run, or for too long
	Output     string
}
