package containerd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// note is what containerd does not keep of a task. It lives below ExecRoot: a
// reboot ends the task as well.
type note struct {
	Version   int       `json:"version"` // 1
	StartedAt time.Time `json:"startedAt"`
	PID       int       `json:"pid"`
	Exit      *exitNote `json:"exit,omitempty"` // once seen
}

type exitNote struct {
	Code int       `json:"code"`
	OOM  bool      `json:"oom,omitempty"`
	At   time.Time `json:"at"`
}

func (e exitNote) known() runtime.Exit {
	return runtime.Exit{Code: e.Code, Known: true, OOM: e.OOM, At: e.At}
}

// notes are the files of notes, one a task. Whoever looks at a task that has
// ended files its exit, several at once: those who wait for it and those who list.
type notes struct {
	dir string
	mu  sync.Mutex // held over each change of a file
}

func (s *notes) path(task weft.ID) string { return filepath.Join(s.dir, string(task)+".json") }

// read gives a task's note, and whether it has one: it was started.
func (s *notes) read(task weft.ID) (note, bool) {
	var n note
	b, err := os.ReadFile(s.path(task))
	if err != nil || json.Unmarshal(b, &n) != nil || n.Version != 1 {
		return note{}, false
	}
	return n, true
}

// begin files that a task is started.
func (s *notes) begin(task weft.ID, n note) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.write(task, n)
}

// end files a task's exit and gives the one that was seen first. A task that is
// removed meanwhile gets no note again.
func (s *notes) end(task weft.ID, exit exitNote) (exitNote, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.read(task)
	if !ok {
		return exit, nil
	}
	if n.Exit != nil {
		return *n.Exit, nil
	}
	n.Exit = &exit
	return exit, s.write(task, n)
}

// forget removes a task's note; none is fine.
func (s *notes) forget(task weft.ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.Remove(s.path(task)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove note of task: %w", err)
	}
	return nil
}

func (s *notes) write(task weft.ID, n note) error {
	n.Version = 1
	b, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("encode task note: %w", err)
	}
	return writeFile(s.path(task), string(b)+"\n")
}
