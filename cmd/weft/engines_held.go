package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// enginesFile says which engines the objects of a node in this host's kernel
// belong to. It lies in the exec root, as it means nothing after a reboot, and
// is written before an engine makes the first of them.
type enginesFile struct {
	Version          int // enginesVersion
	Node             weft.ID
	Overlay, Service string
}

const enginesVersion = 1

func enginesPath(execRoot string) string { return filepath.Join(execRoot, "engines.json") }

// engineUser finds out which engines a node has used on this host since it was
// started.
type engineUser struct {
	execRoot string
	node     weft.ID
}

// used is the pair that the node's kernel objects are of, zero if it made none.
// Builds that wrote no file had the pairs that are told apart by what they left.
func (u engineUser) used() (vxlan.Pair, error) {
	b, err := os.ReadFile(enginesPath(u.execRoot))
	if errors.Is(err, fs.ErrNotExist) {
		return u.left()
	}
	if err != nil {
		return vxlan.Pair{}, fmt.Errorf("read the engines in use: %w", err)
	}
	var f enginesFile
	if err := json.Unmarshal(b, &f); err != nil {
		return vxlan.Pair{}, fmt.Errorf("parse %s: %w", enginesPath(u.execRoot), err)
	}
	if f.Version != enginesVersion {
		return vxlan.Pair{}, fmt.Errorf("%w: %s has version %d, this build reads %d: run the build that wrote it, or drain the node and reboot the host", weft.ErrUnsupported, enginesPath(u.execRoot), f.Version, enginesVersion)
	}
	if f.Node != u.node {
		return vxlan.Pair{}, nil // of a cluster that this host has left
	}
	return vxlan.Pair{Overlay: f.Overlay, Service: f.Service}, nil
}

// left goes by what lies there: the pins of one overlay engine, or the hidden
// namespaces of the other, on which only nftables balanced then.
func (u engineUser) left() (vxlan.Pair, error) {
	_, err := os.Stat(filepath.Join(bpfDir(u.execRoot), string(u.node)))
	if err == nil {
		return vxlan.Pair{Overlay: ebpfEngine, Service: ebpfEngine}, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return vxlan.Pair{}, fmt.Errorf("look for pins: %w", err)
	}
	is, err := u.has("n")
	if !is || err != nil {
		return vxlan.Pair{}, err
	}
	return vxlan.Pair{Overlay: "bridge", Service: "nft"}, nil
}

// held is what used is, as long as the node has tasks whose ports are of these
// engines; otherwise zero.
func (u engineUser) held() (vxlan.Pair, error) {
	is, err := u.has("t")
	if !is || err != nil {
		return vxlan.Pair{}, err
	}
	return u.used()
}

// has says whether a namespace of the node is alive whose name goes on with
// kind: "t" those of tasks, "n" those of networks (names.go).
func (u engineUser) has(kind string) (bool, error) {
	dir := netnsDir(u.execRoot)
	names, err := netns.List(dir, weft.NetNSPrefix(u.node)+kind)
	if err != nil {
		return false, err
	}
	for _, n := range names {
		h, err := netns.Open(filepath.Join(dir, n))
		if err == nil {
			return true, h.Close()
		}
		if !errors.Is(err, weft.ErrNotFound) {
			return false, err
		}
	}
	return false, nil
}

// keep notes that the node uses p from now on.
func (u engineUser) keep(p vxlan.Pair) error {
	b, err := json.Marshal(enginesFile{Version: enginesVersion, Node: u.node, Overlay: p.Overlay, Service: p.Service})
	if err != nil {
		return fmt.Errorf("encode the engines in use: %w", err)
	}
	tmp := enginesPath(u.execRoot) + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write the engines in use: %w", err)
	}
	if err := os.Rename(tmp, enginesPath(u.execRoot)); err != nil {
		return fmt.Errorf("write the engines in use: %w", err)
	}
	return nil
}

// forget says that nothing of the node is left in the kernel.
func (u engineUser) forget() error {
	if err := os.Remove(enginesPath(u.execRoot)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the engines in use: %w", err)
	}
	return nil
}

// replaced are the engines of a node that others take the place of now: what
// they made has to go first. nil, nil if there are none, or they are those that
// were chosen.
func (e *engines) replaced(u engineUser, c engineConfig) (vxlan.Engine, ingress.Engine, error) {
	used, err := u.used()
	chosen, _ := e.verdicts()
	if err != nil || used == (vxlan.Pair{}) || used == chosen {
		return nil, nil, err
	}
	overlays, err := overlayEngines(c)
	if err != nil {
		return nil, nil, err
	}
	services, err := serviceEngines(c)
	if err != nil {
		return nil, nil, err
	}
	overlay, okOverlay := find(overlays, used.Overlay)
	service, okService := find(services, used.Service)
	if !okOverlay || !okService {
		return nil, nil, fmt.Errorf("%w: this host has objects of overlay engine %s and service engine %s, which this build lacks: run the build that made them, or reboot the host", weft.ErrUnsupported, used.Overlay, used.Service)
	}
	e.log.Info("engines change, as no task runs", "from", used, "to", chosen)
	return overlay, service, nil
}

// removeEngines takes away what a node's former engines made.
func (m *member) removeEngines(ctx context.Context, overlay vxlan.Engine, service ingress.Engine) error {
	d, err := m.dataPlaneOf(ctx, overlay, service)
	if err != nil {
		return err
	}
	if err := errors.Join(d.service.Close(ctx), d.overlay.Apply(ctx, vxlan.State{})); err != nil {
		return fmt.Errorf("remove what other engines made: %w", err)
	}
	return nil
}
