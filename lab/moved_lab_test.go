//go:build lab

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

const movedPort = 8155

// TestLabHostsGetOtherAddresses: a worker's host gets another address, then a manager's,
// the leader's at last: each takes up its place by it, nobody gives a command, no
// container ends, and everything answers from everywhere.
func TestLabHostsGetOtherAddresses(t *testing.T) {
	r := besideRig(t, "t-moved", "--hosts", "4", "--managers", "3")
	hosts := []string{"h1", "h2", "h3", "h4"}
	// Whose tasks are replaced after how long is another question.
	r.must(r.on("h1", "swarm", "update", "--dispatcher-heartbeat", "1m")...)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "--publish", fmt.Sprintf("%d:80", movedPort), "weft/whoami")...)
	var web []replica
	r.eventually("one task on every host", func() (err error) {
		if web, err = r.replicas("web", hosts...); err == nil && len(web) != len(hosts) {
			err = fmt.Errorf("%d run", len(web))
		}
		return err
	})
	var vip string
	r.eventually("VIP of web", func() (err error) { vip, err = r.vip("web"); return err })
	addrs := map[string]netip.Addr{}
	for _, h := range hosts {
		addrs[h] = r.host(h).Addr
	}
	all := func() error {
		tasks := addressesOn("front", web)
		for _, from := range web {
			asks := []func(context.Context) error{lookupAll("tasks.web", tasks), ask(vip + ":80")}
			for _, to := range tasks {
				asks = append(asks, ask(to+":80"))
			}
			for _, a := range asks {
				if err := askOnce(t.Context(), from.ns(), a); err != nil {
					return fmt.Errorf("from %s: %w", from.host, err)
				}
			}
			if err := askOnce(t.Context(), r.clientNS(), ask(fmt.Sprintf("%s:%d", addrs[from.host], movedPort))); err != nil {
				return fmt.Errorf("port of %s: %w", from.host, err)
			}
		}
		return nil
	}
	r.eventually("everything answers", all)
	before := identities(web)
	leader := r.mustLeader("h4")
	follower := "h1"
	if leader == follower {
		follower = "h2"
	}
	for i, h := range []string{"h4", follower, leader} {
		was := addrs[h]
		addrs[h] = r.readdress(h, was, byte(101+i))
		began := time.Now()
		ask := "h4" // whom
		if h == ask {
			ask = "h1"
		}
		r.eventually("the cluster knows "+h+" by its new address", func() error {
			out, err := r.run(t.Context(), r.on(ask, "node", "inspect", "-f", "{{.Status.State}} {{.Status.Addr}} {{with .ManagerStatus}}{{.Addr}}{{end}}", h)...)
			if err == nil && !strings.HasPrefix(out, "ready "+addrs[h].String()) {
				err = errors.New(out)
			}
			if err == nil && h != "h4" && !strings.Contains(out, " "+addrs[h].String()+":") {
				err = errors.New(out)
			}
			return err
		})
		known := time.Since(began)
		r.eventually("everything answers after "+h+" has another address", all)
		t.Logf("%s is %s, was %s: known after %s, everything answers after %s", h, addrs[h], was, known.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
		r.eventually("the same containers", func() error {
			now, err := r.replicas("web", hosts...)
			if got := identities(now); err == nil && !slices.Equal(got, before) {
				err = fmt.Errorf("they were %q, are %q", before, got)
			}
			return err
		})
	}
	// The Raft group goes by the new addresses: without one of the moved it has a majority.
	r.killDaemon(follower)
	r.eventually("a change without "+follower, func() error {
		_, err := r.run(t.Context(), r.on("h4", "network", "create", "--driver", "overlay", "later")...)
		return err
	})
	r.must(r.weft, "lab", "start", "--name", r.name, follower)
}

// readdress gives a host another address of the underlay in place of the one that it has.
func (r *rig) readdress(host string, was netip.Addr, last byte) netip.Addr {
	r.t.Helper()
	p, err := newPlan(r.name, DefaultConfig().RunDir, DefaultConfig().DataDir)
	if err != nil {
		r.t.Fatal(err)
	}
	b := was.As4()
	b[3] = last
	is := netip.AddrFrom4(b)
	err = withLinks(p.netnsFile(switchName), func(h *netlink.Handle) error {
		link, err := h.LinkByName(portName(r.host(host).Index))
		if err != nil {
			return err
		}
		way := func(a netip.Addr) *netlink.Route {
			return &netlink.Route{LinkIndex: link.Attrs().Index, Dst: prefix(netip.PrefixFrom(a, 32)), Scope: netlink.SCOPE_LINK}
		}
		return errors.Join(h.RouteReplace(way(is)), h.RouteDel(way(was)))
	})
	if err != nil {
		r.t.Fatal(err)
	}
	err = withLinks(r.host(host).Paths.NetNS, func(h *netlink.Handle) error {
		link, err := h.LinkByName(hostLink)
		if err != nil {
			return err
		}
		routes, err := h.RouteList(link, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		bits := p.subnet.Bits()
		if err := errors.Join(h.AddrDel(link, address(was, bits)), h.AddrAdd(link, address(is, bits))); err != nil {
			return err
		}
		for _, way := range routes { // what went with the address
			if way.Src.Equal(net.IP(was.AsSlice())) {
				way.Src = nil
			}
			if err := h.RouteReplace(&way); err != nil {
				return fmt.Errorf("route %s: %w", way, err)
			}
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return is
}
