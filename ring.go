package weft

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
)

// GossipKeyBytes is the length of a key of the traffic between members.
const GossipKeyBytes = 32

// GossipKey is a key of the traffic between members. Epochs grow by one with each
// new key of a cluster; the first is 0.
type GossipKey struct {
	Epoch uint64
	Key   []byte
}

// Equal reports whether two keys are the same.
func (k GossipKey) Equal(o GossipKey) bool { return k.Epoch == o.Epoch && bytes.Equal(k.Key, o.Key) }

// GossipRing is what a node holds of these keys. A key is read by before anybody
// sends by it, and until nobody does any more.
type GossipRing struct {
	// Sends is the key that the node sends by; it reads by it, too.
	Sends GossipKey
	// Reads are further keys that it reads by: the next, while it is being
	// handed out, or the last, while there may be one who sends by it.
	Reads []GossipKey
}

// GossipEpochs are the keys that a node has taken up.
type GossipEpochs struct {
	// Reads is the newest epoch that it reads by, Sends the one it sends by.
	Reads, Sends uint64
}

// Keys are all keys of the ring, that which sends first.
func (r GossipRing) Keys() []GossipKey { return append([]GossipKey{r.Sends}, r.Reads...) }

// Epochs are those of the ring.
func (r GossipRing) Epochs() GossipEpochs {
	newest := slices.MaxFunc(r.Keys(), func(a, b GossipKey) int { return cmp.Compare(a.Epoch, b.Epoch) })
	return GossipEpochs{Reads: newest.Epoch, Sends: r.Sends.Epoch}
}

// Equal reports whether two rings are the same.
func (r GossipRing) Equal(o GossipRing) bool {
	return r.Sends.Equal(o.Sends) && slices.EqualFunc(r.Reads, o.Reads, GossipKey.Equal)
}

// Validate reports what is wrong with a ring, wrapping ErrInvalid.
func (r GossipRing) Validate() error {
	keys := r.Keys()
	for i, k := range keys {
		if len(k.Key) != GossipKeyBytes {
			return fmt.Errorf("gossip key of epoch %d has %d bytes, want %d: %w", k.Epoch, len(k.Key), GossipKeyBytes, ErrInvalid)
		}
		for _, o := range keys[:i] {
			if o.Epoch == k.Epoch || bytes.Equal(o.Key, k.Key) {
				return fmt.Errorf("gossip keys of epochs %d and %d: one comes twice: %w", o.Epoch, k.Epoch, ErrInvalid)
			}
		}
	}
	return nil
}
