package linux

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// TestPathLimit: the link bounds a path, a route may bound it further, and what
// a person changes is told while somebody watches.
func TestPathLimit(t *testing.T) {
	h := rig(t, 2)[0]
	far := netip.AddrFrom4([4]byte{10, 99, 7, 2})
	limit := func(want int) {
		t.Helper()
		must(t, h.ns.Do(func() error {
			got, err := PathLimit(h.vtep(), far)
			if err == nil && got != want {
				t.Errorf("limit of the path is %d, want %d", got, want)
			}
			return err
		}))
	}
	inHost := func(f func(l netlink.Link) error) {
		t.Helper()
		must(t, h.ns.Do(func() error {
			l, err := netlink.LinkByName("under0")
			if err != nil {
				return err
			}
			return f(l)
		}))
	}
	limit(1500)
	must(t, h.ns.Do(func() error {
		if _, err := PathLimit(h.vtep(), netip.MustParseAddr("192.0.2.1")); !errors.Is(err, weft.ErrUnavailable) {
			t.Errorf("without a route: %v, want ErrUnavailable", err)
		}
		return nil
	}))

	ctx, cancel := context.WithCancel(t.Context())
	changed := make(chan struct{}, 1)
	var g errgroup.Group
	g.Go(func() error { return h.ns.Do(func() error { return WatchUnderlay(ctx, changed) }) })
	told := func(why string, again func(l netlink.Link) error) {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for {
			inHost(again) // the watch may not have begun yet: once more then
			select {
			case <-changed:
				return
			case <-time.After(50 * time.Millisecond):
			case <-deadline:
				t.Fatalf("nobody tells of %s", why)
			}
		}
	}
	mtu := 9000
	told("a link's MTU", func(l netlink.Link) error { mtu = 17000 - mtu; return netlink.LinkSetMTU(l, mtu) })
	limit(mtu)
	inHost(func(l netlink.Link) error { return netlink.LinkSetMTU(l, 9000) })
	limit(9000)
	lock := 1400
	told("a route", func(l netlink.Link) error {
		lock--
		return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(netip.PrefixFrom(far, 32)), Scope: netlink.SCOPE_LINK, MTU: lock})
	})
	limit(lock)
	cancel()
	must(t, g.Wait())
}

// TestPathProven: what the kernel has learnt from a router is forgotten when it is
// proven wrong, and kept while it is not.
func TestPathProven(t *testing.T) {
	for _, c := range []struct{ near, far, gate, subnet string }{
		{"10.99.7.1", "192.0.2.9", "10.99.7.2", "192.0.2.0/24"}, {"fd99:7::1", "fd99:8::9", "fd99:7::2", "fd99:8::/64"},
	} {
		t.Run(c.subnet, func(t *testing.T) {
			hosts := rig(t, 2)
			near, far := netip.MustParseAddr(c.near), netip.MustParseAddr(c.far)
			bits := near.BitLen()
			// The second host is a router whose next link is narrow.
			must(t, hosts[1].ns.Do(func() error {
				narrow := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "narrow", MTU: 1400, Flags: net.FlagUp}, PeerName: "nowhere"}
				if err := netlink.LinkAdd(narrow); err != nil {
					return err
				}
				return errors.Join(
					os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0), os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0),
					netlink.RouteAdd(&netlink.Route{LinkIndex: narrow.Index, Dst: ipNet(netip.MustParsePrefix(c.subnet)), Scope: netlink.SCOPE_LINK}),
					addNoDAD("under0", netip.PrefixFrom(netip.MustParseAddr(c.gate), bits)),
					routeTo("under0", netip.PrefixFrom(near, bits)))
			}))
			must(t, hosts[0].ns.Do(func() error {
				l, err := netlink.LinkByName("under0")
				if err != nil {
					return err
				}
				return errors.Join(addNoDAD("under0", netip.PrefixFrom(near, bits)), routeTo("under0", netip.PrefixFrom(netip.MustParseAddr(c.gate), bits)),
					netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(netip.MustParsePrefix(c.subnet)), Gw: netip.MustParseAddr(c.gate).AsSlice()}))
			}))
			host := vxlan.Port{NetNS: fmt.Sprintf("/proc/self/fd/%d", hosts[0].ns.FD())}
			deadline := time.Now().Add(10 * time.Second)
			for believed(t, host, far) != 1400 {
				if time.Now().After(deadline) {
					t.Fatal("the kernel has learnt nothing")
				}
				sendDF(t, host, far, 1500) // refused as soon as it has
			}
			prove := func(bytes int) {
				must(t, hosts[0].ns.Do(func() error { return PathProven(near, far, bytes) }))
			}
			prove(1400)
			if got := believed(t, host, far); got != 1400 {
				t.Errorf("what is right was forgotten: %d", got)
			}
			prove(1500)
			if got := believed(t, host, far); got != 1500 {
				t.Errorf("the kernel still believes in %d", got)
			}
		})
	}
}

func addNoDAD(link string, p netip.Prefix) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(l, a); !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func routeTo(link string, p netip.Prefix) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(p), Scope: netlink.SCOPE_LINK})
}
