package api

import (
	"time"
)

// RepairsPath is where weft's own client asks for the repairs of this node.
const RepairsPath = ownRoom + "repairs"

// ownRoom is the folder of what the Engine API has no room for. Its version is
// its own: the Engine API's in front of it is taken and means nothing.
const ownRoom = "/weft/v1/"

// RepairsAnswer is the answer of GET RepairsPath.
type RepairsAnswer struct {
	// Since is when this daemon began to count.
	Since   time.Time
	Repairs []RepairCount
}

// RepairCount is weft.RepairCount as JSON.
type RepairCount struct {
	Kind           string
	Count          uint64
	Last           time.Time
	Object, Reason string // of the last one
}

func (s *Server) ownRoutes(add adder) {
	add("GET", RepairsPath, s.repairs)
	add("GET", WaysPath, s.ways)
	add("GET", DrainsPath, s.drains)
}

func (s *Server) repairs(c *call) error {
	since, counts := s.cfg.Repairs.Repairs()
	out := RepairsAnswer{Since: since, Repairs: []RepairCount{}}
	for _, r := range counts {
		out.Repairs = append(out.Repairs, RepairCount(r))
	}
	return c.json(out)
}
