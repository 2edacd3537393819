package containerd

import (
	"fmt"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/weftnet/weft"
)

// builtinImage is in every image store and never pulled.
const builtinImage = "docker.io/weft/whoami:latest"

// untaggedPrefix names image records that no one has named: they need a record
// to be kept by garbage collection.
const untaggedPrefix = "untagged@"

// imageRef is a parsed reference.
type imageRef struct {
	named  reference.Named
	digest digest.Digest // of the manifest; "" = not pinned
}

// parseRef reads a reference as Docker does: "busybox" means
// docker.io/library/busybox:latest.
func parseRef(s string) (imageRef, error) {
	n, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return imageRef{}, fmt.Errorf("image name %q: %w: %w", s, err, weft.ErrInvalid)
	}
	r := imageRef{named: reference.TagNameOnly(n)}
	if d, ok := n.(reference.Digested); ok {
		r.digest = d.Digest()
	}
	return r, nil
}

// tagged is the name with its tag, ":latest" if it has none, without digest.
func (r imageRef) tagged() string {
	tag := "latest"
	if t, ok := r.named.(reference.Tagged); ok {
		tag = t.Tag()
	}
	return r.named.Name() + ":" + tag
}

// record is the name of the image's record in the store, which for a pinned
// reference has no tag.
func (r imageRef) record() string {
	if r.digest != "" {
		return r.named.Name() + "@" + r.digest.String()
	}
	return r.tagged()
}

// familiar shortens a record's name as Docker prints it.
func familiar(record string) string {
	n, err := reference.ParseNormalizedNamed(record)
	if err != nil {
		return record
	}
	return reference.FamiliarString(n)
}

// familiarRepo is the short name without tag and digest.
func familiarRepo(record string) string {
	n, err := reference.ParseNormalizedNamed(record)
	if err != nil {
		return ""
	}
	return reference.FamiliarName(n)
}

// isTag reports whether a record is a name with a tag.
func isTag(record string) bool {
	return !strings.Contains(record, "@")
}

// isIDPrefix reports whether s can be the start of an image id.
func isIDPrefix(s string) bool {
	s = strings.TrimPrefix(s, "sha256:")
	return s != "" && len(s) <= 64 && strings.Trim(s, "0123456789abcdef") == ""
}
