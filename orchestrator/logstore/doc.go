// Package logstore keeps the log of a manager's Raft group, its term and its
// vote on disk: it implements hashicorp/raft's LogStore and StableStore.
//
// A store is a folder of segment files, read as one stream of batches. A batch
// is a list of records (an entry, a key's value, entries deleted from the front or
// from the end), is written with one write and one fdatasync, and counts as a
// whole or not at all. Deletion is a record like any other, so nothing that was
// written is ever changed; files of which nothing is needed any more are
// removed, oldest first.
//
// The format and the rules of recovery are pure functions of bytes (format.go,
// record.go, index.go, replay.go). The files are behind the interface disk.
// Nothing runs in the background. One lock orders the writers and is held while
// they wait for the disk; readers never wait for it.
package logstore
