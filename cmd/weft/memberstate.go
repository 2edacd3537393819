package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// memberState is what a node must remember to find its cluster again. The
// certificate lies beside it (orchestrator/ca).
type memberState struct {
	Version   int // memberVersion
	Node      weft.ID
	Role      weft.Role
	Listen    netip.AddrPort
	Advertise netip.AddrPort
	DataPath  netip.Addr
	// Managers are cluster ports as last told; the leader is found through
	// any of them.
	Managers []netip.AddrPort
	Cluster  wire.ClusterView
	// Links that have Advertise and DataPath, as last seen.
	Links memberLinks
}

const memberVersion = 1

func memberPath(dataRoot string) string { return filepath.Join(dataRoot, "member.json") }
func pkiDir(dataRoot string) string     { return filepath.Join(dataRoot, "pki") }

// loadMember returns nil when the node is in no cluster.
func loadMember(dataRoot string) (*memberState, error) {
	b, err := os.ReadFile(memberPath(dataRoot))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read membership: %w", err)
	}
	var s memberState
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("parse %s: %w", memberPath(dataRoot), err)
	}
	if s.Version != memberVersion {
		return nil, fmt.Errorf("%w: %s has version %d, this build reads %d", weft.ErrUnsupported, memberPath(dataRoot), s.Version, memberVersion)
	}
	return &s, nil
}

// save replaces the file as a whole and forces it to disk: a node that forgot
// its cluster could not be reached any more.
func (s memberState) save(dataRoot string) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("encode membership: %w", err)
	}
	tmp := memberPath(dataRoot) + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write membership: %w", err)
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write membership: %w", err)
	}
	if err := os.Rename(tmp, memberPath(dataRoot)); err != nil {
		return fmt.Errorf("write membership: %w", err)
	}
	return nil
}

// forgetMember removes everything that made this node a member, and the state
// of the cluster it kept.
func forgetMember(dataRoot string) error {
	var errs []error
	for _, p := range []string{memberPath(dataRoot), pkiDir(dataRoot), filepath.Join(dataRoot, "raft"), filepath.Join(dataRoot, "agent")} {
		if err := os.RemoveAll(p); err != nil {
			errs = append(errs, fmt.Errorf("forget membership: %w", err))
		}
	}
	return errors.Join(errs...)
}

// bind is where this node's ports listen. "All addresses" is all of IPv4, unless
// the others know this node by an IPv6 address: then it is all of both.
func (s memberState) bind() netip.AddrPort {
	if s.Listen.Addr().IsUnspecified() && s.Advertise.Addr().Is6() && !s.Advertise.Addr().Is4In6() {
		return netip.AddrPortFrom(netip.IPv6Unspecified(), s.Listen.Port())
	}
	return s.Listen
}
