//go:build lab

package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// portHostMode is published in mode host.
const portHostMode = 8143

// TestLabHostMode: a port in mode host is answered by its host's own task, at the host's
// addresses of both families, and sees its client's address. Tasks ask for it there as
// everyone does: of the same host and of another, of the same service and of another, and
// the very task that answers.
func TestLabHostMode(t *testing.T) {
	r := besideRig(t, "t-host", "--hosts", "2")
	hosts := []string{"h1", "h2"}
	r.must(r.on("h1", "network", "create", "-d", "overlay", "--ipv6", "both")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "both",
		"--publish", fmt.Sprintf("mode=host,target=80,published=%d", portHostMode), "weft/whoami")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "alone", "--mode", "global", "weft/whoami")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "beside", "--mode", "global", "--network", "both", "weft/whoami")...)
	for _, service := range []string{"web", "alone", "beside"} {
		r.eventually(service+" 2/2", func() error { return r.serviceHas(service + " 2/2") })
	}
	own := map[string]string{} // container of web, by host
	for _, h := range hosts {
		own[h] = r.containers(h, "web")[0]
	}
	// wants asks with a command and wants the host's own task to answer.
	wants := func(h string, client netip.Addr, args ...string) error {
		out, err := r.run(t.Context(), args...)
		if err == nil && answerer(out) != own[h][:12] {
			err = fmt.Errorf("%s answered, want the task of %s: %s", answerer(out), h, out)
		}
		seen := netip.AddrPortFrom(client, 1).String()
		if seen = seen[:len(seen)-1]; err == nil && client.IsValid() && !strings.Contains(out, `"client":"`+seen) {
			err = fmt.Errorf("the task sees another client than %s: %s", client, out)
		}
		return err
	}
	url := func(a netip.Addr) string { return fmt.Sprintf("http://%s/", netip.AddrPortFrom(a, portHostMode)) }
	get := []string{"whoami", "get", "--timeout", "2s"}
	for _, h := range hosts {
		for client, to := range map[netip.Addr]netip.Addr{ClientAddr: r.host(h).Addr, ClientAddr6: r.host(h).Addr6} {
			r.eventually(fmt.Sprintf("%s from outside", url(to)), func() error {
				return wants(h, client, append(append([]string{r.weft, "lab", "client", "--name", r.name, "--", r.weft}, get...), url(to))...)
			})
			// The host itself.
			if err := wants(h, to, append(append([]string{r.weft, "lab", "exec", "--name", r.name, h, "--", r.weft}, get...), url(to))...); err != nil {
				t.Errorf("%s asks %s: %v", h, url(to), err)
			}
		}
	}
	for _, from := range hosts {
		for _, service := range []string{"web", "alone", "beside"} {
			c := r.containers(from, service)[0]
			for _, h := range hosts {
				for range 5 { // what comes first may teach a wrong way
					err := wants(h, netip.Addr{}, r.on(from, append(append([]string{"exec", c, "/weft"}, get...), url(r.host(h).Addr))...)...)
					if err != nil {
						t.Errorf("the task of %s on %s asks %s: %v", service, from, url(r.host(h).Addr), errors.Join(err))
						break
					}
				}
			}
		}
	}
}
