// Package agent is what a node does with the tasks that it is assigned.
//
// It owns the node's part of the task life cycle: it keeps a session to the
// leader, remembers on disk what it was told, drives one task.Runner per task,
// derives the data plane (agent/netstate) from its tasks and the gossip table,
// applies it in a fixed order, and reports what happened. It decides nothing
// about the cluster and knows no Docker JSON.
//
// An Agent is run by cmd for as long as the node is a member. Its state has one
// owner, the goroutine of Run's loop named in each field's comment; other
// goroutines send it events.
package agent
