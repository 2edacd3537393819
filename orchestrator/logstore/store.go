package logstore

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"sync"
)

const (
	// DefaultSegmentBytes hold ten thousands of entries of a small manager, and
	// are little of its disk.
	DefaultSegmentBytes = 8 << 20
	// minSegmentBytes have room for a head, a batch and a few keys.
	minSegmentBytes = 4096
	// maxSegmentBytes keep positions within 32 bits.
	maxSegmentBytes = 1 << 30
	// tmpSuffix is of files that are being made.
	tmpSuffix = ".tmp"
)

// Config of a Store.
type Config struct {
	// Dir is the folder, which is the store's alone. Made if it is not there.
	Dir string
	// SegmentBytes are allocated ahead in one file; a batch that is larger gets a
	// file of its size. 0 is DefaultSegmentBytes, else 4 KiB to 1 GiB. Small
	// files free their room sooner, large ones are made more seldom.
	SegmentBytes int64
	// Log gets a line when a write is found that a crash cut off.
	Log *slog.Logger
}

// Store implements raft.LogStore, raft.MonotonicLogStore and raft.StableStore.
// All methods may be called at the same time from several goroutines. Those
// that write return when what they wrote is on the disk.
type Store struct {
	segmentBytes int64
	disk         disk
	newID        func() uint64
	failed       chan struct{} // closed by fail

	// write guards: next, tail, end, buf, err. It is held while the disk
	// writes, and taken before mu.
	write sync.Mutex
	next  uint64   // sequence of the next batch
	tail  *segment // the newest, where it goes, at end
	end   int64
	buf   []byte
	err   error // why nothing is written any more

	// mu guards: index, segments. Both are changed only with write held as well,
	// so its holder may read them without mu.
	mu       sync.RWMutex
	index    index
	segments map[uint64]*segment
}

// segment is an open file.
type segment struct {
	number, id uint64
	size       int64
	file       file
}

var errClosed = errors.New("the raft log is closed")

// Open opens or creates the store in cfg.Dir and owns the folder until Close. It
// fails when another store has it, and when what was acknowledged cannot be read.
// ctx is for the log alone.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	d, err := openFolder(cfg.Dir)
	if err != nil {
		return nil, err
	}
	return open(ctx, cfg, d, func() uint64 {
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails
		return binary.LittleEndian.Uint64(b[:])
	})
}

// open takes d, and closes it on failure.
func open(ctx context.Context, cfg Config, d disk, newID func() uint64) (_ *Store, err error) {
	if cfg.SegmentBytes == 0 {
		cfg.SegmentBytes = DefaultSegmentBytes
	}
	s := &Store{segmentBytes: cfg.SegmentBytes, disk: d, newID: newID, failed: make(chan struct{}), segments: map[uint64]*segment{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if cfg.SegmentBytes < minSegmentBytes || cfg.SegmentBytes > maxSegmentBytes {
		return nil, fmt.Errorf("segments of the raft log have %d bytes, allowed are %d to %d", cfg.SegmentBytes, minSegmentBytes, maxSegmentBytes)
	}
	numbers, err := s.list()
	if err != nil {
		return nil, err
	}
	if len(numbers) == 0 {
		return s, s.addSegment(1, 0)
	}
	r, torn, err := s.replay(numbers)
	if err != nil {
		return nil, err
	}
	if torn > 0 {
		cfg.Log.WarnContext(ctx, "the end of the raft log was a write that a crash cut off and that nobody was told of; it was removed",
			"file", r.file, "offset", r.end, "bytes", torn)
	}
	s.index, s.next, s.end = r.index, r.next, r.end
	return s, s.dropSegments()
}

func segmentName(number uint64) string { return fmt.Sprintf("%016d.log", number) }

// list returns the numbers of the segments, and removes what was being made when
// the last process ended.
func (s *Store) list() ([]uint64, error) {
	names, err := s.disk.List()
	if err != nil {
		return nil, err
	}
	var out []uint64
	for _, name := range names {
		if strings.HasSuffix(name, tmpSuffix) {
			if err := s.disk.Remove(name); err != nil {
				return nil, fmt.Errorf("remove unfinished segment of the raft log: %w", err)
			}
			continue
		}
		var n uint64
		if _, err := fmt.Sscanf(name, "%d.log", &n); err == nil && segmentName(n) == name {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out, nil
}

// replay opens and reads all segments and makes sure that what it read is on
// the disk. It returns how many bytes of a torn write it removed.
func (s *Store) replay(numbers []uint64) (replay, int64, error) {
	var r replay
	var data []byte
	for _, n := range numbers {
		f, size, err := s.disk.Open(segmentName(n))
		if err != nil {
			return r, 0, err
		}
		s.tail = &segment{number: n, size: size, file: f}
		s.segments[n] = s.tail
		data = slices.Grow(data[:0], int(size))[:size]
		if _, err := f.ReadAt(data, 0); err != nil {
			return r, 0, fmt.Errorf("read %s of the raft log: %w", segmentName(n), err)
		}
		if err := r.segment(segmentName(n), n, data); err != nil {
			return r, 0, err
		}
		s.tail.id = r.id
	}
	torn, err := r.tail(data)
	if err == nil {
		err = r.finish()
	}
	if err != nil {
		return r, 0, err
	}
	// The last batch is written again: if the process ended because the disk
	// failed to write it, the kernel would not try again by itself.
	clear(data[r.end : r.end+torn])
	if _, err := s.tail.file.WriteAt(data[r.last:r.end+torn], r.last); err != nil {
		return r, 0, fmt.Errorf("write end of the raft log: %w", err)
	}
	if err := errors.Join(s.tail.file.Sync(), s.disk.Sync()); err != nil {
		return r, 0, fmt.Errorf("sync raft log: %w", err)
	}
	return r, torn, nil
}

// addSegment makes segment number, with room for a batch of n bytes behind its
// first, and turns to it. The file gets its name when it is whole. A disk that
// is full is not the end: nothing was written then. write is held, or s is new.
func (s *Store) addSegment(number uint64, n int64) error {
	head := s.index.headRecords()
	g := &segment{number: number, id: s.newID(), size: max(s.segmentBytes, headBytes+batchBytes(head)+n)}
	name := segmentName(number)
	var err error
	if g.file, err = s.disk.Create(name+tmpSuffix, g.size); err != nil {
		if rerr := s.disk.Remove(name + tmpSuffix); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		return err
	}
	buf := appendSegmentHead(s.buf[:0], number, g.id, g.size)
	buf, _ = appendBatch(buf, g.id, headBytes, s.next, head)
	_, err = g.file.WriteAt(buf, 0)
	for _, step := range []func() error{
		g.file.Sync,
		func() error { return s.disk.Rename(name+tmpSuffix, name) },
		s.disk.Sync,
	} {
		if err == nil {
			err = step()
		}
	}
	if err != nil {
		return errors.Join(s.fail(fmt.Errorf("make %s of the raft log: %w", name, err)), g.file.Close())
	}
	s.next++
	s.tail, s.end, s.buf = g, int64(len(buf)), buf[:0]
	s.mu.Lock()
	defer s.mu.Unlock()
	s.segments[number] = g
	return nil
}

// append writes records as one batch and makes their changes. write is held.
func (s *Store) append(records []record) error {
	if s.err != nil {
		return s.err
	}
	n := batchBytes(records)
	if n > maxBatch {
		return fmt.Errorf("write raft log: %d bytes at once, at most %d", n, maxBatch)
	}
	if s.end+n > s.tail.size {
		if err := s.addSegment(s.tail.number+1, n); err != nil {
			return err
		}
	}
	buf, where := appendBatch(s.buf[:0], s.tail.id, s.end, s.next, records)
	_, err := s.tail.file.WriteAt(buf, s.end)
	if err == nil {
		err = s.tail.file.Sync()
	}
	if err != nil {
		return s.fail(fmt.Errorf("write raft log: %w", err))
	}
	s.next, s.end, s.buf = s.next+1, s.end+n, buf[:0]
	if cap(s.buf) > keptBuffer {
		s.buf = nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.index.apply(s.tail.number, where); err != nil {
		return s.fail(fmt.Errorf("write raft log: %w", err)) // a mistake of ours
	}
	return nil
}

// keptBuffer is more than all but the rarest batches.
const keptBuffer = 1 << 20

// dropSegments removes the files of which nothing is needed, each for good
// before the next, so that no gap can come about. write is held, or s is new.
func (s *Store) dropSegments() error {
	keep := s.index.oldestNeeded(s.tail.number)
	for n := s.tail.number - uint64(len(s.segments)) + 1; n < keep; n++ {
		if err := s.disk.Remove(segmentName(n)); err != nil {
			return fmt.Errorf("remove segment of the raft log: %w", err)
		}
		if err := s.disk.Sync(); err != nil {
			return s.fail(fmt.Errorf("remove segment of the raft log: %w", err))
		}
		s.mu.Lock()
		f := s.segments[n].file
		delete(s.segments, n)
		s.mu.Unlock()
		if err := f.Close(); err != nil {
			return fmt.Errorf("remove segment of the raft log: %w", err)
		}
	}
	return nil
}

// fail ends all writing: what the disk has after an error nobody knows, and to
// try again would only seem to succeed. The next Open finds out. write is held.
func (s *Store) fail(err error) error {
	if s.err == nil {
		s.err = fmt.Errorf("the raft log takes no more writes until it is opened again: %w", err)
		close(s.failed)
	}
	return err
}

// Failed is closed when the store takes no more writes; Err says why.
func (s *Store) Failed() <-chan struct{} { return s.failed }

// Err is why the store takes no more writes, or nil.
func (s *Store) Err() error {
	s.write.Lock()
	defer s.write.Unlock()
	return s.err
}

// Close gives the folder free. Reading and writing fail afterwards.
func (s *Store) Close() error {
	s.write.Lock()
	defer s.write.Unlock()
	if s.err == errClosed {
		return nil
	}
	if s.err == nil {
		close(s.failed)
	}
	s.err = errClosed
	var errs []error
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, g := range s.segments {
		errs = append(errs, g.file.Close())
	}
	if err := errors.Join(append(errs, s.disk.Close())...); err != nil {
		return fmt.Errorf("close raft log: %w", err)
	}
	return nil
}
