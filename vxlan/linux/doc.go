// Package linux makes overlay networks in the Linux kernel: the bridge engine
// of vxlan.Kernel.
//
// Each network has a hidden namespace with a bridge and a VXLAN device in it;
// the device's UDP socket stays in the host's namespace. Nothing is learnt and
// nothing unknown is flooded to other hosts: every entry is written by Apply,
// and the bridge answers ARP and neighbour discovery for what is elsewhere.
// DESIGN.md draws it.
//
// It owns the hidden namespaces and all in them, tasks' ports inside the tasks'
// namespaces, and the host's leg. It does not own the tasks' namespaces. The
// agent calls Apply, one at a time, from a goroutine whose thread is in the
// host's namespace; the package starts no goroutine that outlives a call.
package linux
