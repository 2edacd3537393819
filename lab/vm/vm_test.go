//go:build vm

package vm

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// bootLimit bounds one boot with its work. The demo takes under 3 minutes on
// two idle cores; a loaded machine is given more.
const bootLimit = 8 * time.Minute

// need ends the test when the machine lacks something: as a skip, or as a
// failure where the VM lane is required.
func need(t *testing.T, err error) {
	t.Helper()
	switch {
	case err == nil:
	case errors.Is(err, weft.ErrUnsupported):
		netnstest.Missing(t, "vm", err)
	default:
		t.Fatal(err)
	}
}

func kernelDir(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../../bin/cache/kernel")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func build(t *testing.T, files map[string]string, init string) *Machine {
	t.Helper()
	_, err := findTool("qemu-system-x86_64")
	need(t, err)
	m, err := Build(t.Context(), Config{Kernel: kernelDir(t), Files: files, Init: init, Dir: t.TempDir()})
	need(t, err)
	return m
}

func boot(t *testing.T, m *Machine, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	r, err := m.Boot(ctx, nil, args...)
	if err != nil {
		t.Fatalf("%v\nconsole:\n%s", err, r.Console)
	}
	t.Logf("boot %v took %.1f s", args, r.Took.Seconds())
	return r
}

func want(t *testing.T, r Result, values map[string]string) {
	t.Helper()
	for name, v := range values {
		if r.Values[name] != v {
			t.Errorf("%s = %q, want %q", name, r.Values[name], v)
		}
	}
	if t.Failed() {
		t.Logf("console:\n%s", r.Console)
	}
}

// TestGuestIsReady checks the ground the other tests stand on: the kernel's
// modules, pure cgroup v2, runc, and a disk that keeps its content.
func TestGuestIsReady(t *testing.T) {
	runc, err := findTool("runc")
	need(t, err)
	m := build(t, map[string]string{"/usr/sbin/runc": runc}, `
say() { echo "WEFT-RESULT $*"; }
say kernel $(uname -r)
say cgroup $(stat -f -c %T /sys/fs/cgroup)
for m in overlay vxlan bridge br_netfilter veth nf_tables nft_chain_nat nft_masq nft_numgen ip_vs wireguard sch_netem cls_bpf sch_ingress tun; do
  modprobe $m || bad="$bad $m"
done
say modules ok$bad
mkdir -p /var/lib/c/rootfs/bin /run/lower /run/upper
cp /bin/busybox /var/lib/c/rootfs/bin/busybox
cd /var/lib/c
[ -f config.json ] || runc spec
sed -i 's/"terminal": true/"terminal": false/; s/"sh"/"\/bin\/busybox", "echo", "from a container"/' config.json
say runc $(runc run c1 2>&1)
mkdir -p /var/lib/boots
touch /var/lib/boots/$(ls /var/lib/boots | wc -l)
say boots $(ls /var/lib/boots | wc -l)
`)
	for _, boots := range []string{"1", "2"} {
		r := boot(t, m)
		want(t, r, map[string]string{
			"kernel": m.release, "modules": "ok", "runc": "from a container", "boots": boots,
		})
		if c := r.Values["cgroup"]; c != "cgroup2fs" && c != "UNKNOWN" && c != "0x63677270" {
			t.Errorf("/sys/fs/cgroup is %q, want cgroup v2", c)
		}
	}
}

// weftFiles builds the static binary and finds runc.
func weftFiles(t *testing.T) map[string]string {
	t.Helper()
	runc, err := findTool("runc")
	need(t, err)
	cmd := exec.CommandContext(t.Context(), "make", "-s", "build")
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make build: %v\n%s", err, out)
	}
	return map[string]string{"/usr/bin/weft": "../../bin/weft", "/usr/sbin/runc": runc}
}

func TestDemo(t *testing.T) {
	m := build(t, weftFiles(t), `
weft lab demo; echo "WEFT-RESULT demo $?"
cat /var/lib/weft/lab/lab/*.log 2>/dev/null | tail -n 200
`)
	r := boot(t, m)
	want(t, r, map[string]string{"demo": "0"})
	for line := range strings.Lines(r.Console) {
		if strings.Contains(line, ". ") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

// TestReboot makes a cluster with a service, cuts the power of the whole
// machine, and wants cluster and tasks back after the next boot.
func TestReboot(t *testing.T) {
	m := build(t, weftFiles(t), `
say() { echo "WEFT-RESULT $*"; }
export DOCKER_HOST=unix:///run/weft/lab/lab/h1/weft.sock
# until COMMAND...: repeats it for 90 seconds at most
until_ok() { n=0; until "$@" >/tmp/out 2>&1; do n=$((n+1)); [ $n -gt 180 ] && { cat /tmp/out; return 1; }; sleep 0.5; done; }
# every host runs one task of web, by its own word
full() { for h in h1 h2 h3; do [ $(DOCKER_HOST=unix:///run/weft/lab/lab/$h/weft.sock weft ps | grep -c ' web\.') = 1 ] || return 1; done; }
ask() { for h in h1 h2 h3; do a=$(weft lab ls | awk -v h=$h '$1 == h {print $2}'); weft lab client -- weft whoami get --timeout 2s http://$a:8080/ || return 1; done; }

weft lab up; say up $?
if ! grep -q second /proc/cmdline; then
  weft network create --driver overlay front; say network $?
  weft service create --detach --name web --replicas 3 --network front --publish 8080:80 weft/whoami; say create $?
fi
until_ok full; say full $?
until_ok ask; say answers $?
say nodes $(weft node ls -q | sort)
weft lab ls
weft service ps web
tail -n 40 /var/lib/weft/lab/lab/*.log
sync
# No farewell: the power goes.
poweroff -f
`)
	first := boot(t, m, "first")
	want(t, first, map[string]string{"up": "0", "network": "0", "create": "0", "full": "0", "answers": "0"})
	if t.Failed() {
		t.FailNow()
	}
	if len(strings.Fields(first.Values["nodes"])) != 3 {
		t.Fatalf("nodes %q, want 3", first.Values["nodes"])
	}
	second := boot(t, m, "second")
	want(t, second, map[string]string{"up": "0", "full": "0", "answers": "0", "nodes": first.Values["nodes"]})
}
