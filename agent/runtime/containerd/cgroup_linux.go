package containerd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

const cgroupRoot = "/sys/fs/cgroup"

// unifiedCgroups reports whether the machine has only cgroup v2.
func unifiedCgroups() bool {
	var st unix.Statfs_t
	return unix.Statfs(cgroupRoot, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// hierarchies lists the mounted cgroup trees: one on v2; on v1 and hybrid one
// per controller (two names may be one tree) and perhaps "unified".
func hierarchies() ([]string, error) {
	if unifiedCgroups() {
		return []string{cgroupRoot}, nil
	}
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil, fmt.Errorf("list cgroup hierarchies: %w", err)
	}
	var all []string
	for _, e := range entries {
		var st unix.Statfs_t
		p := filepath.Join(cgroupRoot, e.Name())
		if e.Type()&os.ModeSymlink == 0 && unix.Statfs(p, &st) == nil &&
			(st.Type == unix.CGROUP_SUPER_MAGIC || st.Type == unix.CGROUP2_SUPER_MAGIC) {
			all = append(all, p)
		}
	}
	return all, nil
}

// RemoveGroups removes the folders of a node's cgroups in every hierarchy, and the one of
// all nodes when it was the last. One that is in use stays: it is not empty.
func RemoveGroups(node weft.ID) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, root := range roots {
		for dir := filepath.Join(root, "weft", string(node)); dir != root; dir = filepath.Dir(dir) {
			err := unix.Rmdir(dir)
			if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY) {
				break
			}
			if err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
			}
		}
	}
	return errors.Join(errs...)
}

// oomKilled reports whether the kernel killed a process of the cgroup for
// memory. The group outlives its processes until the task is deleted, so this
// needs no event and works after an adoption.
func oomKilled(cgroup string) bool {
	for _, f := range []string{
		filepath.Join(cgroupRoot, cgroup, "memory.events"),                // v2: "oom_kill N"
		filepath.Join(cgroupRoot, "memory", cgroup, "memory.oom_control"), // v1: the same words
	} {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok && n != "0" {
				return true
			}
		}
	}
	return false
}

// removeCgroups kills what is left in a cgroup and removes it from every tree.
func removeCgroups(ctx context.Context, cgroup string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		if err := removeCgroup(ctx, filepath.Join(root, cgroup)); err != nil {
			return err
		}
	}
	return nil
}

func removeCgroup(ctx context.Context, top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append(dirs, p)
		}
		return nil // a group that vanishes under the walk is what we want
	})
	if err != nil {
		return fmt.Errorf("remove cgroup %s: %w", top, err)
	}
	slices.Reverse(dirs) // children first
	for _, dir := range dirs {
		for {
			err := os.Remove(dir)
			if err == nil || errors.Is(err, os.ErrNotExist) {
				break
			}
			if !errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("remove cgroup: %w", err)
			}
			if err := killCgroup(dir); err != nil {
				return err
			}
			if serr := sleep(ctx, 5*time.Millisecond); serr != nil {
				return fmt.Errorf("remove cgroup %s: %w", dir, serr)
			}
		}
	}
	return nil
}

// killCgroup sends SIGKILL to every process of one cgroup directory.
func killCgroup(dir string) error {
	f, err := os.Open(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list processes of cgroup: %w", err)
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		pid, err := strconv.Atoi(sc.Text())
		if err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill process %d of cgroup %s: %w", pid, dir, err)
		}
	}
	return nil
}
