// Package dispatch is the leader's side of the agents' sessions: it computes
// from the state what each node must know, sends it in full once and in
// numbered increments after, and turns the nodes' reports into commands.
//
// Nothing is queued for an agent. A session remembers the set that it has sent
// and, when it is woken and free, sends the difference to the newest one; an
// agent that reads slowly gets fewer and larger increments. Run belongs to one
// term of leadership: package orchestrator starts it, and its end ends all
// sessions.
package dispatch
