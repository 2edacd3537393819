//go:build lab

package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

// TestFaultsReuse replaces all tasks of a small network again and again, and a
// whole service with them, while a client on every host connects to every name,
// by TCP and UDP: whoever answers must be of the service that was asked. 5 rounds
// of 12 tasks in a /27 on 3 hosts; soak: 50 rounds of 40 tasks in a /26 on 4.
func TestFaultsReuse(t *testing.T) {
	reuse{lab: "flt-reuse", hosts: 3, subnet: "10.90.0.0/27", services: 4, replicas: 3, rounds: 5, pad: true}.run(t)
}

// TestSoakReuse is TestFaultsReuse in its long form.
func TestSoakReuse(t *testing.T) {
	soak(t)
	reuse{lab: "flt-reus-s", hosts: 4, subnet: "10.90.0.0/26", services: 8, replicas: 5, rounds: 50}.run(t)
}

// reuse is the size of one such test.
type reuse struct {
	lab, subnet                       string
	hosts, services, replicas, rounds int
	// pad holds one more address. Addresses are given out in turn: where the rest of
	// the subnet is a multiple of what a round takes, services get their own again.
	pad bool
}

func (u reuse) name(i int) string { return fmt.Sprintf("s%d", i+1) }

func (u reuse) run(t *testing.T) {
	result := newSoakResult(t)
	r := newRig(t, u.lab, "--hosts", fmt.Sprint(u.hosts))
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "--subnet", u.subnet, "small")...)
	var hosts []string
	for i := range u.hosts {
		hosts = append(hosts, fmt.Sprintf("h%d", i+1))
	}
	r.must(r.on("h1", "service", "create", "-d", "--name", "client", "--mode", "global", "--network", "small", "--endpoint-mode", "dnsrr", "weft/whoami")...)
	if u.pad {
		r.must(r.on("h1", "service", "create", "-d", "--name", "pad", "--network", "small", "--endpoint-mode", "dnsrr", "weft/whoami")...)
	}
	for i := range u.services {
		r.must(u.create(r, i)...)
	}
	r.eventually("all tasks", func() error { return u.allRun(r) })
	var clients []replica
	r.eventually("a client on every host", func() (err error) {
		if clients, err = r.replicas("client", hosts...); err == nil && len(clients) != u.hosts {
			err = fmt.Errorf("%d clients", len(clients))
		}
		return err
	})
	j := judge{answered: map[string]int{}, failed: map[string]int{}, names: map[netip.Addr]map[string]bool{}}
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for _, c := range clients {
		asking.Go(func() {
			if err := within(c.ns(), func() error { u.ask(ctx, &j); return nil }); err != nil {
				t.Error(err)
			}
		})
	}
	began := time.Now()
	// The test shows nothing unless addresses go from service to service: how soon
	// they do depends on how the rounds fall in with the order of addresses.
	rounds, wantShared := 0, u.services*u.replicas/2
	for ; rounds < u.rounds || rounds < 3*u.rounds && j.shared() < wantShared; rounds++ {
		u.round(r, rounds)
		if rounds%10 == 9 {
			t.Logf("%s after %d rounds, %s", &j, rounds+1, time.Since(began).Round(time.Second))
		}
	}
	cancel()
	asking.Wait()
	result.printf("%d rounds of %d tasks in %s on %d hosts took %s: %s", rounds, u.services*u.replicas, u.subnet, u.hosts, time.Since(began).Round(time.Second), &j)
	for _, w := range j.wrong[:min(10, len(j.wrong))] {
		t.Errorf("answered by another service: %s", w)
	}
	if shared := j.shared(); shared < wantShared {
		t.Errorf("only %d addresses were seen with tasks of more than one service", shared)
	}
	for kind, n := range j.answered {
		if n < u.rounds*u.services*u.replicas {
			t.Errorf("only %d questions by %s were answered", n, kind)
		}
	}
	if len(j.answered) != len(questions) {
		t.Errorf("answers by %v only", j.answered)
	}
}

// create is the command that makes a service; its containers answer with their
// host name, which is that of the service.
func (u reuse) create(r *rig, i int) []string {
	return r.on("h1", "service", "create", "-d", "--name", u.name(i), "--hostname", "of-"+u.name(i), "--replicas", fmt.Sprint(u.replicas),
		"--network", "small", "--stop-grace-period", "2s", "--update-monitor", "0s", "weft/whoami")
}

func (u reuse) allRun(r *rig) error {
	out, err := r.run(r.t.Context(), r.on("h1", "service", "ls", "--format", "{{.Name}} {{.Replicas}}")...)
	if err != nil {
		return err
	}
	want := fmt.Sprintf("%d/%d", u.replicas, u.replicas)
	for i := range u.services {
		if !slices.Contains(strings.Split(strings.TrimSpace(out), "\n"), u.name(i)+" "+want) {
			return fmt.Errorf("service %s: %s", u.name(i), out)
		}
	}
	return nil
}

// round replaces every task, and removes two services and creates them the other
// way round, so that tasks' and services' addresses move.
func (u reuse) round(r *rig, round int) {
	r.t.Helper()
	fresh := []int{round % u.services, (round + 1) % u.services}
	for i := range u.services {
		if !slices.Contains(fresh, i) {
			r.must(r.on("h1", "service", "update", "-d", "--force", u.name(i))...)
		}
	}
	for _, i := range fresh {
		r.must(r.on("h1", "service", "rm", u.name(i))...)
	}
	for _, i := range slices.Backward(fresh) {
		r.eventually("the service comes back when there is room", func() error {
			_, err := r.run(r.t.Context(), u.create(r, i)...)
			return err
		})
	}
	r.eventually("all tasks are replaced", func() error {
		for i := range u.services {
			if slices.Contains(fresh, i) {
				continue
			}
			out, err := r.run(r.t.Context(), r.on("h1", "service", "inspect", "-f", "{{.UpdateStatus.State}}", u.name(i))...)
			if err == nil && strings.TrimSpace(out) != "completed" {
				err = fmt.Errorf("update of %s: %s", u.name(i), out)
			}
			if err != nil {
				return err
			}
		}
		return u.allRun(r)
	})
}

// nameLives bounds a question from the answer of the resolver on: the name of a
// task may be remembered for that long. It is also less than the kernel's first
// retransmission of a SYN, which would be a question to an older answer.
const nameLives = 9 * weft.TaskNameTTL / 10

// questions are the ways to ask a service who it is, by what they ask.
var questions = map[string]func(ctx context.Context, to netip.Addr) (string, error){
	"TCP": whoByTCP, "UDP": whoByUDP,
}

// ask connects to every name, in turn and by every way, until ctx ends. It runs
// in the namespace of a client's container.
func (u reuse) ask(ctx context.Context, j *judge) {
	for n := 0; ctx.Err() == nil; n++ {
		service := u.name(n % u.services)
		for _, name := range []string{service, "tasks." + service} {
			for _, kind := range slices.Sorted(maps.Keys(questions)) {
				if kind == "UDP" && name == service {
					continue // a server on all addresses answers from its own
				}
				one, cancel := context.WithTimeout(ctx, nameLives)
				j.ask(one, service, name, kind)
				cancel()
			}
		}
		if pause(ctx, 5*time.Millisecond) != nil {
			return
		}
	}
}

// judge counts answers.
type judge struct {
	mu       sync.Mutex // guards: the rest
	answered map[string]int
	failed   map[string]int // by what was asked
	lastErr  error
	wrong    []string
	names    map[netip.Addr]map[string]bool // services that answered at an address
}

func (j *judge) ask(ctx context.Context, service, name, kind string) {
	addrs, err := resolve(ctx, name)
	if err != nil {
		j.note(func() { j.failed["names"]++; j.lastErr = err })
		return
	}
	to := addrs[int(time.Now().UnixNano()/1000)%len(addrs)]
	host, err := questions[kind](ctx, to)
	if err != nil {
		whom := "services"
		if name != service {
			whom = "tasks"
		}
		j.note(func() { j.failed[whom+" by "+kind]++; j.lastErr = err })
		return
	}
	j.note(func() {
		j.answered[kind]++
		if j.names[to] == nil {
			j.names[to] = map[string]bool{}
		}
		j.names[to][host] = true
		if host != "of-"+service {
			j.wrong = append(j.wrong, fmt.Sprintf("%s asked %s at %s by %s, and %q answered", time.Now().Format(time.TimeOnly), name, to, kind, host))
		}
	})
}

func (j *judge) note(f func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	f()
}

// shared is how many addresses more than one service has answered at.
func (j *judge) shared() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for _, services := range j.names {
		if len(services) > 1 {
			n++
		}
	}
	return n
}

func (j *judge) String() string {
	shared := j.shared()
	j.mu.Lock()
	defer j.mu.Unlock()
	return fmt.Sprintf("answers %v, without answer %v (the last: %v), %d by another service; %d addresses, %d of them with more than one service",
		j.answered, j.failed, j.lastErr, len(j.wrong), len(j.names), shared)
}

func whoByTCP(ctx context.Context, to netip.Addr) (string, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(to, 80).String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return "", err
		}
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	return identityIn(c)
}

func whoByUDP(ctx context.Context, to netip.Addr) (string, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "udp", netip.AddrPortFrom(to, 7).String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(nameLives / 3)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "?"); err != nil {
		return "", err
	}
	return identityIn(c)
}

// identityIn finds the line of JSON in an answer of whoami.
func identityIn(r io.Reader) (string, error) {
	in := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := in.ReadString('\n')
		var id struct{ Host string }
		if strings.HasPrefix(line, "{") {
			if err := json.Unmarshal([]byte(line), &id); err != nil {
				return "", err
			}
			return id.Host, nil
		}
		if err != nil {
			return "", errors.Join(errors.New("no identity in the answer"), err)
		}
	}
}
