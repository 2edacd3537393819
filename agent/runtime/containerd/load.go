package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/weftnet/weft"
)

// Load implements runtime.Images.
func (d *Driver) Load(ctx context.Context, r io.Reader) ([]string, error) {
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return nil, err
	}
	before, err := c.ImageService().List(ctx)
	if err != nil {
		return nil, wrap(err, "list images")
	}
	old := make(map[string]ocispec.Descriptor, len(before))
	for _, i := range before {
		old[i.Name] = i.Target
	}
	names, err := d.load(ctx, c, r, old)
	if err == nil {
		return names, nil
	}
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	return nil, errors.Join(d.loadError(ctx, err), d.restore(rctx, c, old))
}

// loadError blames the archive for everything that is not the server's fault.
func (d *Driver) loadError(ctx context.Context, err error) error {
	if ctx.Err() != nil || errdefs.IsUnavailable(err) || errdefs.IsInternal(err) || errors.Is(err, weft.ErrInvalid) || errors.Is(err, weft.ErrConflict) {
		return wrap(err, "load image archive")
	}
	return fmt.Errorf("load image archive: it is not a readable `docker save` or OCI layout archive: %w: %w", weft.ErrInvalid, err)
}

func (d *Driver) load(ctx context.Context, c *client.Client, r io.Reader, old map[string]ocispec.Descriptor) (names []string, err error) {
	plain, err := compression.DecompressStream(r)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	imgs, err := c.Import(ctx, plain,
		client.WithSkipDigestRef(func(name string) bool { return name != "" }),
		client.WithDigestRef(func(dg digest.Digest) string { return untaggedPrefix + dg.String() }))
	if err != nil {
		return nil, err
	}
	for _, i := range imgs {
		name, err := d.rename(ctx, c, i, old)
		if err != nil {
			return nil, err
		}
		i.Name = name
		if err := d.unpack(ctx, c, i); err != nil {
			return nil, err
		}
		shown := familiar(name)
		if !isTag(name) {
			id, err := imageID(ctx, c, i)
			if err != nil {
				return nil, err
			}
			shown = id
		}
		if !slices.Contains(names, shown) {
			names = append(names, shown)
		}
	}
	return names, nil
}

// rename gives an imported record the name that Docker would.
func (d *Driver) rename(ctx context.Context, c *client.Client, i images.Image, old map[string]ocispec.Descriptor) (string, error) {
	if len(i.Name) >= len(untaggedPrefix) && i.Name[:len(untaggedPrefix)] == untaggedPrefix {
		return i.Name, nil
	}
	ref, err := parseRef(i.Name)
	if err != nil {
		return "", err
	}
	if ref.record() == builtinImage {
		return "", fmt.Errorf("the archive holds %s, which is built in: %w", familiar(builtinImage), weft.ErrConflict)
	}
	if ref.record() == i.Name {
		return i.Name, nil
	}
	if err := putImage(ctx, c, ref.record(), i.Target); err != nil {
		return "", err
	}
	if _, was := old[i.Name]; !was {
		if err := c.ImageService().Delete(ctx, i.Name); err != nil && !errdefs.IsNotFound(err) {
			return "", err
		}
	}
	return ref.record(), nil
}

// restore puts the names back as they were. Blobs without a name go with the
// next garbage collection, which the last deletion waits for.
func (d *Driver) restore(ctx context.Context, c *client.Client, old map[string]ocispec.Descriptor) error {
	now, err := c.ImageService().List(ctx)
	if err != nil {
		return wrap(err, "restore image names")
	}
	var errs []error
	for _, i := range now {
		target, was := old[i.Name]
		switch {
		case !was && i.Name == builtinImage: // its import runs beside us
		case !was:
			err = c.ImageService().Delete(ctx, i.Name, images.SynchronousDelete())
		case target.Digest != i.Target.Digest:
			err = putImage(ctx, c, i.Name, target)
		}
		if err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, wrap(err, "restore image name %s", i.Name))
		}
		err = nil
	}
	return errors.Join(errs...)
}
