package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// groupRoot is the folder of all weft nodes in every cgroup hierarchy
// (weft.CgroupPath).
const groupRoot = "weft"

// mount is one line of proc(5) mountinfo.
type mount struct {
	Dir  string // field 5, unescaped
	Type string // field after the separator
}

// parseMounts reads proc(5) mountinfo. Only field 5 says where a mount is: the
// options of an overlay name folders too.
func parseMounts(b []byte) ([]mount, error) {
	var ms []mount
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(nil, 1<<20) // an overlay of many layers has long options
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		sep := slices.Index(f, "-")
		if sep < 6 || sep+1 >= len(f) {
			return nil, fmt.Errorf("parse mountinfo line %q: no separator", sc.Text())
		}
		ms = append(ms, mount{Dir: unescape(f[4]), Type: f[sep+1]})
	}
	return ms, sc.Err()
}

// unescape undoes the kernel's octal escapes (\040 for a space).
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func mounts() ([]mount, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return parseMounts(b)
}

// mountsBelow lists mount points at or below dir, the newest first: a mount on
// top of another is listed after it, so the reverse order always unmounts.
func mountsBelow(dir string) ([]string, error) {
	ms, err := mounts()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, m := range slices.Backward(ms) {
		if below(m.Dir, dir) {
			dirs = append(dirs, m.Dir)
		}
	}
	slices.SortStableFunc(dirs, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
	return dirs, nil
}

func unmountBelow(dir string) error {
	dirs, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, d := range dirs {
		err := unix.Unmount(d, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", d, err)
		}
	}
	return nil
}

// hierarchies are the mount points of all cgroup hierarchies, v1 and v2.
func hierarchies() ([]string, error) {
	ms, err := mounts()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, m := range ms {
		if (m.Type == "cgroup" || m.Type == "cgroup2") && !slices.Contains(dirs, m.Dir) {
			dirs = append(dirs, m.Dir)
		}
	}
	return dirs, nil
}

// groupsOf lists the cgroup folders of the nodes in every hierarchy. A node is
// known by its id, or by the first 8 characters of it, which namespace files
// carry.
func groupsOf(ids []string) ([]string, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, root := range roots {
		entries, err := os.ReadDir(filepath.Join(root, groupRoot))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list cgroups: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() && slices.ContainsFunc(ids, func(id string) bool { return strings.HasPrefix(e.Name(), id) }) {
				dirs = append(dirs, filepath.Join(root, groupRoot, e.Name()))
			}
		}
	}
	return dirs, nil
}

// removeGroups removes cgroups bottom-up. A group whose last process was just
// killed stays busy until it is reaped.
func removeGroups(ctx context.Context, dirs []string) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	for _, top := range dirs {
		var all []string
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("list cgroup %s: %w", top, err)
		}
		for _, d := range slices.Backward(all) {
			if err := removeGroup(ctx, d); err != nil {
				return err
			}
		}
		// The folder of all nodes, when this was the last one.
		err = unix.Rmdir(filepath.Dir(top))
		if err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove cgroup %s: %w", filepath.Dir(top), err)
		}
	}
	return nil
}

func removeGroup(ctx context.Context, dir string) error {
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		if pause(ctx, 5*time.Millisecond) != nil {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
}

// removeTree unmounts and removes everything at and below dir.
func removeTree(dir string) error {
	if err := unmountBelow(dir); err != nil {
		return err
	}
	// Never delete through a mount that stayed: it may show a person's files.
	left, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("remove %s: %s is still mounted", dir, left[0])
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}

// removeEmpty removes dir if it is there and empty.
func removeEmpty(dir string) error {
	err := unix.Rmdir(dir)
	if err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}
