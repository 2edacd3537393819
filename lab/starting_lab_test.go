//go:build lab

package lab

import (
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft/vxlan/netns"
)

// clearance answers tasks' health checks from an agent's namespace: well for those it
// was told of, by the address that they ask from.
type clearance struct {
	mu      sync.Mutex
	cleared map[string]bool // addresses
}

func (c *clearance) clear(addr string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cleared[addr] = true
}

func (c *clearance) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	host, _, _ := net.SplitHostPort(q.RemoteAddr)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.cleared[host] {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}

// starting asks for the names of a service two tasks of which run, but get healthy only
// when told so, one after the other: SRV and tasks. name those that are, and one that
// is not has its own names to itself alone.
func (r *rig) starting(agents []replica) {
	r.t.Helper()
	check := &clearance{cleared: map[string]bool{}}
	at := net.JoinHostPort(agents[0].addrs["front"], "81")
	var ln net.Listener
	if err := netns.Do(agents[0].ns(), func() (err error) {
		ln, err = net.Listen("tcp", at)
		return err
	}); err != nil {
		r.t.Fatal(err)
	}
	server := &http.Server{Handler: check}
	var wg sync.WaitGroup
	wg.Go(func() { server.Serve(ln) })
	defer wg.Wait()
	defer server.Close()

	second := int64(time.Second)
	front := r.must(r.on("h1", "network", "inspect", "-f", "{{.ID}}", "front")...)
	spec := map[string]any{
		"Name": "late",
		"TaskTemplate": map[string]any{
			"ContainerSpec": map[string]any{
				"Image": "weft/whoami",
				"Healthcheck": map[string]any{
					"Test": []string{"CMD", "/weft", "whoami", "get", "http://" + at}, "Interval": second, "Timeout": 5 * second,
					"StartPeriod": 600 * second, "StartInterval": second / 5, "Retries": 1000,
				},
			},
			"Networks": []map[string]any{{"Target": front}},
		},
		"Mode": map[string]any{"Replicated": map[string]any{"Replicas": 2}},
	}
	if a, err := r.call(r.t.Context(), "h1", http.MethodPost, "/services/create", spec); err != nil || a.status != http.StatusCreated {
		r.t.Fatalf("create service: %d %s, %v", a.status, a.message(), err)
	}
	var late []replica // by slot
	names := map[string]string{}
	r.eventually("both tasks run", func() (err error) {
		late, err = r.replicas("late", "h1", "h2")
		if err == nil && len(late) != 2 {
			err = fmt.Errorf("%d run", len(late))
		}
		return err
	})
	for _, p := range late {
		names[p.id] = strings.TrimPrefix(strings.TrimSpace(r.must(r.on(p.host, "inspect", "-f", "{{.Name}}", p.id)...)), "/")
	}
	slices.SortFunc(late, func(a, b replica) int { return strings.Compare(names[a.id], names[b.id]) })
	addr := func(p replica) string { return " | " + p.addrs["front"] }
	target := func(p replica) string { return " | 0 1 80 " + names[p.id] + ".front." }
	all := func(f func(replica) string, ready []replica) string {
		var words []string
		for _, p := range ready {
			words = append(words, f(p))
		}
		slices.Sort(words)
		return "NOERROR" + strings.Join(words, "")
	}
	first, last := late[0], late[1]
	everybody := append(slices.Clone(agents), late...)
	for ready := 0; ; ready++ {
		type question struct {
			from  []replica
			name  string
			qtype uint16
			want  string
		}
		wanted := []question{
			{everybody, "tasks.late.", miekg.TypeA, all(addr, late[:ready])},
			{everybody, "_80._tcp.late.", miekg.TypeSRV, all(target, late[:ready])},
			{agents, "1.late.", miekg.TypeA, all(addr, late[:min(ready, 1)])},
			{agents, "2.late.", miekg.TypeA, all(addr, late[min(ready, 1):ready])},
			{late[:1], "1.late.", miekg.TypeA, "NOERROR" + addr(first)},
			{late[1:], "2.late.", miekg.TypeA, "NOERROR" + addr(last)},
			{late[1:], "1.late.", miekg.TypeA, all(addr, late[:min(ready, 1)])},
			{late[:1], names[first.id] + ".", miekg.TypeA, "NOERROR" + addr(first)},
			{late[1:], names[last.id] + ".front.", miekg.TypeA, "NOERROR" + addr(last)},
		}
		holds := func() error {
			for _, q := range wanted {
				for _, p := range q.from {
					if got, _, err := p.question(q.name, q.qtype); err != nil || got != q.want {
						return fmt.Errorf("%s %s on %s: %q, %v, want %q", q.name, miekg.TypeToString[q.qtype], p.host, got, err, q.want)
					}
				}
			}
			return nil
		}
		r.eventually(fmt.Sprintf("names with %d of 2 tasks ready", ready), holds)
		if ready == len(late) {
			break
		}
		check.clear(late[ready].addrs["front"])
	}
	r.must(r.on("h1", "service", "rm", "late")...)
}
