//go:build vm

package vm

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// bootLimit bounds one boot with its work. The longest, the demo's, takes 3 minutes of a
// processor, of which it may get little: guests run beside everything else (tiers.sh).
const bootLimit = 50 * time.Minute

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

// besideAnother lets a guest run while one more does. It is for the suites of engines,
// which do one thing at a time, most of it one processor's work, and for clusters whose
// clock counts instructions: their nodes watch each other by it.
func besideAnother(t *testing.T) {
	t.Parallel()
	pair.enter(len(longest) - slices.Index(append(longest[:], t.Name()), t.Name()))
	t.Cleanup(pair.leave)
}

// longest are the tests that take the most processor time. They begin first, so that
// none of them runs alone at the end.
var longest = [...]string{"TestDemo", "TestEncryptionInKernel", "TestReboot", "TestNetkit", "TestEBPFOnOldKernel", "TestLossyNetwork", "TestIPVS", "TestIPVSStraight"}

// pair is the two guests of this process that run.
var pair = queue{free: 2}

// queue lets so many run at once, and of those that wait the longest.
type queue struct {
	mu      sync.Mutex // guards: all fields
	free    int
	waiting map[chan struct{}]int // how long it takes, in any unit; closed when its turn has come
}

func (q *queue) enter(length int) {
	turn := make(chan struct{})
	q.mu.Lock()
	if q.waiting == nil {
		q.waiting = map[chan struct{}]int{}
	}
	q.waiting[turn] = length
	q.admitLocked()
	q.mu.Unlock()
	<-turn
}

func (q *queue) leave() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.free++
	q.admitLocked()
}

func (q *queue) admitLocked() {
	for q.free > 0 && len(q.waiting) > 0 {
		var next chan struct{}
		for turn, length := range q.waiting {
			if next == nil || length > q.waiting[next] {
				next = turn
			}
		}
		delete(q.waiting, next)
		q.free--
		close(next)
	}
}

// TestLongestFirst: two at once, and the longest of those that wait when one has ended.
func TestLongestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := queue{free: 2}
		q.enter(1)
		q.enter(1)
		began := make(chan int, 5)
		for _, length := range []int{3, 5, 2, 4} {
			go func() { q.enter(length); began <- length }()
		}
		for _, want := range []int{5, 4, 3, 2} {
			synctest.Wait()
			if len(began) != 0 {
				t.Fatalf("%d began while two others ran", <-began)
			}
			q.leave()
			if got := <-began; got != want {
				t.Errorf("%d began, want %d", got, want)
			}
		}
	})
}

// kernelDir is where need.sh unpacks one of its kernels.
func kernelDir(t *testing.T, name string) string {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join("../../bin/cache", name))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func buildFor(t *testing.T, cfg Config) *Machine {
	t.Helper()
	_, err := findTool("qemu-system-x86_64")
	need(t, err)
	cfg.Dir = t.TempDir()
	m, err := Build(t.Context(), cfg)
	need(t, err)
	return m
}

func boot(t *testing.T, m *Machine, args ...string) Result {
	t.Helper()
	return bootWithin(t, m, bootLimit, args...)
}

// bootWithin is boot with a limit of its own. Lines that begin with "progress: " are shown at once.
func bootWithin(t *testing.T, m *Machine, limit time.Duration, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	r, err := m.Boot(ctx, func(line string) {
		if text, ok := strings.CutPrefix(line, "progress: "); ok {
			t.Log(text)
		}
	}, args...)
	if err != nil {
		t.Fatalf("%v\nconsole:\n%s", err, r.Console)
	}
	t.Logf("boot %v took %.1f s, %.1f s of processor time", args, r.Took.Seconds(), r.CPU.Seconds())
	return r
}

func want(t *testing.T, r Result, values map[string]string) {
	t.Helper()
	var wrong []string
	for name, v := range values {
		if r.Values[name] != v {
			wrong = append(wrong, fmt.Sprintf("%s = %q, want %q", name, r.Values[name], v))
		}
	}
	if len(wrong) == 0 {
		return
	}
	// What was wrong comes last: of a long log the end is shown.
	t.Logf("console:\n%s", r.Console)
	slices.Sort(wrong)
	for _, w := range wrong {
		t.Error(w)
	}
}

// TestGuestIsReady checks the ground the other tests stand on: the kernel's
// modules, pure cgroup v2, runc, and a disk that keeps its content.
func TestGuestIsReady(t *testing.T) {
	runc, err := findTool("runc")
	need(t, err)
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel"), Files: map[string]string{"/usr/sbin/runc": runc}, Init: `
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
`})
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

// makeBuild builds the static binary, once for all tests.
var makeBuild = sync.OnceValue(func() error {
	cmd := exec.Command("make", "-s", "build")
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make build: %w\n%s", err, out)
	}
	return nil
})

// weftFiles builds the static binary and finds runc.
func weftFiles(t *testing.T) map[string]string {
	t.Helper()
	runc, err := findTool("runc")
	need(t, err)
	if err := makeBuild(); err != nil {
		t.Fatal(err)
	}
	return map[string]string{"/usr/bin/weft": "../../bin/weft", "/usr/sbin/runc": runc}
}

// TestDemo runs the demo on the later kernel, where tasks' ports are netkit pairs: the
// cluster of TestReboot has the older kernel's veth pairs and clsact. The guest leaps, so
// that no limit of the demo's is a matter of what else the machine does.
func TestDemo(t *testing.T) {
	besideAnother(t)
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel-new"), Files: weftFiles(t), MemoryMiB: 3072, Leaps: true, Init: `
say() { echo "WEFT-RESULT $*"; }
for m in vxlan bridge br_netfilter veth overlay nf_tables nft_chain_nat nft_masq nft_numgen nf_conntrack nf_conntrack_netlink nft_reject_bridge; do modprobe $m; done
# The demo leaves nothing, its logs neither.
(while sleep 1; do cp /var/lib/weft/lab/lab/*.log /tmp 2>/dev/null; done) &
weft lab demo; say demo $?
say engine $(grep -h 'kind=overlay engine=ebpf chosen=true' /tmp/h1.log)
tail -n 60 /tmp/*.log
`})
	r := boot(t, m)
	want(t, r, map[string]string{"demo": "0"})
	if e := r.Values["engine"]; e == "" || strings.Contains(e, "veth") {
		t.Errorf("the overlay engine was chosen with %q, want netkit ports", e)
	}
	for line := range strings.Lines(r.Console) {
		if strings.Contains(line, ". ") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

// TestReboot makes a cluster with a service, cuts the power of the whole
// machine, and wants cluster and tasks back after the next boot. Its clock counts
// instructions: daemons that are emulated slowly are not late by it.
func TestReboot(t *testing.T) {
	besideAnother(t)
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel"), Files: weftFiles(t), MemoryMiB: 2048, Init: `
say() { echo "WEFT-RESULT $*"; }
export DOCKER_HOST=unix:///run/weft/lab/lab/h1/weft.sock
# until COMMAND...: repeats it for 90 seconds at most
until_ok() { n=0; until "$@" >/tmp/out 2>&1; do n=$((n+1)); [ $n -gt 180 ] && { cat /tmp/out; return 1; }; sleep 0.5; done; }
# the hosts run three tasks of web, by their own word: one each, unless a host was so slow that it was taken for down
runs() { for h in h1 h2 h3; do DOCKER_HOST=unix:///run/weft/lab/lab/$h/weft.sock weft ps | grep -c ' web\.'; done; }
full() { [ $(runs | awk '{n+=$1} END {print n}') = 3 ]; }
ask() { for h in h1 h2 h3; do a=$(weft lab ls | awk -v h=$h '$1 == h {print $2}'); weft lab client -- weft whoami get --timeout 2s http://$a:8080/ || return 1; done; }

weft lab up; say up $?
if ! grep -q second /proc/cmdline; then
  weft network create --driver overlay front; say network $?
  weft service create --detach --name web --replicas 3 --network front --publish 8080:80 weft/whoami; say create $?
fi
until_ok full; say full $?
say spread $(runs)
until_ok ask; say answers $?
say nodes $(weft node ls -q | sort)
weft lab ls
weft service ps web
tail -n 40 /var/lib/weft/lab/lab/*.log
sync
# No farewell: the power goes.
poweroff -f
`})
	first := boot(t, m, "rcupdate.rcu_expedited=1", "norandmaps", "first")
	want(t, first, map[string]string{"up": "0", "network": "0", "create": "0", "full": "0", "answers": "0"})
	if t.Failed() {
		t.FailNow()
	}
	if len(strings.Fields(first.Values["nodes"])) != 3 {
		t.Fatalf("nodes %q, want 3", first.Values["nodes"])
	}
	second := boot(t, m, "rcupdate.rcu_expedited=1", "norandmaps", "second")
	want(t, second, map[string]string{"up": "0", "full": "0", "answers": "0", "nodes": first.Values["nodes"]})
}
