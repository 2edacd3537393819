package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// stopLimit is how long the server gets to end by itself.
const stopLimit = 3 * time.Second

// Shutdown ends every container of the node and the server, and leaves no
// process, mount, cgroup or file below ExecRoot of ours behind; images, volumes
// and logs stay. It is for leaving the cluster and for taking a lab down. Run
// must have returned (or never have been called). It works as well when the
// server is dead, and repeating it is harmless.
func (d *Driver) Shutdown(ctx context.Context) error {
	p, err := d.adopt()
	if err != nil {
		return err
	}
	if p != nil {
		defer p.close()
		// The orderly way first; what it does not reach is killed below.
		if err := d.removeAll(ctx); err != nil {
			d.log.Warn("container runtime did not remove all containers, killing them", weft.KeyErr, err)
		}
		if err := stopProcess(ctx, p); err != nil {
			return fmt.Errorf("stop the container runtime: %w", err)
		}
	}
	errs := []error{d.killShims(ctx), removeCgroups(ctx, "/weft/"+string(d.cfg.Node))}
	if roots, err := hierarchies(); err == nil {
		for _, r := range roots {
			os.Remove(filepath.Join(r, "weft")) // fails while other nodes have groups there: then it is theirs
		}
	}
	errs = append(errs, unmountBelow(d.execDir()), unmountBelow(d.dataDir("containerd")))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("shut the container runtime down: %w", err)
	}
	if err := os.RemoveAll(d.execDir()); err != nil {
		return fmt.Errorf("shut the container runtime down: %w", err)
	}
	return nil
}

func (d *Driver) removeAll(ctx context.Context) error {
	c, err := dial(d.socket())
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, namespace), 20*time.Second)
	defer cancel()
	all, err := c.ContainerService().List(ctx, fmt.Sprintf("labels.%q==%q", labelNode, string(d.cfg.Node)))
	if err != nil {
		return err
	}
	var errs []error
	for _, rec := range all {
		errs = append(errs, d.removeOne(ctx, c, weft.ID(rec.ID)))
	}
	return errors.Join(errs...)
}

func (d *Driver) removeOne(ctx context.Context, c *client.Client, task weft.ID) error {
	unlock, err := d.lock(ctx, task)
	if err != nil {
		return err
	}
	defer unlock()
	return d.remove(ctx, c, task)
}

// stopProcess asks a process to end and kills it when it does not.
func stopProcess(ctx context.Context, p *process) error {
	for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := p.signal(s); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		wctx, cancel := context.WithTimeout(ctx, stopLimit)
		err := p.wait(wctx)
		cancel()
		if errors.Is(err, errDied) {
			reap(p.pid)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return fmt.Errorf("process %d does not end", p.pid)
}

// reap collects a process that Run of this same program started; it is no
// child of ours otherwise, which is fine.
func reap(pid int) {
	var st unix.WaitStatus
	unix.Wait4(pid, &st, unix.WNOHANG, nil)
}

// killShims kills shims and loggers of this node's server: those that run our
// own links in libexec. Their containers die by their cgroups.
func (d *Driver) killShims(ctx context.Context) error {
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, name := range procs {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // ended
		}
		args := bytes.Split(b, []byte{0})
		prog := string(args[0])
		ours := prog == d.libexec(loggerName) || filepath.Base(prog) == shimName && slices.ContainsFunc(args, func(a []byte) bool { return string(a) == d.socket() })
		if !ours {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			continue
		}
		if err := d.killLink(ctx, pid, b); err != nil {
			return err
		}
	}
	return nil
}

// killLink kills pid if it still is the process with these arguments.
func (d *Driver) killLink(ctx context.Context, pid int, cmdline []byte) error {
	p, err := openProcess(pid)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.close()
	if now, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline"); err != nil || !bytes.Equal(now, cmdline) {
		return nil
	}
	if err := p.signal(unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	wctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	if err := p.wait(wctx); !errors.Is(err, errDied) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
}

// unmountBelow detaches every mount below dir, deepest first.
func unmountBelow(dir string) error {
	all, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range all {
		if err := mount.UnmountAll(m, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	return nil
}

// mountsBelow reads the mount points below dir from /proc/self/mountinfo
// (field 5, proc(5)), the latest first.
func mountsBelow(dir string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		if p := unescape(f[4]); strings.HasPrefix(p, dir+"/") {
			found = append(found, p)
		}
	}
	slices.Reverse(found)
	return found, nil
}

// unescape turns mountinfo's octal escapes (\040 for a space) back.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
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
