package main

import (
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft/lab/vm"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestNICPathsChosen: a path on network cards brings its baseline along, each has a
// cable, and what is wanted of it is what is wanted of the same path on a veth.
func TestNICPathsChosen(t *testing.T) {
	cases := withRaw([]string{pathEBPF, nicEBPF, nicRouted})
	if want := []string{nicRaw, pathEBPF, nicEBPF, nicRouted}; !slices.Equal(cases, want) {
		t.Errorf("cases %v, want %v", cases, want)
	}
	if again := withRaw(cases); !slices.Equal(again, cases) {
		t.Errorf("the baseline is added twice: %v", again)
	}
	if without := []string{pathRouted}; !slices.Equal(withRaw(without), without) || cablesOf(without) != 0 || cablesOf(cases) != 3 {
		t.Errorf("cables: %d of %v, %d of %v, and %v", cablesOf(without), without, cablesOf(cases), cases, withRaw(without))
	}
	if got, want := nicOwn(cases), map[string]string{nicEBPF: nicRaw, nicRouted: nicRaw}; !reflect.DeepEqual(got, want) {
		t.Errorf("own baselines %v, want %v", got, want)
	}
	for _, c := range nicCases {
		if !onNICs(c) || onNICs(like(c)) || like(like(c)) != like(c) {
			t.Errorf("%q is like %q", c, like(c))
		}
	}
	for _, p := range patterns {
		if less := opsOf(guestCounts, nicEBPF, p) < opsOf(guestCounts, pathEBPF, p); less != (p == bulk) || opsOf(guestCounts, pathEBPF, p) != guestCounts[p] {
			t.Errorf("%s: %d operations between network cards, %d on a veth", p, opsOf(guestCounts, nicEBPF, p), opsOf(guestCounts, pathEBPF, p))
		}
	}
	metrics := trafficChoices(nil).Metrics
	on := limitsOn(trafficLimits, pathRaw, []string{pathRouted, pathBridge, pathEBPF}, metrics)
	off := limitsOn(nicLimits, pathRaw, nicCases, metrics)
	for i := range off {
		off[i].Case, off[i].Over = like(off[i].Case), like(off[i].Over)
	}
	if len(off) < 8 || !reflect.DeepEqual(off, on) {
		t.Errorf("limits on network cards\n%+v, want\n%+v", off, on)
	}
}

// TestNICPath builds a path on two links that have the hardware addresses of the
// guest's cards, and takes a request over it.
func TestNICPath(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	log := slog.New(slog.DiscardHandler)
	if _, err := newGround(t.Context(), log, []string{nicRaw}); err == nil || !strings.Contains(err.Error(), "02:57:45:46:00:00") {
		t.Errorf("without a card: %v", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = "card0", vm.CardMAC(0, 0)
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "card1", PeerHardwareAddr: vm.CardMAC(0, 1)}); err != nil {
		t.Fatal(err)
	}
	g, err := newGround(t.Context(), log, []string{nicRaw})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := g.close(); err != nil {
			t.Error(err)
		}
	}()
	if g.cables != 1 {
		t.Errorf("%d cables are in use, want 1", g.cables)
	}
	w, err := g.openers([]string{nicRaw})[1].open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s, err := w.client.run(rr, 10, nil); err != nil || s.Ops != 10 {
		t.Errorf("requests: %+v, %v", s, err)
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
}
