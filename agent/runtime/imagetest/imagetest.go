// Package imagetest makes images for tests out of what a Debian machine has: no
// registry and no network is needed. It is run by tests only; its functions may
// be called at the same time.
package imagetest

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/weftnet/weft"
)

// BusyboxName is the name of the image that Busybox writes.
const BusyboxName = "busybox:latest"

// Busybox writes a `docker save` archive of an image with the static busybox of
// this machine: all applets in /bin, users root and app (1000, also in the
// group "extra", 2000), /tmp, /data with one file and owner app, command "sh".
// The same binary gives the same bytes. Without a static busybox the error
// wraps weft.ErrUnsupported and names the package to install.
func Busybox(w io.Writer) error {
	img, err := BusyboxImage()
	if err != nil {
		return err
	}
	return Save(w, BusyboxName, img)
}

// Save writes a `docker save` archive of img under a name.
func Save(w io.Writer, ref string, img v1.Image) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return fmt.Errorf("image name %q: %w", ref, err)
	}
	if err := tarball.Write(tag, img, w); err != nil {
		return fmt.Errorf("write image archive: %w", err)
	}
	return nil
}

// OCILayout writes a tar of an OCI image layout that holds img under ref, or
// without a name when ref is "". It uses dir, an empty directory, as scratch space.
func OCILayout(w io.Writer, dir, ref string, img v1.Image) error {
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write OCI layout: %w", err)
	}
	var opts []layout.Option
	if ref != "" {
		opts = append(opts, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": ref}))
	}
	if err := p.AppendImage(img, opts...); err != nil {
		return fmt.Errorf("write OCI layout: %w", err)
	}
	tw := tar.NewWriter(w)
	if err := tw.AddFS(os.DirFS(dir)); err != nil {
		return fmt.Errorf("write OCI layout: %w", err)
	}
	return tw.Close()
}

// BusyboxImage is the image itself, for tests that change it with
// go-containerregistry's mutate.
func BusyboxImage() (v1.Image, error) {
	bin, err := findBusybox()
	if err != nil {
		return nil, err
	}
	layer, err := busyboxLayer(bin)
	if err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil })
	if err != nil {
		return nil, fmt.Errorf("make busybox layer: %w", err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, fmt.Errorf("make busybox image: %w", err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("make busybox image: %w", err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", goruntime.GOARCH
	cfg.Created = v1.Time{Time: time.Unix(0, 0).UTC()}
	cfg.Config.Cmd = []string{"sh"}
	cfg.Config.Env = []string{"PATH=/bin", "FROM_IMAGE=yes"}
	return mutate.ConfigFile(img, cfg)
}

// findBusybox returns the path of a busybox without a dynamic linker.
func findBusybox() (string, error) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/bin", "/usr/bin") {
		p := filepath.Join(dir, "busybox")
		b, err := os.ReadFile(p)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("read busybox: %w", err)
		}
		if !bytes.Contains(b[:min(len(b), 4096)], []byte("ld-linux")) { // the interpreter's name stands in the first page of a dynamic one
			return p, nil
		}
	}
	return "", fmt.Errorf("find a static busybox on PATH or in /bin: lab/vm/need.sh busybox unpacks Debian's: %w", weft.ErrUnsupported)
}

func busyboxLayer(bin string) ([]byte, error) {
	out, err := exec.Command(bin, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox applets: %w", err)
	}
	content, err := os.ReadFile(bin)
	if err != nil {
		return nil, fmt.Errorf("read busybox: %w", err)
	}
	var buf bytes.Buffer
	t := layerTar{w: tar.NewWriter(&buf)}
	for _, d := range []string{"bin", "dev", "etc", "home", "proc", "root", "sys", "usr", "usr/bin", "var"} {
		t.add(tar.Header{Name: d + "/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	t.add(tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	t.add(tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 1000, Gid: 1000}, nil)
	t.add(tar.Header{Name: "data/seed", Mode: 0o640, Uid: 1000, Gid: 1000}, []byte("from the image\n"))
	t.add(tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home:/bin/sh\n"))
	t.add(tar.Header{Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\napp:x:1000:\nextra:x:2000:app\n"))
	t.add(tar.Header{Name: "bin/busybox", Mode: 0o755}, content)
	for applet := range strings.FieldsSeq(string(out)) {
		if applet != "busybox" {
			t.add(tar.Header{Name: path.Join("bin", applet), Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	if err := errors.Join(t.err, t.w.Close()); err != nil {
		return nil, fmt.Errorf("make busybox layer: %w", err)
	}
	return buf.Bytes(), nil
}

// layerTar keeps the first error.
type layerTar struct {
	w   *tar.Writer
	err error
}

func (t *layerTar) add(h tar.Header, data []byte) {
	if t.err != nil {
		return
	}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
	}
	h.Size, h.ModTime = int64(len(data)), time.Unix(0, 0)
	if t.err = t.w.WriteHeader(&h); t.err == nil {
		_, t.err = t.w.Write(data)
	}
}
