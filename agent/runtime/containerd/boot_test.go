package containerd

import (
	"os"
	"path/filepath"
	"testing"
)

// The mark stays as long as its folder does, and no longer than the kernel.
func TestBootMark(t *testing.T) {
	path := filepath.Join(t.TempDir(), "boot")
	mark := func() string {
		t.Helper()
		m, err := bootMark(path)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	first := mark()
	if again := mark(); again != first {
		t.Errorf("a restarted daemon has the mark %q, the first had %q", again, first)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second := mark()
	if second == first {
		t.Error("a host that lost its runtime folder has the old mark")
	}
	for _, old := range []string{"other-kernel." + second, "", "torn"} {
		if err := os.WriteFile(path, []byte(old), 0o600); err != nil {
			t.Fatal(err)
		}
		if m := mark(); m == old || m == second {
			t.Errorf("a file with %q gave the mark %q", old, m)
		}
	}
}
