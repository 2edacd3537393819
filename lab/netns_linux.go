package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nsfsMagic is NSFS_MAGIC of linux/magic.h: the file system of namespace files.
const nsfsMagic = 0x6e736673

// onThread runs f on an operating system thread of its own that ends with it:
// f may change the thread's namespaces and need not change them back.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		done <- f()
	}()
	return <-done
}

// within runs f on a thread inside the network namespace of file.
func within(file string, f func() error) error {
	return onThread(func() error {
		if err := enter(file); err != nil {
			return err
		}
		return f()
	})
}

func enter(file string) error {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", file, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace %s: %w", file, err)
	}
	return nil
}

// withLinks runs f with a netlink socket inside the namespace of file.
func withLinks(file string, f func(*netlink.Handle) error) error {
	return within(file, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink in %s: %w", file, err)
		}
		defer h.Close()
		return f(h)
	})
}

// listTries bounds how often the links of a namespace are listed again: those of a
// host that makes ten tasks at once change while the kernel lists them.
const listTries = 10

// listLinks repeats a list that was interrupted by a change (NLM_F_DUMP_INTR,
// linux/netlink.h): such a list may lack links that were there all the time.
func listLinks(h *netlink.Handle) ([]netlink.Link, error) {
	for try := 1; ; try++ {
		links, err := h.LinkList()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == listTries {
			return links, err
		}
	}
}

// isNetNS reports whether file is a mounted network namespace, not the empty
// file that a crash between creation and mount leaves.
func isNetNS(file string) bool {
	var st unix.Statfs_t
	return unix.Statfs(file, &st) == nil && int64(st.Type) == nsfsMagic
}

// makeNetNS makes a network namespace with its loopback up and binds it to
// file. A namespace that is already there is kept.
func makeNetNS(file string) error {
	if isNetNS(file) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("make folder of namespace %s: %w", file, err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make namespace file: %w", err)
	}
	f.Close()
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace %s: %w", file, err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", file, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind network namespace to %s: %w", file, err)
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink in %s: %w", file, err)
		}
		defer h.Close()
		return upLoopback(h)
	})
}

func upLoopback(h *netlink.Handle) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// removeNetNS unbinds and deletes the file; the kernel frees the namespace
// when its last process is gone. A file that is not there is no error.
func removeNetNS(file string) error {
	for isNetNS(file) { // a crashed `up` may have bound it twice
		if err := unix.Unmount(file, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount namespace %s: %w", file, err)
		}
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove namespace file: %w", err)
	}
	return nil
}

// setSysctl writes one setting of the calling thread's network namespace.
func setSysctl(path, value string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0o644); err != nil {
		return fmt.Errorf("set %s to %s: %w", path, value, err)
	}
	return nil
}
