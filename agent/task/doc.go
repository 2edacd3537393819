// Package task drives one task through its states on its node.
//
// It owns the state machine: what to do next (Decide, a pure function), doing
// it once (Step) and doing it until the task is gone (Runner). What a step
// touches is behind Controller. The agent runs one Runner per assigned task.
//
//	desired running:  assigned → accepted → preparing → ready → starting → running → complete | failed
//	desired ready:    the same up to ready
//	desired shutdown: any → shutdown
//	desired remove:   any → shutdown → remove (record forgotten)
//
// Every step may be repeated after a crash: the recorded state may lag what
// exists by one step, never lead it.
package task
