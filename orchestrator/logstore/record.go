package logstore

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
)

// kind of a record.
type kind uint8

const (
	// kindEntry is an entry of the log: index 8, term 8, type 1, seconds 8 and
	// nanoseconds 4 of the time it was appended, length of the extensions 4,
	// extensions, data.
	kindEntry kind = iota + 1
	// kindSet is a key with its value: length of the key 4, key, value.
	kindSet
	// kindCut deletes the entries from an index on: index 8. From the first on,
	// the log is empty, and may begin anywhere.
	kindCut
	// kindFirst deletes the entries below an index: index 8.
	kindFirst
	// kindSpan begins a segment: first 8 and last 8 index of the log so far,
	// zeros if it is empty.
	kindSpan
)

const entryBytes = 8 + 8 + 1 + 8 + 4 + 4

// record is one change; which fields count depends on kind.
type record struct {
	kind  kind
	entry raft.Log
	// from of kindCut and kindFirst; from and to of kindSpan.
	from, to uint64
	key      string
	value    []byte
}

func (r *record) bodyBytes() int {
	switch r.kind {
	case kindEntry:
		return entryBytes + len(r.entry.Extensions) + len(r.entry.Data)
	case kindSet:
		return 4 + len(r.key) + len(r.value)
	case kindSpan:
		return 16
	}
	return 8
}

// appendBody adds bodyBytes to b.
func (r *record) appendBody(b []byte) []byte {
	le := binary.LittleEndian
	switch r.kind {
	case kindEntry:
		e := &r.entry
		b = le.AppendUint64(b, e.Index)
		b = le.AppendUint64(b, e.Term)
		b = append(b, byte(e.Type))
		b = le.AppendUint64(b, uint64(e.AppendedAt.Unix()))
		b = le.AppendUint32(b, uint32(e.AppendedAt.Nanosecond()))
		b = le.AppendUint32(b, uint32(len(e.Extensions)))
		return append(append(b, e.Extensions...), e.Data...)
	case kindSet:
		b = le.AppendUint32(b, uint32(len(r.key)))
		return append(append(b, r.key...), r.value...)
	case kindSpan:
		return le.AppendUint64(le.AppendUint64(b, r.from), r.to)
	}
	return le.AppendUint64(b, r.from)
}

// decodeBody is the inverse of appendBody. Slices of the record point into b.
func decodeBody(k kind, b []byte) (record, error) {
	le, r := binary.LittleEndian, record{kind: k}
	short := fmt.Errorf("record of kind %d has %d bytes", k, len(b))
	switch k {
	case kindEntry:
		if len(b) < entryBytes {
			return r, short
		}
		ext, rest := uint64(le.Uint32(b[29:])), b[entryBytes:]
		if ext > uint64(len(rest)) {
			return r, short
		}
		r.entry = raft.Log{Index: le.Uint64(b), Term: le.Uint64(b[8:]), Type: raft.LogType(b[16]),
			AppendedAt: time.Unix(int64(le.Uint64(b[17:])), int64(le.Uint32(b[25:]))).UTC(),
			Extensions: orNil(rest[:ext:ext]), Data: orNil(rest[ext:])}
	case kindSet:
		if len(b) < 4 || uint64(le.Uint32(b)) > uint64(len(b)-4) {
			return r, short
		}
		n := 4 + le.Uint32(b)
		r.key, r.value = string(b[4:n]), b[n:]
	case kindSpan:
		if len(b) != 16 {
			return r, short
		}
		r.from, r.to = le.Uint64(b), le.Uint64(b[8:])
	case kindCut, kindFirst:
		if len(b) != 8 {
			return r, short
		}
		r.from = le.Uint64(b)
	default:
		return r, fmt.Errorf("record of unknown kind %d", k)
	}
	return r, nil
}

// orNil: what was not given to raft comes back as it was not given.
func orNil(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return b
}
