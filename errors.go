package weft

import (
	"errors"
	"strings"
)

// Sentinel errors. Wrap them with %w and a text that names the object and says
// what to do; api turns each into one HTTP status.
var (
	// ErrNotFound: the named object does not exist (HTTP 404).
	ErrNotFound = errors.New("not found")
	// ErrConflict: the name, address or port is taken, or the object is in
	// use (HTTP 409).
	ErrConflict = errors.New("conflict")
	// ErrInvalid: the request itself is wrong; repeating it cannot help
	// (HTTP 400).
	ErrInvalid = errors.New("invalid argument")
	// ErrUnavailable: the right answer is not to be had now (no leader, the
	// node is not part of a cluster, a peer is unreachable); repeating the
	// request later may help (HTTP 503).
	ErrUnavailable = errors.New("unavailable")
	// ErrUnsupported: this kernel or this version of weft cannot do it
	// (HTTP 501). Kernel probes wrap it too; only then may a test skip.
	ErrUnsupported = errors.New("unsupported")
	// ErrForbidden: the caller may not do this (HTTP 403).
	ErrForbidden = errors.New("forbidden")
	// ErrOutOfSequence: the object has changed since the caller read it
	// (optimistic lock; HTTP 400 with Docker's sentence).
	ErrOutOfSequence = errors.New("update out of sequence")
)

// Text is what people read of an error: its message without the bare sentinels
// that class it ("…: invalid argument"). ErrNotFound stays: "service web: not
// found" needs it.
func Text(err error) string {
	msg := err.Error()
	for _, s := range []error{ErrInvalid, ErrForbidden, ErrConflict, ErrUnsupported, ErrUnavailable} {
		if !errors.Is(err, s) {
			continue
		}
		word := s.Error()
		short := strings.TrimSuffix(strings.TrimPrefix(msg, word+": "), ": "+word)
		short = strings.ReplaceAll(short, ": "+word+": ", ": ")
		short = strings.ReplaceAll(short, ": "+word+"\n", "\n")
		if short != "" {
			msg = short
		}
	}
	return msg
}

// NoLeader is the one sentence that every call answers while the cluster has
// no leader. Nothing is queued.
const NoLeader = "the cluster has no leader: a majority of the managers is not reachable; check 'weft node ls' on another manager and try again"

// NotInCluster is the sentence for a node that has neither initialised nor
// joined a cluster. Docker's clients look for "This node is not a swarm manager".
const NotInCluster = `This node is not a swarm manager. Use "weft swarm init" or "weft swarm join" to connect this node to a cluster and try again`
