package orchestrator

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// watched is a Raft transport that notes what followers answer: Raft itself
// does not tell how far a follower has come, nor when it was last heard.
// Heartbeats pass through AppendEntries ten times per heartbeat timeout, so
// that noting those is enough; the pipeline is left alone.
type watched struct {
	raft.Transport
	raft.WithPreVote

	// mu guards: peers.
	mu    sync.Mutex
	peers map[raft.ServerID]peerProgress
}

type peerProgress struct {
	last  uint64 // index of the newest entry in its log
	heard time.Time
}

// transport is what both of raft's transports are.
type transport interface {
	raft.Transport
	raft.WithPreVote
}

func watch(t transport) *watched {
	return &watched{Transport: t, WithPreVote: t, peers: map[raft.ServerID]peerProgress{}}
}

// AppendEntries implements raft.Transport.
func (w *watched) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	err := w.Transport.AppendEntries(id, target, args, resp)
	if err == nil {
		w.mu.Lock()
		w.peers[id] = peerProgress{last: resp.LastLog, heard: time.Now()}
		w.mu.Unlock()
	}
	return err
}

func (w *watched) progress(id raft.ServerID) peerProgress {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.peers[id]
}
