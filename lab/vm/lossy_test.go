//go:build vm

package vm

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestLossyNetwork has hosts whose links lose 5 % of all packets, each way, and are
// late by 100 ms, each way: no node is taken for dead, by gossip or by the leader, no
// task moves, and names answer. 5 hosts for 2 minutes; soak: 10 hosts, 10 minutes.
func TestLossyNetwork(t *testing.T) {
	hosts, seconds, limit := 5, 120, bootLimit
	if os.Getenv("WEFT_SOAK") != "" {
		hosts, seconds, limit = 10, 600, time.Hour
	}
	files := weftFiles(t)
	files["/usr/bin/lab.test"] = testsOf(t, "lab")
	m := buildFor(t, Config{Kernel: kernelDir(t, "kernel"), Files: files, MemoryMiB: 1024 + 320*hosts, Init: lossyInit})
	r := bootWithin(t, m, limit, fmt.Sprintf("hosts=%d", hosts), fmt.Sprintf("seconds=%d", seconds))
	n := strconv.Itoa(hosts)
	want(t, r, map[string]string{
		"verb": "0", "up": "0", "network": "0", "create": "0", "full": "0", "named": "0", "impaired": n,
		"dead": "0", "unready": "0", "unnamed": "0", "moved": "0",
	})
	// A ping crosses two such links: none is faster than both delays, and of 100 one
	// in ten is lost; that none is happens once in 28,000 times.
	if ms, err := strconv.ParseFloat(r.Values["fastest"], 64); err != nil || ms < 200 {
		t.Errorf("the fastest ping took %q ms, want at least 200: the links were not late", r.Values["fastest"])
	}
	if got, err := strconv.Atoi(r.Values["arrived"]); err != nil || got >= 100 {
		t.Errorf("of 100 pings %q were answered: the links were not lossy", r.Values["arrived"])
	}
	if looks, err := strconv.Atoi(r.Values["looks"]); err != nil || looks < 2 {
		t.Errorf("%q looks at the nodes", r.Values["looks"])
	}
	passed(t, r, "TestImpair")
	t.Logf("%d hosts for %s s: of 100 pings %s answered, the fastest after %s ms; %s looks at states and names; %s sessions of agents were opened anew",
		hosts, r.Values["lasted"], r.Values["arrived"], r.Values["fastest"], r.Values["looks"], r.Values["sessions"])
	for line := range strings.Lines(r.Console) {
		if strings.HasPrefix(line, "LOSSY ") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

// lossyInit reads hosts= and seconds= from the kernel's command line. Each look asks
// another daemon for the states of all nodes, and for the names in the namespaces
// of all tasks. What fails is told in lines that begin with LOSSY.
const lossyInit = `
say() { echo "WEFT-RESULT $*"; }
word() { sed -n "s/.*$1=\([0-9]*\).*/\1/p" /proc/cmdline; }
N=$(word hosts); S=$(word seconds)
on() { h=$1; shift; DOCKER_HOST=unix:///run/weft/lab/lab/$h/weft.sock weft "$@"; }
# repeats a command for 5 minutes at most
until_ok() {
  end=$(($(cut -d. -f1 /proc/uptime)+300))
  until "$@" >/tmp/out 2>&1; do [ $(cut -d. -f1 /proc/uptime) -gt $end ] && { cat /tmp/out; return 1; }; sleep 1; done
}
ready() { on $1 node ls >/tmp/nodes 2>&1; [ $(grep -c ' Ready ' /tmp/nodes) = $N ]; }
pids() { pgrep -f '^/weft whoami' | sort; }
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
modprobe sch_netem
WEFT_TEST_REQUIRE=userns,netem lab.test -test.v -test.run '^TestImpair$'; say verb $?
# One after the other and on the engines that are soonest begun: this processor is
# slow, and neither is what is asked here. "up" completes what one before has not.
up=0; k=0
while [ $k -lt $N ]; do k=$((k+1)); until_ok weft lab up --hosts $k --overlay-engine bridge --service-engine nft || up=1; done
say up $up
on h1 network create --driver overlay front; say network $?
on h1 service create --detach --name web --mode global --network front weft/whoami; say create $?
until_ok full; say full $?
until_ok ready h1
until_ok names; say named $?
GONE='member is gone|taken for down'
gone=$(said "$GONE" | wc -l); opened=$(said 'session opened' | wc -l)
pids >/tmp/pids; tasks >/tmp/tasks
i=0; impaired=0
while [ $i -lt $N ]; do i=$((i+1)); weft lab impair --delay 100ms --loss 5 h$i && impaired=$((impaired+1)); done
say impaired $impaired
weft lab exec h1 -- ping -q -c 100 -i 0.1 $(weft lab ls | awk '$1 == "h2" {print $2}') >/tmp/ping
say fastest $(sed -n 's|.*min/avg/max = \([0-9.]*\)/.*|\1|p' /tmp/ping)
say arrived $(sed -n 's/.*transmitted, \([0-9]*\) packets received.*/\1/p' /tmp/ping)
begin=$(cut -d. -f1 /proc/uptime); looks=0; unready=0; unnamed=0
while [ $(($(cut -d. -f1 /proc/uptime)-begin)) -lt $S ]; do
  h=h$((looks%N+1)); looks=$((looks+1))
  ready $h || { unready=$((unready+1)); sed "s/^/LOSSY look $looks by $h: /" /tmp/nodes; }
  names >/tmp/out || { unnamed=$((unnamed+1)); sed "s/^/LOSSY look $looks: /" /tmp/out; }
  sleep 3
done
say lasted $(($(cut -d. -f1 /proc/uptime)-begin))
say looks $looks
say unready $unready
say unnamed $unnamed
say sessions $(($(said 'session opened' | wc -l)-opened))
say dead $(($(said "$GONE" | wc -l)-gone))
said "$GONE" | tail -n +$((gone+1)) | sed 's/^/LOSSY /'
pids >/tmp/pids2; tasks >/tmp/tasks2
cmp /tmp/pids /tmp/pids2 && cmp /tmp/tasks /tmp/tasks2; say moved $?
tail -n 30 /var/lib/weft/lab/lab/*.log
`
