// Package netns makes, enters, lists and removes named network namespaces:
// bind mounts of a namespace on a file.
//
// It owns the rule by which a Go program may change a thread's namespace: on a
// locked thread of its own, which is given back to the scheduler only if it is
// again where it was. It keeps no state and starts no goroutine that outlives
// a call. vxlan/linux, agent/sandbox, the ingress engines and lab use it.
package netns
