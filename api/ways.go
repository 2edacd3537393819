package api

import (
	"net/netip"
	"time"
)

// WaysPath is where weft's own client asks how packets leave this node.
const WaysPath = ownRoom + "ways"

// WaysAnswer is the answer of GET WaysPath.
type WaysAnswer struct{ Ways []Way }

// Way is weft.Way as JSON, with the network's name as far as it is known now.
type Way struct {
	VNI     uint32
	Network string
	VTEP    netip.Addr
	Native  bool
	Since   time.Time
	Reason  string
}

func (s *Server) ways(c *call) error {
	out := WaysAnswer{Ways: []Way{}}
	ways := s.cfg.Ways.Ways()
	if len(ways) == 0 {
		return c.json(out)
	}
	names := map[uint32]string{}
	// What this host does is told without a leader, too.
	if networks, err := s.cfg.Networks.Networks(c.Context()); err == nil {
		for _, n := range networks {
			names[n.VNI] = n.Spec.Name
		}
	}
	for _, w := range ways {
		out.Ways = append(out.Ways, Way{w.VNI, names[w.VNI], w.VTEP, w.Native, w.Since, w.Reason})
	}
	return c.json(out)
}
