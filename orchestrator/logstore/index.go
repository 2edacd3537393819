package logstore

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"slices"
)

// position is where an entry's record lies. Segments are below 4 GiB.
type position struct {
	segment uint64
	off, n  uint32
}

// index is what all records so far amount to.
type index struct {
	// first and last index of the log; zeros if it is empty.
	first, last uint64
	// The entries from base to last are at positions. Those from first to before
	// base were in segments that are not there any more: later records must
	// delete them, or something is lost.
	base      uint64
	positions []position
	keys      map[string][]byte
}

// find returns where an entry lies.
func (x *index) find(i uint64) (position, bool) {
	if i < x.base || i > x.last || i == 0 {
		return position{}, false
	}
	return x.positions[i-x.base], true
}

// apply makes the changes of a batch in a segment.
func (x *index) apply(segment uint64, records []placed) error {
	for i := range records {
		r := &records[i]
		switch r.kind {
		case kindEntry:
			at := r.entry.Index
			if x.last == 0 {
				x.first, x.base, x.last = at, at, at-1
			}
			if at != x.last+1 || at == 0 {
				return fmt.Errorf("entry %d follows entry %d", at, x.last)
			}
			x.last, x.positions = at, append(x.positions, position{segment, uint32(r.off), uint32(r.n)})
		case kindSet:
			if x.keys == nil {
				x.keys = map[string][]byte{}
			}
			x.keys[r.key] = bytes.Clone(r.value)
		case kindCut:
			if x.last == 0 || r.from < x.first || r.from > x.last {
				return fmt.Errorf("entries from %d on are deleted where there are %d to %d", r.from, x.first, x.last)
			}
			x.cut(r.from)
		case kindFirst:
			if x.last == 0 || r.from <= x.first || r.from > x.last {
				return fmt.Errorf("entries below %d are deleted where there are %d to %d", r.from, x.first, x.last)
			}
			x.first = r.from
			if r.from > x.base {
				x.base, x.positions = r.from, x.positions[r.from-x.base:]
			}
		default:
			return fmt.Errorf("record of kind %d within a segment", r.kind)
		}
	}
	return nil
}

func (x *index) cut(from uint64) {
	if from == x.first {
		x.first, x.last, x.base, x.positions = 0, 0, 0, nil
		return
	}
	x.last = from - 1
	if from <= x.base {
		x.base, x.positions = from, nil
		return
	}
	x.positions = x.positions[:from-x.base]
}

// begin takes the first batch of a segment: in the oldest it is where the index
// starts from, in all others it must say what the index says.
func (x *index) begin(records []placed, oldest bool) error {
	if records[0].kind != kindSpan {
		return fmt.Errorf("the segment begins with a record of kind %d", records[0].kind)
	}
	span := records[0].record
	if (span.from == 0) != (span.to == 0) || span.from > span.to || span.to == math.MaxUint64 {
		return fmt.Errorf("the segment begins with entries %d to %d", span.from, span.to)
	}
	if oldest {
		x.first, x.last = span.from, span.to
		if x.last != 0 {
			x.base = x.last + 1
		}
	}
	if span.from != x.first || span.to != x.last {
		return fmt.Errorf("the segment begins with entries %d to %d, where there are %d to %d", span.from, span.to, x.first, x.last)
	}
	for _, r := range records[1:] {
		if r.kind != kindSet {
			return fmt.Errorf("a record of kind %d is at the beginning of a segment", r.kind)
		}
	}
	if oldest {
		return x.apply(0, records[1:])
	}
	if len(records)-1 != len(x.keys) {
		return fmt.Errorf("the segment begins with %d keys, where there are %d", len(records)-1, len(x.keys))
	}
	for _, r := range records[1:] {
		if v, ok := x.keys[r.key]; !ok || !bytes.Equal(v, r.value) {
			return fmt.Errorf("the segment begins with another value of %q", r.key)
		}
	}
	return nil
}

// headRecords are the first batch of a new segment: with it no older segment is
// needed, but for the entries that lie there.
func (x *index) headRecords() []record {
	out := []record{{kind: kindSpan, from: x.first, to: x.last}}
	for _, k := range slices.Sorted(maps.Keys(x.keys)) {
		out = append(out, record{kind: kindSet, key: k, value: x.keys[k]})
	}
	return out
}

// oldestNeeded is the oldest segment with an entry of the log; newest if there is
// none.
func (x *index) oldestNeeded(newest uint64) uint64 {
	if len(x.positions) == 0 {
		return newest
	}
	return x.positions[0].segment
}
