package weft

import (
	"bytes"
	"errors"
	"testing"
)

func TestGossipRing(t *testing.T) {
	key := func(epoch uint64) GossipKey {
		return GossipKey{Epoch: epoch, Key: bytes.Repeat([]byte{byte(epoch)}, GossipKeyBytes)}
	}
	short, again := key(3), key(4)
	short.Key, again.Key = short.Key[1:], key(2).Key
	for _, c := range []struct {
		name  string
		ring  GossipRing
		valid bool
		want  GossipEpochs
	}{
		{"one key, as of a cluster that is older than rings", GossipRing{Sends: key(0)}, true, GossipEpochs{}},
		{"the next is handed out", GossipRing{Sends: key(2), Reads: []GossipKey{key(3)}}, true, GossipEpochs{Reads: 3, Sends: 2}},
		{"the last is not dropped yet", GossipRing{Sends: key(3), Reads: []GossipKey{key(2)}}, true, GossipEpochs{Reads: 3, Sends: 3}},
		{"no key", GossipRing{}, false, GossipEpochs{}},
		{"a short key", GossipRing{Sends: key(2), Reads: []GossipKey{short}}, false, GossipEpochs{Reads: 3, Sends: 2}},
		{"one epoch twice", GossipRing{Sends: key(2), Reads: []GossipKey{key(2)}}, false, GossipEpochs{Reads: 2, Sends: 2}},
		{"one key twice", GossipRing{Sends: key(2), Reads: []GossipKey{again}}, false, GossipEpochs{Reads: 4, Sends: 2}},
	} {
		err := c.ring.Validate()
		if (err == nil) != c.valid || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := c.ring.Epochs(); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
		if !c.ring.Equal(c.ring) || c.ring.Equal(GossipRing{Sends: key(9)}) {
			t.Errorf("%s: Equal is wrong", c.name)
		}
	}
}
