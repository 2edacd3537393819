package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/weftnet/weft"
)

// followEvery is how often a follower looks for new lines: people do not see
// it, and it costs one read of an open file.
const followEvery = 50 * time.Millisecond

// endQuiet is how long nothing may come before a follower of an ended container
// believes that all has come. The writer may stay until the container is
// removed (a shim keeps the pipes open), so its presence alone says nothing.
const endQuiet = 4 * followEvery

// maxEncodedLine bounds a line on disk: every byte of maxLogLine may become six
// (a \u escape), plus the fields around it. Longer ones are damage.
const maxEncodedLine = 6*maxLogLine + 1024

// LogRead is what ReadLog needs beside the directory.
type LogRead struct {
	weft.LogOptions
	Task, Node weft.ID
	// Ended is closed when the container has ended and nothing more will be
	// written but what is on its way; nil: a follower ends only with ctx.
	Ended <-chan struct{}
}

// ReadLog calls f for each selected record of the log in dir, oldest first,
// across rotated parts, without losing or doubling a line at a rotation (lines
// that were rotated away before they were reached are gone). A log that does
// not exist (yet) is empty. It returns the error of f, nil at the end, and
// ctx's error when ctx ends first.
func ReadLog(ctx context.Context, dir string, o LogRead, f func(weft.LogRecord) error) error {
	r := &logReader{dir: dir, opt: o}
	defer r.close()
	if err := r.open(ctx); err != nil {
		return err
	}
	done, err := r.history(ctx, f)
	if err != nil || done || !o.Follow {
		return err
	}
	return r.follow(ctx, f)
}

// logReader walks the parts of a log. It is used by one goroutine.
type logReader struct {
	dir  string
	opt  LogRead
	todo []*os.File // parts not read to their end, oldest first; the last one is the newest
	buf  []byte     // bytes of todo[0] not yet parsed
}

func (r *logReader) close() {
	for _, f := range r.todo {
		f.Close()
	}
}

// open takes hold of all parts at one moment. The newest is opened first; while
// it is held its inode cannot be reused, so if the name still means it after
// the others were opened, no rotation came in between.
func (r *logReader) open(ctx context.Context) error {
	for try := 0; ; try++ {
		parts, ok, err := openParts(r.dir, try >= 20)
		if err != nil {
			return err
		}
		if ok {
			r.todo = parts
			return nil
		}
		if err := pause(ctx, 2*time.Millisecond); err != nil {
			return err
		}
	}
}

// openParts returns the parts oldest first; ok is false when a rotation was
// under way. With force, a log without its newest part (its writer died in a
// rotation) is taken as it is.
func openParts(dir string, force bool) (parts []*os.File, ok bool, err error) {
	defer func() {
		if !ok {
			for _, f := range parts {
				f.Close()
			}
			parts = nil
		}
	}()
	var held [LogParts]*os.File
	for n := range LogParts {
		f, err := os.Open(logPart(dir, n))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return parts, false, fmt.Errorf("open log: %w", err)
		}
		held[n] = f
		parts = append([]*os.File{f}, parts...)
	}
	if held[0] == nil {
		return parts, len(parts) == 0 || force, nil
	}
	same, err := isCurrent(held[0], dir)
	if err != nil {
		return parts, false, err
	}
	for i := 1; i < len(parts); i++ { // a rename in between can show one file under two names
		a, aerr := parts[i-1].Stat()
		b, berr := parts[i].Stat()
		if aerr != nil || berr != nil {
			return parts, false, errors.Join(aerr, berr)
		}
		same = same && !os.SameFile(a, b)
	}
	return parts, same, nil
}

// isCurrent reports whether f still is the newest part.
func isCurrent(f *os.File, dir string) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, fmt.Errorf("read log: %w", err)
	}
	b, err := os.Stat(LogFile(dir))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read log: %w", err)
	}
	return os.SameFile(a, b), nil
}

// history delivers what is there now. done means that Until was passed.
func (r *logReader) history(ctx context.Context, f func(weft.LogRecord) error) (done bool, err error) {
	emit := f
	var ring [][]weft.LogRecord // at most two generations of Tail records
	if r.opt.Tail == 0 {
		emit = func(weft.LogRecord) error { return nil }
	} else if r.opt.Tail > 0 {
		ring = [][]weft.LogRecord{nil, nil}
		emit = func(rec weft.LogRecord) error {
			if len(ring[1]) == r.opt.Tail {
				ring[0], ring[1] = ring[1], nil
			}
			ring[1] = append(ring[1], rec)
			return nil
		}
	}
	for len(r.todo) > 0 && !done {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		if done, err = r.drain(emit); err != nil {
			return false, err
		}
		if len(r.todo) == 1 {
			break // the newest stays open for a follower
		}
		r.next()
	}
	if r.opt.Tail > 0 {
		all := append(ring[0], ring[1]...)
		for _, rec := range all[max(0, len(all)-r.opt.Tail):] {
			if err := f(rec); err != nil {
				return false, err
			}
		}
	}
	return done, nil
}

// next gives up the oldest part; bytes of a torn line go with it.
func (r *logReader) next() {
	r.todo[0].Close()
	r.todo, r.buf = r.todo[1:], nil
}

// drain parses the oldest part up to its present end.
func (r *logReader) drain(f func(weft.LogRecord) error) (done bool, err error) {
	chunk := make([]byte, 64<<10)
	for {
		n, err := r.todo[0].Read(chunk)
		r.buf = append(r.buf, chunk[:n]...)
		for {
			i := bytes.IndexByte(r.buf, '\n')
			if i < 0 {
				break
			}
			rec, ok := r.parse(r.buf[:i])
			r.buf = r.buf[i+1:]
			if !ok || (!r.opt.Since.IsZero() && rec.Time.Before(r.opt.Since)) {
				continue
			}
			if !r.opt.Until.IsZero() && rec.Time.After(r.opt.Until) {
				return true, nil
			}
			if (rec.Stderr && !r.opt.Stderr) || (!rec.Stderr && !r.opt.Stdout) {
				continue
			}
			if err := f(rec); err != nil {
				return false, err
			}
		}
		if len(r.buf) > maxEncodedLine {
			r.buf = nil // not a line of ours
		}
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("read log: %w", err)
		}
	}
}

// parse decodes one line; a damaged one (torn by a kill) is skipped.
func (r *logReader) parse(b []byte) (weft.LogRecord, bool) {
	var l logLine
	if err := json.Unmarshal(b, &l); err != nil || l.Time.IsZero() {
		return weft.LogRecord{}, false
	}
	return weft.LogRecord{
		Task: r.opt.Task, Node: r.opt.Node, Stderr: l.Stream == streamStderr,
		Time: l.Time, Line: []byte(l.Log),
	}, true
}

// follow delivers new lines until the log has ended, Until has passed, or ctx ends.
func (r *logReader) follow(ctx context.Context, f func(weft.LogRecord) error) error {
	var quietSince time.Time
	sawEnd := false
	heard := func(rec weft.LogRecord) error {
		quietSince = time.Now()
		return f(rec)
	}
	for {
		ended := false
		select {
		case <-r.opt.Ended: // never for nil
			if !sawEnd {
				sawEnd, quietSince = true, time.Now()
			}
			// Asked before the drain below: who has let go writes no more.
			ended = !hasWriter(r.dir) || time.Since(quietSince) > endQuiet
		default:
		}
		late := !r.opt.Until.IsZero() && time.Now().After(r.opt.Until)
		done, err := r.catchUp(ctx, heard)
		if err != nil || done || ended || late {
			return err
		}
		if err := pause(ctx, followEvery); err != nil {
			return err
		}
	}
}

// catchUp reads to the present end, through any rotations.
func (r *logReader) catchUp(ctx context.Context, f func(weft.LogRecord) error) (done bool, err error) {
	if len(r.todo) == 0 {
		if err := r.open(ctx); err != nil || len(r.todo) == 0 {
			return false, err
		}
	}
	for {
		for len(r.todo) > 1 {
			if done, err = r.drain(f); done || err != nil {
				return done, err
			}
			r.next()
		}
		// The order matters: only a part that was superseded before it was
		// read to its end is complete.
		current, err := isCurrent(r.todo[0], r.dir)
		if err != nil {
			return false, err
		}
		if done, err = r.drain(f); done || err != nil || current {
			return done, err
		}
		more, err := r.successors(ctx)
		if err != nil || !more {
			return false, err
		}
	}
}

// successors replaces todo by the part being read and all newer ones. If it was
// rotated away meanwhile, all parts that are left are newer.
func (r *logReader) successors(ctx context.Context) (more bool, err error) {
	old := r.todo[0]
	r.todo = nil
	if err := r.open(ctx); err != nil {
		r.todo = []*os.File{old}
		return false, err
	}
	fi, err := old.Stat()
	if err != nil {
		old.Close()
		return false, fmt.Errorf("read log: %w", err)
	}
	for i, f := range r.todo {
		g, err := f.Stat()
		if err != nil {
			old.Close()
			return false, fmt.Errorf("read log: %w", err)
		}
		if os.SameFile(fi, g) {
			for _, done := range r.todo[:i+1] {
				done.Close()
			}
			r.todo = append([]*os.File{old}, r.todo[i+1:]...)
			return len(r.todo) > 1, nil
		}
	}
	if len(r.todo) == 0 { // deleted, or its writer is between two renames
		r.todo = []*os.File{old}
		return false, nil
	}
	old.Close()
	r.buf = nil
	return true, nil
}

// hasWriter reports whether a LogWriter has the log open.
func hasWriter(dir string) bool {
	f, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		return false
	}
	defer f.Close()
	return syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) != nil
}

// pause waits for d or the end of ctx, whose error it returns.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
