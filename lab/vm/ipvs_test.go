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
	c := testIPVS(t, Config{Kernel: kernelDir(t, "kernel")}, "", `
weft lab up --hosts 1 --overlay-engine bridge; say up $?
say chosen $(DOCKER_HOST=unix:///run/weft/lab/lab/h1/weft.sock weft info | grep 'service engine ipvs')
weft lab down; say down $?
`, map[string]string{"tests": "0", "up": "0", "down": "0"})["chosen"]
	if !strings.Contains(c, "its probe succeeded, and it is the best that does") {
		t.Errorf("info says %q", c)
	}
}

// TestIPVSStraight runs them on the newer kernel, which can leave a frame to the stack of
// its port.
func TestIPVSStraight(t *testing.T) {
	besideAnother(t)
	testIPVS(t, Config{Kernel: kernelDir(t, "kernel-new"), CPUs: 1}, "REQUIRED=,broute", "", map[string]string{"tests": "0"})
}

// testIPVS runs the package's tests in a guest, between what else is to be run.
func testIPVS(t *testing.T, c Config, first, then string, results map[string]string) map[string]string {
	t.Helper()
	files := weftFiles(t)
	bin := filepath.Join(t.TempDir(), "ipvs.test")
	cmd := exec.Command("go", "test", "-c", "-o", bin, "../../ingress/ipvs")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the tests of ingress/ipvs: %v\n%s", err, out)
	}
	files["/usr/bin/ipvs.test"] = bin
	c.Files, c.Init = files, first+`
say() { echo "WEFT-RESULT $*"; }
mkdir -p /tmp
# Nothing is loaded by hand: the kernel loads what is asked for.
WEFT_TEST_REQUIRE=userns,root,ipvs,sctp${REQUIRED} ipvs.test -test.v -test.timeout 12m; say tests $?
`+then
	r := boot(t, buildFor(t, c))
	for line := range strings.Lines(r.Console) {
		if strings.Contains(line, "--- ") || strings.Contains(line, "_test.go") {
			t.Log(strings.TrimSpace(line))
		}
	}
	want(t, r, results)
	// A pattern that fits no test, or a kernel without IPVS, would pass, too.
	for _, name := range []string{"TestSequence", "TestRepairs", "TestCloseLeavesNothing", "TestTunnel", "TestPorts", "TestServices", "TestSpeakers"} {
		if !strings.Contains(r.Console, "--- PASS: "+name+" ") {
			t.Errorf("%s has not passed", name)
		}
	}
	return r.Values
}
