package sandbox

import (
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestInterruptedDumpIsRepeated(t *testing.T) {
	for _, c := range []struct{ interrupted, want int }{{0, 1}, {3, 4}, {dumpTries + 5, dumpTries}} {
		asked := 0
		got, err := complete(func() ([]int, error) {
			if asked++; asked <= c.interrupted {
				return nil, fmt.Errorf("list: %w", netlink.ErrDumpInterrupted)
			}
			return []int{1, 2}, nil
		})
		if asked != c.want || (err == nil) != (c.interrupted < dumpTries) || err == nil && len(got) != 2 {
			t.Errorf("interrupted %d times: asked %d times, want %d: %v, %v", c.interrupted, asked, c.want, got, err)
		}
	}
}
