// Package reconcile decides which tasks a service should have.
//
// It is pure: one service with its tasks, the nodes and the time go in; tasks
// to create, desired states to change and records to delete come out. It owns
// scaling, restarts, replacement of lost tasks, rolling updates and the task
// history; it does not choose nodes (schedule) or allocate addresses (ipam)
// and stores nothing. The leader's loop runs it after every change of the
// service, its tasks or a node, and at Output.Again, and proposes the output
// as one command. Safe for concurrent use: nothing given to it is written.
package reconcile
