package containerd

import (
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

func TestCommandLine(t *testing.T) {
	img := ocispec.ImageConfig{Entrypoint: []string{"e"}, Cmd: []string{"c"}}
	for name, c := range map[string]struct {
		entry, args []string
		img         ocispec.ImageConfig
		want        string
	}{
		"image":                    {nil, nil, img, "e c"},
		"args replace cmd":         {nil, []string{"a"}, img, "e a"},
		"entrypoint drops cmd":     {[]string{"x"}, nil, img, "x"},
		"both":                     {[]string{"x"}, []string{"a"}, img, "x a"},
		"only args, no entrypoint": {nil, []string{"a"}, ocispec.ImageConfig{Cmd: []string{"c"}}, "a"},
		"nothing":                  {nil, nil, ocispec.ImageConfig{}, ""},
	} {
		got, err := commandLine(c.entry, c.args, c.img)
		if strings.Join(got, " ") != c.want || (c.want == "") != errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
}

func TestEnvironment(t *testing.T) {
	got := environment("h", true, []string{"PATH=/bin", "A=1", "B=2"}, []string{"A=3", "B", "C=x=y"})
	if want := []string{"PATH=/bin", "HOSTNAME=h", "TERM=xterm", "A=3", "C=x=y"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestBuildSpec(t *testing.T) {
	s, err := buildSpec(specInput{
		Spec: runtime.Spec{Task: "t", Args: []string{"x"}, Cgroup: "/weft/n/t", NetNS: "/run/netns/a", Limits: weft.Resources{NanoCPUs: 1, MemoryBytes: 5},
			Files: map[string]string{"/etc/hosts": "/h"}, Mounts: []weft.Mount{
				{Type: weft.MountTmpfs, Target: "/dev/shm", TmpfsSize: 9}, {Type: weft.MountBind, Source: "/s", Target: "/a/b", ReadOnly: true}, {Type: weft.MountVolume, Target: "/a"},
			}},
		Volumes: map[string]string{"/a": "/vol"}, CgroupV2: true, MaxFiles: 100, OOMScoreAdj: -500, Group: "g",
	})
	if err != nil {
		t.Fatal(err)
	}
	var dests []string
	for _, m := range s.Mounts {
		dests = append(dests, m.Destination)
	}
	if want := []string{"/proc", "/dev", "/dev/pts", "/sys", "/sys/fs/cgroup", "/dev/mqueue", "/a", "/a/b", "/dev/shm", "/etc/hosts"}; !slices.Equal(dests, want) {
		t.Errorf("mounts %q, want %q", dests, want)
	}
	if *s.Linux.Resources.CPU.Quota != minCPUQuota || *s.Linux.Resources.Memory.Limit != 5 || s.Linux.CgroupsPath != "/weft/n/t" {
		t.Errorf("resources %+v", s.Linux.Resources)
	}
	if s.Process.NoNewPrivileges || s.Linux.Seccomp == nil || *s.Process.OOMScoreAdj != 0 || s.Process.Rlimits[0].Hard != 100 {
		t.Errorf("process %+v", s.Process)
	}
	if len(s.Linux.Namespaces) != 6 || s.Annotations["io.containerd.runc.v2.group"] != "g" {
		t.Errorf("namespaces %+v, annotations %v", s.Linux.Namespaces, s.Annotations)
	}
}

// With a read-only root Docker's own files are read-only, too.
func TestReadOnlyHoldsForGivenFiles(t *testing.T) {
	for _, readOnly := range []bool{false, true} {
		s, err := buildSpec(specInput{Spec: runtime.Spec{
			Task: weft.ID(strings.Repeat("a", 25)), Args: []string{"x"}, ReadOnly: readOnly, Files: map[string]string{"/etc/hosts": "/h"},
		}})
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range s.Mounts {
			if m.Destination == "/etc/hosts" && slices.Contains(m.Options, "ro") != readOnly {
				t.Errorf("read-only %v: %s has options %q", readOnly, m.Destination, m.Options)
			}
		}
	}
}

func TestParseRef(t *testing.T) {
	dg := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string][2]string{ // record, familiar
		"busybox":              {"docker.io/library/busybox:latest", "busybox:latest"},
		"busybox:1":            {"docker.io/library/busybox:1", "busybox:1"},
		"weft/whoami":          {builtinImage, "weft/whoami:latest"},
		"localhost:5000/a/b:v": {"localhost:5000/a/b:v", "localhost:5000/a/b:v"},
		"busybox@" + dg:        {"docker.io/library/busybox@" + dg, "busybox@" + dg},
		"busybox:1@" + dg:      {"docker.io/library/busybox@" + dg, "busybox@" + dg},
	} {
		r, err := parseRef(in)
		if err != nil || r.record() != want[0] || familiar(r.record()) != want[1] {
			t.Errorf("%s: %q, %q, %v; want %q", in, r.record(), familiar(r.record()), err, want)
		}
	}
	for _, in := range []string{"", "A b", "x:", "Upper/Case", "a@sha256:12"} {
		if _, err := parseRef(in); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%q: %v, want invalid", in, err)
		}
	}
}

func TestParseAuth(t *testing.T) {
	want := credentials{Username: "u", Password: "p?>"}
	for _, in := range []string{
		`{"username":"u","password":"p?>"}`,
		"eyJ1c2VybmFtZSI6InUiLCJwYXNzd29yZCI6InA_PiJ9", "eyJ1c2VybmFtZSI6InUiLCJwYXNzd29yZCI6InA/PiJ9",
	} {
		if got, err := parseAuth(in); err != nil || got != want {
			t.Errorf("%s: %+v, %v", in, got, err)
		}
	}
	if _, err := parseAuth(`{"username":1,"password":"hidden"}`); !errors.Is(err, weft.ErrInvalid) || strings.Contains(err.Error(), "hidden") {
		t.Errorf("bad credentials: %v", err)
	}
	if _, err := parseAuth(`{"registrytoken":"x"}`); !errors.Is(err, weft.ErrUnsupported) {
		t.Errorf("registry token: %v", err)
	}
}

// The stored specification of version 1 can be read for ever.
func TestSpecFormat(t *testing.T) {
	want := runtime.Spec{
		Task: "t", Name: "s.1.t", Node: "n", Service: "s", Image: "busybox", Entrypoint: []string{"e"}, Args: []string{"a"}, Env: []string{"K=v"},
		Dir: "/d", User: "u", Hostname: "h", Labels: map[string]string{"l": "v"}, Mounts: []weft.Mount{{Type: weft.MountTmpfs, Target: "/t", ReadOnly: true, TmpfsSize: 1}},
		StopSignal: "SIGHUP", TTY: true, ReadOnly: true, Limits: weft.Resources{NanoCPUs: 1, MemoryBytes: 2}, NetNS: "/n", Files: map[string]string{"/f": "/g"}, Cgroup: "/c",
	}
	golden, err := os.ReadFile("testdata/spec-v1.json")
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeSpec(specExtension{golden})
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read %+v, %v", got, err)
	}
	now, err := encodeSpec(want)
	if err != nil || string(now.GetValue())+"\n" != string(golden) {
		t.Errorf("writes %s; a change of the format needs a new version (%v)", now.GetValue(), err)
	}
	if _, err := decodeSpec(nil); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("no extension: %v", err)
	}
}

func TestNoteFormat(t *testing.T) {
	var n note
	b, err := os.ReadFile("testdata/note-v1.json")
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	want := note{Version: 1, StartedAt: at, PID: 7, Exit: &exitNote{Code: 3, OOM: true, At: at}}
	if err := json.Unmarshal(b, &n); err != nil || !reflect.DeepEqual(n, want) {
		t.Errorf("read %+v, %v", n, err)
	}
}

func TestConfig(t *testing.T) {
	for name, c := range map[string]Config{
		"Node": {ExecRoot: "/a", DataRoot: "/b"}, "ExecRoot": {Node: "n", ExecRoot: "a", DataRoot: "/b"},
		"at most": {Node: "n", ExecRoot: "/" + strings.Repeat("a", 29), DataRoot: "/b"}, "DataRoot": {Node: "n", ExecRoot: "/a"},
	} {
		if _, err := New(c); !errors.Is(err, weft.ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	d, err := New(Config{Node: "n", ExecRoot: t.TempDir()[:1] + "tmp/none", DataRoot: t.TempDir(), Runc: "/no/such/runc"})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "apt-get install runc") {
		t.Errorf("without runc: %v", err)
	}
	if err := d.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "runc") {
		t.Errorf("ready without runc: %v", err)
	}
	if _, err := d.List(t.Context()); !errors.Is(err, weft.ErrUnavailable) {
		t.Errorf("list without a server: %v", err)
	}
}

// TestDecodeHealth reads Docker's additions to an image's configuration; a check
// that cannot be run is as none.
func TestDecodeHealth(t *testing.T) {
	for text, want := range map[string]weft.ImageConfig{
		`{"config":{"Healthcheck":{"Test":["CMD-SHELL","true"],"Interval":30000000000,"Timeout":5000000000,"StartPeriod":1000000000,"StartInterval":2000000000,"Retries":4},"Shell":["/bin/bash","-c"]}}`: {
			Health: weft.HealthCheck{Test: []string{"CMD-SHELL", "true"}, Interval: 30 * time.Second, Timeout: 5 * time.Second, StartPeriod: time.Second, StartInterval: 2 * time.Second, Retries: 4},
			Shell:  []string{"/bin/bash", "-c"},
		},
		`{"config":{"Healthcheck":{"Test":["NONE"]}}}`:                    {Health: weft.HealthCheck{Test: []string{"NONE"}}},
		`{"config":{"Healthcheck":{"Test":["RUN","x"]}}}`:                 {},
		`{"config":{"Healthcheck":{"Test":["CMD","x"],"Retries":-1}}}`:    {},
		`{"config":{"Env":["A=b"],"Shell":["/bin/bash","-c"]}}`:           {},
		`{"architecture":"amd64","config":{"Healthcheck":null},"x":true}`: {},
	} {
		var got weft.ImageConfig
		if err := decodeHealth([]byte(text), &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	if err := decodeHealth([]byte(`{"config":{"Healthcheck":{"Test":"x"}}}`), &weft.ImageConfig{}); err == nil {
		t.Error("no error about a test that is no list")
	}
}
