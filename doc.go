// Package weft is the shared vocabulary of the project: identifiers, the
// objects of a cluster (node, network, service, task, endpoint, port), the
// task state table, sentinel errors, validation, kernel object names and the
// attribute keys of the log.
//
// It owns words, not behaviour: it imports nothing of weft, does no I/O,
// starts no goroutine and holds no state. Every value in it is plain data and
// may be copied; a value that was handed to another package is never written
// again by its sender (maps and slices inside count as handed over too).
package weft

// Version is the release of weft, set by the linker (-X) from git describe.
var Version = "dev"
