package nft

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLoadedWaitsForTheModule: who asks while nftables is being loaded is not told that
// the kernel lacks it, and who asks a kernel that does is.
func TestLoadedWaitsForTheModule(t *testing.T) {
	for _, c := range []struct {
		name  string
		fails int
		err   error
		tries int
	}{
		{"there", 0, nil, 1},
		{"being loaded", 3, unix.EINVAL, 4},
		{"not there", loadTries, unix.EINVAL, loadTries},
		{"not allowed", 1, unix.EPERM, 1},
	} {
		tries, waited := 0, time.Duration(0)
		gen, err := loaded(func() (uint32, error) {
			if tries++; tries <= c.fails {
				return 0, fmt.Errorf("ask: %w", c.err)
			}
			return 7, nil
		}, func(d time.Duration) { waited += d })
		if failed := c.fails >= c.tries; failed != (err != nil) || failed && !errors.Is(err, c.err) || !failed && gen != 7 {
			t.Errorf("%s: %d, %v", c.name, gen, err)
		}
		if tries != c.tries || waited != time.Duration(tries-1)*loadPause {
			t.Errorf("%s: %d tries in %v, want %d", c.name, tries, waited, c.tries)
		}
	}
}
