//go:build lab

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Networks without encapsulation. Labs are named "nat-…"; the network "front" is
// 10.77.0.0/24.

var nativeSubnet = netip.MustParsePrefix("10.77.0.0/24")

// TestLabNative: a network of encap=native works by VXLAN while a router is between
// the hosts, without it once the switch is a segment, by VXLAN again within
// seconds when the switch drops addresses that it does not know, and without
// it after that. Nobody restarts anything.
func TestLabNative(t *testing.T) {
	r := newRig(t, "nat-net", "--overlay-engine", "ebpf", "--service-engine", "ebpf")
	_, err := r.run(t.Context(), r.on("h1", "network", "create", "--driver", "overlay", "--opt", "encap=geneve", "front")...)
	if err == nil || !strings.Contains(err.Error(), "write one of vxlan, native, auto") {
		t.Errorf("encap=geneve: %v", err)
	}
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "--subnet", nativeSubnet.String(), "--opt", "encap=native", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "weft/whoami")...)
	var web []replica
	r.eventually("one task on every host", func() (err error) {
		if web, err = r.replicas("web", three...); err == nil && len(web) != 3 {
			err = fmt.Errorf("%d run", len(web))
		}
		return err
	})
	var vip string
	r.eventually("VIP of web", func() (err error) { vip, err = r.vip("web"); return err })
	var tasks, vips []place
	for i, p := range web {
		for _, next := range []int{1, 2} {
			tasks = append(tasks, place{p.ns(), ask(web[(i+next)%len(web)].addrs["front"] + ":80")})
		}
		vips = append(vips, place{p.ns(), ask(vip + ":80")})
	}
	for _, p := range slices.Concat(tasks, vips) {
		r.eventually("first answers", func() error { return askOnce(t.Context(), p.ns, p.ask) })
	}
	for _, h := range three {
		r.logged(h, "is not on a segment of this host")
	}
	r.ways("routed", tasks, false)
	if out := r.must(r.weft, "-H", "unix://"+r.host("h1").Paths.Socket, "net", "ways"); strings.Count(out, "front ") != 2 || strings.Contains(out, " native ") {
		t.Errorf("net ways: %s", out)
	}

	r.segment()
	for _, p := range slices.Concat(tasks, vips) {
		r.eventually("answers over the segment", func() error { return askOnce(t.Context(), p.ns, p.ask) })
	}
	for _, h := range three {
		r.logged(h, "node is reached without encapsulation")
	}
	r.eventually("all ways are native", func() error { return r.carried("segment", tasks, true) })
	r.ways("segment", tasks, true)
	if out := r.must(r.weft, "-H", "unix://"+r.host("h1").Paths.Socket, "net", "ways"); strings.Count(out, " native ") != 2 {
		t.Errorf("net ways: %s", out)
	}
	flows := &flow{name: "VIP", rate: 50}
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	if err := flows.run(ctx, vips); err != nil {
		t.Error(err)
	}
	cancel()
	flows.mustNotHaveFailed(t, began, always)

	r.filter(true)
	r.eventually("answers by VXLAN", func() error { return r.carried("filtered", tasks, false) })
	t.Logf("by VXLAN again after %.1f s", time.Since(began).Seconds()-2)
	r.ways("filtered", tasks, false)
	r.filter(false)
	r.eventually("native again", func() error { return r.carried("open", tasks, true) })
	r.ways("open", tasks, true)
}

// logged waits until a host's daemon has logged something.
func (r *rig) logged(host, what string) {
	r.t.Helper()
	r.eventually(host+" logs "+what, func() error {
		b, err := os.ReadFile(r.host(host).Paths.Log)
		if err == nil && !strings.Contains(string(b), what) {
			err = errors.New("it does not")
		}
		return err
	})
}

// ways fails the test if a second of requests is not carried as it should be.
func (r *rig) ways(when string, tasks []place, native bool) {
	r.t.Helper()
	if err := r.carried(when, tasks, native); err != nil {
		r.t.Error(err)
	}
}

// carried asks all tasks for a second and reports what was not carried as it should
// be: everything natively, or everything in VXLAN, on all hosts.
func (r *rig) carried(when string, tasks []place, native bool) error {
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Second)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	var taps [3]wireTap
	for i, h := range three {
		g.Go(func() error { return taps[i].run(ctx, r.host(h).Paths.NetNS) })
	}
	f := &flow{name: when, rate: 60}
	g.Go(func() error { return f.run(ctx, tasks) })
	if err := g.Wait(); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if bad := f.failed(always); len(bad) > 0 {
		return fmt.Errorf("%s: %d of %d requests failed: %w", when, len(bad), f.sent, bad[0].err)
	}
	for i, h := range three {
		n, v := taps[i].native.Load(), taps[i].vxlan.Load()
		r.t.Logf("%s: %s: %d frames as they are, %d in VXLAN", when, h, n, v)
		if n > 0 != native || v > 0 == native {
			return fmt.Errorf("%s: %s has carried %d frames as they are and %d in VXLAN", when, h, n, v)
		}
	}
	return nil
}

// wireTap counts what crosses a host's link, both ways, without the probes.
type wireTap struct{ native, vxlan atomic.Int64 }

// run counts until ctx ends. It is to be waited for.
func (p *wireTap) run(ctx context.Context, ns string) error {
	fd := -1
	err := within(ns, func() error {
		l, err := netlink.LinkByName(hostLink)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		tenth := unix.NsecToTimeval(int64(100 * time.Millisecond))
		// Protocols are in network order (packet(7)).
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tenth),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: unix.ETH_P_ALL << 8, Ifindex: l.Attrs().Index}))
	})
	if fd >= 0 {
		defer unix.Close(fd)
	}
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<16)
	for ctx.Err() == nil {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || err == nil && (n < 28 || buf[0]>>4 != 4) {
			continue
		}
		if err != nil {
			return err
		}
		src := netip.AddrFrom4([4]byte(buf[12:16]))
		switch l4 := buf[int(buf[0]&15)*4:]; {
		case nativeSubnet.Contains(src) && buf[9] != 253:
			p.native.Add(1)
		case buf[9] == unix.IPPROTO_UDP && int(l4[2])<<8|int(l4[3]) == 4789:
			p.vxlan.Add(1)
		}
	}
	return nil
}

// segmentName is the bridge that joins the hosts.
const segmentName = "segment"

// segment makes one Ethernet segment of the links of all hosts: the switch bridges
// them and routes no more between them, and the hosts ask for each other's
// hardware addresses.
func (r *rig) segment() {
	r.t.Helper()
	p, err := newPlan(r.name, DefaultConfig().RunDir, DefaultConfig().DataDir)
	if err != nil {
		r.t.Fatal(err)
	}
	err = withLinks(p.netnsFile(switchName), func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Flags = segmentName, net.FlagUp
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return err
		}
		br, err := h.LinkByName(segmentName)
		if err != nil {
			return err
		}
		for _, name := range three {
			port, err := h.LinkByName(portName(r.host(name).Index))
			if err != nil {
				return err
			}
			to := &netlink.Route{LinkIndex: br.Attrs().Index, Dst: prefixOf(r.host(name)), Scope: netlink.SCOPE_LINK}
			if err := errors.Join(h.LinkSetMaster(port, br), h.RouteReplace(to)); err != nil {
				return err
			}
		}
		return nil
	})
	for _, name := range three {
		err = errors.Join(err, withLinks(r.host(name).Paths.NetNS, func(h *netlink.Handle) error {
			l, err := h.LinkByName(hostLink)
			if err != nil {
				return err
			}
			return h.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: prefix(p.subnet), Scope: netlink.SCOPE_LINK})
		}))
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// filter has the segment drop what comes from addresses of the overlay, or ends
// that.
func (r *rig) filter(on bool) {
	r.t.Helper()
	p, err := newPlan(r.name, DefaultConfig().RunDir, DefaultConfig().DataDir)
	if err != nil {
		r.t.Fatal(err)
	}
	err = within(p.netnsFile(switchName), func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyBridge, Name: "foreign"})
		if !on {
			c.DelTable(table)
			return c.Flush()
		}
		chain := c.AddChain(&nftables.Chain{Table: table, Name: "forward", Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x08, 0x00}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 3},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: nativeSubnet.Addr().AsSlice()[:3]},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
		return c.Flush()
	})
	if err != nil {
		r.t.Fatal(err)
	}
}
