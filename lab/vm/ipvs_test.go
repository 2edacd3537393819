//go:build vm

package vm

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestIPVS runs the tests of ingress/ipvs where the kernel has IPVS, which the
// machine of the other tiers may lack. Daemons run on that kernel in TestIPVSMustHold.
func TestIPVS(t *testing.T) {
	besideAnother(t)
	testIPVS(t, Config{Kernel: kernelDir(t, "kernel"), Leaps: true}, "", "")
}

// TestIPVSStraight runs them on the newer kernel, which can leave a frame to the stack of
// its port.
func TestIPVSStraight(t *testing.T) {
	besideAnother(t)
	testIPVS(t, Config{Kernel: kernelDir(t, "kernel-new"), Leaps: true}, "REQUIRED=,broute", ipvsDaemons)
}

// ipvsDaemons are two hosts on the bridge overlay, which have to choose the engine by
// themselves and to say so. A published port answers on both, one of which has no task,
// and the task sees the client's own address: the mesh goes by the bridge that has the
// engine's table.
const ipvsDaemons = `
export DOCKER_HOST=unix:///run/weft/lab/lab/h1/weft.sock
# ask HOST: as the client outside
ask() { weft lab client -- weft whoami get --timeout 2s http://$(weft lab ls | awk -v h=$1 '$1 == h {print $2}'):8080/ >/tmp/$1; }
both() { ask h1 && ask h2; }
weft lab up --hosts 2 --overlay-engine bridge; say up $?
say chosen $(weft info | grep 'service engine ipvs')
weft service create --detach --name web --publish 8080:80 weft/whoami; say create $?
n=0; until both; do n=$((n+1)); [ $n -gt 120 ] && break; sleep 0.5; done
# A second time without a repetition: what answers once answers always.
both; say mesh $?
cat /tmp/h1 /tmp/h2
say seen $(cat /tmp/h1 /tmp/h2 | grep -c '"client":"198.51.100.7:')
weft lab down; say down $?
`

// testIPVS runs the package's tests in a guest, then daemons if there are some.
func testIPVS(t *testing.T, c Config, first, daemons string) {
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
`+daemons
	r := boot(t, buildFor(t, c))
	for line := range strings.Lines(r.Console) {
		if strings.Contains(line, "--- ") || strings.Contains(line, "_test.go") {
			t.Log(strings.TrimSpace(line))
		}
	}
	want(t, r, map[string]string{"tests": "0"})
	if daemons != "" {
		want(t, r, map[string]string{"up": "0", "create": "0", "mesh": "0", "seen": "2", "down": "0"})
		if c := r.Values["chosen"]; !strings.Contains(c, "its probe succeeded, and it is the best that does") {
			t.Errorf("info says %q", c)
		}
	}
	// A pattern that fits no test, or a kernel without IPVS, would pass, too.
	for _, name := range []string{"TestSequence", "TestRepairs", "TestCloseLeavesNothing", "TestTunnel", "TestPorts", "TestServices", "TestSpeakers"} {
		if !strings.Contains(r.Console, "--- PASS: "+name+" ") {
			t.Errorf("%s has not passed", name)
		}
	}
}
