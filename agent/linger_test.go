package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
)

func refuse(context.Context, string, string) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Err: fmt.Errorf("connect: %w", syscall.ECONNREFUSED)}
}

func unreachable(context.Context, string, string) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Err: fmt.Errorf("connect: %w", syscall.EHOSTUNREACH)}
}

// dead answers like a host that has lost its power.
func dead(ctx context.Context, _, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func accept(context.Context, string, string) (net.Conn, error) {
	here, there := net.Pipe()
	return here, there.Close()
}

var (
	memberB  = gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB}
	doubtedB = gossip.Member{ID: nodeB, Addr: vtepB, VTEP: vtepB, Doubted: true}
)

func endpointOf(n byte) weft.Endpoint {
	return weft.Endpoint{
		Network: front.ID, Task: testID(fmt.Sprintf("t%d", n)), Service: svc, Slot: uint64(n),
		Addr: netip.AddrFrom4([4]byte{10, 0, 16, n}), State: weft.EndpointReady,
	}
}

// lingering is a linger that runs, with the other node in the table.
type lingering struct {
	*linger
	table *fakeTable
	asked atomic.Int32
	dial  atomic.Value // of type func(...)
	stop  func()
}

func newLingering(t *testing.T, path string) *lingering {
	l := &lingering{table: newFakeTable(&journal{})}
	l.linger = newLinger(nodeA, l.table, path, slog.New(slog.DiscardHandler))
	l.set(refuse)
	l.linger.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		if address != "10.99.0.2:7946" || network != "tcp" {
			t.Errorf("asked %s %s", network, address)
		}
		l.asked.Add(1)
		return l.dial.Load().(func(context.Context, string, string) (net.Conn, error))(ctx, network, address)
	}
	return l
}

func (l *lingering) set(f func(context.Context, string, string) (net.Conn, error)) { l.dial.Store(f) }

func (l *lingering) run(t *testing.T) {
	if err := l.restore(time.Now()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.linger.run(ctx) }()
	var once sync.Once
	l.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(l.stop)
	synctest.Wait()
}

func (l *lingering) sees(t *testing.T, when string, want ...weft.Endpoint) {
	t.Helper()
	synctest.Wait()
	all, _ := l.Snapshot()
	var got []weft.Endpoint
	for _, e := range all {
		got = append(got, e.Endpoint)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s: endpoints %v, want %v", when, got, want)
	}
}

func TestLinger(t *testing.T) {
	one, two := endpointOf(1), endpointOf(2)
	for _, tc := range []struct {
		name string
		run  func(t *testing.T, l *lingering)
	}{
		{"a host without its daemon keeps its endpoints", func(t *testing.T, l *lingering) {
			_, changed := l.Snapshot()
			l.table.fail(nodeB)
			settle(10 * time.Second)
			l.sees(t, "after 10 s", one, two)
			if isClosed(changed) {
				t.Error("readers were woken although nothing changed for them")
			}
			if n := l.asked.Load(); n < 10 || n > 12 {
				t.Errorf("asked %d times in 10 s, want once a second", n)
			}
		}},
		{"not for ever", func(t *testing.T, l *lingering) {
			l.table.fail(nodeB)
			settle(lingerBound - time.Second)
			l.sees(t, "before the bound", one, two)
			settle(2 * time.Second)
			l.sees(t, "after the bound")
			asked := l.asked.Load()
			settle(10 * time.Second)
			if l.asked.Load() != asked {
				t.Error("asked on after the bound")
			}
		}},
		{"a host without power goes within the dial's bound", func(t *testing.T, l *lingering) {
			l.set(dead)
			l.table.fail(nodeB)
			settle(lingerDial - 10*time.Millisecond)
			l.sees(t, "while asking", one, two)
			_, changed := l.Snapshot()
			settle(20 * time.Millisecond)
			l.sees(t, "after the dial's bound")
			if !isClosed(changed) {
				t.Error("readers were not woken")
			}
		}},
		{"a host without a way goes at once", func(t *testing.T, l *lingering) {
			l.set(unreachable)
			l.table.fail(nodeB)
			settle(time.Millisecond)
			l.sees(t, "at once")
		}},
		{"a host that dies after its daemon", func(t *testing.T, l *lingering) {
			l.table.fail(nodeB)
			settle(5 * time.Second)
			l.set(dead)
			settle(lingerAgain + lingerDial + time.Millisecond)
			l.sees(t, "after the next question")
		}},
		{"a daemon that is back but has not joined", func(t *testing.T, l *lingering) {
			l.set(accept)
			l.table.fail(nodeB)
			settle(3 * time.Second)
			l.sees(t, "meanwhile", one, two)
		}},
		{"a host that was silent while gossip doubted goes with it", func(t *testing.T, l *lingering) {
			l.set(dead)
			l.table.set(doubtedB, one, two)
			settle(lingerDial + time.Millisecond)
			l.sees(t, "while doubted", one, two)
			l.table.fail(nodeB)
			l.sees(t, "given up")
		}},
		{"a host that answered while gossip doubted is kept", func(t *testing.T, l *lingering) {
			l.table.set(doubtedB, one, two)
			settle(time.Millisecond)
			l.set(dead)
			l.table.fail(nodeB)
			settle(lingerAgain - 10*time.Millisecond)
			l.sees(t, "given up", one, two)
			settle(10*time.Millisecond + lingerDial)
			l.sees(t, "after the next question")
		}},
		{"the question of the doubt is still open", func(t *testing.T, l *lingering) {
			l.set(dead)
			l.table.set(doubtedB, one, two)
			settle(lingerDial / 2)
			l.table.fail(nodeB)
			l.sees(t, "given up", one, two)
			settle(lingerDial/2 + time.Millisecond)
			l.sees(t, "after the dial's bound")
		}},
		{"heard again before it was given up", func(t *testing.T, l *lingering) {
			l.set(dead)
			l.table.set(doubtedB, one, two)
			settle(lingerDial + time.Millisecond)
			l.table.set(memberB, one, two)
			settle(time.Second)
			asked := l.asked.Load()
			settle(5 * time.Second)
			if l.asked.Load() != asked {
				t.Error("asked on although it was heard")
			}
			l.set(refuse)
			l.table.fail(nodeB)
			settle(lingerDial)
			l.sees(t, "given up later", one, two)
		}},
		{"packets are lost on the way", func(t *testing.T, l *lingering) {
			l.set(func(ctx context.Context, network, address string) (net.Conn, error) {
				if l.asked.Load()%lingerTries != 0 {
					return dead(ctx, network, address)
				}
				return refuse(ctx, network, address)
			})
			l.table.fail(nodeB)
			settle(10 * time.Second)
			l.sees(t, "after 10 s", one, two)
		}},
		{"no processor here while the answer lay there", func(t *testing.T, l *lingering) {
			l.set(func(ctx context.Context, _, _ string) (net.Conn, error) {
				time.Sleep(2 * lingerDial)
				return nil, ctx.Err()
			})
			l.table.fail(nodeB)
			settle(3 * time.Second)
			l.sees(t, "after 3 s", one, two)
			l.set(dead)
			settle(4 * lingerDial)
			l.sees(t, "after a question in time")
		}},
		{"back in the table the old is forgotten", func(t *testing.T, l *lingering) {
			l.table.fail(nodeB)
			settle(5 * time.Second)
			l.table.set(memberB, two)
			l.sees(t, "back", two)
			settle(2 * lingerBound)
			l.sees(t, "later", two)
			asked := l.asked.Load()
			l.table.fail(nodeB)
			settle(time.Millisecond)
			l.sees(t, "gone again", two)
			if l.asked.Load() != asked+1 {
				t.Error("gone again it was not asked at once")
			}
		}},
		{"an answer to an old question", func(t *testing.T, l *lingering) {
			l.set(dead)
			l.table.fail(nodeB)
			settle(100 * time.Millisecond)
			l.set(refuse)
			l.table.set(memberB, one)
			settle(time.Millisecond)
			l.table.fail(nodeB)
			settle(lingerDial)
			l.sees(t, "after the old answer", one)
		}},
		{"the host is another node now", func(t *testing.T, l *lingering) {
			l.set(accept)
			l.table.fail(nodeB)
			settle(time.Second)
			l.sees(t, "meanwhile", one, two)
			l.table.set(gossip.Member{ID: testID("z"), Addr: vtepB, VTEP: vtepB})
			l.sees(t, "joined anew")
		}},
		{"who has left the cluster has nothing to keep", func(t *testing.T, l *lingering) {
			l.table.set(memberB)
			l.sees(t, "withdrawn")
			l.table.fail(nodeB)
			settle(time.Second)
			l.sees(t, "gone")
			if l.asked.Load() != 0 {
				t.Error("its host was asked")
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "endpoints.json")
			synctest.Test(t, func(t *testing.T) {
				l := newLingering(t, path)
				l.table.set(memberB, one, two)
				l.run(t)
				l.sees(t, "at first", one, two)
				tc.run(t, l)
			})
		})
	}
}

// TestLingerIsWrittenSoon: what a daemon knew is on the disk a tenth of a second later, so
// that the next one knows it; where that takes long it is written the less often.
func TestLingerIsWrittenSoon(t *testing.T) {
	one, two := endpointOf(1), endpointOf(2)
	for _, c := range []struct {
		takes, within time.Duration
	}{{0, lingerSoon}, {20 * time.Millisecond, lingerShare*20*time.Millisecond + 20*time.Millisecond}, {time.Second, lingerSave + time.Second}} {
		path := filepath.Join(t.TempDir(), "endpoints.json")
		synctest.Test(t, func(t *testing.T) {
			l := newLingering(t, path)
			writes := 0
			l.linger.save = func(path string, v any) error {
				writes++
				time.Sleep(c.takes)
				return saveFile(path, v)
			}
			l.table.set(memberB, one)
			l.run(t)
			settle(lingerSave + c.takes)
			before := writes
			l.table.set(memberB, one, two)
			settle(c.within + time.Millisecond)
			l.stop() // by then it may be killed
			if writes == before {
				t.Errorf("where writing takes %v nothing is written within %v", c.takes, c.within)
			}
			l = newLingering(t, path)
			if err := l.restore(time.Now()); err != nil {
				t.Fatal(err)
			}
			l.sees(t, "after the end", one, two)
		})
		synctest.Test(t, func(t *testing.T) {
			l := newLingering(t, filepath.Join(t.TempDir(), "endpoints.json"))
			busy := time.Duration(0)
			l.linger.save = func(string, any) error { time.Sleep(c.takes); busy += c.takes; return nil }
			l.run(t)
			began := time.Now()
			for i := range 2000 { // it changes all the time
				l.table.set(memberB, endpointOf(byte(1+i%2)))
				settle(10 * time.Millisecond)
			}
			l.stop()
			if most := time.Since(began)/lingerShare + c.takes; c.takes < lingerSave/lingerShare && busy > most {
				t.Errorf("where writing takes %v it takes %v of %v", c.takes, busy, time.Since(began))
			}
		})
	}
}

func TestLingerOverItsOwnEnd(t *testing.T) {
	one := endpointOf(1)
	next := func(t *testing.T, down time.Duration, f func(t *testing.T, l *lingering)) {
		path := filepath.Join(t.TempDir(), "endpoints.json")
		synctest.Test(t, func(t *testing.T) {
			l := newLingering(t, path)
			l.table.set(memberB, one)
			l.run(t)
			settle(2 * lingerFresh) // nothing changes; the file stays fresh
			l.stop()
			settle(down)
			l = newLingering(t, path)
			f(t, l)
		})
	}
	t.Run("known before gossip has found anyone", func(t *testing.T) {
		next(t, 5*time.Second, func(t *testing.T, l *lingering) {
			if err := l.restore(time.Now()); err != nil {
				t.Fatal(err)
			}
			l.sees(t, "at once", one)
		})
	})
	t.Run("alive, its table on the way", func(t *testing.T) {
		next(t, 5*time.Second, func(t *testing.T, l *lingering) {
			l.run(t)
			l.table.set(memberB)
			settle(lingerSettle - time.Second)
			l.sees(t, "before the table", one)
			l.table.set(memberB, endpointOf(7))
			l.sees(t, "with it", endpointOf(7))
		})
	})
	t.Run("alive, without endpoints", func(t *testing.T) {
		next(t, 5*time.Second, func(t *testing.T, l *lingering) {
			l.run(t)
			l.table.set(memberB)
			settle(lingerSettle + time.Millisecond)
			l.sees(t, "after the time to settle")
		})
	})
	t.Run("died meanwhile", func(t *testing.T) {
		next(t, 5*time.Second, func(t *testing.T, l *lingering) {
			l.set(dead)
			l.run(t)
			settle(lingerDial + time.Millisecond)
			l.sees(t, "after the dial's bound")
		})
	})
	t.Run("too long ago", func(t *testing.T) {
		next(t, lingerBound+lingerFresh, func(t *testing.T, l *lingering) {
			l.run(t)
			l.sees(t, "at first")
		})
	})
}

// TestLingerCore checks, over random histories, what must always hold: an
// owner in the table is seen as the table has it; one that is not is seen with
// the last entries it had, or not at all; after silence, also while gossip
// doubted, after the bound, and alive without entries it is not seen.
func TestLingerCore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newLingerCore(nodeA)
		now := time.Unix(1000, 0)
		last := map[weft.ID][]weft.OwnedEndpoint{}
		since := map[weft.ID]time.Time{}
		silent := map[weft.ID]bool{}
		nodes := []weft.ID{nodeB, testID("c"), testID("d")}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			var table []weft.OwnedEndpoint
			var members []gossip.Member
			for i, id := range nodes {
				m := gossip.Member{ID: id, Addr: netip.AddrFrom4([4]byte{10, 99, 0, byte(i + 2)})}
				state := rapid.IntRange(0, 4).Draw(t, "state")
				switch state {
				case 0: // not alive
					if _, was := since[id]; !was {
						since[id] = now
					}
					continue
				case 1: // alive, nothing
					delete(last, id)
				default:
					last[id] = nil
					for n := range rapid.IntRange(1, 3).Draw(t, "entries") {
						last[id] = append(last[id], weft.OwnedEndpoint{Endpoint: endpointOf(byte(n)), Owner: id})
					}
					table = append(table, last[id]...)
				}
				_, wasAway := since[id]
				delete(since, id)
				if m.Doubted = state == 4; wasAway || !m.Doubted {
					delete(silent, id)
				}
				members = append(members, m)
			}
			c.see(now, table, members)
			seen := map[weft.ID][]weft.OwnedEndpoint{}
			for _, e := range c.merged(table) {
				seen[e.Owner] = append(seen[e.Owner], e)
			}
			for _, id := range nodes {
				gone, away := since[id]
				var want []weft.OwnedEndpoint
				if !away || !silent[id] && now.Sub(gone) < lingerBound {
					want = last[id]
				} else {
					delete(last, id)
				}
				if !slices.Equal(seen[id], want) {
					t.Fatalf("at %s: %s is seen with %v, want %v", now, id.Short(), seen[id], want)
				}
			}
			for _, q := range c.due(now) {
				_, away := since[q.id]
				isDoubted := slices.ContainsFunc(members, func(m gossip.Member) bool { return m.ID == q.id && m.Doubted })
				if !away && !isDoubted {
					t.Fatalf("asked %s, which is alive", q.id.Short())
				}
				host := rapid.SampledFrom([]hostState{hostUnsure, hostThere, hostSilent}).Draw(t, "host")
				switch {
				case host == hostSilent:
					silent[q.id] = true
				case host == hostThere && !away:
					silent[q.id] = false
				}
				c.answer(now, lingerAnswer{q, host})
			}
			now = now.Add(time.Duration(rapid.IntRange(1, 30000).Draw(t, "ms")) * time.Millisecond)
		}
	})
}

func TestLingerIgnoresEntriesThatMakeNoSense(t *testing.T) {
	c := newLingerCore(nodeA)
	now := time.Unix(1000, 0)
	e := []weft.OwnedEndpoint{{Endpoint: endpointOf(1), Owner: nodeB}}
	c.restore(now, []storedOwner{{Node: nodeA, Addr: vtepA, Endpoints: e}, {Node: nodeB, Endpoints: e}, {Node: testID("d"), Addr: vtepB}})
	if len(c.owners) != 0 {
		t.Errorf("took %v", c.owners)
	}
}

func TestSortFailure(t *testing.T) {
	a, b, all := &brokenNetwork{1, errors.New("a")}, &brokenNetwork{2, errors.New("b")}, errors.New("all")
	for _, tc := range []struct {
		name             string
		err              error
		one, two, others bool
	}{
		{"nothing", nil, false, false, false},
		{"one network", a, true, false, false},
		{"wrapped", fmt.Errorf("apply: %w", a), true, false, false},
		{"joined", errors.Join(a, b), true, true, false},
		{"joined and wrapped", fmt.Errorf("x: %w", errors.Join(fmt.Errorf("y: %w", a), nil)), true, false, false},
		{"without a name", all, true, true, true},
		{"without a name, of two sentinels", fmt.Errorf("%w: %w", weft.ErrInvalid, all), true, true, true},
		{"mixed", errors.Join(a, fmt.Errorf("z: %w", all)), true, true, true},
		{"deep", errors.Join(errors.Join(errors.Join(b))), false, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := sortFailure(tc.err)
			if got := [3]bool{f.of([]uint32{1}) != nil, f.of([]uint32{2}) != nil, f.of(nil) != nil}; got != [3]bool{tc.one, tc.two, tc.others} {
				t.Errorf("network 1, 2 and others fail: %v, want %v", got, [3]bool{tc.one, tc.two, tc.others})
			}
			if err := f.of([]uint32{1}); tc.one && tc.others && !errors.Is(err, all) {
				t.Errorf("the cause is lost: %v", err)
			}
		})
	}
}

// TestSlowDiskHoldsUpNobody: what others run is seen while the file is being written,
// and one write is under way at a time, with the newest at the end.
func TestSlowDiskHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "endpoints.json")
		l := newLingering(t, path)
		disk, writes := make(chan struct{}), 0
		l.save = func(path string, v any) error {
			writes++ // a second one at once is a race
			<-disk
			return saveFile(path, v)
		}
		one, two := endpointOf(1), endpointOf(2)
		l.table.set(memberB, one)
		l.run(t)
		l.table.set(memberB, one, two)
		l.sees(t, "while the disk hangs", one, two)
		settle(2 * lingerBound)
		l.table.set(memberB, two)
		l.sees(t, "a while later", two)
		if writes != 1 {
			t.Errorf("%d writes have begun", writes)
		}
		close(disk)
		synctest.Wait()
		if writes != 2 {
			t.Errorf("%d writes have begun, want another of what changed meanwhile", writes)
		}
		l.stop()
		var f storedEndpoints
		if found, err := loadFile(path, endpointsVersion, &f); err != nil || !found || len(f.Owners) != 1 || len(f.Owners[0].Endpoints) != 1 || f.Owners[0].Endpoints[0].Endpoint != two {
			t.Errorf("the file has %+v, %v, %v", f, found, err)
		}
	})
}
