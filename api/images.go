package api

import (
	"cmp"
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"

	"github.com/weftnet/weft"
)

func (s *Server) imageRoutes(add adder) {
	add("GET", "/images/json", s.imageList)
	add("POST", "/images/load", s.imageLoad)
	add("POST", "/images/create", s.imagePull)
	add("GET", "/images/{name...}/json", s.imageInspect)
	add("POST", "/images/{name...}/tag", s.imageTag)
	add("DELETE", "/images/{name...}", s.imageRemove)
	add("GET", "/distribution/{name...}/json", s.distribution)
}

// familiar shortens "docker.io/library/busybox:latest" to "busybox:latest"; a
// text that is no reference stays as it is.
func familiar(ref string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref
	}
	return reference.FamiliarString(named)
}

// normal writes a reference out in full, with a tag if it has no digest.
func normal(ref string) (string, bool) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", false
	}
	if d, ok := named.(reference.Digested); ok {
		// name:tag@digest means name@digest: the digest decides.
		return reference.TrimNamed(named).Name() + "@" + d.Digest().String(), true
	}
	return reference.TagNameOnly(named).String(), true
}

func sameImage(a, b string) bool {
	x, okX := normal(a)
	y, okY := normal(b)
	return a == b || (okX && okY && x == y)
}

// findImage finds a local image by name, digest or beginning of its id.
func (s *Server) findImage(ctx context.Context, ref string) (weft.Image, error) {
	all, err := s.cfg.Images.Images(ctx)
	if err != nil {
		return weft.Image{}, err
	}
	found := -1
	for i := range all {
		img := &all[i]
		if img.ID == ref || slices.ContainsFunc(append(slices.Clone(img.Tags), img.Digests...), func(n string) bool { return sameImage(n, ref) }) {
			return *img, nil
		}
		hexID := strings.TrimPrefix(img.ID, "sha256:")
		if want := strings.TrimPrefix(ref, "sha256:"); want != "" && strings.HasPrefix(hexID, want) {
			if found >= 0 {
				return weft.Image{}, invalidf("image %s is ambiguous: give more characters of the id", ref)
			}
			found = i
		}
	}
	if found < 0 {
		return weft.Image{}, notFoundf("No such image: %s", familiar(ref))
	}
	return all[found], nil
}

func familiarAll(refs []string) []string {
	out := []string{}
	for _, r := range refs {
		out = append(out, familiar(r))
	}
	return out
}

func (s *Server) imageList(c *call) error {
	f, err := c.filters("reference", "label", "dangling")
	if err != nil {
		return err
	}
	isDangling, byDangling, err := f.flag("dangling")
	if err != nil {
		return err
	}
	all, err := s.cfg.Images.Images(c.Context())
	if err != nil {
		return err
	}
	out := []image.Summary{}
	for i := range all {
		img := &all[i]
		tags := familiarAll(img.Tags)
		isNamed := slices.ContainsFunc(f["reference"], func(pattern string) bool {
			return slices.ContainsFunc(tags, func(t string) bool { return matchReference(pattern, t) })
		})
		if (f["reference"] != nil && !isNamed) || !f.labels("label", img.Labels) || (byDangling && isDangling != (len(tags) == 0)) {
			continue
		}
		out = append(out, image.Summary{
			ID: img.ID, RepoTags: tags, RepoDigests: familiarAll(img.Digests), Created: img.Created.Unix(),
			Size: img.Size, SharedSize: -1, Containers: -1, Labels: orEmpty(img.Labels), // -1 = not counted
		})
	}
	slices.SortFunc(out, func(a, b image.Summary) int {
		return cmp.Or(cmp.Compare(b.Created, a.Created), cmp.Compare(a.ID, b.ID))
	})
	return c.json(out)
}

// matchReference is the pattern of `docker images PATTERN`.
func matchReference(pattern, tag string) bool {
	named, err := reference.ParseNormalizedNamed(tag)
	if err != nil {
		return false
	}
	ok, err := reference.FamiliarMatch(pattern, named)
	return ok && err == nil || familiar(pattern) == tag
}

func (s *Server) imageInspect(c *call) error {
	img, err := s.findImage(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	out := image.InspectResponse{
		ID: img.ID, RepoTags: familiarAll(img.Tags), RepoDigests: familiarAll(img.Digests),
		Created: img.Created.UTC().Format(time.RFC3339Nano), Architecture: img.Arch, Os: img.OS, Size: img.Size,
		Config: &dockerspec.DockerOCIImageConfig{},
	}
	cfg := &out.Config.ImageConfig
	cfg.Entrypoint, cfg.Cmd, cfg.Env = img.Config.Entrypoint, img.Config.Cmd, img.Config.Env
	cfg.User, cfg.WorkingDir, cfg.StopSignal, cfg.Labels = img.Config.User, img.Config.Dir, img.Config.StopSignal, img.Labels
	out.Config.Healthcheck, out.Config.Shell = dockerHealthCheck(img.Config.Health), img.Config.Shell
	if len(img.Config.ExposedPorts) > 0 {
		cfg.ExposedPorts = map[string]struct{}{}
		for _, p := range img.Config.ExposedPorts {
			cfg.ExposedPorts[p] = struct{}{}
		}
	}
	return c.json(out)
}

func (s *Server) imageRemove(c *call) error {
	ref := c.vars["name"]
	if c.query.Get("platforms") != "" {
		return unsupportedf("platforms: removing one platform of an image is not supported")
	}
	untagged, deleted, err := s.cfg.Images.RemoveImage(c.Context(), ref, c.bool("force"))
	if err != nil {
		return err
	}
	out := []image.DeleteResponse{}
	for _, t := range untagged {
		out = append(out, image.DeleteResponse{Untagged: familiar(t)})
	}
	for _, d := range deleted {
		out = append(out, image.DeleteResponse{Deleted: d})
	}
	return c.json(out)
}

func (s *Server) imageTag(c *call) error {
	repo, tag := c.query.Get("repo"), c.query.Get("tag")
	if tag != "" {
		repo += ":" + tag
	}
	name, err := reference.ParseNormalizedNamed(repo)
	if err != nil {
		return invalidf("repo: %q: %v", repo, err)
	}
	if _, hasDigest := name.(reference.Digested); hasDigest {
		return invalidf("repo: %q: a name with a digest cannot be given to an image", repo)
	}
	if err := s.cfg.Images.TagImage(c.Context(), c.vars["name"], reference.TagNameOnly(name).String()); err != nil {
		return err
	}
	return c.status(http.StatusCreated)
}

// progress is a stream of JSON lines that starts with the first one: what
// fails before can still be answered with a status.
type progress struct {
	c *call

	mu  sync.Mutex // guards: out and err, as layers report at the same time
	out *flushWriter
	err error
}

// progressLine is jsonstream.Message with the plain text of an error beside
// its detail, which older clients read.
type progressLine struct {
	jsonstream.Message
	ErrorText string `json:"error,omitempty"`
}

func (p *progress) line(l progressLine) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.out == nil && p.err == nil {
		p.out, p.err = startStream(p.c.w, "application/json")
	}
	if p.err == nil {
		p.err = json.NewEncoder(p.out).Encode(l) // a client that has gone ends the work by its context
	}
}

// fail ends the stream with err, or returns it when nothing was sent.
func (p *progress) fail(err error) error {
	p.mu.Lock()
	hasBegun := p.out != nil
	p.mu.Unlock()
	if err == nil || !hasBegun {
		return err
	}
	text := messageOf(err)
	p.line(progressLine{Message: jsonstream.Message{Error: &jsonstream.Error{Code: statusOf(err), Message: text}}, ErrorText: text})
	return nil
}

func (s *Server) imageLoad(c *call) error {
	for _, q := range []string{"platform"} {
		if c.query.Get(q) != "" {
			return unsupportedf("%s: loading one platform of an image is not supported", q)
		}
	}
	names, err := s.cfg.Images.LoadImage(c.Context(), c.Body)
	if err != nil {
		return err
	}
	p := &progress{c: c}
	for _, n := range names {
		p.line(progressLine{Message: jsonstream.Message{Stream: "Loaded image: " + familiar(n) + "\n"}})
	}
	if len(names) == 0 {
		return invalidf("the archive holds no image with a name")
	}
	return nil
}

func (s *Server) imagePull(c *call) error {
	from, tag := c.query.Get("fromImage"), c.query.Get("tag")
	switch {
	case c.query.Get("fromSrc") != "":
		return unsupportedf("fromSrc: making an image of a plain archive (import) is not supported: use 'image load'")
	case from == "":
		return invalidf("fromImage: missing")
	case c.query.Get("platform") != "":
		return unsupportedf("platform: pulling for another platform is not supported")
	}
	if tag != "" {
		sep := ":"
		if _, err := digest.Parse(tag); err == nil {
			sep = "@"
		}
		from += sep + tag
	}
	named, err := reference.ParseNormalizedNamed(from)
	if err != nil {
		return invalidf("fromImage: %q: %v", from, err)
	}
	if reference.IsNameOnly(named) {
		return unsupportedf("tag: pulling all tags of %s is not supported: name one", reference.FamiliarName(named))
	}
	p := &progress{c: c}
	p.line(progressLine{Message: jsonstream.Message{Status: "Pulling from " + reference.Path(named), ID: refTag(named)}})
	err = s.cfg.Images.PullImage(c.Context(), named.String(), c.Header.Get("X-Registry-Auth"),
		func(id, status string, current, total int64) {
			l := progressLine{Message: jsonstream.Message{ID: id, Status: status}}
			if total > 0 {
				l.Progress = &jsonstream.Progress{Current: current, Total: total}
			}
			p.line(l)
		})
	if err == nil {
		p.line(progressLine{Message: jsonstream.Message{Status: "Status: Image is up to date for " + reference.FamiliarString(named)}})
	}
	return p.fail(err)
}

func refTag(named reference.Named) string {
	if t, ok := named.(reference.Tagged); ok {
		return t.Tag()
	}
	return ""
}

// distribution answers with the digest of a local image, so that a client pins
// it. It asks no registry: the docker command has no time limit here, and an
// unreachable one would hold up every service create; with 404 the client goes
// on with the tag.
func (s *Server) distribution(c *call) error {
	ref := c.vars["name"]
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return invalidf("%q: %v", ref, err)
	}
	img, err := s.findImage(c.Context(), ref)
	if err != nil {
		return notFoundf("image %s is not on this node, and registries are not asked for digests", familiar(ref))
	}
	for _, d := range img.Digests {
		have, err := reference.ParseNormalizedNamed(d)
		if err != nil {
			continue
		}
		pinned, ok := have.(reference.Digested)
		if ok && have.Name() == named.Name() {
			var out registry.DistributionInspect
			out.Descriptor.MediaType = "application/vnd.oci.image.manifest.v1+json"
			out.Descriptor.Digest = pinned.Digest()
			return c.json(out)
		}
	}
	return notFoundf("image %s has no digest under this name on this node", familiar(ref))
}
