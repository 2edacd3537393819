package weft

import "time"

// Repair is one difference between what weft left in the kernel and what it
// found there later, put right. What changes because the wish has changed is
// no repair.
type Repair struct {
	// Kind is what counters count by: object and fault, "fdb missing",
	// "neighbour wrong", "device wrong", "port stray".
	Kind string
	// Object names the one: "fdb 02:1f:0a:00:10:05 of network 4097".
	Object string
	// Reason is what was found: "it was gone", "wx4097 is down".
	Reason string
}

// RepairCount sums up the repairs of one kind since the daemon's start. Object
// and Reason are those of the last one.
type RepairCount struct {
	Kind   string
	Count  uint64
	Last   time.Time
	Object string
	Reason string
}
