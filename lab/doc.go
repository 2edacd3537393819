// Package lab lays N hosts on one machine: each host is a network namespace
// with its own `weft daemon`, its own data and runtime folders and one link to
// a switch namespace. It is a user's command (`weft lab`), the ground of the
// system tests and of the benchmarks.
//
// It owns the namespaces, the links between them, the daemons' processes and
// the folders; it does not speak to the daemons' API itself (see Cluster,
// which the caller implements) and knows nothing of services. No link, address,
// route or rule is ever made in the machine's own network namespace.
//
// All state is in the kernel and in two folders, so every method of Lab may be
// called from a new process: nothing of the lab lives in the memory of the
// caller. Methods that change something hold a file lock on the lab's folder;
// two processes take turns. A Lab may be used from several goroutines.
package lab
