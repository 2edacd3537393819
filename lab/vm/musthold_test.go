//go:build vm

package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestIPVSMustHold runs the lab's tests of what must hold of service addresses and
// published ports on the engine that the machine of the other tiers may lack: three hosts
// and their client in one guest, driven by the stock docker command.
func TestIPVSMustHold(t *testing.T) {
	besideAnother(t) // by its own clock nothing in it is late
	ipvsMustHold(t, bootLimit, "TestLabMustHold")
}

// TestSoakIPVSMustHold is its long form.
func TestSoakIPVSMustHold(t *testing.T) {
	if os.Getenv("WEFT_SOAK") == "" {
		netnstest.Missing(t, "soak", errors.New("set WEFT_SOAK=1 for the long form"))
	}
	ipvsMustHold(t, 5*time.Hour, "TestSoakMustHold", "TestSoakRollingUpdates")
}

// ipvsMustHold runs tests of the lab in a guest that leaps.
func ipvsMustHold(t *testing.T, limit time.Duration, tests ...string) {
	t.Helper()
	docker, err := findTool("docker")
	if err != nil {
		netnstest.Missing(t, "docker", err)
	}
	files := weftFiles(t)
	bin := filepath.Join(t.TempDir(), "lab.test")
	cmd := exec.Command("go", "test", "-c", "-tags", strings.TrimSpace(os.Getenv("TAGS")+" lab"), "-o", bin, "..")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the tests of lab: %v\n%s", err, out)
	}
	files["/usr/bin/lab.test"], files["/usr/bin/docker"] = bin, docker
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel"), Files: files, MemoryMiB: 3072, Leaps: true, Init: ipvsMustHoldInit})
	began, commit := time.Now(), commitOf(t)
	r := bootWithin(t, m, limit, "tests="+strings.Join(tests, "+"))
	var text strings.Builder
	for line := range strings.Lines(r.Console) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "--- ") || strings.Contains(line, "_test.go:") {
			t.Log(line)
		}
		if _, said, ok := strings.Cut(line, "_test.go:"); ok {
			if _, said, ok = strings.Cut(said, ": "); ok {
				fmt.Fprintln(&text, said)
			}
		}
	}
	want(t, r, map[string]string{"tests": "0"})
	for _, name := range tests {
		if !strings.Contains(r.Console, "--- PASS: "+name+" ") {
			t.Errorf("%s has not passed", name)
		}
	}
	if strings.HasPrefix(t.Name(), "TestSoak") {
		writeSoak(t, m, commit, began, "all times are the guest's own; service engine ipvs\n"+text.String())
	}
}

const ipvsMustHoldInit = `
say() { echo "WEFT-RESULT $*"; }
mkdir -p /tmp /root
export HOME=/root WEFT_TEST_BINARY=/usr/bin/weft WEFT_TEST_OVERLAY=bridge WEFT_TEST_SERVICE=ipvs WEFT_TEST_REQUIRE=userns,root,docker,soak
T=$(sed -n 's/.*tests=\([A-Za-z+]*\).*/\1/p' /proc/cmdline | tr + '|')
LIMIT=10m
case $T in *Soak*) export WEFT_SOAK=1 LIMIT=4h; mkdir -p /tmp/results;; esac
cd /tmp && lab.test -test.v -test.timeout ${LIMIT} -test.run "^($T)$"; say tests $?
`
