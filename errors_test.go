package weft_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/weftnet/weft"
)

func TestText(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{
		{errors.New("plain"), "plain"},
		{errors.New("mount x: invalid argument"), "mount x: invalid argument"}, // the kernel's, not ours
		{fmt.Errorf("port 0: %w", weft.ErrInvalid), "port 0"},
		{fmt.Errorf("%w: port 0", weft.ErrInvalid), "port 0"},
		{fmt.Errorf("load archive: %w: %w", weft.ErrInvalid, errors.New("no tar")), "load archive: no tar"},
		{fmt.Errorf("a: %w", fmt.Errorf("b: %w: c: %w", weft.ErrUnavailable, weft.ErrConflict)), "a: b: c"},
		{errors.Join(fmt.Errorf("a: %w", weft.ErrInvalid), errors.New("b")), "a\nb"},
		{fmt.Errorf("service web: %w", weft.ErrNotFound), "service web: not found"},
		{weft.ErrInvalid, "invalid argument"},
	} {
		if got := weft.Text(tc.err); got != tc.want {
			t.Errorf("Text(%q) = %q, want %q", tc.err, got, tc.want)
		}
	}
}
