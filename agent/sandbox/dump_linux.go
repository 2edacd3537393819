package sandbox

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// dumpTries bounds how often a list is read again that changed while the kernel
// told it: on a host that makes ten tasks at once a second reading is common, a
// fifth was not seen.
const dumpTries = 10

// complete repeats a netlink dump that was interrupted by a change (NLM_F_DUMP_INTR,
// linux/netlink.h): such a list may lack objects that were there all the time.
func complete[T any](dump func() ([]T, error)) ([]T, error) {
	for try := 1; ; try++ {
		out, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == dumpTries {
			return out, err
		}
	}
}
