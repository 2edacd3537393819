//go:build vm

package vm

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestEncryptionInKernel runs vxlan/wg's own tests where the kernel has
// WireGuard: they then use it, but for those of the child process.
func TestEncryptionInKernel(t *testing.T) {
	besideAnother(t)
	bin := filepath.Join(t.TempDir(), "wg.test")
	cmd := exec.Command("go", "test", "-c", "-o", bin, "../../vxlan/wg")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the tests of vxlan/wg: %v\n%s", err, out)
	}
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel"), Files: map[string]string{"/usr/bin/wg.test": bin}, Leaps: true, Init: `
say() { echo "WEFT-RESULT $*"; }
for m in wireguard vxlan bridge veth tun nf_tables nft_chain_nat nft_reject_bridge nf_conntrack_netlink; do modprobe $m; done
mkdir -p /tmp
WEFT_TEST_REQUIRE=userns,root WEFT_TEST_WIREGUARD=kernel wg.test -test.v -test.timeout 20m
say tests $?
`})
	r := boot(t, m)
	for line := range strings.Lines(r.Console) {
		if strings.Contains(line, "--- ") || strings.Contains(line, "_test.go") {
			t.Log(strings.TrimSpace(line))
		}
	}
	want(t, r, map[string]string{"tests": "0"})
}
