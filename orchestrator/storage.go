package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"
)

const (
	// segmentBytes of the log are allocated ahead on disk. raft-wal's 64 MiB
	// would be most of a small manager's disk use; a segment this size
	// still holds ten thousands of entries.
	segmentBytes = 8 << 20
	// logCache keeps the newest entries in memory for followers that are a
	// little behind.
	logCacheEntries = 512
	// keptSnapshots: the newest and, should its file be damaged, the one before.
	keptSnapshots = 2
)

// openStores opens or creates the stores in dir/raft. The closer must be closed
// after Raft has shut down.
func (m *Manager) openStores(ctx context.Context) (*Stores, io.Closer, error) {
	if m.cfg.Stores != nil {
		return m.cfg.Stores, io.NopCloser(nil), nil
	}
	dir := filepath.Join(m.cfg.Dir, "raft")
	logs := filepath.Join(dir, "log")
	if err := os.MkdirAll(logs, 0o700); err != nil {
		return nil, nil, fmt.Errorf("create folder of the raft log: %w", err)
	}
	meta := &metadb.BoltMetaDB{}
	w, err := wal.Open(logs, wal.WithMetaStore(meta), wal.WithSegmentSize(segmentBytes), wal.WithLogger(newRaftLogger(ctx, m.cfg.Log, "raft-wal")))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open raft log in %s: %w", logs, err), meta.Close())
	}
	closer := logCloser{w, meta}
	cache, err := raft.NewLogCache(logCacheEntries, w)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make cache of the raft log: %w", err), closer.Close())
	}
	snaps, err := raft.NewFileSnapshotStoreWithLogger(dir, keptSnapshots, newRaftLogger(ctx, m.cfg.Log, "raft-snapshot"))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open raft snapshots in %s: %w", dir, err), closer.Close())
	}
	return &Stores{Log: cache, Stable: w, Snapshots: snaps}, closer, nil
}

// logCloser closes the log and then its meta database, which raft-wal 0.4.0
// leaves open and locked: a manager that starts again in the same process, after
// leaving and joining, would wait for that lock for ever.
type logCloser struct {
	log  *wal.WAL
	meta *metadb.BoltMetaDB
}

// Close implements io.Closer.
func (c logCloser) Close() error {
	if err := errors.Join(c.log.Close(), c.meta.Close()); err != nil {
		return fmt.Errorf("close raft log: %w", err)
	}
	return nil
}
