//go:build lab

package lab

import (
	"bytes"
	"context"
	bits "encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
)

// askLimit bounds one request of a flow: far above a scheduling delay of a
// loaded machine, far below the second retransmission of a lost SYN.
const askLimit = 2 * time.Second

// outcome is one request of a flow that failed.
type outcome struct {
	host int // where it was asked: index into the flow's places
	at   time.Time
	err  error
}

// flow asks the same kind of question again and again, from several places at
// once.
type flow struct {
	name string
	rate int // requests a second, over all places

	mu       sync.Mutex // guards: the rest
	sent     int
	slowest  time.Duration
	failures []outcome
}

// place is a network namespace and what is asked from it.
type place struct {
	ns  string
	ask func(ctx context.Context) error // runs inside ns
}

// run asks from all places until ctx ends. It is to be waited for.
func (f *flow) run(ctx context.Context, places []place) error {
	errs := make([]error, len(places))
	var wg sync.WaitGroup
	for i, p := range places {
		wg.Go(func() {
			errs[i] = within(p.ns, func() error {
				f.askFrom(ctx, i, time.Duration(len(places))*time.Second/time.Duration(f.rate), p.ask)
				return nil
			})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (f *flow) askFrom(ctx context.Context, host int, every time.Duration, ask func(context.Context) error) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// A request under way when the flow ends is let finish.
		one, cancel := context.WithTimeout(context.WithoutCancel(ctx), askLimit)
		began := time.Now()
		err := ask(one)
		cancel()
		f.mu.Lock()
		f.sent++
		f.slowest = max(f.slowest, time.Since(began))
		if err != nil {
			f.failures = append(f.failures, outcome{host, began, err})
		}
		f.mu.Unlock()
	}
}

// failed returns the failures so far that keep approves of.
func (f *flow) failed(keep func(outcome) bool) []outcome {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.failures), func(o outcome) bool { return !keep(o) })
}

// lastFailure is when a place was last failed, zero if never after since.
func (f *flow) lastFailure(host int, since time.Time) time.Time {
	var last time.Time
	for _, o := range f.failed(func(o outcome) bool { return o.host == host && o.at.After(since) }) {
		last = o.at
	}
	return last
}

func (f *flow) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return fmt.Sprintf("%s: %d requests, %d failed, slowest %s", f.name, f.sent, len(f.failures), f.slowest.Round(time.Millisecond))
}

// mustNotHaveFailed reports failures, the first few in full.
func (f *flow) mustNotHaveFailed(t *testing.T, began time.Time, keep func(outcome) bool) {
	t.Helper()
	failures := f.failed(keep)
	for _, o := range failures[:min(5, len(failures))] {
		t.Errorf("%s asked on h%d after %s: %v", f.name, o.host+1, o.at.Sub(began).Round(time.Millisecond), o.err)
	}
	if len(failures) > 5 {
		t.Errorf("%s: %d more failures", f.name, len(failures)-5)
	}
}

func always(outcome) bool { return true }

// ask is an HTTP request on a connection of its own to a whoami task.
func ask(addr string) func(context.Context) error {
	return func(ctx context.Context) error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		deadline, _ := ctx.Deadline()
		if err := c.SetDeadline(deadline); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
			return err
		}
		b, err := io.ReadAll(c)
		if err == nil && !bytes.Contains(b, []byte(`"client":`)) {
			err = fmt.Errorf("%s answered %q", addr, b)
		}
		return err
	}
}

// lookup asks the resolver of the namespace for the address of a name.
func lookup(name string) func(context.Context) error {
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, askLimit/4)
		defer cancel()
		_, err := resolve(ctx, name)
		return err
	}
}

// lookupAll is lookup that wants exactly these addresses, each once, in any order.
func lookupAll(name string, want []string) func(context.Context) error {
	want = slices.Sorted(slices.Values(want))
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, askLimit/4)
		defer cancel()
		addrs, err := resolve(ctx, name)
		if err != nil {
			return err
		}
		got := make([]string, len(addrs))
		for i, a := range addrs {
			got[i] = a.String()
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			return fmt.Errorf("name %s has %q, want %q", name, got, want)
		}
		return nil
	}
}

// resolve asks the resolver of the namespace for the IPv4 addresses of a name
// (RFC 1035 section 4), with room for all of them in one datagram (RFC 6891). No address
// is an error.
func resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	q := bits.BigEndian.AppendUint16(nil, 0x7766)
	q = append(q, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1) // recursion desired, one question, one more record
	for label := range strings.SplitSeq(name, ".") {
		q = append(append(q, byte(len(label))), label...)
	}
	q = append(q, 0, 0, 1, 0, 1) // A, IN
	asked := len(q)
	q = append(q, 0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0) // OPT: 4,096 bytes
	var d net.Dialer
	c, err := d.DialContext(ctx, "udp", "127.0.0.11:53")
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	if _, err := c.Write(q); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	n, err := c.Read(b)
	if err != nil {
		return nil, err
	}
	if n < asked || b[3]&0x0f != 0 {
		return nil, fmt.Errorf("name %s: rcode %d", name, b[3]&0x0f)
	}
	addrs := answersIn(b[asked:n], int(bits.BigEndian.Uint16(b[6:])))
	if len(addrs) == 0 {
		return nil, fmt.Errorf("name %s has no address", name)
	}
	return addrs, nil
}

// answersIn are the addresses of up to n resource records (RFC 1035 section
// 4.1.3).
func answersIn(b []byte, n int) (out []netip.Addr) {
	const fixed = 10 // type, class, TTL, length
	for ; n > 0; n-- {
		if b = afterName(b); len(b) < fixed {
			return out
		}
		kind, size := bits.BigEndian.Uint16(b), int(bits.BigEndian.Uint16(b[8:]))
		if len(b) < fixed+size {
			return out
		}
		if kind == 1 && size == 4 {
			out = append(out, netip.AddrFrom4([4]byte(b[fixed:])))
		}
		b = b[fixed+size:]
	}
	return out
}

// afterName skips a name: labels up to an empty one or a pointer (RFC 1035
// section 4.1.4).
func afterName(b []byte) []byte {
	for len(b) > 0 {
		switch size := int(b[0]); {
		case size == 0:
			return b[1:]
		case size&0xc0 == 0xc0 && len(b) >= 2:
			return b[2:]
		case size+1 > len(b):
			return nil
		default:
			b = b[size+1:]
		}
	}
	return nil
}

// replica is one running container of a service.
type replica struct {
	host  string
	id    string // of the container
	pid   string
	addrs map[string]string // network to address
}

func (p replica) ns() string { return "/proc/" + p.pid + "/ns/net" }

// addressesOn are the addresses of tasks on a network.
func addressesOn(network string, rs []replica) []string {
	out := make([]string, len(rs))
	for i, p := range rs {
		out[i] = p.addrs[network]
	}
	return out
}

// replicas reads the running containers of a service from every given host.
func (r *rig) replicas(service string, hosts ...string) ([]replica, error) {
	var out []replica
	for _, h := range hosts {
		ids, err := r.run(r.t.Context(), r.on(h, "ps", "-q", "--no-trunc", "--filter", named(service))...)
		if err != nil {
			return nil, err
		}
		for _, id := range strings.Fields(ids) {
			s, err := r.run(r.t.Context(), r.on(h, "inspect", "-f", "{{.State.Pid}}{{range $n, $e := .NetworkSettings.Networks}} {{$n}}={{$e.IPAddress}}{{end}}", id)...)
			if err != nil {
				return nil, err
			}
			f := strings.Fields(s)
			p := replica{host: h, id: id, pid: f[0], addrs: map[string]string{}}
			for _, kv := range f[1:] {
				n, a, _ := strings.Cut(kv, "=")
				p.addrs[n] = a
			}
			out = append(out, p)
		}
	}
	return out, nil
}

// identities are what adoption must keep: which container, which process.
func identities(rs []replica) []string {
	var out []string
	for _, p := range rs {
		out = append(out, p.host+" "+p.id[:12]+" pid "+p.pid)
	}
	slices.Sort(out)
	return out
}

// tasks are the ids of all tasks of a service, ended ones too.
func (r *rig) tasks(host, service string) ([]string, error) {
	s, err := r.run(r.t.Context(), r.on(host, "service", "ps", "-q", "--no-trunc", service)...)
	ids := strings.Fields(s)
	slices.Sort(ids)
	return ids, err
}

// host is the plan's view of a host.
func (r *rig) host(name string) Host {
	r.t.Helper()
	p, err := newPlan(r.name, DefaultConfig().RunDir, DefaultConfig().DataDir)
	if err != nil {
		r.t.Fatal(err)
	}
	i, err := parseHost(name, MaxHosts)
	if err != nil {
		r.t.Fatal(err)
	}
	return p.host(i)
}

func (r *rig) clientNS() string {
	return filepath.Join(DefaultConfig().RunDir, r.name, "netns", clientName)
}

// inventory is everything on a host that belongs to networks and tasks, one
// line each: what must be the same before a service came and after it went.
func (r *rig) inventory(name string) ([]string, error) {
	h := r.host(name)
	var out []string
	add := func(what string, names ...string) {
		for _, n := range names {
			out = append(out, what+" "+n)
		}
	}
	links, err := linksIn(h.Paths.NetNS)
	if err != nil {
		return nil, err
	}
	add("link", links...)
	spaces, err := filepath.Glob(filepath.Join(h.Paths.ExecRoot, "netns", "*"))
	if err != nil {
		return nil, err
	}
	for _, ns := range spaces {
		add("namespace", filepath.Base(ns))
		links, err := linksIn(ns)
		if err != nil {
			return nil, err
		}
		add("link in "+filepath.Base(ns), links...)
	}
	for _, dir := range []string{h.Paths.ExecRoot, h.Paths.DataRoot} {
		ms, err := mountsBelow(dir)
		if err != nil {
			return nil, err
		}
		add("mount", ms...)
	}
	for _, glob := range []string{"sandbox/*", "agent/tasks/*", "tasks/*"} {
		files, err := filepath.Glob(filepath.Join(h.Paths.DataRoot, glob))
		if err != nil {
			return nil, err
		}
		add("file", files...)
	}
	groups, err := r.groups(name)
	if err != nil {
		return nil, err
	}
	add("cgroup", groups...)
	ids, err := r.run(r.t.Context(), r.on(name, "ps", "-a", "-q", "--no-trunc")...)
	add("container", strings.Fields(ids)...)
	slices.Sort(out)
	return out, err
}

// groups are the cgroups of tasks on a host.
func (r *rig) groups(name string) ([]string, error) {
	id, err := os.ReadFile(filepath.Join(r.host(name).Paths.DataRoot, "local-id"))
	if err != nil {
		return nil, err
	}
	ids := []string{strings.TrimSpace(string(id))}
	out, err := r.run(r.t.Context(), r.on(name, "info", "-f", "{{.Swarm.NodeID}}")...)
	if err != nil {
		return nil, err
	}
	if node := strings.TrimSpace(out); weft.ID(node).Valid() {
		ids = append(ids, node)
	}
	tops, err := groupsOf(ids)
	if err != nil {
		return nil, err
	}
	var groups []string
	for _, top := range tops {
		below, err := filepath.Glob(filepath.Join(top, "*", "cgroup.procs"))
		if err != nil {
			return nil, err
		}
		for _, g := range below {
			groups = append(groups, filepath.Dir(g))
		}
	}
	return groups, nil
}

func linksIn(ns string) ([]string, error) {
	var names []string
	err := withLinks(ns, func(h *netlink.Handle) error {
		links, err := listLinks(h)
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return err
	})
	return names, err
}

// inventories of several hosts, by name.
func (r *rig) inventories(hosts ...string) map[string][]string {
	r.t.Helper()
	out := map[string][]string{}
	for _, h := range hosts {
		inv, err := r.inventory(h)
		if err != nil {
			r.t.Fatal(err)
		}
		out[h] = inv
	}
	return out
}

// sameInventories waits until every host has what it had.
func (r *rig) sameInventories(what string, before map[string][]string) {
	r.t.Helper()
	r.eventually(what, func() error {
		for h, was := range before {
			is, err := r.inventory(h)
			if err != nil {
				return err
			}
			if more, less := without(is, was), without(was, is); len(more)+len(less) > 0 {
				return fmt.Errorf("%s has %q more, lacks %q", h, more, less)
			}
		}
		return nil
	})
}

// without are the elements of a that are not in b.
func without(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}
