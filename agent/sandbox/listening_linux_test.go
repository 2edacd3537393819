package sandbox

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseDiag(t *testing.T) {
	m := make([]byte, diagAnswer)
	m[0] = unix.AF_UNIX
	for name, b := range map[string][]byte{"cut off": m[:diagAnswer-1], "another family": m, "empty": nil} {
		if got, err := parseDiag(b); err == nil {
			t.Errorf("%s: read as %v", name, got)
		}
	}
}
