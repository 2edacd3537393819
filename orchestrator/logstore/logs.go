package logstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/hashicorp/raft"
)

var (
	_ raft.LogStore          = (*Store)(nil)
	_ raft.MonotonicLogStore = (*Store)(nil)
	_ raft.StableStore       = (*Store)(nil)
)

// errNotFound is of a key without a value. Raft compares its text.
var errNotFound = errors.New("not found")

// IsMonotonic implements raft.MonotonicLogStore: the log has no gaps, so Raft
// must empty it before it goes on behind a snapshot from elsewhere.
func (s *Store) IsMonotonic() bool { return true }

// FirstIndex implements raft.LogStore: 0 if the log is empty.
func (s *Store) FirstIndex() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.index.first, nil
}

// LastIndex implements raft.LogStore: 0 if the log is empty.
func (s *Store) LastIndex() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.index.last, nil
}

func (s *Store) locate(i uint64) (position, *segment, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	p, ok := s.index.find(i)
	return p, s.segments[p.segment], ok
}

// GetLog implements raft.LogStore. An index that the log does not have is
// raft.ErrLogNotFound; an entry whose checksum is wrong is an error.
func (s *Store) GetLog(i uint64, out *raft.Log) error {
	p, g, ok := s.locate(i)
	if !ok {
		return raft.ErrLogNotFound
	}
	buf := make([]byte, p.n)
	if _, err := g.file.ReadAt(buf, int64(p.off)); err != nil {
		if now, _, ok := s.locate(i); !ok || now != p {
			return raft.ErrLogNotFound // it was deleted meanwhile, with its file
		}
		return fmt.Errorf("read entry %d of the raft log: %w", i, err)
	}
	r, err := readRecord(buf, g.id, int64(p.off))
	if err == nil && (r.kind != kindEntry || r.entry.Index != i) {
		err = errors.New("another record is there")
	}
	if err != nil {
		return &damage{segmentName(g.number), int64(p.off), fmt.Sprintf("entry %d: %v", i, err)}
	}
	*out = r.entry
	return nil
}

// StoreLog implements raft.LogStore.
func (s *Store) StoreLog(log *raft.Log) error { return s.StoreLogs([]*raft.Log{log}) }

// StoreLogs implements raft.LogStore: all of the entries or, after an error,
// perhaps none. They must go on where the log ends; an empty log may begin
// anywhere.
func (s *Store) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	records := make([]record, len(logs))
	for i, l := range logs {
		records[i] = record{kind: kindEntry, entry: *l}
	}
	s.write.Lock()
	defer s.write.Unlock()
	want := logs[0].Index
	if s.index.last != 0 {
		want = s.index.last + 1
	}
	for _, l := range logs {
		if l.Index != want || want == 0 {
			return fmt.Errorf("store entry %d of the raft log: the next is %d", l.Index, want)
		}
		want++
	}
	return s.append(records)
}

// DeleteRange implements raft.LogStore: the entries from one index to another,
// both included, at the front of the log, at its end, or all. What the log does not have is
// passed over.
func (s *Store) DeleteRange(from, to uint64) error {
	s.write.Lock()
	defer s.write.Unlock()
	first, last := s.index.first, s.index.last
	var r record
	switch {
	case last == 0 || from > to || to < first || from > last:
		return nil
	case to >= last:
		r = record{kind: kindCut, from: max(from, first)}
	case from <= first:
		r = record{kind: kindFirst, from: to + 1}
	default:
		return fmt.Errorf("delete entries %d to %d of the raft log: they lie within %d to %d", from, to, first, last)
	}
	if err := s.append([]record{r}); err != nil {
		return err
	}
	return s.dropSegments()
}

// Set implements raft.StableStore.
func (s *Store) Set(key, value []byte) error {
	s.write.Lock()
	defer s.write.Unlock()
	return s.append([]record{{kind: kindSet, key: string(key), value: value}})
}

// Get implements raft.StableStore. The error for a key without a value reads
// "not found", as Raft expects it.
func (s *Store) Get(key []byte) ([]byte, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v, ok := s.index.keys[string(key)]
	if !ok {
		return nil, errNotFound
	}
	return bytes.Clone(v), nil
}

// SetUint64 implements raft.StableStore.
func (s *Store) SetUint64(key []byte, value uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, value))
}

// GetUint64 implements raft.StableStore. Keys are those of Get.
func (s *Store) GetUint64(key []byte) (uint64, error) {
	v, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, fmt.Errorf("value of %q in the raft log has %d bytes, not 8", key, len(v))
	}
	return binary.BigEndian.Uint64(v), nil
}
