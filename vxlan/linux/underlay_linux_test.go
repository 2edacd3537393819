package linux

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
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
