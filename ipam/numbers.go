package ipam

import (
	"fmt"

	"github.com/weftnet/weft"
)

// PickVNI returns the lowest VXLAN network identifier, from weft.FirstVNI on,
// that is not in used. weft.ErrUnavailable when all 24 bits are used up.
func PickVNI(used map[uint32]bool) (uint32, error) {
	for v := weft.FirstVNI; v <= weft.LastVNI; v++ {
		if !used[v] {
			return v, nil
		}
	}
	return 0, fmt.Errorf("%w: all %d network identifiers are in use; remove a network", weft.ErrUnavailable, weft.LastVNI-weft.FirstVNI+1)
}
