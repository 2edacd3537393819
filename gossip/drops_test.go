package gossip

import (
	"slices"
	"testing"
	"time"
)

// TestDropsAreTold: what was dropped is told at once, and then what has come to it, once in
// a while; frames of nodes that are no members are not.
func TestDropsAreTold(t *testing.T) {
	var d drops
	start := time.Unix(1000, 0)
	for _, c := range []struct {
		after time.Duration
		s     Stats
		want  []any
	}{
		{0, Stats{Unknown: 3, FramesReceived: 9}, nil},
		{time.Second, Stats{Foreign: 2}, []any{"foreign", uint64(2)}},
		{2 * time.Second, Stats{Foreign: 5}, nil},
		{time.Second + dropsEvery, Stats{Foreign: 5, Refused: 1}, []any{"foreign", uint64(3), "refused", uint64(1)}},
		{2 * dropsEvery, Stats{Foreign: 5, Refused: 1, Crowded: 4, SessionsBad: 1}, nil},
		{time.Hour, Stats{Foreign: 5, Refused: 1, Crowded: 4, SessionsBad: 1}, []any{"crowded", uint64(4), "sessions", uint64(1)}},
		{2 * time.Hour, Stats{Foreign: 5, Refused: 1, Crowded: 4, SessionsBad: 1}, nil},
	} {
		if got := d.look(start.Add(c.after), c.s); !slices.Equal(got, c.want) {
			t.Errorf("after %s of %+v: %v, want %v", c.after, c.s, got, c.want)
		}
	}
}
