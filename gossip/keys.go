package gossip

import (
	"fmt"
	"slices"
	"sync"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft"
)

// keys are the ring of a running node: memberlist's own, and what the loop makes its
// frames by. Both follow each call of set before it returns.
type keys struct {
	// mu guards: ring, library.
	mu      sync.Mutex
	ring    weft.GossipRing
	library *memberlist.Keyring
}

func newKeys(r weft.GossipRing) (*keys, error) {
	library, err := memberlist.NewKeyring(secrets(r), r.Sends.Key)
	if err != nil {
		return nil, fmt.Errorf("make keyring: %w", err)
	}
	return &keys{ring: r, library: library}, nil
}

// secrets are the keys of a ring, that which sends first.
func secrets(r weft.GossipRing) (out [][]byte) {
	for _, k := range r.Keys() {
		out = append(out, k.Key)
	}
	return out
}

func (k *keys) now() weft.GossipRing {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ring
}

// set reports whether the ring is another one than before.
func (k *keys) set(r weft.GossipRing) (changed bool, err error) {
	if err := r.Validate(); err != nil {
		return false, fmt.Errorf("take up gossip keys: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ring.Equal(r) {
		return false, nil
	}
	if err := k.follow(secrets(r)); err != nil {
		return false, fmt.Errorf("take up gossip keys: %w", err)
	}
	k.ring = r
	return true, nil
}

// follow makes memberlist's ring the given keys, the first of which sends. Only the
// last key is ever removed: memberlist moves the ones behind it in a list that
// others may be reading. So where another must go, all but the first do, and those
// that stay come back at once: only a node that was away for two changes is there.
func (k *keys) follow(want [][]byte) error {
	if err := k.library.AddKey(want[0]); err != nil {
		return err
	}
	if err := k.library.UseKey(want[0]); err != nil {
		return err
	}
	have := k.library.GetKeys()
	stays := func(key []byte) bool {
		return slices.ContainsFunc(want, func(w []byte) bool { return string(w) == string(key) })
	}
	if i := slices.IndexFunc(have, func(key []byte) bool { return !stays(key) }); i > 0 {
		for _, key := range slices.Backward(slices.Clone(have[i:])) {
			if err := k.library.RemoveKey(key); err != nil {
				return err
			}
		}
	}
	for _, key := range want[1:] {
		if err := k.library.AddKey(key); err != nil {
			return err
		}
	}
	return nil
}

// SetKeys changes the keys of membership and table. When it returns nil, all that
// comes from now on is read by these keys and no others, and nothing is begun to be
// sent by another than theirs. The same ring again does nothing. An invalid one is
// weft.ErrInvalid and changes nothing. It does not block on the network.
func (g *Gossip) SetKeys(r weft.GossipRing) error {
	changed, err := g.keys.set(r)
	if changed {
		e := r.Epochs()
		g.cfg.Log.Info("gossip keys are changed", "reads", e.Reads, "sends", e.Sends)
		g.wake()
	}
	return err
}

// takeKeys has the loop's frames follow the ring.
func (l *loop) takeKeys() {
	r := l.g.keys.now()
	if r.Equal(l.ring) {
		return
	}
	if err := l.seal.use(r.Sends.Key); err != nil {
		l.g.cfg.Log.Error("frames cannot be made by the new key", weft.KeyErr, err)
		return
	}
	if err := l.open.use(secrets(r)...); err != nil {
		l.g.cfg.Log.Error("frames cannot be read by the new keys", weft.KeyErr, err)
		return
	}
	l.ring = r
	// Whoever was away while keys changed can be reached from now on.
	l.seeds.wait, l.seeds.next = seedMin, l.seeds.next.Add(-seedMax)
}
