package weft

import (
	"net/netip"
	"time"
)

// Way is how packets of a network go to another node, of a network that asks for
// no encapsulation where that works (OptionEncap).
type Way struct {
	VNI  uint32
	VTEP netip.Addr // the other node's
	// Native: without encapsulation, since Since; else in VXLAN.
	Native bool
	Since  time.Time
	// Reason is why not, for people; "" of a native one.
	Reason string
}
