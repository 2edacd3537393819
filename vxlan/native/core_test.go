package native

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// Addresses: the underlay is 10.99.0.0/24 and fd99::/64, the overlay 10.100.0.0/24
// and fd77::/64.
var (
	way4  = vxlan.NativeWay{VNI: 5001, VTEP: netip.MustParseAddr("10.99.0.2")}
	way6  = vxlan.NativeWay{VNI: 5001, VTEP: netip.MustParseAddr("fd99::2")}
	other = vxlan.NativeWay{VNI: 5002, VTEP: netip.MustParseAddr("10.99.0.2")}

	dual = vxlan.NativeEnds{
		From: []netip.Addr{netip.MustParseAddr("10.100.0.1"), netip.MustParseAddr("fd77::1")},
		To:   []netip.Addr{netip.MustParseAddr("10.100.0.2"), netip.MustParseAddr("fd77::2")},
	}
	only6 = vxlan.NativeEnds{From: dual.From[1:], To: dual.To[1:]}
)

func testCore() *core {
	id := uint64(0)
	return newCore(func() uint64 { id++; return id }, func(n int) int { return int(id) % n })
}

// run steps a core to a time, whenever it asks for it.
func (c *core) run(from, to time.Time, echoed func(time.Time, vxlan.NativeProbe) bool) {
	for now := from; ; now = c.next() {
		if now.Before(from) {
			now = from
		}
		if now.After(to) || now.IsZero() {
			return
		}
		c.step(now, func(p vxlan.NativeProbe) bool { return echoed(now, p) })
	}
}

// TestEachFamilyIsAsked: what can go natively is proven for itself, and a way on
// which nothing can is never proven.
func TestEachFamilyIsAsked(t *testing.T) {
	start := time.Unix(1000, 0)
	for _, c := range []struct {
		name   string
		way    vxlan.NativeWay
		ends   vxlan.NativeEnds
		pass   func(a netip.Addr) bool
		asked  int
		proven bool
	}{
		{"both families over ipv6", way6, dual, func(netip.Addr) bool { return true }, 2, true},
		{"ipv6 is dropped", way6, dual, netip.Addr.Is4, 2, false},
		{"ipv4 is dropped", way6, dual, netip.Addr.Is6, 2, false},
		{"ipv6 cannot go over ipv4, and is not asked for", way4, dual, netip.Addr.Is4, 1, true},
		{"ipv6 alone over ipv4", way4, only6, func(netip.Addr) bool { return true }, 0, false},
		{"nobody there", way4, vxlan.NativeEnds{From: dual.From}, func(netip.Addr) bool { return true }, 0, false},
	} {
		k := testCore()
		k.watch(start, map[vxlan.NativeWay]vxlan.NativeEnds{c.way: c.ends})
		if got := k.step(start, func(vxlan.NativeProbe) bool { return false }); len(got) != c.asked {
			t.Errorf("%s: asked %v", c.name, got)
		}
		k.run(start.Add(period), start.Add(20*period), func(_ time.Time, p vxlan.NativeProbe) bool { return c.pass(p.To) })
		if got := k.proven()[c.way]; got != c.proven {
			t.Errorf("%s: proven %t", c.name, got)
		}
	}
}

// TestGoneAddressIsNoMiss: a task that ends while it is asked does not count.
func TestGoneAddressIsNoMiss(t *testing.T) {
	now := time.Unix(1000, 0)
	c := testCore()
	ends := vxlan.NativeEnds{From: dual.From[:1], To: dual.To[:1]}
	c.watch(now, map[vxlan.NativeWay]vxlan.NativeEnds{way4: ends})
	c.run(now, now.Add(3*period), func(time.Time, vxlan.NativeProbe) bool { return true })
	if !c.proven()[way4] {
		t.Fatal("not proven")
	}
	for i := range 20 {
		ends.To = []netip.Addr{netip.AddrFrom4([4]byte{10, 100, 0, byte(10 + i)})}
		c.watch(now, map[vxlan.NativeWay]vxlan.NativeEnds{way4: ends})
		now = c.next()
		c.step(now, func(vxlan.NativeProbe) bool { return false })
	}
	if !c.proven()[way4] {
		t.Error("tasks that end have ended the proof")
	}
	c.watch(now, nil)
	if len(c.proven()) != 0 || !c.next().IsZero() {
		t.Error("a way that is not watched is not forgotten")
	}
}

// TestProofHolds, in virtual time: whatever a way does, it is proven only after
// echoes of the last checks, and not for longer than maxMisses checks and one
// more after it ends; and one that carries everything is found again.
func TestProofHolds(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		start := time.Unix(1000, 0)
		c := testCore()
		ends := vxlan.NativeEnds{From: dual.From[:1], To: dual.To[:1]}
		ways := map[vxlan.NativeWay]vxlan.NativeEnds{way4: ends}
		for i := range rapid.IntRange(0, 120).Draw(r, "other ways") {
			ways[vxlan.NativeWay{VNI: 6000 + uint32(i), VTEP: way4.VTEP}] = ends
		}
		pause := max(period, time.Duration(len(ways))*periodPerWay)
		c.watch(start, ways)
		now, isOpen, since := start, false, start
		row, misses := 0, 0
		sent := 0
		for range rapid.IntRange(1, 12).Draw(r, "phases") {
			isOpen, since = rapid.Bool().Draw(r, "open"), now
			loss := rapid.IntRange(0, 3).Draw(r, "lost in ten")
			until := now.Add(time.Duration(rapid.IntRange(1, 100).Draw(r, "seconds")) * time.Second)
			for ; !now.After(until); now = c.next() {
				was := c.proven()[way4]
				sent += len(c.step(now, func(p vxlan.NativeProbe) bool {
					ok := isOpen && rapid.IntRange(1, 10).Draw(r, "fate") > loss
					if p.NativeWay == way4 {
						if row, misses = row+1, 0; !ok {
							row, misses = 0, c.ways[way4].misses+1
						}
					}
					return ok
				}))
				is := c.proven()[way4]
				if is && !was && row < minHits {
					r.Fatalf("proven after %d echoes", row)
				}
				if is && !isOpen && now.Sub(since) > time.Duration(maxMisses+1)*pause {
					r.Fatalf("proven %s after the way has ended", now.Sub(since))
				}
				if was && !is && misses < maxMisses {
					r.Fatalf("ended after %d misses", misses)
				}
			}
		}
		if most := int(now.Sub(start).Seconds())*int(time.Second/periodPerWay) + 2*len(ways); sent > most {
			r.Fatalf("%d probes in %s, at most %d", sent, now.Sub(start), most)
		}
		c.run(now, now.Add(maxSilence+(maxHits+2)*pause), func(time.Time, vxlan.NativeProbe) bool { return true })
		if !c.proven()[way4] {
			r.Fatal("a sound way is not found")
		}
	})
}

// TestFlappingWayIsLeftAlone: each proof that ends asks for more echoes.
func TestFlappingWayIsLeftAlone(t *testing.T) {
	now := time.Unix(1000, 0)
	c := testCore()
	c.watch(now, map[vxlan.NativeWay]vxlan.NativeEnds{way4: {From: dual.From[:1], To: dual.To[:1]}})
	ends := 0
	for i := range 10 * 60 {
		was := c.proven()[way4]
		c.step(now, func(vxlan.NativeProbe) bool { return i%20 < 10 })
		if was && !c.proven()[way4] {
			ends++
		}
		now = c.next()
	}
	if ends != 2 { // after 3 and 6 echoes; there are never 12 in a row
		t.Errorf("ended %d times", ends)
	}
}

// fakeLink is a segment on which a set of ways carries packets.
type fakeLink struct {
	carries map[vxlan.NativeWay]bool
	failure error
	sent    map[uint64]bool
	closed  bool
}

func (l *fakeLink) Ask(probes []vxlan.NativeProbe) map[vxlan.NativeWay]error {
	failed := map[vxlan.NativeWay]error{}
	for _, p := range probes {
		if l.failure != nil {
			failed[p.NativeWay] = l.failure
			continue
		}
		l.sent[p.ID] = l.carries[p.NativeWay]
	}
	return failed
}

func (l *fakeLink) Echoed(p vxlan.NativeProbe) (bool, error) { return l.sent[p.ID], nil }
func (l *fakeLink) Close() error                             { l.closed = true; return nil }

// TestProberTells: what is proven is published once, and the reason why a way
// cannot be asked is logged once.
func TestProberTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &fakeLink{carries: map[vxlan.NativeWay]bool{way4: true}, sent: map[uint64]bool{}, failure: weft.ErrUnavailable}
		var log lines
		p, err := New(Config{Open: func() (Link, error) { return l, nil }, Log: slog.New(&log)})
		if err != nil {
			t.Fatal(err)
		}
		ends := vxlan.NativeEnds{From: dual.From[:1], To: dual.To[:1]}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		time.Sleep(time.Minute) // nothing is watched, and nothing done
		p.Watch(map[vxlan.NativeWay]vxlan.NativeEnds{way4: ends, other: ends})
		time.Sleep(time.Minute)
		if got, _ := p.Proven(); len(got) != 0 || len(log) != 2 {
			t.Errorf("proven %v, log %v", got, log)
		}
		synctest.Wait()
		if got := p.Ways(); len(got) != 2 || got[0].Native || got[0].Reason != weft.ErrUnavailable.Error() {
			t.Errorf("ways %+v", got)
		}
		l.failure = nil
		_, changed := p.Proven()
		<-changed
		if got, _ := p.Proven(); !maps.Equal(got, map[vxlan.NativeWay]bool{way4: true}) {
			t.Errorf("proven %v", got)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := p.Ways(); !got[0].Native || got[0].Reason != "" || got[1].Native || got[1].Reason != "probes do not come back" {
			t.Errorf("ways %+v", got)
		}
		l.carries = nil
		_, changed = p.Proven()
		<-changed
		if got, _ := p.Proven(); len(got) != 0 {
			t.Errorf("proven %v", got)
		}
		synctest.Wait()
		if want := []string{"node is reached without encapsulation", "node is not reached without encapsulation any more: its packets go by VXLAN"}; !slices.Equal(log[2:], want) {
			t.Errorf("log %q", log[2:])
		}
		cancel()
		if err := <-done; err != nil || !l.closed {
			t.Errorf("%v, closed %t", err, l.closed)
		}
	})
}

// lines is a log that keeps its messages.
type lines []string

func (l *lines) Enabled(context.Context, slog.Level) bool { return true }
func (l *lines) Handle(_ context.Context, r slog.Record) error {
	*l = append(*l, r.Message)
	return nil
}
func (l *lines) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l *lines) WithGroup(string) slog.Handler      { return l }

func TestNewNamesWhatIsMissing(t *testing.T) {
	if _, err := New(Config{}); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("got %v", err)
	}
}
