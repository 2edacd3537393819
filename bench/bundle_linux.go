package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// bundle starts the program of the image with runc alone: the least that
// starting a container costs on this machine, without scheduling, image
// store, supervisor, network or port.
type bundle struct {
	dir   string
	netns string
}

// newBundle prepares a root file system that holds nothing but the binary.
// Containers run in the network namespace of file, side by side.
func newBundle(binary, file string) (*bundle, error) {
	if _, err := exec.LookPath("runc"); err != nil {
		return nil, fmt.Errorf("find runc (apt-get install runc): %w", err)
	}
	dir, err := os.MkdirTemp("", "weft-bench-")
	if err != nil {
		return nil, fmt.Errorf("make folder for plain containers: %w", err)
	}
	b := &bundle{dir: dir, netns: file}
	for i := range replicas {
		if err := b.prepare(i, binary); err != nil {
			return nil, errors.Join(fmt.Errorf("prepare plain container %d: %w", i, err), b.remove())
		}
	}
	return b, nil
}

// id of a container, for runc.
func (b *bundle) id(i int) string { return filepath.Base(b.dir) + "-" + strconv.Itoa(i) }

// port of a container: they share one network namespace.
func (b *bundle) port(i int) int { return firstPort - 100 + i }

// prepare writes one bundle (OCI runtime specification, config.md). Every
// container sees the same root, read-only.
func (b *bundle) prepare(i int, binary string) error {
	root := filepath.Join(b.dir, "root")
	for _, dir := range []string{filepath.Join(root, "proc"), filepath.Join(b.dir, strconv.Itoa(i))} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	target := filepath.Join(root, "weft")
	if _, err := os.Stat(target); errors.Is(err, fs.ErrNotExist) {
		body, err := os.ReadFile(binary)
		if err != nil {
			return err
		}
		if err := os.WriteFile(target, body, 0o755); err != nil {
			return err
		}
	}
	port := strconv.Itoa(b.port(i))
	config, err := json.MarshalIndent(map[string]any{
		"ociVersion": "1.0.2",
		"process": map[string]any{
			"user": map[string]int{"uid": 0, "gid": 0}, "cwd": "/", "env": []string{"PATH=/"},
			// The echo port is asked for by no one, but must be free.
			"args": []string{"/weft", "whoami", "--http", "127.0.0.1:" + port, "--echo", "127.0.0.1:0"},
		},
		"root":     map[string]any{"path": root, "readonly": true},
		"hostname": b.id(i),
		"mounts":   []map[string]string{{"destination": "/proc", "type": "proc", "source": "proc"}},
		"linux": map[string]any{
			"cgroupsPath": "/" + b.id(i),
			"namespaces": []map[string]string{
				{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network", "path": b.netns},
			},
		},
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.dir, strconv.Itoa(i), "config.json"), config, 0o644)
}

// runc runs one runc command on the bundle's own state folder.
func (b *bundle) runc(ctx context.Context, args ...string) error {
	c := exec.CommandContext(ctx, "runc", append([]string{"--root", filepath.Join(b.dir, "state")}, args...)...)
	// Not a pipe: the container would hold it open for as long as it runs.
	log, err := os.OpenFile(filepath.Join(b.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	c.Stdout, c.Stderr = log, log
	if err := c.Run(); err != nil {
		words, readErr := os.ReadFile(log.Name())
		return errors.Join(fmt.Errorf("runc %v: %w: %s", args, err, lastLines(string(words), 5)), readErr)
	}
	return nil
}

// run starts the containers one after another, each after the one before has
// answered, and removes them. The three metrics are the times of the first and
// of the last answer, as for a service.
func (b *bundle) run(ctx context.Context) (sample, error) {
	c := newProbe(b.netns, probeTimeout)
	a := arrivals{map[string]time.Duration{}, map[string]time.Duration{}}
	t0 := time.Now()
	err := func() error {
		for i := range replicas {
			if err := b.runc(ctx, "run", "--detach", "--bundle", filepath.Join(b.dir, strconv.Itoa(i)), b.id(i)); err != nil {
				return err
			}
			target := "127.0.0.1:" + strconv.Itoa(b.port(i))
			if err := await(ctx, func() error { _, err := ask(ctx, c, target); return err }); err != nil {
				return fmt.Errorf("wait for plain container %d: %w", i, err)
			}
			a.byTarget[target], a.byTask[b.id(i)] = time.Since(t0), time.Since(t0)
		}
		return nil
	}()
	if err := errors.Join(err, closeBounded(ctx, b.end)); err != nil {
		return nil, err
	}
	return a.sample(), nil
}

// end kills and deletes the containers that are there.
func (b *bundle) end(ctx context.Context) error {
	var all error
	for i := range replicas {
		if _, err := os.Stat(filepath.Join(b.dir, "state", b.id(i))); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		all = errors.Join(all, b.runc(ctx, "delete", "--force", b.id(i)))
	}
	return all
}

// remove deletes the bundle's folder. Its containers have ended.
func (b *bundle) remove() error {
	if err := os.RemoveAll(b.dir); err != nil {
		return fmt.Errorf("remove folder of plain containers: %w", err)
	}
	return nil
}
