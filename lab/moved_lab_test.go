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
	w := newMoving(t, "t-moved", "h4", "--hosts", "4", "--managers", "3")
	leader := w.mustLeader("h4")
	follower := "h1"
	if leader == follower {
		follower = "h2"
	}
	for i, h := range []string{"h4", follower, leader} {
		w.move(h, byte(101+i))
	}
	// The Raft group goes by the new addresses: without one of the moved it has a majority.
	w.killDaemon(follower)
	w.eventually("a change without "+follower, func() error {
		// One that was cut off may have been carried out.
		if _, err := w.run(t.Context(), w.on("h4", "network", "inspect", "later")...); err == nil {
			return nil
		}
		_, err := w.run(t.Context(), w.on("h4", "network", "create", "--driver", "overlay", "later")...)
		return err
	})
	w.must(w.weft, "lab", "start", "--name", w.name, follower)
}

// TestLabOnlyManagerGetsAnotherAddress: its workers find it by gossip.
func TestLabOnlyManagerGetsAnotherAddress(t *testing.T) {
	newMoving(t, "t-moved1", "h2", "--hosts", "2", "--managers", "1").move("h1", 101)
}

// moving is a cluster of which hosts get other addresses.
type moving struct {
	*rig
	hosts  []string
	worker string // who says where the others are
	web    []replica
	vip    string
	addrs  map[string]netip.Addr
}

func newMoving(t *testing.T, lab, worker string, args ...string) *moving {
	w := &moving{rig: besideRig(t, lab, args...), worker: worker, addrs: map[string]netip.Addr{}}
	for i := 1; i <= w.host(worker).Index; i++ {
		h := fmt.Sprintf("h%d", i)
		w.hosts, w.addrs[h] = append(w.hosts, h), w.host(h).Addr
	}
	// Whose tasks are replaced after how long is another question.
	w.must(w.on("h1", "swarm", "update", "--dispatcher-heartbeat", "1m")...)
	w.must(w.on("h1", "network", "create", "--driver", "overlay", "front")...)
	w.must(w.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "--publish", fmt.Sprintf("%d:80", movedPort), "weft/whoami")...)
	w.eventually("one task on every host", func() (err error) {
		if w.web, err = w.replicas("web", w.hosts...); err == nil && len(w.web) != len(w.hosts) {
			err = fmt.Errorf("%d run", len(w.web))
		}
		return err
	})
	w.eventually("VIP of web", func() (err error) { w.vip, err = w.rig.vip("web"); return err })
	w.eventually("everything answers", w.all)
	return w
}

// all: names, tasks, service address and ports answer, from everywhere.
func (w *moving) all() error {
	ctx, tasks := w.t.Context(), addressesOn("front", w.web)
	for _, from := range w.web {
		asks := []func(context.Context) error{lookupAll("tasks.web", tasks), ask(w.vip + ":80")}
		for _, to := range tasks {
			asks = append(asks, ask(to+":80"))
		}
		for _, a := range asks {
			if err := askOnce(ctx, from.ns(), a); err != nil {
				return fmt.Errorf("from %s: %w", from.host, err)
			}
		}
		if err := askOnce(ctx, w.clientNS(), ask(fmt.Sprintf("%s:%d", w.addrs[from.host], movedPort))); err != nil {
			return fmt.Errorf("port of %s: %w", from.host, err)
		}
	}
	return nil
}

// move gives a host another address and waits until all is as it was.
func (w *moving) move(host string, last byte) {
	w.t.Helper()
	before, was := identities(w.web), w.addrs[host]
	w.addrs[host] = w.readdress(host, was, last)
	began := time.Now()
	ask := w.worker
	if host == ask {
		ask = "h1"
	}
	w.eventually("the cluster knows "+host+" by its new address", func() error {
		out, err := w.run(w.t.Context(), w.on(ask, "node", "inspect", "-f", "{{.Status.State}} {{.Status.Addr}} {{with .ManagerStatus}}{{.Addr}}{{end}}", host)...)
		is := w.addrs[host].String()
		if err == nil && (!strings.HasPrefix(out, "ready "+is) || host != w.worker && !strings.Contains(out, " "+is+":")) {
			err = errors.New(out)
		}
		return err
	})
	known := time.Since(began)
	w.eventually("everything answers after "+host+" has another address", w.all)
	w.t.Logf("%s is %s, was %s: known after %s, everything answers after %s", host, w.addrs[host], was, known.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	w.eventually("the same containers", func() error {
		now, err := w.replicas("web", w.hosts...)
		if got := identities(now); err == nil && !slices.Equal(got, before) {
			err = fmt.Errorf("they were %q, are %q", before, got)
		}
		return err
	})
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
