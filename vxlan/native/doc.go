// Package native finds out to which nodes the packets of a network may go without
// encapsulation, by sending some and waiting for their echo.
//
// It owns the decision (pure: time, randomness and echoes are passed in) and the
// loop that asks. How a packet is sent, and that its echo has come, is known to
// the Link, which package bpf has. The agent says by Watch which ways matter and
// reads what is proven. A Prober is run by one goroutine of its own; a mutex
// guards what the methods share with it. DESIGN.md says why a proof is believed.
package native
