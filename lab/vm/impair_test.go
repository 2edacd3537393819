//go:build vm

package vm

import "testing"

// TestImpair runs lab's test of links that lose packets and are late, for which the kernel
// of the other tiers lacks netem.
func TestImpair(t *testing.T) {
	besideAnother(t)
	files := weftFiles(t)
	files["/usr/bin/lab.test"] = testsOf(t, "lab")
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel"), Files: files, MemoryMiB: 1024, Leaps: true, Init: `
mkdir -p /tmp
modprobe sch_netem
WEFT_TEST_REQUIRE=userns,netem lab.test -test.v -test.run '^TestImpair$'
echo "WEFT-RESULT tests $?"
`})
	r := boot(t, m)
	want(t, r, map[string]string{"tests": "0"})
	passed(t, r, "TestImpair")
}
