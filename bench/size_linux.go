package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weftnet/weft/lab"
)

// idleFor is how long a daemon is left alone before its memory is read: long
// enough for a garbage collection's pages to go back.
const idleFor = 10 * time.Second

// megabyte is 10^6 bytes: the stricter reading of "60 MB".
const megabyte = 1e6

// The metrics of memory. Private is what nothing else on the machine shares;
// proportional adds the shared pages, each divided by the number of processes
// that map it. Where only this daemon and its containerd run the binary, their
// proportional memory together is all there is, the binary's own pages
// included; with a second host it would be divided further and say nothing.
const (
	private       = "private memory"
	proportional  = "proportional memory"
	privateDaemon = "private, daemon alone"
	privateChild  = "private, containerd alone"
)

// sizeBench: what an idle node costs.
func sizeBench() benchmark {
	const (
		binary, binarySize = "bin/weft", "file size"
		bare, manager      = "no cluster", "manager"
		worker             = "worker"
	)
	return benchmark{
		Name:  "size",
		About: fmt.Sprintf("size of the binary, and memory of a daemon with its containerd after %.0f idle seconds, against a daemon in no cluster", idleFor.Seconds()),
		Prepare: func(_ context.Context, r *rig) (plan, error) {
			f, err := r.field("")
			if err != nil {
				return plan{}, err
			}
			idle := func(host int, build func(context.Context) error) func(context.Context) (sample, error) {
				return func(ctx context.Context) (sample, error) {
					var out sample // of memoryOf
					err := f.once(ctx, func() error { return build(ctx) }, func() error {
						if err := pause(ctx, idleFor); err != nil {
							return err
						}
						var err error
						out, err = f.memoryOf(ctx, host)
						if host > 1 {
							delete(out, proportional)
						}
						return err
					})
					return out, err
				}
			}
			return plan{
				Metrics: []metric{
					{binarySize, "MB", false}, {private, "MB", true}, {proportional, "MB", true},
					{privateDaemon, "MB", false}, {privateChild, "MB", false},
				},
				Baseline: variant{bare, idle(1, func(ctx context.Context) error { return f.lab.Up(ctx, lab.Spec{Hosts: 1}) })},
				Cases: []variant{
					{binary, func(context.Context) (sample, error) {
						st, err := os.Stat(r.weft)
						if err != nil {
							return nil, err
						}
						return sample{binarySize: float64(st.Size()) / megabyte}, nil
					}},
					{manager, idle(1, func(ctx context.Context) error { return f.up(ctx, 1) })},
					{worker, idle(2, func(ctx context.Context) error { return f.up(ctx, 2) })},
				},
				Limits: []limit{{Case: binary, Metric: binarySize, Most: 60}, {Case: manager, Metric: private, Most: 60}, {Case: worker, Metric: private, Most: 60}, {Case: manager, Metric: proportional, Most: 60}},
			}, nil
		},
	}
}

// memoryOf reads the memory of the daemon of a host and of its children.
func (f *field) memoryOf(ctx context.Context, host int) (sample, error) {
	list, _, err := f.lab.List(ctx)
	if err != nil {
		return nil, err
	}
	if host > len(list) || list[host-1].PID == 0 {
		return nil, fmt.Errorf("the daemon of h%d does not run", host)
	}
	daemon := list[host-1].PID
	family, err := descendants(daemon)
	if err != nil {
		return nil, err
	}
	if len(family) < 2 {
		return nil, fmt.Errorf("daemon %d of h%d has no containerd child: its memory would be missing", daemon, host)
	}
	out := sample{private: 0, proportional: 0, privateDaemon: 0, privateChild: 0}
	for _, pid := range family {
		m, err := readMemory(pid)
		if err != nil {
			return nil, err
		}
		who := privateChild
		if pid == daemon {
			who = privateDaemon
		}
		out[private] += m.private / megabyte
		out[proportional] += m.proportional / megabyte
		out[who] += m.private / megabyte
	}
	return out, nil
}

// memory of one process in bytes.
type memory struct{ private, proportional float64 }

func readMemory(pid int) (memory, error) {
	file := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
	b, err := os.ReadFile(file)
	if err != nil {
		return memory{}, err
	}
	m, err := parseRollup(b)
	if err != nil {
		return memory{}, fmt.Errorf("read %s: %w", file, err)
	}
	return m, nil
}

// parseRollup reads the form of /proc/PID/smaps_rollup (proc_pid_smaps(5)).
func parseRollup(b []byte) (memory, error) {
	got := map[string]float64{}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		key, value, ok := strings.Cut(s.Text(), ":")
		if !ok || !strings.HasSuffix(value, " kB") {
			continue // the line of the address range
		}
		kb, err := kilobytes(strings.TrimSpace(value))
		if err != nil {
			return memory{}, fmt.Errorf("%s: %w", key, err)
		}
		got[key] = kb * 1024
	}
	for _, key := range []string{"Pss", "Private_Clean", "Private_Dirty", "Private_Hugetlb"} {
		if _, ok := got[key]; !ok {
			return memory{}, fmt.Errorf("no line %q", key)
		}
	}
	return memory{private: got["Private_Clean"] + got["Private_Dirty"] + got["Private_Hugetlb"], proportional: got["Pss"]}, nil
}

// descendants are a process and its children and theirs, the oldest first.
func descendants(root int) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) || err != nil && strings.Contains(err.Error(), "no such process") {
			continue // ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		pid, parent, err := parseStat(string(b))
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", file, err)
		}
		children[parent] = append(children[parent], pid)
	}
	out := []int{root}
	for i := 0; i < len(out); i++ {
		out = append(out, children[out[i]]...)
	}
	return out, nil
}

// parseStat reads the process id and its parent's from /proc/PID/stat. The
// name in between may hold spaces and brackets (proc_pid_stat(5)).
func parseStat(s string) (pid, parent int, err error) {
	front, rest, ok := strings.Cut(s, " (")
	end := strings.LastIndex(rest, ") ")
	if !ok || end < 0 {
		return 0, 0, fmt.Errorf("%.60q: want 'PID (NAME) STATE PARENT'", s)
	}
	fields := strings.Fields(rest[end+2:])
	if len(fields) < 2 {
		return 0, 0, fmt.Errorf("%.60q: too few fields", s)
	}
	if pid, err = strconv.Atoi(front); err != nil {
		return 0, 0, err
	}
	parent, err = strconv.Atoi(fields[1])
	return pid, parent, err
}
