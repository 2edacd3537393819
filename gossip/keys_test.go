package gossip

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// keyOf is the key of an epoch; that of epoch 0 is what nodes start with.
func keyOf(epoch uint64) weft.GossipKey {
	if epoch == 0 {
		return testKeys().Sends
	}
	return weft.GossipKey{Epoch: epoch, Key: bytes.Repeat([]byte{byte(epoch)}, weft.GossipKeyBytes)}
}

func ringOf(sends uint64, reads ...uint64) weft.GossipRing {
	r := weft.GossipRing{Sends: keyOf(sends)}
	for _, e := range reads {
		r.Reads = append(r.Reads, keyOf(e))
	}
	return r
}

// undecrypted counts what memberlist could not read.
type undecrypted struct{ n atomic.Uint64 }

func (u *undecrypted) Enabled(context.Context, slog.Level) bool { return true }
func (u *undecrypted) WithAttrs([]slog.Attr) slog.Handler       { return u }
func (u *undecrypted) WithGroup(string) slog.Handler            { return u }

func (u *undecrypted) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if text := a.Value.String(); strings.Contains(text, "ecrypt") {
			u.n.Add(1)
		}
		return true
	})
	return nil
}

// unread is what all nodes could not read: frames, and packets of memberlist.
func (c *cluster) unread(u *undecrypted) (frames, packets uint64) {
	for _, r := range c.nodes {
		frames += r.Stats().Unauthentic
	}
	return frames, u.n.Load()
}

// TestKeysRotate: ten nodes at 10 % loss go through five changes of keys, each node
// up to three seconds after the other, while tables change. No frame and no
// packet is refused, nobody is thought dead, every table arrives.
func TestKeysRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const nodes = 10
		u := &undecrypted{}
		c := newLoggedCluster(t, nodes, slog.New(u))
		defer c.close()
		c.f.mu.Lock()
		c.f.loss = 0.1
		c.f.mu.Unlock()
		// everywhere has each node take a ring up in its own time.
		everywhere := func(r weft.GossipRing) {
			done := make(chan error, nodes)
			for _, n := range c.nodes {
				go func() {
					time.Sleep(rand.N(3 * time.Second))
					done <- n.SetKeys(r)
				}()
			}
			for range nodes {
				if err := <-done; err != nil {
					t.Error(err)
				}
				if !c.allSee(nodes) {
					t.Errorf("somebody is thought dead: %s", c.describe())
				}
			}
		}
		for e := range uint64(5) {
			for n, r := range c.nodes {
				r.Publish(endpoints(n + int(e)))
			}
			everywhere(ringOf(e, e+1))
			everywhere(ringOf(e+1, e))
			time.Sleep(time.Second) // what is on its way by the old key
			everywhere(ringOf(e + 1))
			c.await(5*time.Second, "all tables", func() bool {
				for n := range c.nodes {
					if !c.allHave(n, n+int(e)) {
						return false
					}
				}
				return true
			})
		}
		if frames, packets := c.unread(u); frames+packets != 0 {
			t.Errorf("%d frames and %d packets were not read", frames, packets)
		}
		// Control: the counters count, and a key that nobody has cuts its node off.
		if err := c.nodes[3].SetKeys(ringOf(99)); err != nil {
			t.Error(err)
		}
		c.await(time.Minute, "a node with a key that nobody has to see nobody", func() bool {
			m, _ := c.nodes[3].Members()
			return len(m) == 1
		})
		if frames, packets := c.unread(u); frames == 0 || packets == 0 {
			t.Errorf("with a key that nobody has, %d frames and %d packets were not read", frames, packets)
		}
	})
}

// TestAwayWhileKeysChanged: a node that was cut off while keys changed twice is not
// let in by its old key, and is back as soon as it has the ring, without a command.
func TestAwayWhileKeysChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 5)
		defer c.close()
		for n, r := range c.nodes {
			r.Publish(endpoints(n))
		}
		away := testAddr(5).String()
		c.f.setCut(func(from, to string) bool { return (from == away) != (to == away) })
		time.Sleep(20 * time.Second)
		for _, ring := range []weft.GossipRing{ringOf(0, 1), ringOf(1, 0), ringOf(1), ringOf(1, 2), ringOf(2, 1), ringOf(2)} {
			for n, r := range c.nodes {
				if n != 5 {
					if err := r.SetKeys(ring); err != nil {
						t.Error(err)
					}
				}
			}
			time.Sleep(time.Second)
		}
		c.nodes[1].Publish(endpoints(9)) // it must hear of it
		c.f.setCut(nil)
		time.Sleep(10 * time.Second)
		if m, _ := c.nodes[5].Members(); len(m) != 1 {
			t.Errorf("a node with an old key sees %d members", len(m))
		}
		if err := c.nodes[5].SetKeys(ringOf(2)); err != nil {
			t.Error(err)
		}
		d := c.await(3*time.Second, "the node that was away", func() bool {
			return c.allSee(5) && c.allHave(1, 9) && c.allHave(5, 5)
		})
		t.Logf("back %v after it has the keys", d)
	})
}

// TestSetKeysFollows: whatever rings come one after the other, memberlist has their
// keys, and sends by the one that sends; frames are read by them, and by no others.
func TestSetKeysFollows(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		k, err := newKeys(ringOf(0))
		if err != nil {
			rt.Fatal(err)
		}
		open := newOpener(secrets(ringOf(0))...)
		if err := open.know([]weft.ID{nodeID(1)}); err != nil {
			rt.Fatal(err)
		}
		for range rapid.IntRange(1, 8).Draw(rt, "steps") {
			epochs := rapid.SliceOfNDistinct(rapid.Uint64Range(0, 5), 1, 4, rapid.ID).Draw(rt, "epochs")
			ring := ringOf(epochs[0], epochs[1:]...)
			before := k.now()
			if changed, err := k.set(ring); err != nil || changed == before.Equal(ring) {
				rt.Fatalf("%v after %v: changed %v, %v", ring, before, changed, err)
			}
			if err := open.use(secrets(ring)...); err != nil {
				rt.Fatal(err)
			}
			has := map[uint64]bool{}
			for _, e := range epochs {
				has[e] = true
			}
			if got := k.library.GetKeys(); len(got) != len(epochs) || !bytes.Equal(got[0], keyOf(epochs[0]).Key) {
				rt.Fatalf("memberlist has %x for %v", got, ring)
			}
			for e := range uint64(6) {
				held := false
				for _, key := range k.library.GetKeys() {
					held = held || bytes.Equal(key, keyOf(e).Key)
				}
				s, err := newSealer(keyOf(e).Key, nodeID(1))
				if err != nil {
					rt.Fatal(err)
				}
				_, _, err = open.open(s.seal(knock{}))
				if held != has[e] || has[e] != (err == nil) || !has[e] && !errors.Is(err, errUnauthentic) {
					rt.Fatalf("key %d, of the ring: %v; memberlist has it: %v; its frame: %v", e, has[e], held, err)
				}
			}
		}
	})
}

// TestReplayAcrossKeys: a frame that has come is refused after a change, too.
func TestReplayAcrossKeys(t *testing.T) {
	s, err := newSealer(keyOf(0).Key, nodeID(1))
	if err != nil {
		t.Fatal(err)
	}
	o := knowing(t, keyOf(0).Key, nodeID(1))
	old, late := s.seal(knock{}), s.seal(knock{})
	if err := errors.Join(s.use(keyOf(1).Key), o.use(keyOf(1).Key, keyOf(0).Key)); err != nil {
		t.Fatal(err)
	}
	next := s.seal(knock{})
	for i, c := range []struct {
		frame []byte
		want  error
	}{{old, nil}, {old, errReplayed}, {next, nil}, {next, errReplayed}, {late, nil}} {
		if _, _, err := o.open(c.frame); !errors.Is(err, c.want) {
			t.Errorf("frame %d: %v, want %v", i, err, c.want)
		}
	}
}

func TestSetKeysRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 2)
		defer c.close()
		short := ringOf(1, 0)
		short.Reads[0].Key = short.Reads[0].Key[:16]
		same := ringOf(1)
		same.Reads = []weft.GossipKey{{Epoch: 2, Key: keyOf(1).Key}}
		for name, r := range map[string]weft.GossipRing{"short": short, "one key twice": same, "one epoch twice": ringOf(1, 1), "empty": {}} {
			if err := c.nodes[2].SetKeys(r); !errors.Is(err, weft.ErrInvalid) {
				t.Errorf("%s: %v", name, err)
			}
		}
		c.nodes[1].Publish(endpoints(3))
		c.await(time.Second, "a table by the old key", func() bool { return c.allHave(1, 3) })
	})
}
