// Package state is the replicated state of a cluster: the commands of the Raft
// log, the state machine that applies them to tables (go-memdb), immutable
// views for readers, a feed of what changed, and the snapshot format.
//
// It owns what a change means and when it is refused (optimistic lock, unique
// names, states that only grow). It owns no decision: the leader decides from a
// view and proposes a command that carries every result, time and new id. It
// starts no goroutine. Raft's FSM goroutine (package orchestrator) is the one
// writer; any goroutine may read.
package state
