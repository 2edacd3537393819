package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/logstore"
)

const (
	// logCacheEntries are the newest entries in memory for followers that are a
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
	if err := refuseOldLog(dir); err != nil {
		return nil, nil, err
	}
	s, err := logstore.Open(ctx, logstore.Config{Dir: filepath.Join(dir, "entries"), Log: m.cfg.Log})
	if err != nil {
		return nil, nil, fmt.Errorf("open raft log: %w", err)
	}
	cache, err := raft.NewLogCache(logCacheEntries, s)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make cache of the raft log: %w", err), s.Close())
	}
	snaps, err := raft.NewFileSnapshotStoreWithLogger(dir, keptSnapshots, newRaftLogger(ctx, m.cfg.Log, "raft-snapshot"))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open raft snapshots in %s: %w", dir, err), s.Close())
	}
	return &Stores{Log: cache, Stable: s, Snapshots: snaps, Failed: s.Failed(), Err: s.Err}, s, nil
}

// refuseOldLog: builds before this one kept the log in another format. To begin
// an empty one beside it would forget what this manager has promised.
func refuseOldLog(dir string) error {
	old := filepath.Join(dir, "log")
	switch _, err := os.Stat(filepath.Join(old, "wal-meta.db")); {
	case err == nil:
		return fmt.Errorf("%w: the raft log in %s is of an earlier build, which this one does not read; nothing was changed: go back to that build, or take this manager "+
			"out of the cluster ('weft swarm leave --force' here, then 'weft node rm --force' on another manager) and let it join again", weft.ErrUnsupported, old)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("look for a raft log of an earlier build: %w", err)
	}
	return nil
}
