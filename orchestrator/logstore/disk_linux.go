package logstore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// lockName is the file by whose lock a store owns its folder.
const lockName = "lock"

// folder is a disk of real files.
type folder struct {
	dir, lock *os.File
}

// openFolder makes path if it is not there, and locks it.
func openFolder(path string) (_ *folder, err error) {
	if err := makeFolder(path); err != nil {
		return nil, err
	}
	d := &folder{}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if d.dir, err = os.Open(path); err != nil {
		return nil, fmt.Errorf("open folder of the raft log: %w", err)
	}
	if d.lock, err = os.OpenFile(filepath.Join(path, lockName), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("open lock of the raft log: %w", err)
	}
	err = control(d.lock, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("the raft log in %s is in use: another weft daemon runs with this data folder", path)
	}
	if err != nil {
		return nil, fmt.Errorf("lock the raft log in %s: %w", path, err)
	}
	return d, nil
}

// makeFolder makes a folder and its parents such that they survive a power cut.
func makeFolder(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	parent := filepath.Dir(path)
	if err := makeFolder(parent); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create folder of the raft log: %w", err)
	}
	f, err := os.Open(parent)
	if err != nil {
		return fmt.Errorf("create folder of the raft log: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("create folder of the raft log: %w", err)
	}
	return nil
}

func (d *folder) path(name string) string { return filepath.Join(d.dir.Name(), name) }

// List implements disk.
func (d *folder) List() ([]string, error) {
	list, err := os.ReadDir(d.dir.Name())
	if err != nil {
		return nil, fmt.Errorf("list raft log: %w", err)
	}
	var out []string
	for _, e := range list {
		out = append(out, e.Name())
	}
	return out, nil
}

// Create implements disk.
func (d *folder) Create(name string, size int64) (file, error) {
	f, err := os.OpenFile(d.path(name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create segment of the raft log: %w", err)
	}
	if err := allocate(f, size); err != nil {
		return nil, errors.Join(fmt.Errorf("allocate %d bytes for %s: %w", size, f.Name(), err), f.Close())
	}
	return realFile{f}, nil
}

// allocate gives an empty file size bytes of room, which read as zeros.
func allocate(f *os.File, size int64) error {
	err := control(f, func(fd int) error { return unix.Fallocate(fd, 0, 0, size) })
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	zeros := make([]byte, 1<<20) // a file system without fallocate
	for off := int64(0); off < size; off += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), size-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// Open implements disk.
func (d *folder) Open(name string) (file, int64, error) {
	f, err := os.OpenFile(d.path(name), os.O_RDWR, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("open segment of the raft log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("open segment of the raft log: %w", err), f.Close())
	}
	return realFile{f}, st.Size(), nil
}

// Rename implements disk.
func (d *folder) Rename(from, to string) error { return os.Rename(d.path(from), d.path(to)) }

// Remove implements disk.
func (d *folder) Remove(name string) error { return os.Remove(d.path(name)) }

// Sync implements disk.
func (d *folder) Sync() error { return d.dir.Sync() }

// Close implements disk.
func (d *folder) Close() error {
	var errs []error
	for _, f := range []*os.File{d.lock, d.dir} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// realFile differs from os.File in Sync alone.
type realFile struct{ *os.File }

// Sync leaves out times and what else is not needed to read the data.
func (f realFile) Sync() error {
	return control(f.File, unix.Fdatasync)
}

// control calls f with the descriptor, which stays open meanwhile.
func control(file *os.File, f func(fd int) error) error {
	c, err := file.SyscallConn()
	if err != nil {
		return err
	}
	cerr := c.Control(func(fd uintptr) {
		for {
			if err = f(int(fd)); err != unix.EINTR {
				return
			}
		}
	})
	return errors.Join(cerr, err)
}
