package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestUnderlayIsKept: a tunnel address that comes late costs a line in the log, not
// the node.
func TestUnderlayIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		u := &underlay{log: slog.New(slog.NewTextHandler(&log, nil))}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		tries := 0
		err := u.keep(ctx, func(ctx context.Context) error {
			if tries++; tries <= 5 {
				return errors.New("cannot assign requested address")
			}
			<-ctx.Done()
			return ctx.Err()
		})
		if err != nil || tries != 6 {
			t.Errorf("%d tries and %v, want 6 and no error", tries, err)
		}
		if n := strings.Count(log.String(), "cannot assign"); n != 1 {
			t.Errorf("the failure is logged %d times:\n%s", n, log.String())
		}
	})
}
