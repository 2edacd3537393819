//go:build vm

package vm

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestEBPFOnOldKernel runs tests of both eBPF engines where the kernel has no
// tcx and takes fewer flags: they attach by clsact there. Then a daemon that is
// told to use them has to choose them, and to say how. The bridge engine has to
// change few entries alone there, too.
func TestEBPFOnOldKernel(t *testing.T) {
	besideAnother(t)
	files := weftFiles(t)
	for name, pkg := range map[string]string{"vxlan": "vxlan/bpf", "ingress": "ingress/bpf", "bridge": "vxlan/linux"} {
		files["/usr/bin/"+name+".test"] = testsOf(t, pkg)
	}
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel"), Files: files, Leaps: true, Init: `
say() { echo "WEFT-RESULT $*"; }
for m in vxlan bridge veth nf_tables nft_chain_nat nft_masq nft_numgen nf_conntrack; do modprobe $m; done
export WEFT_TEST_REQUIRE=userns,root,clsact
# What depends on the kernel: all of it takes three minutes.
vxlan.test -test.v -test.timeout 5m -test.run '^Test(Probe|Choice|TooBigIsAnswered|FilterLost|TakenPriorityIsNamed|OutlivesItsDaemon|Upgrade)$'; say overlay $?
vxlan.test -test.v -test.timeout 5m -test.run '^TestPacketsCross$/clsact/ip'; say packets $?
vxlan.test -test.v -test.timeout 5m -test.run '^TestRepair$/clsact/(program|qdisc)'; say repairs $?
ingress.test -test.v -test.timeout 5m -test.run '^TestConformance$/clsact'; say service $?
ingress.test -test.v -test.timeout 10m -test.run '^TestServices$/veth/IPv4'; say suite $?
bridge.test -test.v -test.timeout 5m -test.run '^Test(Express|ExpressIsAsAWholePass|BatchAnswersInOrder)$'; say express $?
weft lab up --hosts 1 --overlay-engine ebpf; say up $?
say chosen $(DOCKER_HOST=unix:///run/weft/lab/lab/h1/weft.sock weft info | grep 'overlay engine ebpf')
weft lab down; say down $?
`})
	r := boot(t, m)
	logTests(t, r)
	want(t, r, map[string]string{"overlay": "0", "packets": "0", "repairs": "0", "service": "0", "suite": "0", "express": "0", "up": "0", "down": "0"})
	passed(t, r, "TestChoice", "TestPacketsCross/clsact/ipv6_in_ipv4", "TestRepair/clsact/qdisc_of_the_underlay_gone", "TestConformance/clsact", "TestServices/veth/IPv4",
		"TestExpress", "TestExpressIsAsAWholePass", "TestBatchAnswersInOrder")
	if c := r.Values["chosen"]; !strings.Contains(c, "chosen: --overlay-engine asks for it, and its probe succeeded") || !strings.Contains(c, "clsact") {
		t.Errorf("info says %q", c)
	}
}

// testsOf builds the tests of an engine's package.
func testsOf(t *testing.T, pkg string) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), strings.ReplaceAll(pkg, "/", "-")+".test")
	cmd := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", bin, "../../"+pkg)
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the tests of %s: %v\n%s", pkg, err, out)
	}
	return bin
}

// logTests shows what the guest's tests said.
func logTests(t *testing.T, r Result) {
	t.Helper()
	for line := range strings.Lines(r.Console) {
		if strings.Contains(line, "--- ") || strings.Contains(line, "_test.go") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

// passed wants tests of the guest by name: a pattern that fits none passes, too.
func passed(t *testing.T, r Result, names ...string) {
	t.Helper()
	for _, name := range names {
		if !strings.Contains(r.Console, "--- PASS: "+name+" ") {
			t.Errorf("%s has not passed", name)
		}
	}
}

// TestNetkit runs tests of both eBPF engines with tasks' ports of netkit, for which
// the kernel of the other tests is too old. It has the unified cgroup tree alone, too. A daemon chooses them by itself.
func TestNetkit(t *testing.T) {
	besideAnother(t)
	files := weftFiles(t)
	files["/usr/bin/vxlan.test"], files["/usr/bin/ingress.test"] = testsOf(t, "vxlan/bpf"), testsOf(t, "ingress/bpf")
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel-new"), Leaps: true, Files: files, Init: `
say() { echo "WEFT-RESULT $*"; }
for m in vxlan bridge veth nf_tables nft_chain_nat nft_masq nft_numgen nf_conntrack; do modprobe $m; done
export WEFT_TEST_REQUIRE=userns,root,netkit
vxlan.test -test.v -test.timeout 5m -test.run '^Test(Choice|NothingPassesWithoutItsProgram)$'; say chosen $?
vxlan.test -test.v -test.timeout 5m -test.run '^TestPortsKeepTheirKind$/netkit_then_tcx'; say kept $?
vxlan.test -test.v -test.timeout 5m -test.run '^Test(TooBigIsAnswered|WhatIsNotCarried|ForgedProtocol|OutlivesItsDaemon)$/netkit/ipv6=true'; say packets $?
vxlan.test -test.v -test.timeout 5m -test.run '^TestRepair$/netkit/(link|program_of_a_port|what)'; say repairs $?
ingress.test -test.v -test.timeout 5m -test.run '^Test(SocketsTCP|SocketsUDP)$'; say sockets $?
ingress.test -test.v -test.timeout 5m -test.run '^TestServices$/veth/IPv4|^TestServices$/sockets/IPv6'; say service $?
ingress.test -test.v -test.timeout 5m -test.run '^TestPublished(FastWay|SilentAmongShort)$'; say published $?
# A daemon alone is wanted, and its word: on a loaded machine the cluster's making may be late.
weft lab up --hosts 1
export DOCKER_HOST=unix:///run/weft/lab/lab/h1/weft.sock
n=0; until weft info | grep -q 'overlay engine ebpf: chosen'; do n=$((n+1)); [ $n -gt 120 ] && break; sleep 1; done
say engine $(weft info | grep 'overlay engine ebpf')
weft lab down; say down $?
`})
	r := boot(t, m)
	logTests(t, r)
	want(t, r, map[string]string{"chosen": "0", "kept": "0", "packets": "0", "repairs": "0", "sockets": "0", "service": "0", "published": "0", "down": "0"})
	passed(t, r, "TestChoice", "TestNothingPassesWithoutItsProgram", "TestPortsKeepTheirKind/netkit_then_tcx", "TestTooBigIsAnswered/netkit/ipv6=true",
		"TestWhatIsNotCarried/netkit", "TestForgedProtocol/netkit", "TestOutlivesItsDaemon/netkit", "TestRepair/netkit/what_no_program_has_seen_let_through",
		"TestSocketsTCP", "TestSocketsUDP", "TestServices/veth/IPv4", "TestServices/sockets/IPv6", "TestPublishedFastWay", "TestPublishedSilentAmongShort")
	if e := r.Values["engine"]; !strings.Contains(e, "chosen") || strings.Contains(e, "veth") {
		t.Errorf("info says %q", e)
	}
}
