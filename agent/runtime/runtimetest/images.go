package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// MemoryImages is an image store in memory. It has no registry: what was not
// put in with Add does not exist. Safe for concurrent use.
type MemoryImages struct {
	// imu guards: images.
	imu    sync.Mutex
	images []weft.Image
}

// NewMemoryImages returns a store that holds only weft/whoami.
func NewMemoryImages() *MemoryImages {
	s := &MemoryImages{}
	s.Add(weft.Image{ID: "sha256:" + strings.Repeat("0", 63) + "1", Tags: []string{"weft/whoami:latest"},
		Config: weft.ImageConfig{Entrypoint: []string{"/weft", "whoami"}, ExposedPorts: []string{"80/tcp", "7/tcp", "7/udp"}}})
	return s
}

// Add puts an image in; it takes its tags from others.
func (s *MemoryImages) Add(i weft.Image) {
	s.imu.Lock()
	defer s.imu.Unlock()
	for n := range s.images {
		s.images[n].Tags = slices.DeleteFunc(slices.Clone(s.images[n].Tags), func(t string) bool { return slices.Contains(i.Tags, t) })
	}
	s.images = append(s.images, i)
}

func withTag(ref string) string {
	ref, _, _ = strings.Cut(ref, "@")
	if i := strings.LastIndex(ref, ":"); i < 0 || strings.Contains(ref[i:], "/") {
		return ref + ":latest"
	}
	return ref
}

func (s *MemoryImages) findLocked(ref string) (int, error) {
	i := slices.IndexFunc(s.images, func(i weft.Image) bool {
		return slices.Contains(i.Tags, withTag(ref)) || slices.Contains(i.Digests, ref) || strings.HasPrefix(i.ID, ref) && len(ref) > 7
	})
	if i < 0 {
		//lint:ignore ST1005 Docker's sentence
		return 0, fmt.Errorf("No such image: %s: %w", withTag(ref), weft.ErrNotFound)
	}
	return i, nil
}

// Ensure implements runtime.Images.
func (s *MemoryImages) Ensure(ctx context.Context, ref string, _ func(runtime.Progress)) (weft.Image, error) {
	if err := ctx.Err(); err != nil {
		return weft.Image{}, err
	}
	s.imu.Lock()
	defer s.imu.Unlock()
	i, err := s.findLocked(ref)
	if err != nil {
		return weft.Image{}, err
	}
	return s.images[i], nil
}

// Images implements runtime.Images.
func (s *MemoryImages) Images(ctx context.Context) ([]weft.Image, error) {
	s.imu.Lock()
	defer s.imu.Unlock()
	return slices.Clone(s.images), ctx.Err()
}

// Load implements runtime.Images: the archive is a name and nothing else.
func (s *MemoryImages) Load(ctx context.Context, r io.Reader) ([]string, error) {
	b, err := io.ReadAll(io.LimitReader(r, 256))
	if err := errors.Join(err, ctx.Err()); err != nil {
		return nil, err
	}
	name := strings.TrimSpace(string(b))
	if name == "" || strings.ContainsAny(name, " \n\x00") {
		return nil, fmt.Errorf("load image archive: this store takes a name only: %w", weft.ErrInvalid)
	}
	s.Add(weft.Image{ID: fmt.Sprintf("sha256:%064x", name), Tags: []string{withTag(name)}})
	return []string{withTag(name)}, nil
}

// RemoveImage implements runtime.Images; nothing is ever in use.
func (s *MemoryImages) RemoveImage(ctx context.Context, ref string, _ bool) (untagged, deleted []string, err error) {
	s.imu.Lock()
	defer s.imu.Unlock()
	i, err := s.findLocked(ref)
	if err := errors.Join(err, ctx.Err()); err != nil {
		return nil, nil, err
	}
	img := s.images[i]
	if t := withTag(ref); len(img.Tags) > 1 && slices.Contains(img.Tags, t) {
		s.images[i].Tags = slices.DeleteFunc(slices.Clone(img.Tags), func(o string) bool { return o == t })
		return []string{t}, nil, nil
	}
	s.images = slices.Delete(slices.Clone(s.images), i, i+1)
	return img.Tags, []string{img.ID}, nil
}

// Pull implements runtime.Images: there is no registry.
func (s *MemoryImages) Pull(ctx context.Context, ref, _ string, _ func(runtime.Progress)) error {
	return errors.Join(ctx.Err(), fmt.Errorf("manifest for %s not found: %w", ref, weft.ErrNotFound))
}

// Tag implements runtime.Images.
func (s *MemoryImages) Tag(ctx context.Context, ref, name string) error {
	s.imu.Lock()
	defer s.imu.Unlock()
	i, err := s.findLocked(ref)
	if err := errors.Join(err, ctx.Err()); err != nil {
		return err
	}
	for n := range s.images {
		s.images[n].Tags = slices.DeleteFunc(slices.Clone(s.images[n].Tags), func(t string) bool { return t == withTag(name) })
	}
	s.images[i].Tags = append(s.images[i].Tags, withTag(name))
	return nil
}
