package containerd

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// progressEvery is how often a pull reports; Docker's clients redraw about as often.
const progressEvery = 200 * time.Millisecond

// credentials as Docker's clients send them (Engine API, X-Registry-Auth).
type credentials struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// parseAuth reads X-Registry-Auth: base64url of JSON, or the JSON itself; ""
// means none.
func parseAuth(s string) (credentials, error) {
	var c credentials
	if s == "" {
		return c, nil
	}
	raw := []byte(s)
	if !strings.HasPrefix(strings.TrimSpace(s), "{") {
		var err error
		// Old clients use the standard alphabet, some leave the padding off.
		plain := strings.TrimRight(strings.NewReplacer("+", "-", "/", "_").Replace(s), "=")
		if raw, err = base64.RawURLEncoding.DecodeString(plain); err != nil {
			return c, fmt.Errorf("registry credentials: %w: %w", weft.ErrInvalid, err)
		}
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		return credentials{}, fmt.Errorf("registry credentials: %w: they must be a JSON object", weft.ErrInvalid) // err would quote them
	}
	if c.RegistryToken != "" {
		return credentials{}, fmt.Errorf("registry credentials: registrytoken: %w", weft.ErrUnsupported)
	}
	return c, nil
}

type pullRequest struct {
	ref    imageRef
	auth   credentials
	report func(runtime.Progress)
}

// Pull implements runtime.Images. auth is the value of X-Registry-Auth. Plain
// HTTP is spoken only with a registry on localhost.
func (d *Driver) Pull(ctx context.Context, ref, auth string, report func(runtime.Progress)) error {
	r, err := parseRef(ref)
	if err != nil {
		return err
	}
	if r.tagged() == builtinImage {
		return fmt.Errorf("pull %s: it is built in and never pulled: %w", ref, weft.ErrInvalid)
	}
	cred, err := parseAuth(auth)
	if err != nil {
		return err
	}
	ctx, c, err := d.conn(ctx)
	if err != nil {
		return err
	}
	return d.pull(ctx, c, pullRequest{ref: r, auth: cred, report: report})
}

func (d *Driver) pull(ctx context.Context, c *client.Client, req pullRequest) error {
	creds := func(string) (string, string, error) {
		if req.auth.IdentityToken != "" {
			return "", req.auth.IdentityToken, nil // an empty name marks a token
		}
		return req.auth.Username, req.auth.Password, nil
	}
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: docker.ConfigureDefaultRegistries(
			docker.WithPlainHTTP(docker.MatchLocalhost),
			docker.WithAuthorizer(docker.NewDockerAuthorizer(docker.WithAuthCreds(creds)))),
	})
	w := &pullWatch{client: c, report: req.report}
	stop := w.start(ctx)
	if err := reachable(ctx, resolver, req.ref.record()); err != nil {
		stop(false)
		return pullError(req.ref, err)
	}
	_, err := c.Pull(ctx, req.ref.record(),
		client.WithResolver(resolver), client.WithPullUnpack, client.WithPullSnapshotter(snapshotter),
		client.WithImageHandler(images.HandlerFunc(w.see)))
	stop(err == nil)
	if err != nil {
		return pullError(req.ref, err)
	}
	return nil
}

// reachTimeout bounds the first word of a registry. Without it the client tries
// a silent one five times for as long as names and connections take to fail,
// which is a minute.
const reachTimeout = 15 * time.Second

// reachable asks the registry for the image's name.
func reachable(ctx context.Context, r remotes.Resolver, record string) error {
	actx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	_, _, err := r.Resolve(actx, record)
	if err != nil && ctx.Err() == nil && actx.Err() != nil {
		return fmt.Errorf("no answer within %s: %w", reachTimeout, &url.Error{Op: "ask", URL: record, Err: err})
	}
	return err
}

// pullError says what failed in Docker's words.
func pullError(r imageRef, err error) error {
	name := familiar(r.record())
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("pull image %s: %w", name, err)
	case errors.As(err, &status) && (status.StatusCode == 401 || status.StatusCode == 403), strings.Contains(err.Error(), "authorization failed"):
		return fmt.Errorf("pull access denied for %s, repository does not exist or may require 'docker login': %w: %w", name, weft.ErrNotFound, err)
	case errdefs.IsNotFound(err):
		return fmt.Errorf("manifest for %s not found: manifest unknown: %w: %w", name, weft.ErrNotFound, err)
	case isUnreachable(err):
		return fmt.Errorf("pull image %s: its registry cannot be reached: %w: %w", name, weft.ErrUnavailable, err)
	}
	return wrap(err, "pull image %s", name)
}

// isUnreachable reports whether no registry has answered at all.
func isUnreachable(err error) bool {
	var op *net.OpError
	var dns *net.DNSError
	var u *url.Error
	return errors.As(err, &op) || errors.As(err, &dns) || errors.As(err, &u) && u.Timeout()
}

// pullWatch reports the progress of a pull.
type pullWatch struct {
	client *client.Client
	report func(runtime.Progress)

	// mu guards: layers.
	mu     sync.Mutex
	layers []ocispec.Descriptor
}

// see is called by the pull for each descriptor it meets.
func (w *pullWatch) see(_ context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	if images.IsLayerType(desc.MediaType) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.layers = append(w.layers, desc)
	}
	return nil, nil
}

// start begins to report; the function it returns ends that and waits for it.
func (w *pullWatch) start(ctx context.Context) (stop func(ok bool)) {
	if w.report == nil {
		return func(bool) {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for sleep(ctx, progressEvery) == nil {
			w.tick(ctx)
		}
	}()
	return func(ok bool) {
		cancel()
		<-done
		if !ok {
			return
		}
		for _, l := range w.layers {
			w.report(runtime.Progress{ID: short(l.Digest.String()), Status: "Pull complete", Current: l.Size, Total: l.Size})
		}
	}
}

func (w *pullWatch) tick(ctx context.Context) {
	w.mu.Lock()
	layers := append([]ocispec.Descriptor(nil), w.layers...)
	w.mu.Unlock()
	for _, l := range layers {
		p := runtime.Progress{ID: short(l.Digest.String()), Status: "Downloading", Total: l.Size}
		st, err := w.client.ContentStore().Status(ctx, "layer-"+l.Digest.String())
		if err == nil {
			p.Current = st.Offset
		} else if _, err := w.client.ContentStore().Info(ctx, l.Digest); err == nil {
			p.Status, p.Current = "Download complete", l.Size
		}
		w.report(p)
	}
}
