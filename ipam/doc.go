// Package ipam allocates the numbers of a cluster: subnets out of pools,
// addresses out of subnets, VXLAN network identifiers and published ports.
//
// Everything is a pure value: no storage, no I/O, no goroutine, no clock. The
// leader builds the values from the replicated state, asks, and proposes the
// answer as part of one command; the state machine never allocates. Values are
// not safe for concurrent use.
package ipam
