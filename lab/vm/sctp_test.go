//go:build vm

package vm

import "testing"

// TestSCTP runs tests of published ports where the kernel has sockets of SCTP, which
// the machine of the other tiers may lack. Those of service addresses are TestIPVS's.
func TestSCTP(t *testing.T) {
	besideAnother(t)
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel"), Leaps: true, Files: map[string]string{"/usr/bin/nft.test": testsOf(t, "ingress/nft")}, Init: `
say() { echo "WEFT-RESULT $*"; }
mkdir -p /tmp
# In a user namespace a socket has no more room for answers than this.
echo 8388608 > /proc/sys/net/core/rmem_max
echo 8388608 > /proc/sys/net/core/wmem_max
for m in bridge veth nf_tables nft_chain_nat nft_masq nft_numgen nf_conntrack; do modprobe $m; done
WEFT_TEST_REQUIRE=userns,sctp nft.test -test.v -test.timeout 10m -test.run '^(TestMeshKeepsClients|TestMeshSCTP|TestPublishedOnTheHostIPv6|TestPublishedInBothModes)$'; say tests $?
`})
	r := boot(t, m)
	logTests(t, r)
	want(t, r, map[string]string{"tests": "0"})
	passed(t, r, "TestMeshKeepsClients", "TestMeshSCTP", "TestPublishedOnTheHostIPv6", "TestPublishedInBothModes")
}
