package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"

	vish "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// nsfsMagic is the file system type of a namespace file (NSFS_MAGIC,
// linux/magic.h).
const nsfsMagic = 0x6e736673

// Handle is an open namespace. It keeps the namespace alive until Close.
type Handle struct {
	ns   vish.NsHandle
	path string
}

// Open opens the namespace file at path. A missing file, or one that is no
// namespace (the rest of a crash before the mount), is weft.ErrNotFound.
func Open(path string) (*Handle, error) {
	ok, err := isNamespace(path)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("open network namespace %s: %w", path, weft.ErrNotFound)
	}
	ns, err := vish.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return &Handle{ns: ns, path: path}, nil
}

// Current opens the namespace of the calling thread: the host's, for a caller
// outside of Do.
func Current() (*Handle, error) {
	ns, err := vish.Get()
	if err != nil {
		return nil, fmt.Errorf("open the current network namespace: %w", err)
	}
	return &Handle{ns: ns, path: "the current namespace"}, nil
}

// FD is the open file descriptor, for IFLA_NET_NS_FD. It is valid until Close.
func (h *Handle) FD() int { return int(h.ns) }

// Close releases the handle.
func (h *Handle) Close() error {
	if err := h.ns.Close(); err != nil {
		return fmt.Errorf("close network namespace %s: %w", h.path, err)
	}
	return nil
}

// Do runs f on a thread inside the namespace and waits for it. f must not start
// goroutines that rely on the namespace: they run on other threads. Sockets
// that f opens stay in the namespace. Safe for concurrent use.
func (h *Handle) Do(f func() error) error {
	return onThread(func() (bool, error) {
		host, err := vish.Get()
		if err != nil {
			return true, fmt.Errorf("open the current network namespace: %w", err)
		}
		defer host.Close()
		if err := vish.Set(h.ns); err != nil {
			return true, fmt.Errorf("enter network namespace %s: %w", h.path, err)
		}
		ferr := f()
		if err := vish.Set(host); err != nil {
			// The thread is in the wrong namespace: it is not given
			// back to the scheduler. What f did stands.
			return false, ferr
		}
		return true, ferr
	})
}

// Do opens the namespace file at path, runs f inside as Handle.Do does, and
// closes it.
func Do(path string, f func() error) error {
	h, err := Open(path)
	if err != nil {
		return err
	}
	defer h.Close()
	return h.Do(f)
}

// Create makes the namespace file dir/name and returns its path. The folder is
// made when missing; a namespace that exists already is kept. Two calls for
// the same name at the same time must be prevented by the caller.
func Create(dir, name string) (string, error) {
	if name == "" || name != filepath.Base(name) || name == "." || name == ".." {
		return "", fmt.Errorf("create network namespace %q: the name must be a plain file name: %w", name, weft.ErrInvalid)
	}
	path := filepath.Join(dir, name)
	if ok, err := isNamespace(path); err != nil || ok {
		return path, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("create network namespace %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o444)
	if err != nil {
		return "", fmt.Errorf("create network namespace %s: %w", path, err)
	}
	if err := f.Close(); err != nil {
		return "", fmt.Errorf("create network namespace %s: %w", path, err)
	}
	err = onThread(func() (bool, error) {
		// The thread is never given back: it lives in the new namespace
		// and ends with its goroutine.
		ns, err := vish.New()
		if err != nil {
			return false, fmt.Errorf("unshare for network namespace %s: %w", path, err)
		}
		defer ns.Close()
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return false, fmt.Errorf("mount network namespace %s: %w", path, err)
		}
		return false, nil
	})
	if err != nil {
		if rmErr := Remove(path); rmErr != nil {
			err = errors.Join(err, rmErr)
		}
		return "", err
	}
	return path, nil
}

// Remove unmounts and unlinks the namespace file. One that is not there is
// success. The namespace itself lives on while a process or socket uses it.
func Remove(path string) error {
	// More than one mount can be stacked if two creators ever raced; each
	// turn removes one, and the bound is there only against a loop for ever.
	for range 16 {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // not a mount point, not there
		}
		if err != nil {
			return fmt.Errorf("unmount network namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network namespace %s: %w", path, err)
	}
	return nil
}

// List returns the names in dir that begin with prefix, sorted, whether they
// are complete namespaces or the rest of a crash. A missing folder is empty.
func List(dir, prefix string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list network namespaces in %s: %w", dir, err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			names = append(names, e.Name())
		}
	}
	sort.Strings(names)
	return names, nil
}

func isNamespace(path string) (bool, error) {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at network namespace %s: %w", path, err)
	}
	return st.Type == nsfsMagic, nil
}

// onThread runs f on a thread of its own and waits. f says whether the thread
// is clean; one that is not ends with its goroutine.
//
// The process's first thread is never used: it cannot end, and /proc/self/ns
// shows its namespace to everyone who looks at the process.
func onThread(f func() (clean bool, err error)) error {
	done := make(chan error, 1) // closed by nobody: one value, one receiver
	var run func()
	run = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Held until the other goroutine has its own thread and is done.
			inner := make(chan struct{})
			go func() { defer close(inner); run() }()
			<-inner
			runtime.UnlockOSThread()
			return
		}
		clean, err := f()
		if clean {
			runtime.UnlockOSThread()
		}
		done <- err
	}
	go run()
	return <-done
}
