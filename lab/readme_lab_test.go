//go:build lab

package lab

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestLabReadme types the README's tour as it stands there. The tour's lab has
// the default name; where a person has one standing, the test leaves it alone.
func TestLabReadme(t *testing.T) {
	weftBinary := binary(t)
	docker, err := exec.LookPath("docker")
	if err != nil {
		netnstest.Missing(t, "docker", err)
	}
	if err := oneRun(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/var/lib/weft/lab/lab"); err == nil {
		t.Fatal(`a lab named "lab" stands here: remove it with weft lab down`)
	}
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, tour, ok := strings.Cut(string(text), "## A quick tour\n")
	tour, _, ok2 := strings.Cut(tour, "\n## ")
	if !ok || !ok2 {
		t.Fatal("README.md has no quick tour")
	}
	script := []string{"set -euxo pipefail", "PATH=$PWD/bin:$PATH"}
	for _, line := range strings.Split(tour, "\n") {
		if command, ok := strings.CutPrefix(line, "    "); ok {
			script = append(script, command)
		}
	}
	if len(script) < 18 {
		t.Fatalf("the tour has only %d lines: was its form changed?", len(script))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"weft": weftBinary, "docker": docker} {
		if err := os.Symlink(target, filepath.Join(dir, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command(weftBinary, "lab", "down").CombinedOutput(); err != nil {
			t.Errorf("lab down: %v\n%s", err, out)
		}
	})
	cmd := exec.CommandContext(ctx, "bash", "-c", strings.Join(script, "\n"))
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
