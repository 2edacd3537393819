package vm

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
)

// The "newc" format of cpio (kernel: Documentation/driver-api/early-userspace/
// buffer-format.rst).
const (
	cpioMagic   = "070701"
	cpioTrailer = "TRAILER!!!"
	cpioAlign   = 4

	modeDir     = 0o040000
	modeFile    = 0o100000
	modeSymlink = 0o120000
)

// cpioWriter writes one archive; write errors stick and come out of close.
type cpioWriter struct {
	w     io.Writer
	n     int64 // bytes written
	inode int
	err   error
}

func (c *cpioWriter) write(b []byte) {
	if c.err == nil {
		var n int
		n, c.err = c.w.Write(b)
		c.n += int64(n)
	}
}

func (c *cpioWriter) pad() {
	if rest := c.n % cpioAlign; rest != 0 {
		c.write(make([]byte, cpioAlign-rest))
	}
}

func (c *cpioWriter) entry(name string, mode uint32, body []byte) {
	c.inode++
	links := 1
	if mode&modeDir == modeDir {
		links = 2
	}
	fields := []int{c.inode, int(mode), 0, 0, links, 0, len(body), 0, 0, 0, 0, len(name) + 1, 0}
	c.write([]byte(cpioMagic))
	for _, f := range fields {
		c.write(fmt.Appendf(nil, "%08X", f))
	}
	c.write(append([]byte(name), 0))
	c.pad()
	c.write(body)
	c.pad()
}

func (c *cpioWriter) close() error {
	c.entry(cpioTrailer, 0, nil)
	return c.err
}

// writeInitramfs packs files (path in the archive to path on disk, or to the
// target of a symlink after "->") with all folders they need.
func writeInitramfs(out string, files map[string]string) (err error) {
	f, err := os.Create(out)
	if err != nil {
		return fmt.Errorf("make initramfs: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return fmt.Errorf("make initramfs: %w", err)
	}
	defer func() { err = errors.Join(err, z.Close()) }()
	c := &cpioWriter{w: z}
	made := map[string]bool{".": true}
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		c.folders(filepath.Dir(name), made)
		if target, ok := cutPrefix(files[name]); ok {
			c.entry(name, modeSymlink|0o777, []byte(target))
			continue
		}
		body, err := os.ReadFile(files[name])
		if err != nil {
			return fmt.Errorf("make initramfs: %w", err)
		}
		c.entry(name, modeFile|0o755, body)
	}
	return c.close()
}

func (c *cpioWriter) folders(dir string, made map[string]bool) {
	if made[dir] {
		return
	}
	c.folders(filepath.Dir(dir), made)
	made[dir] = true
	c.entry(dir, modeDir|0o755, nil)
}

func cutPrefix(s string) (string, bool) {
	const arrow = "->"
	if len(s) > len(arrow) && s[:len(arrow)] == arrow {
		return s[len(arrow):], true
	}
	return s, false
}
