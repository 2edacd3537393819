package orchestrator

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// watched is a Raft transport that notes what followers answer: Raft itself
// does not tell how far a follower has come, nor when it was last heard, nor how
// long its answer took.
// Heartbeats pass through AppendEntries ten times per heartbeat timeout, so
// that noting those is enough; the pipeline is left alone.
type watched struct {
	raft.Transport
	raft.WithPreVote

	// mu guards: peers, rounds.
	mu     sync.Mutex
	peers  map[raft.ServerID]peerProgress
	rounds map[raft.ServerID]round
}

// round is how long a question and its answer take.
type round struct {
	took time.Duration // smoothed
	at   time.Time     // of the last answer
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
	return &watched{Transport: t, WithPreVote: t, peers: map[raft.ServerID]peerProgress{}, rounds: map[raft.ServerID]round{}}
}

// AppendEntries implements raft.Transport.
func (w *watched) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	began := time.Now()
	err := w.Transport.AppendEntries(id, target, args, resp)
	if err == nil {
		w.answered(id, began)
		w.mu.Lock()
		w.peers[id] = peerProgress{last: resp.LastLog, heard: time.Now()}
		w.mu.Unlock()
	}
	return err
}

// RequestPreVote implements raft.WithPreVote: it is how a follower, which asks
// nothing else, learns how far the others are.
func (w *watched) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	began := time.Now()
	err := w.WithPreVote.RequestPreVote(id, target, args, resp)
	if err == nil {
		w.answered(id, began)
	}
	return err
}

// answered notes a round trip, a quarter of which counts.
func (w *watched) answered(id raft.ServerID, began time.Time) {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	r := w.rounds[id]
	if took := now.Sub(began); now.Sub(r.at) > distanceFor {
		r.took = took
	} else {
		r.took += (took - r.took) / 4
	}
	r.at = now
	w.rounds[id] = r
}

// farthest is the longest of the round trips that still count; 0 = none is known.
func (w *watched) farthest(now time.Time) (d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.rounds {
		if now.Sub(r.at) <= distanceFor {
			d = max(d, r.took)
		}
	}
	return d
}

func (w *watched) progress(id raft.ServerID) peerProgress {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.peers[id]
}
