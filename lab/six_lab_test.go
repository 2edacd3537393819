//go:build lab

package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// Ports that these tests publish.
const (
	portDual = 8111
	portSix  = 8112
)

// TestLabTwoFamilies: on a network of two families tasks, names, service addresses
// and published ports answer on IPv6 as they do on IPv4, between hosts and from
// outside; on a network of IPv6 alone, too.
func TestLabTwoFamilies(t *testing.T) {
	r := besideRig(t, "t-dual", "--hosts", "2")
	r.must(r.on("h1", "network", "create", "-d", "overlay", "--ipv6", "both")...)
	r.must(r.weftOn("h1", "network", "create", "--ipv6", "--ipv4=false", "--subnet", "fd00:77::/64", "six")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--replicas", "4", "--network", "both", "--network", "six",
		"--publish", fmt.Sprintf("%d:80", portDual), "weft/whoami")...)
	r.sixStory("both", "web", portDual)
	for _, h := range []string{"h1", "h2"} {
		if _, err := r.get(t.Context(), h, portDual); err != nil {
			t.Errorf("over IPv4: %v", err)
		}
	}

	// By name on the network of IPv6 alone: an answer of A would be a lie.
	r.must(r.on("h1", "service", "create", "-d", "--name", "only", "--network", "six", "weft/whoami")...)
	r.eventually("only 1/1", func() error { return r.serviceHas("only 1/1") })
	from := r.containers("h1", "web")[0]
	names := r.must(r.on("h1", "exec", from, "/weft", "whoami", "lookup", "only")...)
	if !strings.HasPrefix(names, "fd00:77::") || len(strings.Fields(names)) != 1 {
		t.Errorf("only is %q", names)
	}
	r.eventually("only by its name", func() error {
		_, err := r.run(t.Context(), r.on("h1", "exec", from, "/weft", "whoami", "get", "--timeout", "2s", "http://only/")...)
		return err
	})
	r.must(r.on("h1", "service", "rm", "web", "only")...)
	r.eventually("networks removed", func() error {
		_, err := r.run(t.Context(), r.on("h1", "network", "rm", "both", "six")...)
		return err
	})
}

// TestLabIPv6Underlay tells the same story where hosts have no IPv4 address at all.
func TestLabIPv6Underlay(t *testing.T) {
	r := besideRig(t, "t-six", "--hosts", "2", "--underlay", UnderlayIPv6)
	for _, h := range []string{"h1", "h2"} {
		if out := r.must(r.on(h, "info", "--format", "{{.Swarm.NodeAddr}}")...); out != r.host(h).Addr6.String() {
			t.Errorf("%s is at %s, want %s", h, out, r.host(h).Addr6)
		}
	}
	r.must(r.on("h1", "network", "create", "-d", "overlay", "--ipv6", "both")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--replicas", "4", "--network", "both",
		"--publish", fmt.Sprintf("%d:80", portSix), "weft/whoami")...)
	r.sixStory("both", "web", portSix)
}

// sixStory asks a service of four tasks in every way there is over IPv6.
func (r *rig) sixStory(network, service string, port int) {
	r.t.Helper()
	r.eventually(service+" 4/4", func() error { return r.serviceHas(service + " 4/4") })
	prefix := netip.MustParsePrefix(strings.Fields(r.must(r.on("h1", "network", "inspect", network, "-f",
		"{{range .IPAM.Config}}{{.Subnet}} {{end}}")...))[1])
	from := map[string]string{}
	for _, h := range []string{"h1", "h2"} {
		c := r.containers(h, service)
		if len(c) == 0 {
			r.t.Fatalf("no container of %s on %s", service, h)
		}
		from[h] = c[0]
	}
	for h, c := range from {
		exec := func(args ...string) (string, error) {
			return r.run(r.t.Context(), r.on(h, append([]string{"exec", c, "/weft", "whoami"}, args...)...)...)
		}
		within := func(name string) (out []netip.Addr) {
			text, err := exec("lookup", name)
			if err != nil {
				r.t.Fatal(err)
			}
			for _, f := range strings.Fields(text) {
				if a, err := netip.ParseAddr(f); err == nil && prefix.Contains(a) {
					out = append(out, a)
				}
			}
			return out
		}
		// With the network's name: docker's command puts networks in the order of
		// their ids, and the first that has a family answers for it.
		vip, tasks := within(service+"."+network), within("tasks."+service+"."+network)
		if len(vip) != 1 || len(tasks) != 4 {
			r.t.Fatalf("%s has the names %v and %v in %s", h, vip, tasks, prefix)
		}
		for _, a := range tasks {
			if _, err := exec("ping", a.String()); err != nil {
				r.t.Errorf("%s: %v", h, err)
			}
			if _, err := exec("get", "--timeout", "2s", fmt.Sprintf("http://[%s]/", a)); err != nil {
				r.t.Errorf("%s: %v", h, err)
			}
		}
		// Each connection is balanced anew, to the asking task, too: after 40
		// of them a task of four is left out once in 25,000 runs.
		seen := map[string]bool{}
		for range 40 {
			out, err := exec("get", "--timeout", "2s", fmt.Sprintf("http://[%s]/", vip[0]))
			if err != nil {
				r.t.Fatalf("%s: %v", h, err)
			}
			if seen[answerer(out)] = true; len(seen) == 4 {
				break
			}
		}
		if len(seen) != 4 {
			r.t.Errorf("%s: the service address reached %d of 4 tasks", h, len(seen))
		}
	}
	for _, h := range []string{"h1", "h2"} {
		url := fmt.Sprintf("http://[%s]:%d/", r.host(h).Addr6, port)
		r.eventually(url+" from outside", func() error {
			_, err := r.run(r.t.Context(), r.weft, "lab", "client", "--name", r.name, "--", r.weft, "whoami", "get", "--timeout", "2s", url)
			return err
		})
		// From the host itself, by the name that has both families.
		r.must(r.weft, "lab", "exec", "--name", r.name, h, "--", r.weft, "whoami", "get", "--timeout", "2s", fmt.Sprintf("http://localhost:%d/", port))
	}
}

// answerer is the host that an answer of whoami names.
func answerer(out string) string {
	_, rest, _ := strings.Cut(out, `"host":"`)
	name, _, _ := strings.Cut(rest, `"`)
	return name
}

func (r *rig) serviceHas(want string) error {
	out, err := r.run(r.t.Context(), r.on("h1", "service", "ls", "--format", "{{.Name}} {{.Replicas}}")...)
	if err == nil && !strings.Contains(out, want) {
		err = errors.New(out)
	}
	return err
}
