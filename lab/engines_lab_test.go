//go:build lab

package lab

import (
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLabEngines forces engines: what a flag asks for serves and is said to, and
// what the host cannot have refuses the daemon's start by the flag's name.
func TestLabEngines(t *testing.T) {
	r := newRig(t, "t-eng", "--hosts", "1", "--overlay-engine", "bridge", "--service-engine", "nft")
	out := r.must(r.on("h1", "info", "--format", "{{range .DriverStatus}}{{index . 0}}: {{index . 1}}\n{{end}}")...)
	for _, want := range []string{
		"overlay engine bridge: chosen: --overlay-engine asks for it, and its probe succeeded",
		"service engine nft: chosen: --service-engine asks for it, and its probe succeeded",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("info says %q, want %q in it", out, want)
		}
	}
	for _, c := range []struct{ flag, name, want string }{
		{"--overlay-engine", "pigeon", "--overlay-engine pigeon: this build has "},
		{"--service-engine", "pigeon", "--service-engine pigeon: this build has "},
	} {
		dir := t.TempDir()
		_, err := r.run(t.Context(), r.weft, "lab", "exec", "--name", r.name, "h1", "--",
			r.weft, "daemon", "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"), c.flag, c.name)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: %v; want exit code 1 and %q", c.flag, c.name, err, c.want)
		}
	}
}
