package state

import (
	"fmt"
	"sync"

	"github.com/hashicorp/go-memdb"
)

// Store is the replicated state machine: Apply and Restore write (one caller
// at a time, Raft's), everything else reads and may be called concurrently.
type Store struct {
	// mu guards: db, index, subs. It is held while an entry is applied, so
	// that no Snapshot shows half an entry.
	mu    sync.Mutex
	db    *memdb.MemDB
	index uint64
	subs  map[*Subscription]struct{}
}

// New is an empty store at index 0.
func New() *Store {
	return &Store{db: newDB(), subs: map[*Subscription]struct{}{}}
}

func newDB() *memdb.MemDB {
	db, err := memdb.NewMemDB(schema())
	if err != nil {
		panic(fmt.Sprintf("schema of the state: %v", err)) // a constant of this package
	}
	return db
}

// Apply decodes and applies the log entry at index. The first result has one
// error per command of the entry, by the sentinels of package weft; a command
// with an error has changed nothing. The second is fatal: the entry cannot be
// understood, the state is not advanced, and this member must stop.
func (s *Store) Apply(index uint64, entry []byte) ([]error, error) {
	cmds, err := DecodeEntry(entry)
	if err != nil {
		return nil, fmt.Errorf("apply log entry %d: %w", index, err)
	}
	results := make([]error, len(cmds))
	changed := newChanged()
	s.mu.Lock()
	for i := range cmds {
		// memdb has no nested transactions: one each, so that a command
		// that fails half-way leaves nothing.
		c := newChanged()
		txn := s.db.Txn(true)
		if results[i] = applyCommand(&tx{Txn: txn, index: index, at: cmds[i].At, changed: &c}, cmds[i].Changes); results[i] != nil {
			txn.Abort()
			continue
		}
		txn.Commit()
		changed.merge(&c)
	}
	s.index = index
	s.mu.Unlock()
	s.publish(&changed)
	return results, nil
}

// Subscribe starts to collect changes; the first Take has All set.
func (s *Store) Subscribe() *Subscription {
	sub := &Subscription{store: s, c: make(chan struct{}, 1), pending: newChanged()}
	all := newChanged()
	all.All = true
	sub.add(&all)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.subs[sub] = struct{}{}
	return sub
}

// View is an immutable snapshot of the newest state. It costs no copy and may
// be kept.
func (s *Store) View() *Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &Snapshot{txn: s.db.Txn(false), index: s.index}
}

// Index is the log index of the last applied entry.
func (s *Store) Index() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index
}

func (s *Store) publish(c *Changed) {
	if c.Empty() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for sub := range s.subs {
		sub.add(c)
	}
}
