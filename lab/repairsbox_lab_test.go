//go:build lab

package lab

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
)

// What TestLabRepairs breaks around tasks, on every engine: what is in their
// namespaces, their gateway legs, and the host's gateway bridge.

// legPrefix is how the host ends of gateway legs are named (weft.HostVethName).
var legPrefix = weft.HostVethName("x")[:2]

// strikeBoxes breaks the share of one of three hosts.
func (d *damager) strikeBoxes(index int) {
	d.t.Helper()
	tasks := d.taskSpaces()
	host := d.rig.host(d.host).Paths.NetNS
	switch index {
	case 0: // a service address gone, a leg off the bridge, the bridge down
		d.inTask(tasks[0], "service address missing", func(h *netlink.Handle) error { return d.loseAddr(h, "lo", isVIP) })
		d.leg(host, tasks[1], "gateway leg wrong", func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetNoMaster(l) })
		d.link(host, weft.GatewayBridge, "gateway bridge wrong", func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetDown(l) })
	case 1: // lo down, a default route gone, a leg not isolated, the bridge's address gone
		d.inTask(tasks[0], "loopback wrong", func(h *netlink.Handle) error {
			return withLink(h, "lo", h.LinkSetDown)
		})
		d.inTask(tasks[1], "gateway route missing", func(h *netlink.Handle) error {
			return h.RouteDel(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
		})
		d.leg(host, tasks[0], "gateway leg wrong", func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetIsolated(l, false) })
		d.must(withLinks(host, func(h *netlink.Handle) error {
			return d.loseAddr(h, weft.GatewayBridge, func(net.IPNet) bool { return true })
		}))
		d.counts["gateway bridge address missing"]++
	case 2: // a sysctl flipped, a leg gone, another one's address, and the bridge
		d.must(within(tasks[0], func() error {
			return os.WriteFile("/proc/sys/net/ipv4/conf/all/arp_ignore", []byte("0"), 0o644)
		}))
		d.counts["task sysctl wrong"]++
		d.leg(host, tasks[0], "gateway leg missing", func(h *netlink.Handle, l netlink.Link) error { return h.LinkDel(l) })
		d.inTask(tasks[1], "gateway leg address missing", func(h *netlink.Handle) error {
			return d.loseAddr(h, "gw0", func(n net.IPNet) bool { return n.IP.To4() != nil })
		})
		d.link(host, weft.GatewayBridge, "gateway bridge missing", func(h *netlink.Handle, l netlink.Link) error { return h.LinkDel(l) })
	}
}

// repairsOfAbsence: what is broken while no daemon runs is found and counted by the
// next one, and its coming counts nothing else.
func (r *rig) repairsOfAbsence(hosts []string, w repairWorld, was []string) {
	r.t.Helper()
	for _, broken := range []bool{false, true} {
		r.killDaemon("h1")
		d := damager{t: r.t, rig: r, host: "h1", counts: map[string]int{}}
		if broken {
			d.strikeBoxes(1)
		}
		began := time.Now()
		r.must(r.weft, "lab", "start", "--name", r.name, "h1")
		if _, err := r.awaitRepairs([]string{"h1"}, map[string]map[string]int{"h1": d.counts}, began.Add(repairLimit)); err != nil {
			r.t.Error(err)
		}
		took := time.Since(began)
		// And two passes later.
		if err := pause(r.t.Context(), 11*time.Second); err != nil {
			r.t.Fatal(err)
		}
		if got := r.repairCounts("h1"); !maps.Equal(got, d.counts) {
			r.t.Errorf("a daemon that came back has counted %v, want %v", got, d.counts)
		}
		if is := r.kernels(hosts, w)["h1"]; len(without(is, was))+len(without(was, is)) > 0 {
			r.t.Errorf("h1 has %q more, lacks %q", without(is, was), without(was, is))
		}
		r.t.Logf("a daemon came back: %v, %s after its start", d.counts, took.Round(10*time.Millisecond))
	}
}

// taskSpaces are the namespaces of two tasks with a service address, by what they
// hold: the daemon cannot be asked, it stands still.
func (d *damager) taskSpaces() []string {
	d.t.Helper()
	found, err := filepath.Glob(filepath.Join(d.rig.host(d.host).Paths.ExecRoot, "netns", "weft-*-t*"))
	d.must(err)
	var out []string
	for _, f := range found {
		d.must(withLinks(f, func(h *netlink.Handle) error {
			return withLink(h, "lo", func(lo netlink.Link) error {
				addrs, err := h.AddrList(lo, netlink.FAMILY_V4)
				if slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return isVIP(*a.IPNet) }) {
					out = append(out, f)
				}
				return err
			})
		}))
	}
	if len(out) < 2 {
		d.t.Fatalf("%s has %d tasks with a service address, want 2: %q", d.host, len(out), found)
	}
	return out[:2]
}

func isVIP(n net.IPNet) bool {
	ones, bits := n.Mask.Size()
	return ones == bits && bits == 32
}

func withLink(h *netlink.Handle, name string, f func(netlink.Link) error) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	return f(l)
}

func (d *damager) inTask(ns, kind string, f func(*netlink.Handle) error) {
	d.t.Helper()
	d.must(withLinks(ns, f))
	d.counts[kind]++
}

// loseAddr deletes the first address of a link for which is says yes.
func (d *damager) loseAddr(h *netlink.Handle, link string, is func(net.IPNet) bool) error {
	return withLink(h, link, func(l netlink.Link) error {
		addrs, err := h.AddrList(l, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(addrs, func(a netlink.Addr) bool { return is(*a.IPNet) })
		if i < 0 {
			return fmt.Errorf("%s has no address to lose: %v", link, addrs)
		}
		return h.AddrDel(l, &addrs[i])
	})
}

// leg breaks the host end of a task's leg.
func (d *damager) leg(host, task, kind string, f func(*netlink.Handle, netlink.Link) error) {
	d.t.Helper()
	_, id, _ := strings.Cut(filepath.Base(task), "-t")
	d.must(withLinks(host, func(h *netlink.Handle) error {
		links, err := listLinks(h)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(links, func(l netlink.Link) bool {
			name, ok := strings.CutPrefix(l.Attrs().Name, legPrefix)
			return ok && name != "" && strings.HasPrefix(id, name)
		})
		if i < 0 {
			return errors.New("task " + id + " has no leg")
		}
		return f(h, links[i])
	}))
	d.counts[kind]++
}

// boxesOf are the lines of kernels for what surrounds a host's tasks.
func (r *rig) boxesOf(host string) ([]string, error) {
	var out []string
	note := func(where string, h *netlink.Handle, is func(string) bool) error {
		links, err := listLinks(h)
		if err != nil {
			return err
		}
		for _, l := range links {
			a := l.Attrs()
			if !is(a.Name) {
				continue
			}
			out = append(out, fmt.Sprintf("%s %s up %t port %t alias %q", where, a.Name, a.Flags&net.FlagUp != 0, a.MasterIndex != 0, a.Alias))
			if p, err := h.LinkGetProtinfo(l); err == nil && a.MasterIndex != 0 {
				out = append(out, fmt.Sprintf("%s %s isolated %t", where, a.Name, p.Isolated))
			}
			addrs, err := h.AddrList(l, netlink.FAMILY_V4)
			if err != nil {
				return err
			}
			for _, x := range addrs {
				out = append(out, fmt.Sprintf("%s %s %s", where, a.Name, x.IPNet))
			}
		}
		return nil
	}
	paths := r.host(host).Paths
	err := withLinks(paths.NetNS, func(h *netlink.Handle) error {
		return note("host", h, func(name string) bool { return name == weft.GatewayBridge || strings.HasPrefix(name, legPrefix) })
	})
	if err != nil {
		return nil, err
	}
	found, err := filepath.Glob(filepath.Join(paths.ExecRoot, "netns", "weft-*-t*"))
	if err != nil {
		return nil, err
	}
	for _, f := range found {
		where := filepath.Base(f)
		err := withLinks(f, func(h *netlink.Handle) error {
			if err := note(where, h, func(name string) bool { return name == "lo" || name == "gw0" }); err != nil {
				return err
			}
			routes, err := h.RouteList(nil, netlink.FAMILY_V4)
			for _, x := range routes {
				if x.Gw != nil {
					out = append(out, fmt.Sprintf("%s route %s by %s", where, x.Dst, x.Gw))
				}
			}
			b, err2 := os.ReadFile("/proc/sys/net/ipv4/conf/all/arp_ignore")
			out = append(out, where+" arp_ignore "+strings.TrimSpace(string(b)))
			return errors.Join(err, err2)
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}
