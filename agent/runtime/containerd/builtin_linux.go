package containerd

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/weftnet/weft"
)

// The built-in image is one layer with one file: this executable. Importing a
// tar of it would write its tens of megabytes twice per node. Instead its
// snapshot is made directly, with a hard link, and only configuration and
// manifest go to the content store; the manifest names the layer by the digest
// that its tar has, so the image has the same digest on every node of the same
// build. The layer's blob itself does not exist; nothing asks for the blob of
// an unpacked layer.

// labelExe on the image's record tells which file it was made from.
const labelExe = "weft.executable"

// importBuiltin makes the built-in image in the background: the daemon is
// ready without it, and Ensure makes it if it comes first.
func (d *Driver) importBuiltin(ctx context.Context) error {
	for gap := minRestart; ; gap = min(2*gap, maxRestart) {
		if err := d.Ready(ctx); err != nil {
			return nil // supervise says why, or ctx has ended
		}
		nctx, c, err := d.conn(ctx)
		if err == nil {
			err = d.ensureBuiltin(nctx, c)
		}
		if err == nil || ctx.Err() != nil {
			return nil
		}
		d.log.Warn("cannot make the built-in image, trying again", weft.KeyErr, err, "after", gap)
		if sleep(ctx, gap) != nil {
			return nil
		}
	}
}

// ensureBuiltin makes the built-in image unless it is there, from the
// executable of this daemon.
func (d *Driver) ensureBuiltin(ctx context.Context, c *client.Client) error {
	select {
	case d.builtin <- struct{}{}:
		defer func() { <-d.builtin }()
	case <-ctx.Done():
		return fmt.Errorf("make built-in image: %w", ctx.Err())
	}
	exe, err := d.executable()
	if err != nil {
		return err
	}
	mark, err := fileMark(exe)
	if err != nil {
		return fmt.Errorf("make built-in image: %w", err)
	}
	if i, err := c.ImageService().Get(ctx, builtinImage); err == nil && i.Labels[labelExe] == mark {
		if ok, err := client.NewImage(c, i).IsUnpacked(ctx, snapshotter); err == nil && ok {
			return nil
		}
	}
	return wrap(d.makeBuiltin(ctx, c, exe, mark), "make built-in image")
}

func fileMark(path string) (string, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	ino := uint64(0)
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		ino = st.Ino
	}
	return fmt.Sprintf("%d-%d-%d", ino, fi.Size(), fi.ModTime().UnixNano()), nil
}

func (d *Driver) makeBuiltin(ctx context.Context, c *client.Client, exe, mark string) (err error) {
	ctx, done, err := c.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done(context.WithoutCancel(ctx))) }()
	layer, err := layerOf(exe)
	if err != nil {
		return err
	}
	if err := d.builtinSnapshot(ctx, c, exe, layer.Digest.String()); err != nil {
		return err
	}
	conf, manifest, err := builtinBlobs(layer)
	if err != nil {
		return err
	}
	if err := writeBlob(ctx, c, conf, map[string]string{"containerd.io/gc.ref.snapshot." + snapshotter: layer.Digest.String()}); err != nil {
		return err
	}
	if err := writeBlob(ctx, c, manifest, map[string]string{"containerd.io/gc.ref.content.config": conf.desc.Digest.String()}); err != nil {
		return err
	}
	rec := images.Image{Name: builtinImage, Target: manifest.desc, Labels: map[string]string{labelExe: mark}}
	_, err = c.ImageService().Create(ctx, rec)
	if errdefs.IsAlreadyExists(err) {
		_, err = c.ImageService().Update(ctx, rec, "target", "labels")
	}
	return err
}

// layerOf describes the layer that holds the executable as /weft, uncompressed:
// its digest is also its diff id and chain id.
func layerOf(exe string) (ocispec.Descriptor, error) {
	f, err := os.Open(exe)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer f.Close()
	h := digest.Canonical.Digester()
	n := &counter{w: h.Hash()}
	if err := writeLayer(n, f); err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: h.Digest(), Size: n.n}, nil
}

// writeLayer writes the tar; nothing in it but the file's bytes depends on
// the machine.
func writeLayer(w io.Writer, f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	if err := tw.WriteHeader(&tar.Header{Name: "weft", Mode: 0o755, Size: fi.Size(), Typeflag: tar.TypeReg, Format: tar.FormatUSTAR, ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	if _, err := io.Copy(tw, f); err != nil {
		return err
	}
	return tw.Close()
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

// builtinSnapshot commits a snapshot with one hard link (across file systems a
// copy) of the executable. Containers see it through an overlay, so a write in
// one of them copies it up and never reaches the link.
func (d *Driver) builtinSnapshot(ctx context.Context, c *client.Client, exe, chain string) error {
	sn := c.SnapshotService(snapshotter)
	if _, err := sn.Stat(ctx, chain); err == nil {
		return nil
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	key := "weft-builtin-" + string(weft.NewID())
	mounts, err := sn.Prepare(ctx, key, "")
	if err != nil {
		return err
	}
	fail := func(err error) error {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		return errors.Join(err, sn.Remove(rctx, key))
	}
	// Without a parent the snapshot is one directory, bind-mounted; a link
	// must be made in the directory itself, since link(2) does not cross mounts.
	if len(mounts) != 1 || mounts[0].Type != "bind" {
		return fail(fmt.Errorf("the snapshotter gave %d mounts (%+v) for an empty snapshot, one bind mount was expected", len(mounts), mounts))
	}
	if err := linkOrCopy(exe, filepath.Join(mounts[0].Source, "weft")); err != nil {
		return fail(err)
	}
	err = sn.Commit(ctx, chain, key, snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": chain}))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fail(err)
	}
	return nil
}

type blob struct {
	desc ocispec.Descriptor
	data []byte
}

// builtinBlobs makes the image's configuration and manifest; same layer in, same bytes out.
func builtinBlobs(layer ocispec.Descriptor) (conf, manifest blob, err error) {
	epoch := time.Unix(0, 0).UTC()
	conf, err = jsonBlob(ocispec.MediaTypeImageConfig, ocispec.Image{
		Created: &epoch, Platform: ocispec.Platform{Architecture: goruntime.GOARCH, OS: "linux"},
		Config: ocispec.ImageConfig{
			Entrypoint:   []string{"/weft", "whoami"},
			Env:          []string{defaultPath},
			ExposedPorts: map[string]struct{}{"80/tcp": {}, "7/tcp": {}, "7/udp": {}},
			Labels:       map[string]string{"org.opencontainers.image.title": "weft/whoami"},
		},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest}},
	})
	if err != nil {
		return conf, manifest, err
	}
	manifest, err = jsonBlob(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: conf.desc, Layers: []ocispec.Descriptor{layer},
	})
	return conf, manifest, err
}

func jsonBlob(mediaType string, v any) (blob, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return blob{}, fmt.Errorf("encode %s: %w", mediaType, err)
	}
	return blob{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}, b}, nil
}

func writeBlob(ctx context.Context, c *client.Client, b blob, labels map[string]string) error {
	return content.WriteBlob(ctx, c.ContentStore(), b.desc.Digest.String(), bytes.NewReader(b.data), b.desc, content.WithLabels(labels))
}
