//go:build vm

package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestLossyNetwork has hosts whose links lose 5 % of all packets, each way, and are
// late by 100 ms, each way: no node is taken for dead, by gossip or by the leader, no
// task moves, and names answer.
func TestLossyNetwork(t *testing.T) {
	besideAnother(t) // by its own clock nothing in it is late
	lossy(t, 3, time.Minute, bootLimit)
}

// TestSoakLossyNetwork is its long form, of 10 hosts for 10 minutes.
func TestSoakLossyNetwork(t *testing.T) {
	if os.Getenv("WEFT_SOAK") == "" {
		netnstest.Missing(t, "soak", errors.New("set WEFT_SOAK=1 for the long form"))
	}
	lossy(t, 10, 10*time.Minute, 5*time.Hour)
}

// lossy boots a guest that leaps: all times are its own, in which a processor carries
// out an instruction a nanosecond. Limits of the cluster are then as far away as
// on a machine, whatever emulates it.
func lossy(t *testing.T, hosts int, lasts, limit time.Duration) {
	n, seconds := strconv.Itoa(hosts), int(lasts.Seconds())
	m := buildFor(t, Config{
		Kernel: kernelDir(t, "kernel"), Files: weftFiles(t), MemoryMiB: 2048 + 256*hosts, Leaps: true, Init: lossyInit,
	})
	began, commit := time.Now(), commitOf(t)
	r := bootWithin(t, m, limit, "hosts="+n, fmt.Sprintf("seconds=%d", seconds))
	want(t, r, map[string]string{
		"up": "0", "network": "0", "create": "0", "full": "0", "named": "0", "impaired": n,
		"dead": "0", "unready": "0", "unnamed": "0", "moved": "0",
	})
	number := func(name string) float64 {
		v, err := strconv.ParseFloat(r.Values[name], 64)
		if err != nil {
			t.Errorf("%s is %q, want a number", name, r.Values[name])
		}
		return v
	}
	// A ping crosses two such links: none is faster than both delays, and of 100 one
	// in ten is lost; that none is happens once in 28,000 times.
	if ms := number("fastest"); ms < 200 {
		t.Errorf("the fastest ping took %v ms, want at least 200: the links were not late", ms)
	}
	if arrived := number("arrived"); arrived >= 100 || arrived < 50 {
		t.Errorf("of 100 pings %v were answered: the links were not lossy, or did not carry", arrived)
	}
	if lasted := number("lasted"); lasted < lasts.Seconds() {
		t.Errorf("watched for %v s, want %s", lasted, lasts)
	}
	if looks := number("looks"); looks < 3 {
		t.Errorf("%v looks at the nodes", looks)
	}
	moved := "none"
	if r.Values["moved"] != "0" {
		moved = "some"
	}
	text := fmt.Sprintf(`all times are the guest's own
%d hosts, 3 of them managers, with a task each, were up after %s s
each host's link lost 5 %% of what it sent and was late by 100 ms: of 100 pings between two %s were answered, the fastest after %s ms
watched for %s s, of which the processor was busy for %s: %s looks at the states of all nodes, each by another daemon, and at the names in all tasks
taken for dead by gossip or leader: %s; suspected by gossip, and refuted: %s
looks that saw a node not ready: %s; a name without all answers: %s
tasks moved or started anew: %s; agents' sessions opened anew: %s; leaders elected anew: %s
`, hosts, r.Values["ready"], r.Values["arrived"], r.Values["fastest"], r.Values["lasted"], r.Values["busy"], r.Values["looks"],
		r.Values["dead"], r.Values["suspects"], r.Values["unready"], r.Values["unnamed"], moved, r.Values["sessions"], r.Values["elections"])
	t.Log(text)
	for line := range strings.Lines(r.Console) {
		if strings.HasPrefix(line, "LOSSY ") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if strings.HasPrefix(t.Name(), "TestSoak") {
		writeSoak(t, m, commit, began, text)
	}
}

// commitOf is what the guest was built of.
func commitOf(t *testing.T) string {
	b, err := exec.CommandContext(t.Context(), "git", "describe", "--always", "--dirty").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

// writeSoak files what a long run found, as lab's own do.
func writeSoak(t *testing.T, m *Machine, commit string, began time.Time, text string) {
	verdict := "passed"
	if t.Failed() {
		verdict = "FAILED"
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Error(err)
	}
	text = fmt.Sprintf("%s %s after %s\ncommit %s\noverlay engine bridge\nkernel %s in a guest of one processor, which leaps (lab/vm/DESIGN.md); load of the machine at the end %s\n%s\n\n%s",
		t.Name(), verdict, time.Since(began).Round(time.Second), commit, m.release, strings.Join(strings.Fields(string(load))[:3], " "), began.UTC().Format(time.DateOnly), text)
	if err := os.WriteFile(filepath.Join("../results", t.Name()+"-bridge.txt"), []byte(text), 0o644); err != nil {
		t.Error(err)
	}
}

// lossyInit reads hosts= and seconds= from the kernel's command line. Each look asks
// another daemon for the states of all nodes, and for the names in the namespaces of all
// tasks. What fails is told in lines that begin with LOSSY.
const lossyInit = `
say() { echo "WEFT-RESULT $*"; }
word() { sed -n "s/.*$1=\([0-9]*\).*/\1/p" /proc/cmdline; }
now() { cut -d. -f1 /proc/uptime; }
N=$(word hosts); S=$(word seconds)
for m in vxlan bridge br_netfilter veth overlay nf_tables nft_chain_nat nft_masq nft_numgen nf_conntrack nf_conntrack_netlink nft_reject_bridge sch_netem; do modprobe $m; done
on() { h=$1; shift; DOCKER_HOST=unix:///run/weft/lab/lab/$h/weft.sock weft "$@"; }
# repeats a command for 5 minutes at most
until_ok() {
  end=$(($(now)+300))
  until "$@" >/tmp/out 2>&1; do [ $(now) -gt $end ] && { cat /tmp/out; return 1; }; sleep 2; done
}
ready() { on $1 node ls >/tmp/nodes 2>&1; [ $(grep -c ' Ready ' /tmp/nodes) = $N ]; }
pids() { ps -o pid,args | awk '$2 == "/weft" && $3 == "whoami" {print $1}' | sort; }
full() { [ $(pids | wc -l) = $N ]; }
# the addresses of tasks.web by every task's resolver
names() {
  for p in $(pids); do
    a=$(nsenter -t $p -n nslookup -type=a tasks.web 127.0.0.11 2>&1)
    [ $(echo "$a" | grep -c '^Address.* 10\.') = $N ] || { echo "in the task of process $p: $a"; return 1; }
  done
}
tasks() { on h1 service ps --no-trunc web | awk 'NR > 1 {print $1}' | sort; }
# what the daemons have said
said() { cat /var/lib/weft/lab/lab/*.log | grep -E "$1"; }
busy() { awk '/^cpu / {printf "%d", ($2+$3+$4+$7+$8)/100}' /proc/stat; }
begin=$(now)
# On the engines that are soonest begun: neither is what is asked here.
weft lab up --hosts $N --managers 3 --overlay-engine bridge --service-engine nft; up=$?; say up $up
echo "progress: up: $up, after $(($(now)-begin)) s"
on h1 network create --driver overlay front; say network $?
on h1 service create --detach --name web --mode global --network front weft/whoami; say create $?
until_ok full; full=$?; say full $full
[ $full = 0 ] || on h1 service ps --no-trunc web
until_ok ready h1
until_ok names; say named $?
say ready $(($(now)-begin))
echo "progress: all tasks run, after $(($(now)-begin)) s"
# The start keeps the processor busy for a minute, which is another question.
sleep 30
GONE='member is gone|taken for down'
gone=$(said "$GONE" | wc -l); opened=$(said 'session opened' | wc -l); suspects=$(said Refuting | wc -l); won=$(said 'leadership won' | wc -l)
said "$GONE" | sed 's/^/LOSSY at the start: /'
pids >/tmp/pids; tasks >/tmp/tasks
i=0; impaired=0
while [ $i -lt $N ]; do i=$((i+1)); weft lab impair --delay 100ms --loss 5 h$i && impaired=$((impaired+1)); done
say impaired $impaired
echo "progress: all links are impaired at $(date -u +%T), $(($(said "$GONE" | wc -l)-gone)) taken for dead meanwhile, $gone before"
begin=$(now); looks=0; unready=0; unnamed=0; worked=$(busy)
weft lab exec h1 -- ping -q -c 100 -i 0.1 $(weft lab ls | awk '$1 == "h2" {print $2}') >/tmp/ping
say fastest $(sed -n 's|.*min/avg/max = \([0-9.]*\)/.*|\1|p' /tmp/ping)
say arrived $(sed -n 's/.*transmitted, \([0-9]*\) packets received.*/\1/p' /tmp/ping)
while [ $(($(now)-begin)) -lt $S ]; do
  h=h$((looks%N+1)); looks=$((looks+1))
  ready $h || { unready=$((unready+1)); sed "s/^/LOSSY look $looks by $h: /" /tmp/nodes; }
  names >/tmp/out || { unnamed=$((unnamed+1)); sed "s/^/LOSSY look $looks: /" /tmp/out; }
  echo "progress: look $looks, after $(($(now)-begin)) s: $unready not ready, $unnamed without a name, $(($(said "$GONE" | wc -l)-gone)) taken for dead"
  sleep 15
done
say lasted $(($(now)-begin))
say busy $(($(busy)-worked))
say looks $looks
say unready $unready
say unnamed $unnamed
say sessions $(($(said 'session opened' | wc -l)-opened))
say elections $(($(said 'leadership won' | wc -l)-won))
say suspects $(($(said Refuting | wc -l)-suspects))
say dead $(($(said "$GONE" | wc -l)-gone))
said "$GONE" | tail -n +$((gone+1)) | sed 's/^/LOSSY /'
pids >/tmp/pids2; tasks >/tmp/tasks2
cmp /tmp/pids /tmp/pids2 && cmp /tmp/tasks /tmp/tasks2; say moved $?
tail -n 30 /var/lib/weft/lab/lab/*.log
`
