package containerd_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// output runs a container to its end and returns what it wrote.
func (h *host) output(ctx context.Context, t *testing.T, s runtime.Spec) (string, runtime.Exit) {
	t.Helper()
	s.Task = weft.NewID()
	if s.Image == "" {
		s.Image = "busybox"
	}
	if err := h.Create(ctx, s); err != nil {
		t.Fatalf("create: %v", err)
	}
	defer func() {
		if err := h.Remove(ctx, s.Task); err != nil {
			t.Errorf("remove: %v", err)
		}
	}()
	if _, err := h.Start(ctx, s.Task); err != nil {
		t.Fatalf("start: %v", err)
	}
	exit, err := h.Wait(ctx, s.Task)
	if err != nil {
		t.Fatalf("wait: %v", err)
	}
	var b strings.Builder
	err = h.Logs(ctx, s.Task, weft.LogOptions{Stdout: true, Stderr: true, Tail: -1, Follow: true}, func(r weft.LogRecord) error {
		b.Write(r.Line)
		return nil
	})
	if err != nil {
		t.Fatalf("logs: %v", err)
	}
	return b.String(), exit
}

func TestContainer(t *testing.T) {
	h := newHost(t)
	h.loadBusybox(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	hosts := t.TempDir() + "/hosts"
	if err := os.WriteFile(hosts, []byte("1.2.3.4 here\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	sh := func(script string) []string { return []string{"sh", "-c", script} }
	for name, c := range map[string]struct {
		spec runtime.Spec
		want string
	}{
		"env":           {runtime.Spec{Args: sh("echo $FROM_IMAGE $MINE $PATH $HOSTNAME"), Env: []string{"MINE=1"}, Hostname: "box"}, "yes 1 /bin box\n"},
		"hostname":      {runtime.Spec{Args: sh("hostname"), Hostname: "box"}, "box\n"},
		"entrypoint":    {runtime.Spec{Entrypoint: []string{"echo", "a"}, Args: []string{"b"}}, "a b\n"},
		"work dir":      {runtime.Spec{Args: sh("pwd"), Dir: "/new/dir"}, "/new/dir\n"},
		"user by name":  {runtime.Spec{Args: sh("id -u; id -g; id -G"), User: "app"}, "1000\n1000\n1000 2000\n"},
		"user by id":    {runtime.Spec{Args: sh("id -u; id -g"), User: "5:6"}, "5\n6\n"},
		"read only":     {runtime.Spec{Args: sh("touch /x 2>/dev/null || echo ro"), ReadOnly: true}, "ro\n"},
		"file":          {runtime.Spec{Args: sh("cat /etc/hosts"), Files: map[string]string{"/etc/hosts": hosts}}, "1.2.3.4 here\n"},
		"tmpfs":         {runtime.Spec{Args: sh("df -k /t | tail -1 | awk '{print $2}'"), Mounts: []weft.Mount{{Type: weft.MountTmpfs, Target: "/t", TmpfsSize: 1 << 20}}}, "1024\n"},
		"shm":           {runtime.Spec{Args: sh("df -k /dev/shm | tail -1 | awk '{print $2}'")}, "65536\n"},
		"seccomp":       {runtime.Spec{Args: sh("grep Seccomp: /proc/self/status | awk '{print $2}'; unshare -n true 2>/dev/null || echo refused")}, "2\nrefused\n"},
		"capabilities":  {runtime.Spec{Args: sh("grep CapEff /proc/self/status | awk '{print $2}'")}, "00000000a80425fb\n"},
		"no privileges": {runtime.Spec{Args: sh("grep CapEff /proc/self/status | awk '{print $2}'"), User: "app"}, "0000000000000000\n"},
		"masked":        {runtime.Spec{Args: sh("cat /proc/keys 2>/dev/null | wc -c; echo 1 2>/dev/null >/proc/sys/kernel/domainname || echo ro")}, "0\nro\n"},
		"volume copy":   {runtime.Spec{Args: sh("cat /data/seed; stat -c %u:%a /data"), Mounts: []weft.Mount{{Type: weft.MountVolume, Source: "vol", Target: "/data"}}}, "from the image\n1000:750\n"},
		"tty":           {runtime.Spec{Args: sh("test -t 1 && echo tty $TERM"), TTY: true}, "tty xterm\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if got, exit := h.output(ctx, t, c.spec); got != c.want || exit.Code != 0 {
				t.Errorf("printed %q with code %d, want %q", got, exit.Code, c.want)
			}
		})
	}
	t.Run("volume keeps", func(t *testing.T) {
		vol := []weft.Mount{{Type: weft.MountVolume, Source: "keep", Target: "/data"}}
		h.output(ctx, t, runtime.Spec{Args: sh("echo mine >/data/seed; rm -f /data/none"), Mounts: vol})
		if got, _ := h.output(ctx, t, runtime.Spec{Args: sh("cat /data/seed"), Mounts: vol}); got != "mine\n" {
			t.Errorf("second container read %q", got)
		}
	})
	t.Run("anonymous volume goes", func(t *testing.T) {
		h.output(ctx, t, runtime.Spec{Args: sh("true"), Mounts: []weft.Mount{{Type: weft.MountVolume, Target: "/data"}}})
		if left, _ := filepath.Glob(h.cfg.DataRoot + "/tasks/*/volumes"); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	t.Run("memory", func(t *testing.T) {
		_, exit := h.output(ctx, t, runtime.Spec{Args: sh("tail /dev/zero"), Limits: weft.Resources{MemoryBytes: 16 << 20}})
		if exit.Code != 137 || !exit.OOM {
			t.Errorf("exit %+v, want 137 by memory", exit)
		}
	})
	t.Run("cpu", func(t *testing.T) {
		got, _ := h.output(ctx, t, runtime.Spec{Limits: weft.Resources{NanoCPUs: 5e8}, Args: sh("cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || cut -d' ' -f1 /sys/fs/cgroup/cpu.max")})
		if got != "50000\n" {
			t.Errorf("quota %q, want 50000", got)
		}
	})
	t.Run("bad", func(t *testing.T) {
		for name, s := range map[string]runtime.Spec{
			"user": {User: "nobody-here"}, "bind source": {Mounts: []weft.Mount{{Type: weft.MountBind, Source: "/no/such", Target: "/x"}}},
			"target":      {Mounts: []weft.Mount{{Type: weft.MountTmpfs, Target: "x"}}},
			"volume name": {Mounts: []weft.Mount{{Type: weft.MountVolume, Source: "../x", Target: "/x"}}},
			"twice":       {Mounts: []weft.Mount{{Type: weft.MountTmpfs, Target: "/x"}, {Type: weft.MountTmpfs, Target: "/x/"}}},
		} {
			s.Task, s.Image = weft.NewID(), "busybox"
			wantInvalid(ctx, t, h, name, s)
		}
	})
}

func wantInvalid(ctx context.Context, t *testing.T, h *host, name string, s runtime.Spec) {
	t.Helper()
	if err := h.Create(ctx, s); !isInvalid(err) {
		t.Errorf("%s: %v, want invalid", name, err)
	}
	all, err := h.List(ctx)
	if err != nil || len(all) != 0 {
		t.Errorf("%s left containers: %v, %v", name, all, err)
	}
}
