package runtime

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Limits of a log: Docker's json-file driver with the options max-size=10m and
// max-file=3, which is what weft always uses.
const (
	LogPartBytes = 10 << 20
	LogParts     = 3
)

// maxLogLine splits lines that are longer: Docker's json-file driver cuts at
// 16 KiB (moby daemon/logger/copier.go); the pieces carry no newline but the
// last.
const maxLogLine = 16 << 10

// logLine is one line on disk. Its shape is that of Docker's json-file
// driver and must not change: other tools read these files.
type logLine struct {
	Log    string    `json:"log"`
	Stream string    `json:"stream"`
	Time   time.Time `json:"time"`
}

const (
	streamStdout = "stdout"
	streamStderr = "stderr"
)

// LogFile is the newest part of the log in dir; older parts have ".1" and
// ".2" behind the name.
func LogFile(dir string) string { return filepath.Join(dir, "json.log") }

func logPart(dir string, n int) string {
	if n == 0 {
		return LogFile(dir)
	}
	return LogFile(dir) + "." + strconv.Itoa(n)
}

// LogWriter appends lines to a log and rotates it. It holds an exclusive lock
// on the directory's "lock" file while open, by which readers know that more
// may come. Safe for concurrent use.
type LogWriter struct {
	dir   string
	limit int64
	now   func() time.Time
	lock  *os.File

	// mu guards: f, size.
	mu   sync.Mutex
	f    *os.File
	size int64
}

// OpenLog opens the log in dir for writing, making the directory if needed.
// partBytes <= 0 means LogPartBytes. A log has one writer at a time; a second
// one gets an error.
func OpenLog(dir string, partBytes int64) (*LogWriter, error) {
	if partBytes <= 0 {
		partBytes = LogPartBytes
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make log directory: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log lock: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("lock log %s: another writer has it: %w", dir, err)
	}
	w := &LogWriter{dir: dir, limit: partBytes, now: time.Now, lock: lock}
	if err := w.openLocked(); err != nil {
		lock.Close()
		return nil, err
	}
	return w, nil
}

func (w *LogWriter) openLocked() error {
	f, err := os.OpenFile(LogFile(w.dir), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	size, err := endLine(f)
	if err != nil {
		f.Close()
		return fmt.Errorf("open log %s: %w", f.Name(), err)
	}
	w.f, w.size = f, size
	return nil
}

// endLine terminates a line that a killed writer left torn, so that the next
// one is not glued to it; readers skip the torn one.
func endLine(f *os.File) (int64, error) {
	fi, err := f.Stat()
	if err != nil || fi.Size() == 0 {
		return 0, err
	}
	var last [1]byte
	if _, err := f.ReadAt(last[:], fi.Size()-1); err != nil {
		return 0, err
	}
	if last[0] == '\n' {
		return fi.Size(), nil
	}
	if _, err := f.Write([]byte{'\n'}); err != nil {
		return 0, err
	}
	return fi.Size() + 1, nil
}

// Write appends one line (with its newline, if it has one).
func (w *LogWriter) Write(stderr bool, line []byte) error {
	l := logLine{Log: string(line), Stream: streamStdout}
	if stderr {
		l.Stream = streamStderr
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	l.Time = w.now().UTC() // under the lock: times in a log never go back
	b, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("encode log line: %w", err)
	}
	b = append(b, '\n')
	if w.f == nil || (w.size > 0 && w.size+int64(len(b)) > w.limit) {
		if err := w.rotateLocked(); err != nil {
			return err
		}
	}
	n, err := w.f.Write(b)
	w.size += int64(n)
	if err != nil {
		// A disk that fills up tears a line; end it when there is room
		// again, at the latest by the next rotation.
		return fmt.Errorf("write log: %w", err)
	}
	return nil
}

// rotateLocked shifts the parts. The newest file is renamed before its
// successor exists and never written again: a reader that sees the successor
// knows that the old part is complete.
func (w *LogWriter) rotateLocked() error {
	if w.f != nil {
		w.f.Close()
		w.f = nil
		for n := LogParts - 1; n > 0; n-- {
			err := os.Rename(logPart(w.dir, n-1), logPart(w.dir, n))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("rotate log: %w", err)
			}
		}
	}
	return w.openLocked()
}

// Copy writes everything from r, line by line, until EOF. A line that cannot
// be stored (full disk) is dropped: the container must never block on its log.
// The first such error is returned at the end.
func (w *LogWriter) Copy(stderr bool, r io.Reader) error {
	br := bufio.NewReaderSize(r, maxLogLine)
	var first error
	for {
		line, err := br.ReadSlice('\n')
		if len(line) > 0 {
			if werr := w.Write(stderr, line); werr != nil && first == nil {
				first = werr
			}
		}
		switch {
		case err == nil, errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF), errors.Is(err, os.ErrClosed), errors.Is(err, syscall.EIO): // EIO: a pty whose far side closed
			return first
		default:
			return errors.Join(first, fmt.Errorf("read output: %w", err))
		}
	}
}

// Close ends the log; readers that follow it see its end.
func (w *LogWriter) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var err error
	if w.f != nil {
		err = w.f.Close()
		w.f = nil
	}
	return errors.Join(err, w.lock.Close())
}
