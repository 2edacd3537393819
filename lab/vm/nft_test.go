//go:build vm

package vm

import "testing"

// TestNftOnOldKernel runs the suite of service addresses, what tasks have of it, and one port
// at two addresses on Debian's kernel, whose nftables refuses more than later ones do.
func TestNftOnOldKernel(t *testing.T) {
	besideAnother(t)
	files := weftFiles(t)
	files["/usr/bin/nft.test"] = testsOf(t, "ingress/nft")
	// In a namespace of a user's the kernel answers into the default buffer, which large
	// transactions overrun.
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel"), Files: files, MemoryMiB: 1024, Leaps: true, Init: `
mkdir -p /tmp
echo 16777216 >/proc/sys/net/core/rmem_max
WEFT_TEST_REQUIRE=userns,root,sctp nft.test -test.v -test.timeout 10m -test.run '^(TestServices|TestEnds|TestEndsRepairs|TestFlowsOutliveTheirTable|TestSpeakers|TestOnePortAtTwoAddresses|TestRangesThatOverlapAtTwoAddresses)$'
echo "WEFT-RESULT tests $?"
`})
	r := boot(t, m)
	want(t, r, map[string]string{"tests": "0"})
	passed(t, r, "TestServices", "TestEnds", "TestEndsRepairs", "TestFlowsOutliveTheirTable", "TestSpeakers", "TestOnePortAtTwoAddresses", "TestRangesThatOverlapAtTwoAddresses")
}
