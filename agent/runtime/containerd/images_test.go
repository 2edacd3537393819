package containerd_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
	"github.com/weftnet/weft/agent/runtime/imagetest"
	"github.com/weftnet/weft/agent/runtime/runtimetest"
)

func (h *host) tags(t *testing.T) []string {
	t.Helper()
	all, err := h.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var tags []string
	for _, i := range all {
		if i.ID == "" || i.Size <= 0 || i.OS != "linux" {
			t.Errorf("image without id, size or platform: %+v", i)
		}
		if !slices.Contains(i.Tags, "weft/whoami:latest") { // comes on its own time
			tags = append(tags, i.Tags...)
		}
	}
	slices.Sort(tags)
	return tags
}

func TestLoad(t *testing.T) {
	h := newHost(t)
	ctx := t.Context()
	h.loadBusybox(t)
	plain, err := busyboxTar()
	needBusybox(t, err)
	var gz bytes.Buffer
	zw := gzip.NewWriter(&gz)
	zw.Write(plain)
	zw.Close()
	if names, err := h.Load(ctx, &gz); err != nil || !slices.Equal(names, []string{"busybox:latest"}) {
		t.Errorf("compressed archive: %v, %v", names, err)
	}
	img, err := imagetest.BusyboxImage()
	needBusybox(t, err)
	img, err = mutate.Config(img, *must(img.ConfigFile()).Config.DeepCopy())
	if err != nil {
		t.Fatal(err)
	}
	var oci, unnamed bytes.Buffer
	if err := imagetest.OCILayout(&oci, t.TempDir(), "example.org/team/box:v1", img); err != nil {
		t.Fatal(err)
	}
	if names, err := h.Load(ctx, &oci); err != nil || !slices.Equal(names, []string{"example.org/team/box:v1"}) {
		t.Errorf("OCI layout: %v, %v", names, err)
	}
	if err := imagetest.OCILayout(&unnamed, t.TempDir(), "", img); err != nil {
		t.Fatal(err)
	}
	if names, err := h.Load(ctx, &unnamed); err != nil || len(names) != 1 || !strings.HasPrefix(names[0], "sha256:") {
		t.Errorf("OCI layout without a name: %v, %v", names, err)
	}
	if got, want := h.tags(t), []string{"busybox:latest", "example.org/team/box:v1"}; !slices.Equal(got, want) {
		t.Errorf("tags %v, want %v", got, want)
	}
	for name, archive := range map[string][]byte{
		"empty": nil, "text": []byte("hello"), "cut": plain[:len(plain)/2], "cut late": plain[:len(plain)-4096],
		"cut gzip": gzipped(t, plain)[:1000],
	} {
		if names, err := h.Load(ctx, bytes.NewReader(archive)); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s archive: %v, %v; want invalid", name, names, err)
		}
	}
	if got, want := h.tags(t), []string{"busybox:latest", "example.org/team/box:v1"}; !slices.Equal(got, want) {
		t.Errorf("after broken archives: tags %v, want %v", got, want)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func gzipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestTagAndRemoveImage(t *testing.T) {
	h := newHost(t)
	ctx := t.Context()
	h.loadBusybox(t)
	if err := h.Tag(ctx, "busybox", "mine/box:1"); err != nil {
		t.Fatal(err)
	}
	if err := h.Tag(ctx, "nothing", "x"); !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("tag of nothing: %v", err)
	}
	if err := h.Tag(ctx, "busybox", "Bad Name"); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("bad tag: %v", err)
	}
	img, err := h.Ensure(ctx, "mine/box:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	id := strings.TrimPrefix(img.ID, "sha256:")[:12]
	if byID, err := h.Ensure(ctx, id, nil); err != nil || byID.ID != img.ID {
		t.Errorf("by id: %+v, %v", byID, err)
	}
	pinned := img.Digests[0]
	if got, err := h.Ensure(ctx, pinned, nil); err != nil || got.ID != img.ID {
		t.Errorf("by %s: %+v, %v", pinned, got, err)
	}
	if _, _, err := h.RemoveImage(ctx, id, false); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("remove by id with two repositories: %v", err)
	}
	task, _ := h.start(ctx, t, "sh", "-c", sleeper)
	if untagged, deleted, err := h.RemoveImage(ctx, "mine/box:1", false); err != nil || !slices.Equal(untagged, []string{"mine/box:1"}) || deleted != nil {
		t.Errorf("untag: %v, %v, %v", untagged, deleted, err)
	}
	if _, _, err := h.RemoveImage(ctx, "busybox", true); !errors.Is(err, weft.ErrConflict) {
		t.Errorf("remove in use by a running container: %v", err)
	}
	if err := h.Remove(ctx, task); err != nil {
		t.Fatal(err)
	}
	if untagged, deleted, err := h.RemoveImage(ctx, id, false); err != nil || !slices.Equal(untagged, []string{"busybox:latest"}) || !slices.Equal(deleted, []string{img.ID}) {
		t.Errorf("remove: %v, %v, %v", untagged, deleted, err)
	}
	if _, _, err := h.RemoveImage(ctx, "busybox", false); !errors.Is(err, weft.ErrNotFound) || !strings.Contains(err.Error(), "No such image: busybox") {
		t.Errorf("remove again: %v", err)
	}
}

// serveImage is a read-only registry with one image, tag v1, that wants the
// user "me" with the password "secret".
func serveImage(base string, img v1.Image) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != "me" || p != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		manifest := must(img.RawManifest())
		blobs := map[string][]byte{base + "/blobs/" + must(img.ConfigName()).String(): must(img.RawConfigFile())}
		for _, l := range must(img.Layers()) {
			rc := must(l.Compressed())
			blobs[base+"/blobs/"+must(l.Digest()).String()] = must(io.ReadAll(rc))
			rc.Close()
		}
		switch b, ok := blobs[r.URL.Path]; {
		case ok:
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
		case r.URL.Path == base+"/manifests/v1", r.URL.Path == base+"/manifests/"+must(img.Digest()).String():
			w.Header().Set("Content-Type", string(must(img.MediaType())))
			w.Header().Set("Docker-Content-Digest", must(img.Digest()).String())
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(manifest))
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
}

func TestPull(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	img, err := imagetest.BusyboxImage()
	needBusybox(t, err)
	srv := httptest.NewServer(serveImage("/v2/team/box", img))
	defer srv.Close()
	repo := strings.TrimPrefix(srv.URL, "http://") + "/team/box"
	if err := h.Pull(ctx, repo+":v1", "", nil); !errors.Is(err, weft.ErrNotFound) || !strings.Contains(err.Error(), "pull access denied") {
		t.Errorf("pull without credentials: %v", err)
	}
	auth := base64.URLEncoding.EncodeToString([]byte(`{"username":"me","password":"secret"}`))
	var last runtime.Progress
	if err := h.Pull(ctx, repo+":v1", auth, func(p runtime.Progress) { last = p }); err != nil {
		t.Fatal(err)
	}
	if last.Status != "Pull complete" || last.Total <= 0 {
		t.Errorf("last progress %+v", last)
	}
	got, err := h.Ensure(ctx, repo+":v1", nil)
	if err != nil || !slices.Equal(got.Tags, []string{repo + ":v1"}) {
		t.Errorf("ensure: %+v, %v", got, err)
	}
	if err := h.Pull(ctx, repo+":none", auth, nil); !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("unknown tag: %v", err)
	}
	if err := h.Pull(ctx, repo+":v1", "not json", nil); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("bad credentials: %v", err)
	}
	if err := h.Pull(ctx, "weft/whoami", "", nil); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("pull of the built-in image: %v", err)
	}
	digest := must(img.Digest()).String()
	if _, err := h.Ensure(ctx, repo+"@"+digest, nil); err != nil {
		t.Errorf("pinned, here: %v", err)
	}
	srv.Close()
	other := "@sha256:" + strings.Repeat("a", 64)
	if _, err := h.Ensure(ctx, repo+":v1"+other, nil); err != nil {
		t.Errorf("pinned to another digest, registry away, name here: %v", err)
	}
	if _, err := h.Ensure(ctx, repo+":v2", nil); !errors.Is(err, weft.ErrNotFound) || !strings.HasPrefix(err.Error(), "No such image: ") {
		t.Errorf("missing, registry away: %v", err)
	} else if errors.Is(err, weft.ErrUnavailable) {
		t.Errorf("missing, registry away: %v would be waited for, not reported", err)
	}
}

func TestBuiltinImage(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	img, err := h.Ensure(ctx, "weft/whoami", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("built-in image of %d bytes after %s", img.Size, time.Since(began))
	if !slices.Equal(img.Tags, []string{"weft/whoami:latest"}) || !slices.Equal(img.Config.ExposedPorts, []string{"7/tcp", "7/udp", "80/tcp"}) {
		t.Errorf("image %+v", img)
	}
	id := weft.NewID()
	began = time.Now()
	spec := runtime.Spec{Task: id, Image: "weft/whoami@sha256:" + strings.Repeat("b", 64)}
	for _, dir := range []string{"/lib", "/lib64", "/usr"} { // a test binary built with cgo (-race) is not static
		spec.Mounts = append(spec.Mounts, weft.Mount{Type: weft.MountBind, Source: dir, Target: dir, ReadOnly: true})
	}
	if err := h.Create(ctx, spec); err != nil {
		t.Fatal(err) // another node's build of it
	}
	if _, err := h.Start(ctx, id); err != nil {
		t.Fatal(err)
	}
	t.Logf("create and start in %s", time.Since(began))
	h.logMemory(t)
	runtimetest.AwaitLine(ctx, t, h, id, "ready\n")
	list, err := h.List(ctx)
	if err != nil || len(list) != 1 || !slices.Equal(list[0].Spec.Args, []string{"/weft", "whoami"}) {
		t.Errorf("listed %+v, %v; want the command that the image brings", list, err)
	}
	h.stop(t)
	h.run(t)
	again, err := h.Ensure(ctx, "weft/whoami:latest", nil)
	if err != nil || again.ID != img.ID {
		t.Errorf("after a restart: %+v, %v", again, err)
	}
}
