package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// noSuchImage is Docker's sentence.
func noSuchImage(ref string) error {
	//lint:ignore ST1005 Docker's clients print it as it is
	return fmt.Errorf("No such image: %s: %w", ref, weft.ErrNotFound)
}

// find returns the local image that ref means: a name with a tag, a name pinned
// by a digest, or an id or the start of one. A pinned name matches any record
// of the same repository with that digest.
func (d *Driver) find(ctx context.Context, c *client.Client, ref string) (images.Image, error) {
	all, err := c.ImageService().List(ctx)
	if err != nil {
		return images.Image{}, wrap(err, "list images")
	}
	r, perr := parseRef(ref)
	if perr == nil {
		for _, i := range all {
			if i.Name == r.record() || r.digest != "" && i.Target.Digest == r.digest && familiarRepo(i.Name) == familiarRepo(r.record()) {
				return i, nil
			}
		}
	}
	if !isIDPrefix(ref) {
		return images.Image{}, errors.Join(perr, noSuchImage(ref))
	}
	var found []images.Image
	ids := make(map[string]bool)
	for _, i := range all {
		id, err := imageID(ctx, c, i)
		if err != nil {
			continue // another platform's, or damaged: cannot be meant by an id
		}
		if strings.HasPrefix(strings.TrimPrefix(id, "sha256:"), strings.TrimPrefix(ref, "sha256:")) {
			found, ids[id] = append(found, i), true
		}
	}
	switch len(ids) {
	case 0:
		return images.Image{}, noSuchImage(ref)
	case 1:
		return found[0], nil
	}
	return images.Image{}, fmt.Errorf("image id %s is not unique: it begins %d ids; give more digits: %w", ref, len(ids), weft.ErrInvalid)
}

func imageID(ctx context.Context, c *client.Client, i images.Image) (string, error) {
	conf, err := i.Config(ctx, c.ContentStore(), platforms.Default())
	return conf.Digest.String(), err
}

// local returns the image that a container with this reference runs. A pinned
// reference is satisfied by its digest, or, when that is not here, by the name
// alone: Ensure has let that pass before.
func (d *Driver) local(ctx context.Context, c *client.Client, ref string) (client.Image, error) {
	i, err := d.find(ctx, c, ref)
	if errors.Is(err, weft.ErrNotFound) {
		if r, perr := parseRef(ref); perr == nil && r.digest != "" {
			if got, terr := c.ImageService().Get(ctx, r.tagged()); terr == nil {
				i, err = got, nil
			}
		}
	}
	if err != nil {
		return nil, err
	}
	return client.NewImage(c, i), nil
}

// Ensure implements runtime.Images. A reference pinned by a digest
// ("name@sha256:…") is met by a local image with that digest; else it is
// pulled; and if its registry cannot be reached at all, a local image of that
// name is taken: an image loaded from a tar on each node need not have the
// same digest everywhere. The built-in image is always this node's own.
func (d *Driver) Ensure(ctx context.Context, ref string, report func(runtime.Progress)) (weft.Image, error) {
	r, err := parseRef(ref)
	if err != nil && !isIDPrefix(ref) {
		return weft.Image{}, err
	}
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return weft.Image{}, err
	}
	if r.named != nil && r.tagged() == builtinImage {
		if err := d.ensureBuiltin(ctx, c); err != nil {
			return weft.Image{}, err
		}
		return d.describeName(ctx, c, builtinImage)
	}
	i, err := d.find(ctx, c, ref)
	if err == nil {
		if err := d.unpack(ctx, c, i); err != nil {
			return weft.Image{}, err
		}
		return d.describe(ctx, c, []images.Image{i})
	}
	if !errors.Is(err, weft.ErrNotFound) || r.named == nil {
		return weft.Image{}, err
	}
	perr := d.pull(ctx, c, pullRequest{ref: r, report: report})
	if perr == nil {
		return d.describeName(ctx, c, r.record())
	}
	if ctx.Err() != nil {
		return weft.Image{}, fmt.Errorf("pull image %s: %w", familiar(r.record()), ctx.Err())
	}
	if r.digest != "" && isUnreachable(perr) {
		if img, err := d.local(ctx, c, ref); err == nil {
			if err := d.unpack(ctx, c, img.Metadata()); err != nil {
				return weft.Image{}, err
			}
			return d.describe(ctx, c, []images.Image{img.Metadata()})
		}
	}
	// An unreachable registry is not worth waiting for here: the task is
	// rejected, everybody sees why, and its restart policy tries again. So
	// perr gives its text, not its class.
	//lint:ignore ST1005 Docker's sentence
	return weft.Image{}, fmt.Errorf("No such image: %s (%s): %w", familiar(r.record()), weft.Text(perr), weft.ErrNotFound)
}

// unpack makes the snapshots of an image if they are not there.
func (d *Driver) unpack(ctx context.Context, c *client.Client, i images.Image) error {
	img := client.NewImage(c, i)
	ok, err := img.IsUnpacked(ctx, snapshotter)
	if err == nil && !ok {
		err = img.Unpack(ctx, snapshotter)
	}
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("unpack image %s: it is not made for %s: %w: %w", familiar(i.Name), platforms.DefaultString(), weft.ErrInvalid, err)
	}
	return wrap(err, "unpack image %s", familiar(i.Name))
}

func (d *Driver) describeName(ctx context.Context, c *client.Client, name string) (weft.Image, error) {
	i, err := c.ImageService().Get(ctx, name)
	if err != nil {
		return weft.Image{}, wrap(err, "image %s", familiar(name))
	}
	return d.describe(ctx, c, []images.Image{i})
}

// describe joins the records of one image (same configuration).
func (d *Driver) describe(ctx context.Context, c *client.Client, records []images.Image) (weft.Image, error) {
	img := client.NewImage(c, records[0])
	cfg, err := img.Spec(ctx)
	if err != nil {
		return weft.Image{}, wrap(err, "read image %s", familiar(records[0].Name))
	}
	id, err := imageID(ctx, c, records[0])
	if err != nil {
		return weft.Image{}, wrap(err, "read image %s", familiar(records[0].Name))
	}
	m, err := images.Manifest(ctx, c.ContentStore(), records[0].Target, platforms.Default())
	if err != nil {
		return weft.Image{}, wrap(err, "read image %s", familiar(records[0].Name))
	}
	w := weft.Image{ID: id, Size: m.Config.Size, Labels: cfg.Config.Labels, Arch: cfg.Architecture, OS: cfg.OS, Config: imageConfig(cfg.Config)}
	if err := addHealth(ctx, c, m.Config, &w.Config); err != nil {
		return weft.Image{}, wrap(err, "read image %s", familiar(records[0].Name))
	}
	if cfg.Created != nil {
		w.Created = *cfg.Created
	}
	for _, l := range m.Layers {
		w.Size += l.Size
	}
	for _, i := range records {
		if strings.HasPrefix(i.Name, untaggedPrefix) {
			continue
		}
		if isTag(i.Name) {
			w.Tags = append(w.Tags, familiar(i.Name))
		}
		if pin := familiarRepo(i.Name) + "@" + i.Target.Digest.String(); !slices.Contains(w.Digests, pin) {
			w.Digests = append(w.Digests, pin)
		}
	}
	slices.Sort(w.Tags)
	slices.Sort(w.Digests)
	return w, nil
}

func imageConfig(c ocispec.ImageConfig) weft.ImageConfig {
	out := weft.ImageConfig{
		Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env,
		User: c.User, Dir: c.WorkingDir, StopSignal: c.StopSignal,
	}
	for p := range c.ExposedPorts {
		out.ExposedPorts = append(out.ExposedPorts, p)
	}
	slices.Sort(out.ExposedPorts)
	return out
}

// addHealth reads what Docker adds to an image's configuration: OCI's has no room
// for it. A check that no service could have is as none.
func addHealth(ctx context.Context, c *client.Client, d ocispec.Descriptor, to *weft.ImageConfig) error {
	b, err := content.ReadBlob(ctx, c.ContentStore(), d)
	if err != nil {
		return err
	}
	return decodeHealth(b, to)
}

func decodeHealth(b []byte, to *weft.ImageConfig) error {
	var in struct {
		Config struct {
			Healthcheck *weft.HealthCheck // the fields have Docker's names and units
			Shell       []string
		} `json:"config"`
	}
	if err := json.Unmarshal(b, &in); err != nil {
		return fmt.Errorf("decode configuration: %w", err)
	}
	if h := in.Config.Healthcheck; h != nil && h.Validate("Healthcheck") == nil {
		to.Health, to.Shell = *h, in.Config.Shell
	}
	return nil
}

// Images implements runtime.Images; newest first.
func (d *Driver) Images(ctx context.Context) ([]weft.Image, error) {
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return nil, err
	}
	records, err := c.ImageService().List(ctx)
	if err != nil {
		return nil, wrap(err, "list images")
	}
	byID := make(map[string][]images.Image)
	for _, i := range records {
		id, err := imageID(ctx, c, i)
		if err != nil {
			d.log.Warn("image cannot be read", "image", i.Name, weft.KeyErr, err)
			continue
		}
		byID[id] = append(byID[id], i)
	}
	all := make([]weft.Image, 0, len(byID))
	for _, rs := range byID {
		w, err := d.describe(ctx, c, rs)
		if err != nil {
			return nil, err
		}
		all = append(all, w)
	}
	slices.SortFunc(all, func(a, b weft.Image) int {
		if n := b.Created.Compare(a.Created); n != 0 {
			return n
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all, nil
}

// Tag implements runtime.Images.
func (d *Driver) Tag(ctx context.Context, ref, name string) error {
	to, err := parseRef(name)
	if err != nil {
		return err
	}
	if to.digest != "" {
		return fmt.Errorf("tag %s: a tag cannot carry a digest: %w", name, weft.ErrInvalid)
	}
	if to.tagged() == builtinImage {
		return fmt.Errorf("tag %s: that name belongs to the built-in image: %w", name, weft.ErrConflict)
	}
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return err
	}
	i, err := d.find(ctx, c, ref)
	if err != nil {
		return err
	}
	return wrap(putImage(ctx, c, to.tagged(), i.Target), "tag %s as %s", ref, name)
}

// putImage makes a record or turns it to another target.
func putImage(ctx context.Context, c *client.Client, name string, target ocispec.Descriptor) error {
	rec := images.Image{Name: name, Target: target}
	_, err := c.ImageService().Create(ctx, rec)
	if errdefs.IsAlreadyExists(err) {
		_, err = c.ImageService().Update(ctx, rec, "target")
	}
	return err
}

// RemoveImage implements runtime.Images, by Docker's rules: a tag among several
// is only untagged; the last one, or an id, deletes the image, unless a
// container uses it. force lets an id with several tags go, and an image that
// only ended containers use.
func (d *Driver) RemoveImage(ctx context.Context, ref string, force bool) (untagged, deleted []string, err error) {
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return nil, nil, err
	}
	i, err := d.find(ctx, c, ref)
	if err != nil {
		return nil, nil, err
	}
	id, err := imageID(ctx, c, i)
	if err != nil {
		return nil, nil, wrap(err, "remove image %s", ref)
	}
	all, err := d.recordsOf(ctx, c, id)
	if err != nil {
		return nil, nil, err
	}
	victims := all
	if r, perr := parseRef(ref); perr == nil && r.record() == i.Name {
		victims = []images.Image{i}
		// A pinned record is a shadow of the tags of its repository.
		if tags := slices.DeleteFunc(slices.Clone(all), func(o images.Image) bool { return o.Name == i.Name || !isTag(o.Name) }); len(tags) == 0 {
			victims = all
		}
	} else if len(all) > 1 && !force && multiRepo(all) {
		return nil, nil, fmt.Errorf("unable to delete %s (must be forced): image is referenced in multiple repositories: %w", short(id), weft.ErrConflict)
	}
	if len(victims) == len(all) {
		if err := d.checkUnused(ctx, c, id, force); err != nil {
			return nil, nil, fmt.Errorf("remove image %s: %w", ref, err)
		}
	}
	for n, v := range victims {
		var opts []images.DeleteOpt
		if n == len(victims)-1 {
			opts = append(opts, images.SynchronousDelete())
		}
		if err := c.ImageService().Delete(ctx, v.Name, opts...); err != nil && !errdefs.IsNotFound(err) {
			return untagged, nil, wrap(err, "remove image %s", ref)
		}
		if !strings.HasPrefix(v.Name, untaggedPrefix) {
			untagged = append(untagged, familiar(v.Name))
		}
	}
	if len(victims) == len(all) {
		deleted = []string{id}
	}
	return untagged, deleted, nil
}

func short(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(12, len(id))]
}

func multiRepo(records []images.Image) bool {
	for _, r := range records[1:] {
		if familiarRepo(r.Name) != familiarRepo(records[0].Name) {
			return true
		}
	}
	return false
}

// recordsOf returns all records of one image.
func (d *Driver) recordsOf(ctx context.Context, c *client.Client, id string) ([]images.Image, error) {
	records, err := c.ImageService().List(ctx)
	if err != nil {
		return nil, wrap(err, "list images")
	}
	return slices.DeleteFunc(records, func(i images.Image) bool {
		got, err := imageID(ctx, c, i)
		return err != nil || got != id
	}), nil
}

// checkUnused refuses the removal of an image that a container needs.
func (d *Driver) checkUnused(ctx context.Context, c *client.Client, id string, force bool) error {
	recs, err := c.ContainerService().List(ctx, fmt.Sprintf("labels.%q==%q", labelImageID, id))
	if err != nil {
		return wrap(err, "list containers")
	}
	for _, rec := range recs {
		st, err := d.status(ctx, c, rec)
		if err != nil {
			return wrap(err, "list containers")
		}
		name := weft.ContainerID(weft.ID(rec.ID))[:12]
		switch {
		case st.State == runtime.Running:
			return fmt.Errorf("image is being used by running container %s: %w", name, weft.ErrConflict)
		case !force:
			return fmt.Errorf("image is being used by stopped container %s (must be forced): %w", name, weft.ErrConflict)
		}
	}
	return nil
}
