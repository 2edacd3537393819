package orchestrator

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft/orchestrator/state"
)

// fsm adapts a state.Store to Raft.
type fsm struct {
	store *state.Store
	// fatal receives one error when an entry cannot be understood; it has
	// room for it and is never closed.
	fatal chan error

	// mu guards: broken.
	mu sync.Mutex
	// broken is set for good by the first entry that cannot be understood:
	// a member that skipped it would silently hold another state.
	broken error
}

func newFSM(s *state.Store) *fsm { return &fsm{store: s, fatal: make(chan error, 1)} }

func (f *fsm) err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.broken
}

// Apply implements raft.FSM. The response is []error, one per command, or an
// error for all of them.
func (f *fsm) Apply(l *raft.Log) any {
	if err := f.err(); err != nil {
		return err
	}
	results, err := f.store.Apply(l.Index, l.Data)
	if err != nil {
		f.mu.Lock()
		f.broken = err
		f.mu.Unlock()
		f.fatal <- err
		return err
	}
	return results
}

// Snapshot implements raft.FSM; it costs nothing, Persist does the work.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if err := f.err(); err != nil {
		return nil, err
	}
	return fsmSnapshot{f.store.View()}, nil
}

// Restore implements raft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error {
	err := f.store.Restore(r)
	if cerr := r.Close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("close snapshot: %w", cerr))
	}
	return err
}

type fsmSnapshot struct{ view *state.Snapshot }

// Persist implements raft.FSMSnapshot.
func (s fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.view.Persist(sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (s fsmSnapshot) Release() {}
