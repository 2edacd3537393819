package bpf

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// vanishing is a way of attaching with one hook, which runs another build's
// program, and what attach says to it.
type vanishing struct {
	attacher
	err error
}

func (v vanishing) standing() ([]hook, error) {
	return []hook{{pin: "wp1", ifindex: 7, prog: overlayProgFromTask}}, nil
}
func (v vanishing) isAttached(hook) bool { return false }
func (v vanishing) attach(hook) error    { return v.err }

// TestAdoptingALinkThatGoes: a task ends between the look at its link and the
// change of its program. A pass failed of it once.
func TestAdoptingALinkThatGoes(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{fmt.Errorf("attach: %w", unix.ENODEV), false},   // link.AttachTCX
		{fmt.Errorf("replace: %w", unix.ENOLINK), false}, // Link.Update
		{fmt.Errorf("attach: %w", unix.EPERM), true},
	} {
		v := vanishing{err: tc.err}
		if err := (&snapshot{via: v, other: v}).adopt(); (err != nil) != tc.want || tc.want && !errors.Is(err, unix.EPERM) {
			t.Errorf("attach says %v: adopt says %v", tc.err, err)
		}
	}
}
