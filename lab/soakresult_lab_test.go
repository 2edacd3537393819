//go:build lab

package lab

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// soakResult is what a long run found, for a file in lab/results that is
// committed. The short form of a test logs the same lines and writes nothing.
// Safe for concurrent use, by parts of a test that run at once.
type soakResult struct {
	t     *testing.T
	began time.Time
	mu    sync.Mutex
	lines []string
}

// newSoakResult begins the result of t. The file is written when t has ended,
// however it did.
func newSoakResult(t *testing.T) *soakResult {
	r := &soakResult{t: t, began: time.Now()}
	if strings.HasPrefix(t.Name(), "TestSoak") {
		t.Cleanup(r.write)
	}
	return r
}

func (r *soakResult) printf(format string, args ...any) {
	r.t.Helper()
	line := fmt.Sprintf(format, args...)
	r.t.Log(line)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, line)
}

func (r *soakResult) write() {
	verdict := "passed"
	if r.t.Failed() {
		verdict = "FAILED"
	}
	commit := "unknown"
	if b, err := exec.Command("git", "describe", "--always", "--dirty").Output(); err == nil {
		commit = strings.TrimSpace(string(b))
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		r.t.Error(err)
	}
	load := "unknown"
	if f, err := os.Open("/proc/loadavg"); err == nil {
		s := bufio.NewScanner(f)
		if s.Scan() {
			load = strings.Join(strings.Fields(s.Text())[:3], " ")
		}
		f.Close()
	}
	engine := os.Getenv(overlayEnv)
	if engine == "" {
		engine = "chosen"
	}
	name := r.t.Name() + "-" + engine
	text := fmt.Sprintf("%s %s after %s\ncommit %s\noverlay engine %s\nkernel %s, %d cores, load at the end %s\n%s\n\n", r.t.Name(), verdict,
		time.Since(r.began).Round(time.Second), commit, engine, unix.ByteSliceToString(u.Release[:]), runtime.NumCPU(), load, r.began.UTC().Format(time.DateOnly))
	for _, l := range r.lines {
		text += l + "\n"
	}
	if err := os.WriteFile(filepath.Join("results", name+".txt"), []byte(text), 0o644); err != nil {
		r.t.Error(err)
	}
}
