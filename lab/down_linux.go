package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Down removes the lab: processes, mounts, links, namespaces, cgroups and
// folders. It needs neither a running daemon nor a whole lab, and may be
// repeated; removing a lab that does not exist succeeds.
func (l *Lab) Down(ctx context.Context) error {
	return l.locked(func() error {
		r, err := l.load()
		if err != nil {
			// Lost or foreign: go by the folders instead.
			l.cfg.Log.Debug("no usable record of the lab", weft.KeyErr, err)
			r = record{Hosts: 0}
		}
		n, err := l.hostsOnDisk(r.Hosts)
		if err != nil {
			return err
		}
		g, gctx := errgroup.WithContext(ctx)
		for _, h := range l.plan.hosts(n) {
			g.Go(func() error { return l.powerOff(gctx, h, r) })
		}
		if err := g.Wait(); err != nil {
			return err
		}
		if err := l.endStrays(ctx); err != nil {
			return err
		}
		for _, dir := range []string{l.plan.dataDir, l.plan.runDir} {
			if err := removeTree(dir); err != nil {
				return err
			}
			// The parents, when this was the last lab and weft made them.
			for range 2 {
				dir = filepath.Dir(dir)
				if filepath.Base(dir) != "lab" && filepath.Base(dir) != "weft" {
					break
				}
				if err := removeEmpty(dir); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// hostsOnDisk is the largest host number of which a trace is left.
func (l *Lab) hostsOnDisk(atLeast int) (int, error) {
	n := atLeast
	for _, dir := range []string{l.plan.dataDir, l.plan.runDir, filepath.Join(l.plan.runDir, "netns")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, fmt.Errorf("read %s: %w", dir, err)
		}
		for _, e := range entries {
			name, _, _ := strings.Cut(e.Name(), ".")
			if digits, ok := strings.CutPrefix(name, "h"); ok {
				if i, err := strconv.Atoi(digits); err == nil && i <= MaxHosts {
					n = max(n, i)
				}
			}
		}
	}
	return n, nil
}

// endStrays kills what `lab exec` and `lab client` left running in the
// namespaces of the lab, and removes the namespaces.
func (l *Lab) endStrays(ctx context.Context) error {
	t, err := l.Observe()
	if err != nil {
		return err
	}
	if err := killAll(ctx, t.signs, 0); err != nil {
		return fmt.Errorf("kill the processes of lab %s: %w", l.plan.name, err)
	}
	// One that was about to make a container's cgroups when its host's were removed has
	// made them since.
	groups, err := groupsOf(t.ids)
	if err == nil {
		err = removeGroups(ctx, groups)
	}
	if err != nil {
		return err
	}
	return errors.Join(removeNetNS(l.plan.netnsFile(clientName)), removeNetNS(l.plan.netnsFile(switchName)))
}

// Trace is what a lab consists of, taken while it stands, so that its removal
// can be checked afterwards.
type Trace struct {
	signs signs
	ids   []string
	dirs  []string
}

// Observe takes a Trace. It changes nothing and works on half a lab, too.
func (l *Lab) Observe() (Trace, error) {
	r, err := l.load()
	if err != nil {
		l.cfg.Log.Debug("no usable record of the lab", weft.KeyErr, err)
	}
	n, err := l.hostsOnDisk(r.Hosts)
	if err != nil {
		return Trace{}, err
	}
	t := Trace{dirs: []string{l.plan.runDir, l.plan.dataDir}}
	for _, h := range l.plan.hosts(n) {
		ids, err := h.nodeIDs(r)
		if err != nil {
			return Trace{}, err
		}
		s, err := l.signs(h, ids)
		if err != nil {
			return Trace{}, err
		}
		t.ids = append(t.ids, ids...)
		t.signs.NetNS = append(t.signs.NetNS, s.NetNS...)
		t.signs.Groups = append(t.signs.Groups, s.Groups...)
		t.signs.Own, t.signs.Spare, t.signs.At = s.Own, s.Spare, s.At
	}
	if t.signs.Own == 0 { // no host left
		s, err := l.signs(l.plan.host(1), nil)
		if err != nil {
			return Trace{}, err
		}
		t.signs.Own, t.signs.Spare, t.signs.At = s.Own, s.Spare, s.At
	}
	t.signs.Dirs = t.dirs
	for _, f := range []string{switchName, clientName} {
		var st unix.Stat_t
		if file := l.plan.netnsFile(f); isNetNS(file) && unix.Stat(file, &st) == nil {
			t.signs.NetNS = append(t.signs.NetNS, st.Ino)
		}
	}
	return t, nil
}

// Leftovers lists whatever of the lab is still there: processes, mounts,
// folders, cgroups, and links with weft's mark in the caller's own
// network namespace. Empty = gone without a trace.
func (t Trace) Leftovers() ([]string, error) {
	var left []string
	ps, err := find(t.signs)
	if err != nil {
		return nil, err
	}
	for _, p := range ps {
		left = append(left, fmt.Sprintf("process %d %q (%s)", p.PID, p.Args, t.signs.match(p)))
	}
	for _, dir := range t.dirs {
		ms, err := mountsBelow(dir)
		if err != nil {
			return nil, err
		}
		for _, m := range ms {
			left = append(left, "mount "+m)
		}
	}
	for _, file := range t.dirs {
		if _, err := os.Lstat(file); err == nil {
			left = append(left, "file "+file)
		}
	}
	groups, err := groupsOf(t.ids)
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		left = append(left, "cgroup "+g)
	}
	links, err := t.strayLinks()
	if err != nil {
		return nil, err
	}
	return append(left, links...), nil
}

// Leftovers is Observe and Trace.Leftovers in one: on a lab that was removed
// it lists what can still be recognised.
func (l *Lab) Leftovers() ([]string, error) {
	t, err := l.Observe()
	if err != nil {
		return nil, err
	}
	return t.Leftovers()
}
