package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/moby/sys/user"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// Create implements runtime.Runtime. The image must be here (Ensure). What a
// failed Create has made is removed again.
func (d *Driver) Create(ctx context.Context, s runtime.Spec) error {
	if err := checkTask(s.Task); err != nil {
		return err
	}
	unlock, err := d.lock(ctx, s.Task)
	if err != nil {
		return err
	}
	defer unlock()
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return err
	}
	if _, err := c.ContainerService().Get(ctx, string(s.Task)); err == nil {
		return nil
	} else if !errdefs.IsNotFound(err) {
		return wrap(err, "create container of task %s", s.Task)
	}
	if s.Cgroup == "" {
		s.Cgroup = weft.CgroupPath(d.cfg.Node, s.Task)
	}
	// A daemon that was killed in the middle of this leaves the snapshot, for
	// which the record was to follow.
	if _, err := c.SnapshotService(snapshotter).Stat(ctx, string(s.Task)); err == nil {
		if err := d.remove(ctx, c, s.Task); err != nil {
			return wrap(err, "remove the rest of an unfinished container of task %s", s.Task)
		}
	} else if !errdefs.IsNotFound(err) {
		return wrap(err, "create container of task %s", s.Task)
	}
	if err := d.create(ctx, c, s); err != nil {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		return errors.Join(wrap(err, "create container of task %s", s.Task), d.remove(rctx, c, s.Task))
	}
	return nil
}

func (d *Driver) create(ctx context.Context, c *client.Client, s runtime.Spec) error {
	img, err := d.local(ctx, c, s.Image)
	if err != nil {
		return err
	}
	cfg, err := img.Spec(ctx)
	if err != nil {
		return fmt.Errorf("read configuration of image %s: %w", s.Image, err)
	}
	stop := s.StopSignal
	if stop == "" {
		stop = cfg.Config.StopSignal
	}
	if stop == "" {
		stop = "SIGTERM"
	}
	if _, err := parseSignal(stop); err != nil {
		return fmt.Errorf("stop signal: %w", err)
	}
	args, err := commandLine(s.Entrypoint, s.Args, cfg.Config)
	if err != nil {
		return err
	}
	stored := s // with what runs in the end, for those who list containers
	stored.Entrypoint, stored.Args = nil, args
	ext, err := encodeSpec(stored)
	if err != nil {
		return err
	}
	conf, err := img.Config(ctx)
	if err != nil {
		return fmt.Errorf("read configuration of image %s: %w", s.Image, err)
	}
	if err := os.MkdirAll(d.logDir(s.Task), 0o700); err != nil {
		return fmt.Errorf("make log directory: %w", err)
	}
	_, err = c.NewContainer(ctx, string(s.Task), // it holds a lease until the record refers to the snapshot
		client.WithImageName(img.Name()),
		client.WithContainerLabels(map[string]string{
			labelNode: string(d.cfg.Node), labelBoot: d.bootID,
			labelImageID: conf.Digest.String(), labelSignal: stop,
		}),
		client.WithSnapshotter(snapshotter),
		client.WithNewSnapshot(string(s.Task), img),
		client.WithRuntime(runtimeName, &options.Options{BinaryName: d.current().runc, Root: d.execDir("runc")}),
		func(ctx context.Context, c *client.Client, rec *containers.Container) error {
			spec, err := d.specFor(ctx, c, s, cfg.Config)
			if err != nil {
				return err
			}
			if rec.Spec, err = typeurl.MarshalAny(spec); err != nil {
				return fmt.Errorf("encode OCI specification: %w", err)
			}
			rec.Extensions = map[string]typeurl.Any{labelSpec: ext}
			return nil
		})
	return err
}

// specFor resolves what needs the container's file system (user, first content
// of volumes) and builds the specification.
func (d *Driver) specFor(ctx context.Context, c *client.Client, s runtime.Spec, img ocispec.ImageConfig) (*specs.Spec, error) {
	for _, m := range s.Mounts {
		if m.Type != weft.MountBind {
			continue
		}
		if _, err := os.Stat(m.Source); err != nil {
			return nil, fmt.Errorf("bind source path does not exist: %s: %w", m.Source, weft.ErrInvalid)
		}
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return nil, fmt.Errorf("read limit of open files: %w", err)
	}
	in := specInput{Spec: s, Image: img, CgroupV2: unifiedCgroups(), MaxFiles: files.Max, OOMScoreAdj: ownOOMScore()}
	if d.cfg.Grouped {
		in.Group = "weft-" + string(d.cfg.Node)
	}
	vols, err := d.volumes(s, img)
	if err != nil {
		return nil, err
	}
	in.Volumes = make(map[string]string, len(vols))
	for _, v := range vols {
		in.Volumes[v.target] = v.dir
	}
	wish := s.User
	if wish == "" {
		wish = img.User
	}
	err = d.withRootfs(ctx, c, s.Task, func(root string) error {
		if in.User, err = lookupUser(root, wish); err != nil {
			return err
		}
		for _, v := range vols {
			if err := v.fill(root); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return buildSpec(in)
}

func ownOOMScore() int {
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(b))) // 0 when it is no number
	return n
}

// withRootfs mounts a container's file system while f runs; nothing of the
// container runs at that time.
func (d *Driver) withRootfs(ctx context.Context, c *client.Client, task weft.ID, f func(root string) error) (err error) {
	mounts, err := c.SnapshotService(snapshotter).Mounts(ctx, string(task))
	if err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	dir := d.execDir("exec", string(task)+".rootfs")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(dir, 0), os.Remove(dir)) }()
	if err := mount.All(mounts, dir); err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	return f(dir)
}

// lookupUser resolves "name|uid[:group|gid]" as Docker does, by the passwd and
// group files below root; links in them do not lead out of root.
func lookupUser(root, wish string) (specs.User, error) {
	passwd, err := fs.RootPath(root, "/etc/passwd")
	if err != nil {
		return specs.User{}, fmt.Errorf("resolve /etc/passwd: %w", err)
	}
	group, err := fs.RootPath(root, "/etc/group")
	if err != nil {
		return specs.User{}, fmt.Errorf("resolve /etc/group: %w", err)
	}
	u, err := user.GetExecUserPath(wish, nil, passwd, group)
	if err != nil {
		return specs.User{}, fmt.Errorf("user %q: %w: %w", wish, err, weft.ErrInvalid)
	}
	out := specs.User{UID: uint32(u.Uid), GID: uint32(u.Gid), AdditionalGids: []uint32{uint32(u.Gid)}}
	for _, g := range u.Sgids {
		if !slices.Contains(out.AdditionalGids, uint32(g)) {
			out.AdditionalGids = append(out.AdditionalGids, uint32(g))
		}
	}
	return out, nil
}

// volume is one volume mount with its directory on the host.
type volume struct{ target, dir string }

// checkVolumeName is Docker's rule (moby volume/names).
func checkVolumeName(name string) error {
	if !regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`).MatchString(name) || len(name) > 255 {
		return fmt.Errorf("volume name %q: only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, at least two; for a host directory use a bind mount: %w", name, weft.ErrInvalid)
	}
	return nil
}

// volumes makes the directories of the volumes of s and of those that the image
// declares. Named ones live for ever; anonymous ones go with the container.
func (d *Driver) volumes(s runtime.Spec, img ocispec.ImageConfig) ([]volume, error) {
	var vols []volume
	taken := make(map[string]bool)
	for _, m := range s.Mounts {
		target := path.Clean(m.Target)
		taken[target] = true
		if m.Type != weft.MountVolume {
			continue
		}
		dir := d.anonymous(s.Task, len(vols))
		if m.Source != "" {
			if err := checkVolumeName(m.Source); err != nil {
				return nil, err
			}
			dir = d.dataDir("volumes", m.Source, "_data")
		}
		vols = append(vols, volume{target, dir})
	}
	declared := make([]string, 0, len(img.Volumes))
	for t := range img.Volumes {
		declared = append(declared, path.Join("/", t))
	}
	slices.Sort(declared)
	for _, t := range declared {
		if !taken[t] {
			vols = append(vols, volume{t, d.anonymous(s.Task, len(vols))})
		}
	}
	for _, v := range vols {
		if err := os.MkdirAll(v.dir, 0o755); err != nil {
			return nil, fmt.Errorf("make volume: %w", err)
		}
	}
	return vols, nil
}

func (d *Driver) anonymous(task weft.ID, n int) string {
	return d.dataDir("tasks", string(task), "volumes", strconv.Itoa(n))
}

// fill copies what the image has at the target into an empty volume, and
// owner and mode with it, as Docker does on first use.
func (v volume) fill(root string) error {
	src, err := fs.RootPath(root, v.target)
	if err != nil {
		return fmt.Errorf("volume at %s: %w", v.target, err)
	}
	fi, err := os.Stat(src)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("volume at %s: %w", v.target, err)
	}
	if !fi.IsDir() {
		return fmt.Errorf("volume at %s: the image has a file there: %w", v.target, weft.ErrInvalid)
	}
	entries, err := os.ReadDir(v.dir)
	if err != nil || len(entries) > 0 {
		return err
	}
	// By way of a neighbour: a copy that broke off must not look like a
	// filled volume.
	tmp := v.dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return fmt.Errorf("fill volume at %s: %w", v.target, err)
	}
	if err := fs.CopyDir(tmp, src); err != nil {
		return errors.Join(fmt.Errorf("fill volume at %s: %w", v.target, err), os.RemoveAll(tmp))
	}
	if err := os.Remove(v.dir); err != nil {
		return errors.Join(fmt.Errorf("fill volume at %s: %w", v.target, err), os.RemoveAll(tmp))
	}
	return os.Rename(tmp, v.dir)
}

// putSandbox writes the record that makes a restarted server keep a task that
// ended while it was away (see start). It exists already when Start repeats.
func (d *Driver) putSandbox(ctx context.Context, c *client.Client, id string) error {
	_, err := c.SandboxStore().Create(ctx, sandbox.Sandbox{
		ID: id, Sandboxer: "podsandbox", Runtime: sandbox.RuntimeOpts{Name: runtimeName},
		Labels: map[string]string{labelNode: string(d.cfg.Node)},
	})
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("write sandbox record: %w", err)
	}
	return nil
}
