package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Status of one host.
type Status struct {
	Host
	PID  int  // of its daemon; 0 = does not run
	Down bool // killed and not started again
	MTU  int  // of its link, bytes; 0 = no link
	Info NodeInfo
	Err  string // why Info could not be had
}

// Cut is one direction that `cut` has stopped.
type Cut struct{ From, To string }

// List tells the state of every host and the cuts that are in force.
func (l *Lab) List(ctx context.Context) ([]Status, []Cut, error) {
	r, err := l.load()
	if err != nil {
		return nil, nil, err
	}
	var out []Status
	for _, h := range r.hosts(l.plan) {
		s := Status{Host: h, Down: isDown(h)}
		if s.PID, err = daemonPID(h); err != nil {
			return nil, nil, err
		}
		if isNetNS(h.Paths.NetNS) {
			if s.MTU, err = linkMTU(h.Paths.NetNS); err != nil {
				return nil, nil, err
			}
		}
		if s.PID != 0 {
			if s.Info, err = l.cfg.Cluster.Info(ctx, h.Paths.Socket); err != nil {
				s.Err = err.Error()
			}
		}
		out = append(out, s)
	}
	cuts, err := l.plan.cuts(r.Hosts)
	return out, cuts, err
}

func linkMTU(file string) (int, error) {
	mtu := 0
	err := withLinks(file, func(h *netlink.Handle) error {
		link, err := h.LinkByName(hostLink)
		if err != nil {
			return fmt.Errorf("find %s in %s: %w", hostLink, file, err)
		}
		mtu = link.Attrs().MTU
		return nil
	})
	return mtu, err
}

func (p plan) cuts(hosts int) ([]Cut, error) {
	file := p.netnsFile(switchName)
	if !isNetNS(file) {
		return nil, nil
	}
	var cuts []Cut
	err := withLinks(file, func(h *netlink.Handle) error {
		rules, err := h.RuleList(netlink.FAMILY_V4)
		if err != nil {
			return fmt.Errorf("list rules of the switch: %w", err)
		}
		for _, r := range rules {
			if r.Priority != cutPriority || r.Dst == nil {
				continue
			}
			to, _ := netip.AddrFromSlice(r.Dst.IP.To4())
			cuts = append(cuts, Cut{From: "h" + strings.TrimPrefix(r.IifName, "port"), To: p.nameOf(to, hosts)})
		}
		return nil
	})
	return cuts, err
}

func (p plan) nameOf(a netip.Addr, hosts int) string {
	for _, h := range p.hosts(hosts) {
		if h.Addr == a {
			return h.Name
		}
	}
	return a.String()
}

// strayLinks are links in the caller's namespace that carry the mark of one of
// the lab's nodes.
func (t Trace) strayLinks() ([]string, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	links, err := listLinks(h)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var left []string
	for _, link := range links {
		for _, id := range t.ids {
			if strings.HasPrefix(link.Attrs().Alias, weft.LinkAlias(weft.ID(id))) {
				left = append(left, "link "+link.Attrs().Name)
			}
		}
	}
	return left, nil
}

// Counters are the packets that a device has carried.
type Counters struct {
	Link                 string
	RxPackets, TxPackets uint64
}

// VXLANCounters reads the counters of what carries a network on a host: its VXLAN
// device in the hidden namespace or, where the overlay engine has none (ebpf),
// the host's own link. ErrNotFound (by the file system) when the host has no
// task on that network of the engine bridge.
func (h Host) VXLANCounters(node weft.ID, vni uint32) (Counters, error) {
	file, c := h.Paths.ExecRoot+"/netns/"+weft.OverlayNetNS(node, vni), Counters{Link: weft.VXLANName(vni)}
	if _, err := os.Stat(filepath.Join(h.Paths.ExecRoot, "bpf")); err == nil {
		file, c.Link = h.Paths.NetNS, hostLink
	}
	err := withLinks(file, func(nl *netlink.Handle) error {
		link, err := nl.LinkByName(c.Link)
		if err != nil {
			return fmt.Errorf("find %s on %s: %w", c.Link, h.Name, err)
		}
		if s := link.Attrs().Statistics; s != nil {
			c.RxPackets, c.TxPackets = s.RxPackets, s.TxPackets
		}
		return nil
	})
	return c, err
}
