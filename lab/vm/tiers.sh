#!/bin/bash
# Runs every test tier that this machine can run, one after the other, and ends
# with a table: what ran, how many tests passed, failed and were skipped, how
# long it took, and what could not run and why. Exit code 0 only if nothing
# failed and nothing that WEFT_TEST_REQUIRE names (userns,root,vm,docker) was
# left out.
#   TAGS            build tags of the product (from the Makefile)
#   WEFT_TEST_ONLY  run only tiers whose name contains this
set -uo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin:/usr/local/go/bin
logs=$PWD/bin/test-logs
mkdir -p "$logs"
require=,${WEFT_TEST_REQUIRE:-},
TAGS=${TAGS:-}
STATICCHECK=honnef.co/go/tools/cmd/staticcheck@v0.8.2
table=()
said=
failed=0

required() { [[ $require == *,$1,* ]]; }

# row NAME RESULT SECONDS DETAIL
row() { table+=("$(printf '%-12s %-8s %5ss  %s' "$1" "$2" "$3" "$4")"); }

chosen() { [[ $1 == *"${WEFT_TEST_ONLY:-}"* ]]; }

# without NAME REQUIRED-WORD REASON
without() {
  if required "$2"; then
    failed=1
    row "$1" FAILED 0 "required, but could not run: $3"
  else
    row "$1" "not run" 0 "$3"
  fi
}

# counts LOG: passed, failed and skipped tests, subtests not counted
counts() {
  awk '/^--- PASS/ {p++} /^--- FAIL/ {f++} /^--- SKIP/ {s++} END {printf "%d passed, %d failed, %d skipped", p, f, s}' "$1"
}

# reasons TIER LOG: the first line of everything that each failed test logged, also of
# its subtests; dumps of daemons, which are long, come after what led to them
reasons() {
  awk -v tier="$1" '
    /^=== (RUN|NAME|CONT) / {test = $3; sub(/\/.*/, "", test)}
    /^ +[a-zA-Z0-9_]+_test\.go:[0-9]+: / {if (lines[test]++ < 40) text[test] = text[test] "\n" substr($0, 1, 400)}
    /^--- FAIL/ {if (!($3 in done)) {done[$3]; print tier, $3 ":" text[$3]}}
    # What ends a whole process, or is no test'"'"'s: no test is said to have failed then.
    /^(panic|fatal error|signal|SIG[A-Z]+|runtime): |^(WARNING: DATA RACE|==[0-9]+==ERROR|ThreadSanitizer|race: )/ {
      if (deaths++ < 4) {print tier ", after " test ": " substr($0, 1, 400); rest = 30; next}
    }
    rest > 0 {rest--; print "    " substr($0, 1, 200)}
  ' "$2"
}

# tier NAME COMMAND...
tier() {
  chosen "$1" || return 0
  local name=$1 start=$SECONDS rc=0
  shift
  echo "=== $name: $*"
  "$@" >"$logs/$name.log" 2>&1 || rc=$?
  judge $rc "$name" $start "$@"
}

# judge EXIT-CODE NAME START COMMAND...: says how a tier has ended whose log is written
judge() {
  local rc=$1 name=$2 start=$3 detail log=$logs/$2.log
  shift 3
  if [ "$rc" = 0 ]; then
    grep -E '^(ok|---|    --- SKIP)|^\?' "$log" | grep -v 'no test files' | grep -E '^ok|SKIP' || true
    detail=; [[ $1 == *go && $2 == test || $* == *"go test"* ]] && detail=$(counts "$log")
    row "$name" ok $((SECONDS - start)) "$detail"
    return 0
  fi
  failed=1
  # The end of the log, which has the reason of a build error, then the names. What
  # the tests said comes before the table.
  tail -n 80 "$log"
  grep -E '^(FAIL|panic:)|--- FAIL' "$log" | head -n 50
  said+=$(reasons "$name" "$log")$'\n'
  row "$name" FAILED $((SECONDS - start)) "see $log"
  return 1
}

# A group of processes that get what nobody else wants of the processors (cpu.idle of
# the cpu controller, of cgroup v1 or v2); "" where none can be made. A share of the
# scheduler's own (SCHED_IDLE, nice) counts among a session's processes only.
idle=
for root in /sys/fs/cgroup/cpu /sys/fs/cgroup; do
  group=$root/weft-tests-$$
  for old in "$root"/weft-tests-*; do # of runs that were killed
    [ -d "/proc/${old##*-}" ] || rmdir "$old" 2>/dev/null
  done
  mkdir "$group" 2>/dev/null || continue
  if [ -e "$group/cpu.idle" ] && echo 1 >"$group/cpu.idle"; then
    idle=$group
    break
  fi
  rmdir "$group"
done
# What is left in it when this ends early is ours, and ends with it.
end_idle() {
  [ -n "$idle" ] || return 0
  local pids
  while pids=$(<"$idle/cgroup.procs") && [ -n "$pids" ]; do
    kill -KILL $pids 2>/dev/null # some have ended since
    sleep 0.1
  done
  rmdir "$idle"
}
trap end_idle EXIT
trap 'exit 130' INT TERM

# begin NAME COMMAND...: a tier that runs beside the next ones, in the idle group; finish
# waits for it. Without such a group it runs when it is to be finished.
declare -A began pid
begin() {
  chosen "$1" && [ -n "$idle" ] || return 0
  local name=$1
  shift
  echo "=== $name, beside what follows: $*"
  began[$name]=$SECONDS
  (echo $BASHPID >"$idle/cgroup.procs" && exec "$@") >"$logs/$name.log" 2>&1 &
  pid[$name]=$!
}
finish() {
  local name=$1 rc=0
  shift
  if [ -z "${pid[$name]:-}" ]; then
    tier "$name" "$@"
    return
  fi
  wait "${pid[$name]}" || rc=$?
  judge $rc "$name" "${began[$name]}" "$@"
}

need() { lab/vm/need.sh "$@" 2>"$logs/need.log" || { reason=$(tail -n 1 "$logs/need.log"); return 1; }; }

gofmt_clean() {
  local files; files=$(git ls-files '*.go' | xargs gofmt -l) || return 1
  [ -z "$files" ] || { echo "not gofmt'ed: $files"; return 1; }
}

# What tests of all tiers use, where it is there. Unpacked things come behind the
# machine's own commands, but for busybox, which may be there and not be static.
need runc busybox && runc=yes || { runc=; runc_reason=$reason; }
need docker && docker=yes || { docker=; docker_reason=$reason; }
export PATH=$PWD/bin/cache/busybox/bin:$PWD/bin/cache/busybox/usr/bin:$PATH:$PWD/bin/cache/docker/usr/bin

tier gofmt gofmt_clean
tier build make -s build
tier vet go vet -tags "$TAGS lab vm" ./...
tier staticcheck go run "$STATICCHECK" -tags "${TAGS// /,},lab,vm" ./...

# The guests' clocks count instructions: nothing in them is late because of what else the
# machine does, so they take what the tests of the kernel and the labs, which mostly
# wait, leave of it.
guests=(env CGO_ENABLED=0 go test -count=1 -v -timeout 75m -parallel 16 -tags "$TAGS vm" ./lab/vm)
need runc qemu busybox kernel kernel-new && vm=yes || { vm=; vm_reason=$reason; }
[ -z "$vm" ] || begin 3-vm "${guests[@]}"

# Tests of the kernel mostly wait for it: four packages at once keep two processors
# busy, and those that take longest begin first.
longest=(./vxlan/bpf ./vxlan/wg ./ingress/nft ./agent/runtime/containerd ./api)
tier 0+1 env CGO_ENABLED=0 go test -p 4 -count=1 -v -timeout 10m -tags "$TAGS" "${longest[@]}" ./...

# Race-built shims of real containers start so slowly that the runtime's own
# limits end them; the driver's concurrency is the lab's to test.
if need gcc; then
  raced=$(go list -tags "$TAGS" "${longest[@]}" ./... | awk '!/\/agent\/runtime\/containerd$/ && !seen[$0]++')
  # In a synctest bubble the timers of all goroutines share one thread of the
  # detector's, so that two processors at once break its memory: SIGSEGV, one run in
  # ten (golang/go#78156). On one processor it sees the same, as it goes by order.
  bubbles=$(grep -rl --include=*_test.go testing/synctest . | xargs -n1 dirname | sort -u)
  bubbles=$(go list -tags "$TAGS" $bubbles)
  rest=$(grep -vxF "$bubbles" <<<"$raced")
  # aside COMMAND...: for the bubbles on one processor, and beside it for the rest
  aside() {
    local fail=0
    "$@" -p 1 -cpu 1 $bubbles >"$logs/bubbles.log" 2>&1 &
    "$@" -p 4 $rest || fail=1
    wait $! || fail=1
    cat "$logs/bubbles.log"
    return $fail
  }
  # A process with the detector sleeps for a second when it ends, so that its other
  # goroutines may still meet: a tenth, as two hundred are started.
  tier 0+1-race aside env CGO_ENABLED=1 GORACE=atexit_sleep_ms=100 go test -race -count=1 -v -timeout 15m -tags "$TAGS"
else
  without 0+1-race userns "$reason"
fi

# lab_tier NAME RUN [VARIABLE=VALUE]
lab_tier() {
  if [ "$(id -u)" != 0 ]; then
    without "$1" root "needs root"
  elif [ -z "$docker" ]; then
    without "$1" docker "$docker_reason"
  elif [ -n "$runc" ]; then
    tier "$1" env CGO_ENABLED=0 ${3:-} go test -count=1 -v -timeout 30m -parallel 2 -tags "$TAGS lab" -run "$2" ./lab/...
  else
    without "$1" root "$runc_reason"
  fi
}

lab_tier 2-lab 'Lab|Faults'
# The must-hold tests on the engine that is not this machine's first choice.
lab_tier 2-lab-bridge '^(TestLabDemo|TestLabDocker|TestLabForeign|TestLabRepairs|TestLabEncryptedNetwork|TestLabTwoFamilies|TestLabIPv6Underlay|TestFaultsAdoption|TestFaultsKillWhileBusy|TestFaultsReuse|TestFaultsMTU|TestLabMeshKeepsClients|TestLabMustHold|TestLabPublishedToSome|TestLabRollingUpdates)$' WEFT_TEST_OVERLAY=bridge

if [ -n "$vm" ]; then
  finish 3-vm "${guests[@]}"
else
  without 3-vm vm "$vm_reason"
fi

[ -z "$said" ] || printf '\nWhat the tests that failed said:\n%s' "$said"
echo
printf '%-12s %-8s %6s  %s\n' TIER RESULT TIME DETAIL
printf '%s\n' "${table[@]}"
exit $failed
