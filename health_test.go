package weft_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

func TestHealthCheckIsJudged(t *testing.T) {
	for _, c := range []struct {
		check weft.HealthCheck
		want  string // the field that is wrong; "" = none
	}{
		{weft.HealthCheck{}, ""},
		{weft.HealthCheck{Test: []string{"NONE"}}, ""},
		{weft.HealthCheck{Test: []string{"CMD", "true"}, Retries: 1, Interval: time.Millisecond}, ""},
		{weft.HealthCheck{Test: []string{"CMD-SHELL", "exit 0"}, StartPeriod: time.Hour}, ""},
		{weft.HealthCheck{Interval: time.Second}, ""}, // of the image's
		{weft.HealthCheck{Test: []string{"true"}}, "Test"},
		{weft.HealthCheck{Test: []string{"CMD"}}, "Test"},
		{weft.HealthCheck{Test: []string{"CMD", ""}}, "Test"},
		{weft.HealthCheck{Test: []string{"CMD-SHELL", "a", "b"}}, "Test"},
		{weft.HealthCheck{Test: []string{"NONE", "a"}}, "Test"},
		{weft.HealthCheck{Test: []string{"NONE"}, Retries: 3}, "Test"},
		{weft.HealthCheck{Interval: -time.Second}, "Interval"},
		{weft.HealthCheck{Timeout: time.Microsecond}, "Timeout"},
		{weft.HealthCheck{StartPeriod: 1}, "StartPeriod"},
		{weft.HealthCheck{StartInterval: 1}, "StartInterval"},
		{weft.HealthCheck{Retries: -1}, "Retries"},
	} {
		s := weft.ServiceSpec{Name: "web", Container: weft.ContainerSpec{Image: "a", Health: c.check}}
		s.Defaults()
		err := s.Validate()
		path := "TaskTemplate.ContainerSpec.Healthcheck." + c.want + ": "
		if (err != nil) != (c.want != "") || err != nil && (!errors.Is(err, weft.ErrInvalid) || !strings.HasPrefix(err.Error(), path)) {
			t.Errorf("%+v: %v, want %q", c.check, err, c.want)
		}
	}
}

func TestHealthCheckOfImageAndService(t *testing.T) {
	image := weft.HealthCheck{Test: []string{"CMD", "image"}, Interval: 4 * time.Second, Retries: 5}
	for _, c := range []struct {
		service, image weft.HealthCheck
		want           weft.HealthCheck
		ok             bool
	}{
		{weft.HealthCheck{}, weft.HealthCheck{}, weft.HealthCheck{}, false},
		{weft.HealthCheck{Interval: time.Second}, weft.HealthCheck{}, weft.HealthCheck{}, false},
		{weft.HealthCheck{Test: []string{"NONE"}}, image, weft.HealthCheck{}, false},
		{weft.HealthCheck{}, weft.HealthCheck{Test: []string{"NONE"}}, weft.HealthCheck{}, false},
		{weft.HealthCheck{}, image, weft.HealthCheck{Test: []string{"CMD", "image"}, Interval: 4 * time.Second, Timeout: 30 * time.Second, StartInterval: 5 * time.Second, Retries: 5}, true},
		{weft.HealthCheck{Timeout: 2 * time.Second, Retries: 1}, image, weft.HealthCheck{Test: []string{"CMD", "image"}, Interval: 4 * time.Second, Timeout: 2 * time.Second, StartInterval: 5 * time.Second, Retries: 1}, true},
		{weft.HealthCheck{Test: []string{"CMD-SHELL", "x"}, StartPeriod: time.Minute}, weft.HealthCheck{}, weft.HealthCheck{Test: []string{"CMD-SHELL", "x"}, Interval: 30 * time.Second, Timeout: 30 * time.Second, StartPeriod: time.Minute, StartInterval: 5 * time.Second, Retries: 3}, true},
	} {
		got, ok := c.service.Of(c.image)
		if ok != c.ok || !got.Equal(c.want) {
			t.Errorf("%+v of an image with %+v: %+v, %v", c.service, c.image, got, ok)
		}
	}
}

func TestAnotherCheckReplacesTasks(t *testing.T) {
	a := weft.ServiceSpec{Container: weft.ContainerSpec{Image: "a"}}
	for _, h := range []weft.HealthCheck{{Test: []string{"NONE"}}, {Interval: 1}, {Timeout: 1}, {StartPeriod: 1}, {StartInterval: 1}, {Retries: 1}} {
		b := a
		b.Container.Health = h
		if !weft.NeedsRestart(&a, &b) || weft.NeedsRestart(&b, &b) {
			t.Errorf("%+v", h)
		}
	}
}
