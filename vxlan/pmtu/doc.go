// Package pmtu finds out how large the packets are that the underlay carries to
// other nodes, by sending some.
//
// It owns the search (pure: time, randomness and the routes are passed in), the
// format of its packets, and the sockets. It does not know what the sizes are
// for: the agent asks for peers by Watch and reads MTUs. A Prober is run by one
// goroutine of its own; a mutex guards what the methods share with it.
package pmtu
