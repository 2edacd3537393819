package logstore

import "fmt"

// damage is stored data that cannot be read and was acknowledged, as far as
// anyone can tell.
type damage struct {
	file string
	off  int64
	why  string
}

// Error implements error.
func (d *damage) Error() string {
	return fmt.Sprintf("the raft log is damaged in %s at offset %d: %s; nothing was changed, and this manager must not go on without what is lost: "+
		"take it out of the cluster ('weft swarm leave --force' here, then 'weft node rm --force' on another manager) and let it join again, "+
		"or put back a copy of the folder if it is the only manager", d.file, d.off, d.why)
}

// replay reads segments, oldest first, and checks that none of what was written
// between the first batch and the last is missing.
type replay struct {
	index
	next   uint64 // sequence of the next batch
	begun  bool
	file   string // the segment read last
	number uint64
	id     uint64
	last   int64 // its last batch begins here
	end    int64 // and the next one would here
}

// segment reads one more. Whether the bytes behind r.end are a damaged batch is
// told by the next segment's sequence, or by tail for the newest.
func (r *replay) segment(file string, number uint64, data []byte) error {
	if r.begun && number != r.number+1 {
		return &damage{file, 0, fmt.Sprintf("the segment before it, number %d, is missing", number-1)}
	}
	id, err := readSegmentHead(data, number)
	if err != nil {
		return &damage{file, 0, err.Error()}
	}
	off := int64(headBytes)
	for n := 0; ; n++ {
		h, records, ok := readBatch(data, id, off)
		switch {
		case !ok && n == 0:
			return &damage{file, off, "the first batch of the file cannot be read"}
		case !ok:
			r.file, r.number, r.id, r.end = file, number, id, off
			return nil
		case !r.begun:
			r.next, r.begun = h.sequence, true
			err = r.begin(records, true)
		case h.sequence != r.next && n == 0:
			return &damage{r.file, r.end, fmt.Sprintf("batch %d cannot be read, and %s goes on with batch %d", r.next, file, h.sequence)}
		case h.sequence != r.next:
			return &damage{file, off, fmt.Sprintf("batch %d is where batch %d belongs", h.sequence, r.next)}
		case n == 0:
			err = r.begin(records, false)
		default:
			err = r.apply(number, records)
		}
		if err != nil {
			return &damage{file, off, err.Error()}
		}
		r.next++
		r.last, off = off, aligned(h.end)
	}
}

// tail judges the bytes behind the last good batch of the newest segment, data:
// nothing (0), or so many bytes of a write that was cut off by a crash. Such a
// write was never acknowledged: writes follow one another, each after the one
// before is on the disk, so nothing good is behind it. Where it was to go were
// zeros, and a disk writes sectors as a whole; so what is in its place is what
// was written, with whole sectors of zeros. Anything else is damage.
func (r *replay) tail(data []byte) (int64, error) {
	if r.end >= int64(len(data)) || isZero(data[r.end:]) {
		return 0, nil
	}
	torn := int64(len(data)) - r.end
	for torn > 0 && data[r.end+torn-1] == 0 {
		torn--
	}
	for off := r.end + alignment; off < int64(len(data)); off += alignment {
		if h, ok := readBatchHead(data, r.id, off); ok {
			return 0, &damage{r.file, r.end, fmt.Sprintf("batch %d cannot be read, and batch %d is behind it at offset %d", r.next, h.sequence, off)}
		}
	}
	if isZero(data[r.end:min(r.end+headBytes, int64(len(data)))]) {
		return torn, nil // the sector with the head never came
	}
	h, ok := readBatchHead(data, r.id, r.end)
	if !ok {
		return 0, &damage{r.file, r.end, fmt.Sprintf("the head of batch %d is damaged", r.next)}
	}
	for from := (r.end/sectorBytes + 1) * sectorBytes; from < h.end; from += sectorBytes {
		if isZero(data[from:min(from+sectorBytes, h.end)]) {
			return torn, nil
		}
	}
	return 0, &damage{r.file, r.end, fmt.Sprintf("all sectors of batch %d were written, and it cannot be read", r.next)}
}

// finish checks the whole.
func (r *replay) finish() error {
	if r.index.last != 0 && r.first < r.base {
		return &damage{r.file, 0, fmt.Sprintf("entries %d to %d are in no file", r.first, r.base-1)}
	}
	return nil
}
