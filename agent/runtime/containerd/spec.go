package containerd

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/moby/profiles/seccomp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// Docker's defaults (moby daemon/pkg/oci/defaults.go and caps/defaults.go).
const (
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	shmSize     = "size=67108864"
	softFiles   = 1024    // of systemd and Docker 29
	hardFiles   = 524288  // a program that needs more than the soft limit raises it
	cpuPeriod   = 100_000 // microseconds
	// minCPUQuota is what the kernel accepts (kernel/sched/core.c min_cfs_quota_period).
	minCPUQuota = 1_000
)

func defaultCapabilities() []string {
	return []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD",
		"CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP",
		"CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	}
}

func maskedPaths() []string {
	return []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys",
		"/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug",
		"/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
}

func readonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}

// specInput is all that a container's OCI specification is made of.
type specInput struct {
	runtime.Spec
	Image ocispec.ImageConfig
	User  specs.User // resolved in the image
	// Volumes has the host directory of each volume mount, by target.
	Volumes  map[string]string
	CgroupV2 bool
	Group    string // shim group; "" = a shim of its own
	// MaxFiles is the most open files that the node may allow (RLIMIT_NOFILE).
	MaxFiles uint64
	// OOMScoreAdj of the daemon, which its children inherit.
	OOMScoreAdj int
}

// buildSpec makes the specification of a container as Docker would. It is pure
// but for the seccomp profile, which looks at the kernel's version.
func buildSpec(in specInput) (*specs.Spec, error) {
	args, err := commandLine(in.Entrypoint, in.Args, in.Image)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", in.Spec.Image, err)
	}
	mounts, err := buildMounts(in)
	if err != nil {
		return nil, err
	}
	hostname := in.Hostname
	if hostname == "" {
		hostname = weft.ContainerID(in.Task)[:12]
	}
	caps := &specs.LinuxCapabilities{Bounding: defaultCapabilities()}
	if in.User.UID == 0 { // another user has them in reach of setuid programs only
		caps.Effective, caps.Permitted = defaultCapabilities(), defaultCapabilities()
	}
	var oomScore *int
	if in.OOMScoreAdj < 0 { // the daemon's protection is not the container's
		oomScore = new(int)
	}
	s := &specs.Spec{
		Version:  "1.0.2", // what the oldest supported runc knows (1.1)
		Hostname: hostname,
		Root:     &specs.Root{Path: "rootfs", Readonly: in.ReadOnly},
		Mounts:   mounts,
		Process: &specs.Process{
			Terminal: in.TTY, User: in.User, Args: args, Cwd: workDir(in.Dir, in.Image.WorkingDir),
			Env:          environment(hostname, in.TTY, in.Image.Env, in.Env),
			Capabilities: caps, OOMScoreAdj: oomScore,
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: min(softFiles, in.MaxFiles), Hard: min(hardFiles, in.MaxFiles)}},
		},
		Linux: &specs.Linux{
			CgroupsPath: in.Cgroup, Namespaces: namespacesOf(in), Resources: resources(in.Limits),
			MaskedPaths: maskedPaths(), ReadonlyPaths: readonlyPaths(),
			// Docker's, so that no privilege is needed for ping and port 80.
			Sysctl: map[string]string{
				"net.ipv4.ip_unprivileged_port_start": "0",
				"net.ipv4.ping_group_range":           "0 2147483647",
			},
		},
	}
	if in.Group != "" {
		s.Annotations = map[string]string{"io.containerd.runc.v2.group": in.Group}
	}
	if s.Linux.Seccomp, err = seccomp.GetDefaultProfile(s); err != nil {
		return nil, fmt.Errorf("make the seccomp profile: %w", err)
	}
	return s, nil
}

// commandLine merges the wish with the image: an entrypoint of the wish puts the
// image's command aside as well.
func commandLine(entrypoint, args []string, img ocispec.ImageConfig) ([]string, error) {
	if len(entrypoint) == 0 {
		entrypoint = img.Entrypoint
		if len(args) == 0 {
			args = img.Cmd
		}
	}
	all := slices.Concat(entrypoint, args)
	if len(all) == 0 {
		return nil, fmt.Errorf("no command specified: the image brings none, so give one: %w", weft.ErrInvalid)
	}
	return all, nil
}

func workDir(wish, image string) string {
	for _, d := range []string{wish, image} {
		if d != "" {
			return path.Join("/", d)
		}
	}
	return "/"
}

// environment has Docker's defaults, then the image's, then the wish; a later
// value replaces an earlier one in its place, and a wish without "=" removes.
func environment(hostname string, tty bool, image, wish []string) []string {
	env := []string{defaultPath, "HOSTNAME=" + hostname}
	if tty {
		env = append(env, "TERM=xterm")
	}
	for _, kv := range slices.Concat(image, wish) {
		key, _, set := strings.Cut(kv, "=")
		i := slices.IndexFunc(env, func(e string) bool { return strings.HasPrefix(e, key+"=") })
		switch {
		case !set && i >= 0:
			env = slices.Delete(env, i, i+1)
		case !set:
		case i >= 0:
			env[i] = kv
		default:
			env = append(env, kv)
		}
	}
	return env
}

func namespacesOf(in specInput) []specs.LinuxNamespace {
	ns := []specs.LinuxNamespace{
		{Type: specs.MountNamespace}, {Type: specs.UTSNamespace}, {Type: specs.IPCNamespace}, {Type: specs.PIDNamespace},
		{Type: specs.NetworkNamespace, Path: in.NetNS},
	}
	if in.CgroupV2 { // as Docker: private on v2, the host's on v1
		ns = append(ns, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return ns
}

func resources(l weft.Resources) *specs.LinuxResources {
	r := &specs.LinuxResources{
		// runc adds the harmless devices (null, zero, tty, …) to this.
		Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
	}
	if l.MemoryBytes > 0 {
		r.Memory = &specs.LinuxMemory{Limit: &l.MemoryBytes}
	}
	if l.NanoCPUs > 0 {
		period, quota := uint64(cpuPeriod), max(l.NanoCPUs*cpuPeriod/1e9, minCPUQuota)
		r.CPU = &specs.LinuxCPU{Period: &period, Quota: &quota}
	}
	return r
}

// buildMounts has Docker's default mounts first, then the wish, parents before
// children; a wish takes the place of a default on the same target.
func buildMounts(in specInput) ([]specs.Mount, error) {
	base := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", shmSize}},
	}
	var more []specs.Mount
	for _, m := range in.Mounts {
		sm, err := buildMount(m, in.Volumes)
		if err != nil {
			return nil, err
		}
		more = append(more, sm)
	}
	for target, dir := range in.Volumes { // those that the image declares
		if !slices.ContainsFunc(more, func(m specs.Mount) bool { return m.Destination == target }) {
			more = append(more, bindMount(dir, target, false))
		}
	}
	for target, source := range in.Files {
		more = append(more, bindMount(source, path.Clean(target), in.ReadOnly)) // as Docker
	}
	slices.SortStableFunc(more, func(a, b specs.Mount) int {
		if n := strings.Count(a.Destination, "/") - strings.Count(b.Destination, "/"); n != 0 {
			return n
		}
		return strings.Compare(a.Destination, b.Destination)
	})
	for i := 1; i < len(more); i++ {
		if more[i].Destination == more[i-1].Destination {
			return nil, fmt.Errorf("duplicate mount point %s: %w", more[i].Destination, weft.ErrInvalid)
		}
	}
	base = slices.DeleteFunc(base, func(b specs.Mount) bool {
		return slices.ContainsFunc(more, func(m specs.Mount) bool { return m.Destination == b.Destination })
	})
	return append(base, more...), nil
}

func buildMount(m weft.Mount, volumes map[string]string) (specs.Mount, error) {
	target := path.Clean(m.Target)
	if !path.IsAbs(m.Target) || target == "/" {
		return specs.Mount{}, fmt.Errorf("mount target %q must be an absolute path other than /: %w", m.Target, weft.ErrInvalid)
	}
	switch m.Type {
	case weft.MountBind:
		if !path.IsAbs(m.Source) {
			return specs.Mount{}, fmt.Errorf("bind source %q of %s must be an absolute path: %w", m.Source, target, weft.ErrInvalid)
		}
		return bindMount(m.Source, target, m.ReadOnly), nil
	case weft.MountVolume:
		return bindMount(volumes[target], target, m.ReadOnly), nil
	case weft.MountTmpfs:
		o := []string{"nosuid", "nodev", "noexec", "mode=1777"}
		if m.TmpfsSize > 0 {
			o = append(o, fmt.Sprintf("size=%d", m.TmpfsSize))
		}
		if m.ReadOnly {
			o = append(o, "ro")
		}
		return specs.Mount{Destination: target, Type: "tmpfs", Source: "tmpfs", Options: o}, nil
	}
	return specs.Mount{}, fmt.Errorf("mount type %q of %s is none of bind, volume, tmpfs: %w", m.Type, target, weft.ErrInvalid)
}

func bindMount(source, target string, readOnly bool) specs.Mount {
	o := []string{"rbind", "rprivate"}
	if readOnly {
		o = append(o, "ro")
	}
	return specs.Mount{Destination: target, Type: "bind", Source: source, Options: o}
}
