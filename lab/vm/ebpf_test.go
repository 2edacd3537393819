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
// told to use them has to choose them, and to say how.
func TestEBPFOnOldKernel(t *testing.T) {
	files := weftFiles(t)
	for _, pkg := range []string{"vxlan", "ingress"} {
		bin := filepath.Join(t.TempDir(), pkg+".test")
		cmd := exec.Command("go", "test", "-c", "-o", bin, "../../"+pkg+"/bpf")
		cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build the tests of %s/bpf: %v\n%s", pkg, err, out)
		}
		files["/usr/bin/"+pkg+".test"] = bin
	}
	m := build(t, files, `
say() { echo "WEFT-RESULT $*"; }
for m in vxlan bridge veth nf_tables nft_chain_nat nft_masq nft_numgen nf_conntrack; do modprobe $m; done
export WEFT_TEST_REQUIRE=userns,root,clsact
# What depends on the kernel: all of it takes three minutes.
vxlan.test -test.v -test.timeout 2m -test.run '^Test(Probe|Choice|TooBigIsAnswered|FilterLost|TakenPriorityIsNamed|OutlivesItsDaemon|Upgrade)$'; say overlay $?
vxlan.test -test.v -test.timeout 2m -test.run '^TestPacketsCross$/clsact/ip'; say packets $?
vxlan.test -test.v -test.timeout 2m -test.run '^TestRepair$/clsact/(program|qdisc)'; say repairs $?
ingress.test -test.v -test.timeout 2m -test.run '^TestConformance$/clsact'; say service $?
weft lab up --hosts 1 --overlay-engine ebpf; say up $?
say chosen $(DOCKER_HOST=unix:///run/weft/lab/lab/h1/weft.sock weft info | grep 'overlay engine ebpf')
weft lab down; say down $?
`)
	r := boot(t, m)
	for line := range strings.Lines(r.Console) {
		if strings.Contains(line, "--- ") || strings.Contains(line, "_test.go") {
			t.Log(strings.TrimSpace(line))
		}
	}
	want(t, r, map[string]string{"overlay": "0", "packets": "0", "repairs": "0", "service": "0", "up": "0", "down": "0"})
	// A pattern that fits no test would pass, too.
	for _, name := range []string{"TestChoice", "TestPacketsCross/clsact/ipv6_in_ipv4", "TestRepair/clsact/qdisc_of_the_underlay_gone", "TestConformance/clsact"} {
		if !strings.Contains(r.Console, "--- PASS: "+name+" ") {
			t.Errorf("%s has not passed", name)
		}
	}
	if c := r.Values["chosen"]; !strings.Contains(c, "chosen: --overlay-engine asks for it, and its probe succeeded") || !strings.Contains(c, "clsact") {
		t.Errorf("info says %q", c)
	}
}
