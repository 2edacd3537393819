// Package orchestrator is a manager of the cluster: a member of the Raft group
// and, while it leads, the one place where decisions are taken.
//
// It owns the Raft node (log, snapshots, membership of managers), leadership,
// allocation of addresses, ports and VNIs, the loop that drives package
// reconcile and package schedule, liveness of nodes, and the cluster-wide calls
// of package wire (Control, Dispatcher, Membership). It does not own what a
// change means (package state), what an agent is told (package dispatch), nor
// how calls reach it (package wire).
//
// Run belongs to the daemon of a manager. Everything that only a leader does
// runs under one context that ends with the term; a new term builds all of its
// memory from the state anew, so nothing but the log is carried over.
package orchestrator
