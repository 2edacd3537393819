package lab

import (
	"errors"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestImpair: a link is as it was last told, and whole again when told so; what
// cannot be is refused by name.
func TestImpair(t *testing.T) {
	l := newLab(t, "t-impair")
	up(t, l, Spec{Hosts: 2})
	for _, bad := range []Impairment{{Delay: -time.Millisecond}, {Delay: 11 * time.Second}, {Loss: -1}, {Loss: 100.5}} {
		if err := l.Impair("h1", bad); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%+v: %v, want ErrInvalid", bad, err)
		}
	}
	if err := l.Impair("h3", Impairment{Loss: 5}); !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("unknown host: %v, want ErrNotFound", err)
	}
	if err := l.Impair("h1", Impairment{}); err != nil { // it is whole
		t.Error(err)
	}
	err := l.Impair("h1", Impairment{Delay: 100 * time.Millisecond, Loss: 5})
	if errors.Is(err, weft.ErrUnsupported) {
		netnstest.Missing(t, "netem", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	queue := func(host int) (n *netlink.Netem) {
		if err := withLinks(l.plan.host(host).Paths.NetNS, func(h *netlink.Handle) error {
			link, err := h.LinkByName(hostLink)
			if err != nil {
				return err
			}
			qs, err := h.QdiscList(link)
			for _, q := range qs {
				if q, ok := q.(*netlink.Netem); ok {
					n = q
				}
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	// The tick of the kernel's packet scheduler is 64 ns (linux pkt_sched.h).
	if q := queue(1); q == nil || q.Latency != 100_000_000/64 || q.Loss != netlink.Percentage2u32(5) {
		t.Errorf("queue of h1: %+v", q)
	}
	if q := queue(2); q != nil {
		t.Errorf("queue of h2: %+v, want none", q)
	}
	if err := l.Impair("h1", Impairment{Loss: 1}); err != nil {
		t.Fatal(err)
	}
	if q := queue(1); q == nil || q.Latency != 0 || q.Loss != netlink.Percentage2u32(1) {
		t.Errorf("queue of h1: %+v", q)
	}
	for range 2 {
		if err := l.Impair("h1", Impairment{}); err != nil {
			t.Fatal(err)
		}
		if q := queue(1); q != nil {
			t.Errorf("queue of h1: %+v, want none", q)
		}
	}
}
