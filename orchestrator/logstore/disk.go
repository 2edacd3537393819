package logstore

import "io"

// disk is a folder of files. Whatever it is told to do may be undone by a
// power cut, in part and in any order, until the matching Sync has returned.
type disk interface {
	// List names all files.
	List() ([]string, error)
	// Create makes a file, or empties it, of size zeros. The room is allocated:
	// writing within it never fails for want of room.
	Create(name string, size int64) (file, error)
	// Open opens a file and tells its size.
	Open(name string) (file, int64, error)
	Rename(from, to string) error
	Remove(name string) error
	// Sync forces what was made, renamed and removed to the disk.
	Sync() error
	// Close lets another store have the folder.
	Close() error
}

// file may be read while it is written and closed.
type file interface {
	io.ReaderAt
	io.WriterAt
	// Sync forces what was written to the disk. After an error nobody knows what
	// is there: the kernel forgets what it could not write.
	Sync() error
	Close() error
}
