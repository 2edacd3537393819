package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/weftnet/weft"
)

// Config of a machine.
type Config struct {
	// Kernel is a folder with Debian's kernel package unpacked: boot/ and
	// lib/modules/ (or usr/lib/modules/). need.sh makes it.
	Kernel string
	// Base, when set, is a folder that the guest's root begins as: a system whose
	// /bin, /sbin and /lib may be links into /usr. It is copied, not changed.
	Base string
	// Files go into the guest: path in the guest to path here. Programs
	// bring their shared libraries along.
	Files map[string]string
	// Init is the shell script that the guest runs as root once it is up;
	// its output is the console's. The guest is powered off after it.
	Init string
	// MemoryMiB (default 2048) of the guest; DiskMiB (default 2048) of its disk, which is
	// sparse.
	MemoryMiB, DiskMiB int
	// Leaps has idle time leapt over: the clock is at the next timer at once. Nothing in
	// the guest is late, however slow or busy the machine is, but for what comes from
	// outside it: while the disk is read the clock runs away, by minutes. So a guest that
	// leaps works in memory: before Init all its programs and modules are read, and
	// /var/lib/weft is a tmpfs.
	Leaps bool
	// Cables are pairs of virtio network cards of the guest, each pair joined by
	// nothing but a hub; CardMAC tells them apart. A packet is at the other card as
	// soon as its driver has been told of it, so that no time passes on the wire.
	Cables int
	// Dir is where image, initramfs and console log go.
	Dir string
}

// guestModules are the modules of the guest: by folder or by name. A name that
// the kernel has built in is no error.
var guestModules = []string{
	"kernel/net/", "kernel/drivers/net/vxlan", "veth", "dummy", "tun", "ifb", "macvlan", "wireguard",
	"virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "ext4", "overlay", "crc32c_generic", "crc32c_intel",
}

// bootModules are loaded by the initramfs, in this order with what they need.
var bootModules = []string{"virtio_pci", "virtio_blk", "crc32c_generic", "ext4"}

// Machine is a built image, ready to boot.
type Machine struct {
	cfg     Config
	kernel  string
	initrd  string
	disk    string
	release string
}

// Build makes the disk image and the initramfs in cfg.Dir. It needs mke2fs and
// a static busybox; ErrUnsupported names what is missing.
func Build(ctx context.Context, cfg Config) (*Machine, error) {
	cfg.MemoryMiB, cfg.DiskMiB = or(cfg.MemoryMiB, 2048), or(cfg.DiskMiB, 2048)
	m := &Machine{cfg: cfg, initrd: filepath.Join(cfg.Dir, "initramfs.gz"), disk: filepath.Join(cfg.Dir, "disk.img")}
	if err := m.findKernel(); err != nil {
		return nil, err
	}
	busybox, err := findTool("busybox")
	if err != nil {
		return nil, err
	}
	root := filepath.Join(cfg.Dir, "root")
	if err := m.makeRoot(ctx, root, busybox); err != nil {
		return nil, err
	}
	if err := m.makeInitramfs(root, busybox); err != nil {
		return nil, err
	}
	return m, m.makeDisk(ctx, root)
}

func or(v, otherwise int) int {
	if v == 0 {
		return otherwise
	}
	return v
}

func findTool(name string) (string, error) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		if path := filepath.Join(dir, name); isExecutable(path) {
			return filepath.EvalSymlinks(path)
		}
	}
	return "", fmt.Errorf("no %s on this machine; lab/vm/need.sh installs it: %w", name, weft.ErrUnsupported)
}

func isExecutable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

func (m *Machine) findKernel() error {
	found, err := filepath.Glob(filepath.Join(m.cfg.Kernel, "boot/vmlinuz-*"))
	if err != nil || len(found) != 1 {
		return fmt.Errorf("found %d kernels in %s/boot, want 1; lab/vm/need.sh %s unpacks one: %w", len(found), m.cfg.Kernel, filepath.Base(m.cfg.Kernel), weft.ErrUnsupported)
	}
	m.kernel = found[0]
	m.release = strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")
	if _, err := os.Stat(filepath.Join(m.cfg.Kernel, "lib/modules", m.release)); errors.Is(err, os.ErrNotExist) {
		m.cfg.Kernel = filepath.Join(m.cfg.Kernel, "usr")
	}
	return nil
}

// makeRoot fills the guest's root folder.
func (m *Machine) makeRoot(ctx context.Context, root, busybox string) error {
	if m.cfg.Base != "" {
		if err := os.MkdirAll(root, 0o755); err != nil {
			return fmt.Errorf("make guest root: %w", err)
		}
		if out, err := exec.CommandContext(ctx, "cp", "-a", "--reflink=auto", m.cfg.Base+"/.", root).CombinedOutput(); err != nil {
			return fmt.Errorf("copy %s to the guest's root: %w: %s", m.cfg.Base, err, out)
		}
	}
	for _, d := range []string{"proc", "sys", "dev", "run", "tmp", "etc", "root", "var/lib", "mnt", "usr/bin", "usr/sbin"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return fmt.Errorf("make guest root: %w", err)
		}
	}
	if err := copyModules(m.cfg.Kernel, m.release, root, guestModules); err != nil {
		return err
	}
	if err := copyFile(busybox, filepath.Join(root, "bin/busybox"), 0o755); err != nil {
		return err
	}
	for guest, host := range m.cfg.Files {
		if err := copyProgram(ctx, root, guest, host); err != nil {
			return err
		}
	}
	script := m.cfg.Init
	if m.cfg.Leaps {
		script = memoryInit + script
	}
	for name, text := range map[string]string{
		"sbin/init": guestInit, "etc/weft-init": script,
		"etc/hostname": "weft-vm\n", "etc/hosts": "127.0.0.1 localhost\n", "etc/resolv.conf": "",
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n",
	} {
		if err := writeFile(filepath.Join(root, name), text); err != nil {
			return err
		}
	}
	return nil
}

// guestInit is the first process of the guest. Pure cgroup v2, as a fresh
// Debian has it.
const guestInit = `#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
[ -c /dev/null ] || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --make-rshared /
ln -sf /bin/modprobe /sbin/modprobe
hostname weft-vm
ip link set lo up
cd /root
sh /etc/weft-init </dev/null
sync
poweroff -f
`

// memoryInit comes before the script of a guest that leaps.
const memoryInit = `mkdir -p /var/lib/weft
mount -t tmpfs -o size=75% tmpfs /var/lib/weft
find /bin /sbin /lib /usr -type f -exec cat {} + >/dev/null
`

// bootInit is the first process of the initramfs: it finds the disk.
func bootInit(ms []module) string {
	var b strings.Builder
	b.WriteString("#!/bin/busybox sh\nb=/bin/busybox\n$b mount -t devtmpfs dev /dev\n")
	for _, m := range ms {
		fmt.Fprintf(&b, "$b insmod /m/%s.ko\n", m.name)
	}
	b.WriteString(`n=0
while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do $b usleep 50000; n=$((n+1)); done
$b mount -t ext4 -o noatime /dev/vda /root || { echo "no root disk"; $b poweroff -f; }
$b umount /dev
exec $b switch_root /root /sbin/init
`)
	return b.String()
}

func (m *Machine) makeInitramfs(root, busybox string) error {
	src := filepath.Join(root, "lib/modules", m.release)
	all, err := readModules(src)
	if err != nil {
		return err
	}
	ms, err := loadOrder(all, bootModules)
	if err != nil {
		return err
	}
	script := filepath.Join(m.cfg.Dir, "boot-init")
	if err := writeFile(script, bootInit(ms)); err != nil {
		return err
	}
	files := map[string]string{"init": script, "bin/busybox": busybox, "dev/.keep": os.DevNull, "root/.keep": os.DevNull}
	for _, mod := range ms {
		files["m/"+mod.name+".ko"] = filepath.Join(src, mod.file)
	}
	return writeInitramfs(m.initrd, files)
}

// loadOrder is the wanted modules after what they need. Those that the kernel
// has built in are left out.
func loadOrder(all map[string]module, wanted []string) ([]module, error) {
	ms, err := closure(all, wanted)
	if err != nil {
		return nil, err
	}
	needs := map[string][]string{}
	for _, m := range ms {
		needs[m.name] = m.depends
	}
	var out []module
	add := func(name string) {
		if m, ok := all[name]; ok && !slices.ContainsFunc(out, func(o module) bool { return o.name == name }) {
			out = append(out, m)
		}
	}
	for _, w := range wanted {
		for _, d := range slices.Backward(order(needs, w)) {
			add(d)
		}
		add(w)
	}
	return out, nil
}

func (m *Machine) makeDisk(ctx context.Context, root string) error {
	mke2fs, err := findTool("mke2fs")
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, mke2fs, "-q", "-F", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0",
		"-d", root, m.disk, fmt.Sprintf("%dM", m.cfg.DiskMiB)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("make disk image: %w: %s", err, out)
	}
	return nil
}

var lddPath = regexp.MustCompile(`(?m)(?:=> )?(/[^ ]+) \(0x`)

// copyProgram copies a file and, if it is a dynamic program, its libraries.
func copyProgram(ctx context.Context, root, guest, host string) error {
	if err := copyFile(host, filepath.Join(root, guest), 0o755); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "ldd", host).CombinedOutput()
	if err != nil {
		return nil // static, or no program at all
	}
	for _, match := range lddPath.FindAllStringSubmatch(string(out), -1) {
		if err := copyFile(match[1], filepath.Join(root, match[1]), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func copyFile(from, to string, mode os.FileMode) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("copy into the guest: %w", err)
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("copy into the guest: %w", err)
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return fmt.Errorf("copy into the guest: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if _, err := io.Copy(out, in); err != nil {
		return fmt.Errorf("copy %s into the guest: %w", from, err)
	}
	return nil
}
