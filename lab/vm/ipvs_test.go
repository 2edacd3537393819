//go:build vm

package vm

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestIPVS runs the tests of ingress/ipvs where the kernel has IPVS, which the
// machine of the other tiers may lack. Then a daemon on the bridge overlay has to
// choose the engine by itself, and to say so.
func TestIPVS(t *testing.T) {
	besideAnother(t)
	files := weftFiles(t)
	bin := filepath.Join(t.TempDir(), "ipvs.test")
	cmd := exec.Command("go", "test", "-c", "-o", bin, "../../ingress/ipvs")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the tests of ingress/ipvs: %v\n%s", err, out)
	}
	files["/usr/bin/ipvs.test"] = bin
	m := build(t, files, `
say() { echo "WEFT-RESULT $*"; }
mkdir -p /tmp
# Nothing is loaded by hand: the kernel loads what is asked for.
WEFT_TEST_REQUIRE=userns,root,ipvs,sctp ipvs.test -test.v -test.timeout 12m; say tests $?
weft lab up --hosts 1 --overlay-engine bridge; say up $?
say chosen $(DOCKER_HOST=unix:///run/weft/lab/lab/h1/weft.sock weft info | grep 'service engine ipvs')
weft lab down; say down $?
`)
	r := boot(t, m)
	for line := range strings.Lines(r.Console) {
		if strings.Contains(line, "--- ") || strings.Contains(line, "_test.go") {
			t.Log(strings.TrimSpace(line))
		}
	}
	want(t, r, map[string]string{"tests": "0", "up": "0", "down": "0"})
	// A pattern that fits no test, or a kernel without IPVS, would pass, too.
	for _, name := range []string{"TestSequence", "TestRepairs", "TestCloseLeavesNothing", "TestServices", "TestSpeakers"} {
		if !strings.Contains(r.Console, "--- PASS: "+name+" ") {
			t.Errorf("%s has not passed", name)
		}
	}
	if c := r.Values["chosen"]; !strings.Contains(c, "its probe succeeded, and it is the best that does") {
		t.Errorf("info says %q", c)
	}
}
