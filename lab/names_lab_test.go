//go:build lab

package lab

import (
	"context"
	bits "encoding/binary"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	miekg "github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/netns"
)

// Addresses that this test makes up: what the nameserver outside answers, a line of
// /etc/hosts, and what a nameserver answers that is a task.
const (
	namesOutside = "192.0.2.77"
	// slowAnswer is how long a nameserver takes that is slow.
	slowAnswer  = 2 * time.Second
	namesHost   = "192.0.2.78"
	namesInside = "192.0.2.79"
)

// nameserver answers every question of an address with one. The one of all hosts
// stands with the client, outside the cluster, so what it hears is what left the
// nodes.
type nameserver struct {
	answer string

	mu    sync.Mutex // guards all below
	heard []string   // names
	from  []string   // addresses that asked
	mode  string     // "", "dead", "garbage", "lying"
}

func newNameserver(t *testing.T, ns, at, answer string) *nameserver {
	t.Helper()
	var pc net.PacketConn
	var ln net.Listener
	if err := netns.Do(ns, func() (err error) {
		if pc, err = net.ListenPacket("udp", at); err != nil {
			return err
		}
		ln, err = net.Listen("tcp", at)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	o := &nameserver{answer: answer}
	var wg sync.WaitGroup
	servers := []*miekg.Server{{PacketConn: pc, Handler: o}, {Listener: ln, Handler: o}}
	for _, s := range servers {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		wg.Go(func() { s.ActivateAndServe() })
		<-started
	}
	t.Cleanup(func() {
		for _, s := range servers {
			s.Shutdown()
		}
		wg.Wait()
	})
	return o
}

func (o *nameserver) set(mode string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.mode = mode
}

func (o *nameserver) names() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.heard)
}

// ServeDNS answers every question, or as the mode says.
func (o *nameserver) ServeDNS(w miekg.ResponseWriter, q *miekg.Msg) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.heard = append(o.heard, strings.ToLower(q.Question[0].Name))
	if a, err := netip.ParseAddrPort(w.RemoteAddr().String()); err == nil {
		o.from = append(o.from, a.Addr().Unmap().String())
	}
	m := new(miekg.Msg)
	m.SetReply(q)
	if q.Question[0].Qtype == miekg.TypeA {
		m.Answer = []miekg.RR{&miekg.A{Hdr: miekg.RR_Header{Name: q.Question[0].Name, Rrtype: miekg.TypeA, Class: miekg.ClassINET, Ttl: 1}, A: net.ParseIP(o.answer)}}
	}
	switch o.mode {
	case "dead":
	case "slow":
		time.AfterFunc(slowAnswer, func() { w.WriteMsg(m) })
	case "garbage":
		w.Write([]byte("this is no answer at all, and it is long enough for a header"))
	case "lying":
		m.Id++
		w.WriteMsg(m)
	default:
		w.WriteMsg(m)
	}
}

// question asks the resolver of a container from inside; it gives the code and the
// data of the answer in one line, and the time that took.
func (p replica) question(name string, qtype uint16) (string, time.Duration, error) {
	var conn net.Conn
	if err := netns.Do(p.ns(), func() (err error) {
		conn, err = net.Dial("udp", "127.0.0.11:53")
		return err
	}); err != nil {
		return "", 0, err
	}
	defer conn.Close()
	m := new(miekg.Msg)
	m.SetQuestion(name, qtype)
	c := &miekg.Client{Timeout: 8 * time.Second}
	resp, took, err := c.ExchangeWithConn(m, &miekg.Conn{Conn: conn})
	if err != nil {
		return "", took, fmt.Errorf("%s: %w", name, err)
	}
	words := []string{miekg.RcodeToString[resp.Rcode]}
	for _, rr := range resp.Answer {
		if ttl := rr.Header().Ttl; ttl > 5 {
			return "", took, fmt.Errorf("%s: TTL %d, want at most 5", name, ttl)
		}
		words = append(words, strings.Join(strings.Fields(rr.String())[4:], " "))
	}
	slices.Sort(words[1:])
	return strings.Join(words, " | "), took, nil
}

// TestLabNames: what services wish of names is honoured by the stock command, no
// name of the cluster leaves its node, and bad nameservers hurt external names only.
func TestLabNames(t *testing.T) {
	r := newRig(t, "t-names", "--hosts", "2")
	up := newNameserver(t, r.clientNS(), netip.AddrPortFrom(ClientAddr, 53).String(), namesOutside)
	hosts := []string{"h1", "h2"}
	left := r.tapNames(hosts...)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "--internal", "inner")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "db", "--replicas", "3", "--network", "name=front,alias=store,alias=Store", "--constraint", "node.hostname==h2",
		"--dns", ClientAddr.String(), "--dns-search", "corp.example", "--dns-option", "timeout:1", "--host", "extra:"+namesHost, "--hostname", "box", "weft/whoami")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "agent", "--mode", "global", "--network", "front", "--endpoint-mode", "dnsrr", "weft/whoami")...)
	for _, bad := range [][]string{{"--dns", "127.0.0.1"}, {"--dns", "127.0.0.11"}, {"--dns", "fe80::1"}, {"--network", "inner", "--dns", ClientAddr.String()}, {"--dns-option", "ndots:x"}, {"--dns-search", "a..b"}, {"--network", "name=front,alias=a.b"}} {
		args := append(append([]string{"service", "create", "-d", "--name", "bad"}, bad...), "weft/whoami")
		if out, err := r.run(t.Context(), r.on("h1", args...)...); err == nil {
			t.Errorf("%q is taken: %s", bad, out)
		}
	}
	var agents, dbs []replica
	r.eventually("all tasks", func() (err error) {
		if agents, err = r.replicas("agent", hosts...); err == nil {
			dbs, err = r.replicas("db", hosts...)
		}
		if err == nil && (len(agents) != 2 || len(dbs) != 3) {
			err = fmt.Errorf("%d agents and %d dbs run", len(agents), len(dbs))
		}
		return err
	})
	began := time.Now()
	db, agent := dbs[0], agents[0]
	all := func(f func(replica) string) string {
		var words []string
		for _, p := range dbs {
			words = append(words, f(p))
		}
		slices.Sort(words)
		return strings.Join(words, " | ")
	}
	addr := func(p replica) string { return p.addrs["front"] }
	target := func(p replica) string {
		return "0 1 8080 " + strings.TrimSpace(strings.TrimPrefix(r.must(r.on(p.host, "inspect", "-f", "{{.Name}}", p.id)...), "/")) + ".front."
	}
	for file, want := range map[string]string{
		"resolv.conf": "nameserver 127.0.0.11\nsearch corp.example\noptions timeout:1 ndots:0\n", "hostname": "box\n", "hosts": namesHost + "\textra\n",
	} {
		if b, err := os.ReadFile(filepath.Join("/proc", db.pid, "root/etc", file)); err != nil || !strings.Contains(string(b), want) {
			t.Errorf("/etc/%s is %q, %v, want %q in it", file, b, err, want)
		}
	}
	type question struct {
		from  replica
		name  string
		qtype uint16
		want  string
	}
	internal := []question{
		{agent, "tasks.db.", miekg.TypeA, "NOERROR | " + all(addr)},
		{agent, "Tasks.DB.front.", miekg.TypeA, "NOERROR | " + all(addr)},
		{agent, "_8080._tcp.db.", miekg.TypeSRV, "NOERROR | " + all(target)},
		{agent, "_8080._tcp.store.", miekg.TypeSRV, "NOERROR | " + all(target)},
		{agent, "db.", miekg.TypeAAAA, "NOERROR"},
		{agent, agent.host + ".agent.", miekg.TypeA, "NOERROR | " + addr(agent)},
		// All have this hostname, and each is found by itself alone.
		{dbs[0], "box.", miekg.TypeA, "NOERROR | " + addr(dbs[0])},
		{dbs[1], "box.", miekg.TypeA, "NOERROR | " + addr(dbs[1])},
		{dbs[2], "box.front.", miekg.TypeA, "NOERROR | " + addr(dbs[2])},
		{agents[0], "box.", miekg.TypeA, "NXDOMAIN"},
		{agents[1], "box.", miekg.TypeA, "NXDOMAIN"},
		{db, agent.host + ".agent.corp.example.", miekg.TypeA, "NOERROR | " + addr(agent)},
		{db, "db.corp.example.", miekg.TypeAAAA, "NOERROR"},
		{agent, "nonsense.", miekg.TypeA, "NXDOMAIN"},
		{agent, "_80._tcp.nonsense.", miekg.TypeSRV, "NXDOMAIN"},
		{agent, "nonsense.front.", miekg.TypeA, "NXDOMAIN"},
		{agent, "4.db.", miekg.TypeA, "NXDOMAIN"}, // it has three
		{agent, "nonsense.db.", miekg.TypeA, "NXDOMAIN"},
		{agent, "_8080._tcp.4.db.", miekg.TypeSRV, "NXDOMAIN"},
		{db, "h9.agent.", miekg.TypeA, "NXDOMAIN"},
		{db, "_80._tcp.nonsense.front.", miekg.TypeSRV, "NXDOMAIN"},
	}
	ask := func(q question) time.Duration {
		t.Helper()
		got, took, err := q.from.question(q.name, q.qtype)
		if err != nil || got != q.want {
			t.Errorf("%s %s on %s: %q, %v, want %q", q.name, miekg.TypeToString[q.qtype], q.from.host, got, err, q.want)
		}
		return took
	}
	// Gossip may be behind what docker ps says.
	r.eventually("tasks.db everywhere", func() error {
		for _, a := range agents {
			if got, _, err := a.question("tasks.db.", miekg.TypeA); err != nil || got != internal[0].want {
				return fmt.Errorf("%s: %q, %v", a.host, got, err)
			}
		}
		return nil
	})
	for _, q := range internal {
		ask(q)
	}
	ask(question{agent, "www.example.com.", miekg.TypeA, "NOERROR | " + namesOutside})
	ask(question{db, "nonsense.corp.example.", miekg.TypeA, "NOERROR | " + namesOutside})

	for _, mode := range []string{"dead", "garbage", "lying", "slow"} {
		up.set(mode)
		var external sync.WaitGroup
		for i := range 8 {
			external.Go(func() { agent.question(fmt.Sprintf("n%d.%s.example.com.", i, mode), miekg.TypeA) })
		}
		var took []time.Duration
		for range 10 {
			for _, q := range internal {
				took = append(took, ask(q))
			}
		}
		external.Wait()
		slices.Sort(took)
		median := took[len(took)/2]
		t.Logf("with a nameserver that is %s %d internal names took %v (median), %v at worst", mode, len(took), median, took[len(took)-1])
		if median > 5*time.Millisecond {
			t.Errorf("with a nameserver that is %s an internal name took %v (median), want under 5 ms", mode, median)
		}
	}
	up.set("")
	r.nearNameserver(agent)
	r.successor(agents, dbs)
	r.starting(agents)

	// What has gone stays here, too.
	r.must(r.on("h1", "service", "rm", "db")...)
	for _, name := range []string{"tasks.db.", "1.db.", "db.front.", "_80._tcp.db."} {
		r.eventually(name+" is gone", func() error {
			if got, _, err := agent.question(name, miekg.TypeA); err != nil || got != "NXDOMAIN" {
				return fmt.Errorf("%q, %v", got, err)
			}
			return nil
		})
	}
	heard, captured := up.names(), left()
	for _, name := range append(slices.Clone(heard), captured...) {
		if !strings.HasSuffix(name, ".example.com.") && name != "nonsense.corp.example." {
			t.Errorf("%s has left its node", name)
		}
	}
	if len(heard) < 10 {
		t.Errorf("only %d questions came out: nothing is shown by them", len(heard))
	}
	if missing := slices.DeleteFunc(heard, func(n string) bool { return slices.Contains(captured, n) }); len(missing) > 0 {
		t.Errorf("the capture has not seen %q", missing)
	}
	t.Logf("%d questions came out, of %d names in the capture; took %.1f s with all tasks up", len(up.names()), len(captured), time.Since(began).Seconds())
}

// tapNames looks for DNS on the links of hosts, to whomever it goes; names ends that and
// gives the names that were asked for.
func (r *rig) tapNames(hosts ...string) (names func() []string) {
	var mu sync.Mutex
	seen := map[string]bool{}
	ctx, cancel := context.WithCancel(r.t.Context())
	g, ctx := errgroup.WithContext(ctx)
	for _, h := range hosts {
		p := &tap{sees: func(frame []byte) bool {
			name, ok := askedIn(frame)
			if ok {
				mu.Lock()
				seen[name] = true
				mu.Unlock()
			}
			return ok
		}}
		g.Go(func() error { return p.run(ctx, r.host(h).Paths.NetNS) })
	}
	return func() []string {
		cancel()
		if err := g.Wait(); err != nil {
			r.t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		return slices.Sorted(maps.Keys(seen))
	}
}

// askedIn is the name that a frame asks for: IPv4, by UDP or TCP, from or to port 53. What
// is in VXLAN is not looked at.
func askedIn(frame []byte) (name string, ok bool) {
	const ethernet, ports = 14, 4
	if len(frame) < ethernet+20 || frame[12] != 0x08 || frame[13] != 0 {
		return "", false
	}
	ip := frame[ethernet:]
	header := int(ip[0]&0x0f) * 4
	if len(ip) < header+20 {
		return "", false
	}
	body := ip[header:]
	if bits.BigEndian.Uint16(body) != 53 && bits.BigEndian.Uint16(body[2:ports]) != 53 {
		return "", false
	}
	switch ip[9] {
	case unix.IPPROTO_UDP:
		body = body[8:]
	case unix.IPPROTO_TCP:
		if behind := int(body[12]>>4)*4 + 2; len(body) > behind {
			body = body[behind:] // and the length of the message
		}
	default:
		return "", false
	}
	m := new(miekg.Msg)
	if m.Unpack(body) != nil || len(m.Question) == 0 {
		return "", false
	}
	return strings.ToLower(m.Question[0].Name), true
}

// nearNameserver lets tasks on the other host ask an agent for external names, by its
// own address and by that of a service, over the overlay.
func (r *rig) nearNameserver(agent replica) {
	r.t.Helper()
	other := "h1"
	if agent.host == other {
		other = "h2"
	}
	r.must(r.on("h1", "service", "create", "-d", "--name", "resolver", "--network", "front", "--constraint", "node.hostname=="+agent.host, "weft/whoami")...)
	var servers []replica
	r.eventually("a task to be a nameserver", func() (err error) {
		if servers, err = r.replicas("resolver", agent.host); err == nil && len(servers) != 1 {
			err = fmt.Errorf("%d run", len(servers))
		}
		return err
	})
	vip, err := r.vip("resolver")
	if err != nil {
		r.t.Fatal(err)
	}
	for name, at := range map[string]string{"by-task": servers[0].addrs["front"], "by-service": vip} {
		// Not on all addresses: port 53 of one is the resolver's.
		server := newNameserver(r.t, servers[0].ns(), net.JoinHostPort(at, "53"), namesInside)
		r.must(r.on("h1", "service", "create", "-d", "--name", name, "--network", "front", "--constraint", "node.hostname=="+other, "--dns", at, "weft/whoami")...)
		var askers []replica
		r.eventually("a task that asks "+at, func() (err error) {
			if askers, err = r.replicas(name, other); err == nil && len(askers) != 1 {
				err = fmt.Errorf("%d run", len(askers))
			}
			return err
		})
		asked := name + ".example.net."
		r.eventually("an answer of a nameserver "+name, func() error {
			got, _, err := askers[0].question(asked, miekg.TypeA)
			if err == nil && got != "NOERROR | "+namesInside {
				err = fmt.Errorf("%s is %q", asked, got)
			}
			return err
		})
		server.mu.Lock()
		if i := slices.Index(server.heard, asked); i < 0 || server.from[i] != askers[0].addrs["front"] {
			r.t.Errorf("%s: asked of %q by %q, want it of %s", name, server.heard, server.from, askers[0].addrs["front"])
		}
		server.mu.Unlock()
	}
	r.must(r.on("h1", "service", "rm", "by-task", "by-service", "resolver")...)
}

// successor kills the second task of db and waits, on all nodes, for 2.db to be the
// one in its place.
func (r *rig) successor(agents, dbs []replica) {
	r.t.Helper()
	old, _, err := agents[0].question("2.db.", miekg.TypeA)
	if err != nil || !strings.HasPrefix(old, "NOERROR | ") {
		r.t.Fatalf("2.db is %q, %v", old, err)
	}
	for _, p := range dbs {
		if strings.HasSuffix(old, " "+p.addrs["front"]) {
			r.must("kill", "-9", p.pid)
		}
	}
	var mu sync.Mutex
	seen := map[string]time.Time{}
	var wg sync.WaitGroup
	for _, a := range agents {
		wg.Go(func() {
			for end := time.Now().Add(settle); time.Now().Before(end); pause(r.t.Context(), time.Millisecond) {
				if now, _, err := a.question("2.db.", miekg.TypeA); err == nil && now != old && strings.HasPrefix(now, "NOERROR | ") {
					mu.Lock()
					seen[a.host] = time.Now()
					mu.Unlock()
					return
				}
			}
		})
	}
	wg.Wait()
	if len(seen) != len(agents) {
		r.t.Fatalf("2.db has a successor on %d of %d nodes", len(seen), len(agents))
	}
	ids := strings.Fields(r.must(r.on("h1", "service", "ps", "-q", "--no-trunc", "--filter", "desired-state=running", "--filter", "name=db.2", "db")...))
	at, err := time.Parse(time.RFC3339Nano, strings.TrimSpace(r.must(r.on("h1", "inspect", "-f", "{{.Status.Timestamp}}", ids[0])...)))
	if err != nil {
		at, err = time.Parse("2006-01-02 15:04:05.999999999 -0700 MST", strings.TrimSpace(r.must(r.on("h1", "inspect", "-f", "{{.Status.Timestamp}}", ids[0])...)))
	}
	if err != nil {
		r.t.Fatal(err)
	}
	for host, when := range seen {
		late := when.Sub(at)
		r.t.Logf("2.db is the successor on %s %v after that runs", host, late.Round(time.Millisecond/10))
		if late > 2*time.Second {
			r.t.Errorf("2.db is the successor on %s %v after that runs, want 2 s at most", host, late)
		}
	}
}
