// Package wg encrypts what encrypted networks send between nodes: WireGuard in
// the kernel where it is there, else in a process of weft's own.
//
// It owns the namespace in which the two WireGuard devices of a node live, what
// is routed there, the node's private keys and the child process. It does not
// own networks, ports and uplinks (vxlan/linux, vxlan/bpf) nor the translation of
// service addresses (ingress). An Engine wraps the overlay's vxlan.Kernel; the caller of that seam
// runs it, one Apply at a time.
package wg
