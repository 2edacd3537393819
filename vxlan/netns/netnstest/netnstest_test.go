package netnstest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
)

// recorder is a test that notes how it was ended, and goes on.
type recorder struct {
	testing.TB
	ended []string
}

func (r *recorder) Helper()          {}
func (r *recorder) Skip(args ...any) { r.ended = append(r.ended, "skip: "+fmt.Sprint(args...)) }
func (r *recorder) Fatalf(format string, args ...any) {
	r.ended = append(r.ended, "fail: "+fmt.Sprintf(format, args...))
}

func TestMissing(t *testing.T) {
	for required, want := range map[string]string{
		"":                    "skip: no such tool",
		"vm":                  "fail: WEFT_TEST_REQUIRE has vm, but: no such tool",
		"userns,root,vm":      "fail: WEFT_TEST_REQUIRE has vm, but: no such tool",
		"userns,root,docker":  "skip: no such tool",
		"vmlinux,root,not-vm": "skip: no such tool", // words, not pieces of them
	} {
		t.Setenv(require, required)
		r := &recorder{TB: t}
		Missing(r, "vm", errors.New("no such tool"))
		if len(r.ended) == 0 || !strings.HasPrefix(r.ended[0], want) {
			t.Errorf("%s=%s: %q, want %q", require, required, r.ended, want)
		}
	}
}

// The test goes on in a network of its own, with nothing in /run.
func TestInside(t *testing.T) {
	if !Inside(t) {
		return
	}
	links, err := net.Interfaces()
	if err != nil || len(links) != 1 || links[0].Name != "lo" || links[0].Flags&net.FlagUp != 0 {
		t.Errorf("links %v, %v", links, err)
	}
	if files, err := os.ReadDir("/run"); err != nil || len(files) > 0 {
		t.Errorf("/run holds %v, %v", files, err)
	}
}
