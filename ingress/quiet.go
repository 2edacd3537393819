package ingress

import (
	"fmt"

	"github.com/weftnet/weft"
)

// flowLooks is how often flows are looked for at most. Our own choice.
const flowLooks = 20

// EndFlows ends the flows that lead to a backend which is gone, what chooses backends
// having been changed before. A packet that has chosen by what was there, or has found its
// flow before it was ended, brings it back: so pass waits for all packets on their way,
// and flows are looked for again by once, which says how many it has ended, until quiet
// looks in a row find none. An error of once ends it.
func EndFlows(pass func(), once func() (ended int, err error), quiet int) error {
	silent := 0
	for range flowLooks {
		pass()
		ended, err := once()
		if err != nil {
			return err
		}
		if silent++; ended > 0 {
			silent = 0
		}
		if silent == quiet {
			return nil
		}
	}
	return fmt.Errorf("flows to backends that are gone came back %d times: %w", flowLooks, weft.ErrUnavailable)
}
