package logstore

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"slices"
	"syscall"
)

// fakeDisk is a folder that loses what a real one may lose. A power cut keeps any
// of the sectors, names and removals that were not synced; the end of a process
// keeps all that it had done; a failed sync keeps any of the sectors and then
// takes all for written, as Linux does.
type fakeDisk struct {
	draw func(n int) int // 0 to n-1, by the test

	names, durable map[string]*inode
	pending        []func(map[string]*inode) // changes of names that are not synced

	alive *fakeProcess // which has the folder
}

// inode is a file: what the kernel has of it, what the disk has, and which
// sectors the kernel still means to write.
type inode struct {
	cached, durable []byte
	dirty           map[int]bool
	sized           bool // the disk knows its size
}

// fakeProcess is one process's view. After left more calls it dies within a
// call, or its disk fails to sync.
type fakeProcess struct {
	d       *fakeDisk
	left    int // -1: it lives
	dead    bool
	eio     bool // it does not die, but its next sync fails, when left is 0
	calls   int
	handles int
}

var (
	errDead = errors.New("the process is dead")
	errEIO  = syscall.EIO
)

func newFakeDisk(draw func(int) int) *fakeDisk {
	return &fakeDisk{draw: draw, names: map[string]*inode{}, durable: map[string]*inode{}}
}

// process starts one; the one before must be dead or have closed the folder.
func (d *fakeDisk) process(t interface{ Fatal(...any) }) *fakeProcess {
	if d.alive != nil && !d.alive.dead {
		t.Fatal("the folder has two owners")
	}
	d.alive = &fakeProcess{d: d, left: -1}
	return d.alive
}

func (d *fakeDisk) coin() bool { return d.draw(2) == 1 }

// powerCut leaves what is on the disk.
func (d *fakeDisk) powerCut() {
	for _, op := range d.pending {
		if d.coin() {
			op(d.durable)
		}
	}
	d.pending, d.names = nil, maps.Clone(d.durable)
	for _, name := range slices.Sorted(maps.Keys(d.names)) {
		f := d.names[name]
		f.write(d, false)
		f.cached = slices.Clone(f.durable)
	}
}

// write brings dirty sectors to the disk: all, or any.
func (f *inode) write(d *fakeDisk, all bool) {
	if !f.sized && (all || d.coin()) {
		f.durable, f.sized = make([]byte, len(f.cached)), true
	}
	for _, s := range slices.Sorted(maps.Keys(f.dirty)) {
		from, to := s*sectorBytes, min((s+1)*sectorBytes, len(f.durable))
		if from < to && (all || d.coin()) {
			copy(f.durable[from:to], f.cached[from:to])
		}
	}
	f.dirty = map[int]bool{}
}

// step is the beginning of a call. If the process dies in it, does says whether
// the call still has its effect.
func (p *fakeProcess) step() (does bool, err error) {
	if p.dead {
		return false, errDead
	}
	p.calls++
	if p.eio || p.left != 0 {
		p.left = max(p.left-1, -1)
		if p.eio {
			p.left = max(p.left, 0)
		}
		return true, nil
	}
	p.dead = true
	return p.d.coin(), errDead
}

// naming changes names, now and, once synced, on the disk.
func (p *fakeProcess) naming(op func(map[string]*inode)) error {
	does, err := p.step()
	if does {
		op(p.d.names)
		p.d.pending = append(p.d.pending, op)
	}
	return err
}

func (p *fakeProcess) List() ([]string, error) {
	_, err := p.step()
	return slices.Sorted(maps.Keys(p.d.names)), err
}

func (p *fakeProcess) Create(name string, size int64) (file, error) {
	f := &inode{cached: make([]byte, size), dirty: map[int]bool{}}
	if err := p.naming(func(names map[string]*inode) { names[name] = f }); err != nil {
		return nil, err
	}
	p.handles++
	return &fakeFile{p: p, f: f}, nil
}

func (p *fakeProcess) Open(name string) (file, int64, error) {
	_, err := p.step()
	f, ok := p.d.names[name]
	if err != nil || !ok {
		return nil, 0, errors.Join(err, fs.ErrNotExist)
	}
	p.handles++
	return &fakeFile{p: p, f: f}, int64(len(f.cached)), nil
}

func (p *fakeProcess) Rename(from, to string) error {
	if p.d.names[from] == nil {
		return fs.ErrNotExist
	}
	f := p.d.names[from]
	return p.naming(func(names map[string]*inode) {
		delete(names, from)
		names[to] = f
	})
}

func (p *fakeProcess) Remove(name string) error {
	if p.d.names[name] == nil {
		return fs.ErrNotExist
	}
	return p.naming(func(names map[string]*inode) { delete(names, name) })
}

func (p *fakeProcess) Sync() error {
	does, err := p.step()
	if does {
		for _, op := range p.d.pending {
			op(p.d.durable)
		}
		p.d.pending = nil
	}
	return err
}

func (p *fakeProcess) Close() error {
	if p.d.alive == p {
		p.d.alive = nil
	}
	return nil
}

type fakeFile struct {
	p      *fakeProcess
	f      *inode
	closed bool
}

func (f *fakeFile) ReadAt(b []byte, off int64) (int, error) {
	if f.closed {
		return 0, fs.ErrClosed
	}
	if f.p.dead {
		return 0, errDead
	}
	if n := copy(b, f.f.cached[min(off, int64(len(f.f.cached))):]); n < len(b) {
		return n, io.EOF
	}
	return len(b), nil
}

func (f *fakeFile) WriteAt(b []byte, off int64) (int, error) {
	if f.closed {
		return 0, fs.ErrClosed
	}
	if off+int64(len(b)) > int64(len(f.f.cached)) {
		return 0, errors.New("a write beyond what is allocated")
	}
	does, err := f.p.step()
	n := int64(len(b))
	if err != nil && !does && n > 0 { // a kill ends a write between two pages
		n = min(n, (off/4096+int64(f.p.d.draw(3)))*4096-off)
		n = max(n, 0)
	}
	copy(f.f.cached[off:], b[:n])
	for s := off / sectorBytes; s*sectorBytes < off+n; s++ {
		f.f.dirty[int(s)] = true
	}
	return int(n), err
}

func (f *fakeFile) Sync() error {
	if f.closed {
		return fs.ErrClosed
	}
	if f.p.eio && f.p.left == 0 {
		f.f.write(f.p.d, false)
		f.p.eio, f.p.left = false, -1
		return errEIO
	}
	does, err := f.p.step()
	if does {
		f.f.write(f.p.d, true)
	}
	return err
}

func (f *fakeFile) Close() error {
	if f.closed {
		return fs.ErrClosed
	}
	f.closed = true
	f.p.handles--
	return nil
}
