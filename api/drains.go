package api

import (
	"time"

	"github.com/weftnet/weft"
)

// DrainsPath is where weft's own client asks how tasks of this node came into the
// balancers of others before they were said to run, and were taken out of them
// before they were stopped.
const DrainsPath = ownRoom + "drains"

// DrainsAnswer is the answer of GET DrainsPath.
type DrainsAnswer struct {
	// Since is when this daemon began to count.
	Since time.Time
	// Drains are counts by kind: "confirmed" are tasks of which every node
	// concerned had confirmed the drain, "passed" are nodes that did not
	// within the bound; "arrival confirmed" and "arrival passed" are the same of
	// tasks that begin to serve.
	Drains []RepairCount
}

// DrainLog tells what became of draining tasks.
type DrainLog interface {
	// Drains returns the counts by kind, sorted, and since when.
	Drains() (since time.Time, counts []weft.RepairCount)
}

func (s *Server) drains(c *call) error {
	since, counts := s.cfg.Drains.Drains()
	out := DrainsAnswer{Since: since, Drains: []RepairCount{}}
	for _, d := range counts {
		out.Drains = append(out.Drains, RepairCount(d))
	}
	return c.json(out)
}
