// Package sandbox makes and removes what surrounds one task besides its
// overlay ports: the network namespace with its loopback, service addresses
// and sysctls, the gateway leg to the host's bridge, and the files hosts,
// resolv.conf and hostname.
//
// It owns the per-host gateway bridge. What it made it reads back and repairs
// (Keep). It does not attach overlay ports
// (vxlan) and does not open the resolver's sockets (agent does, inside the
// namespace).
package sandbox

import (
	"context"
	"net/netip"

	"github.com/weftnet/weft"
)

// Spec is what one task needs.
type Spec struct {
	Task     weft.ID
	Hostname string
	// VIPs are the addresses of the task's own service, put on the loopback
	// with /32 (/128) so that balanced packets are accepted (direct return).
	VIPs []netip.Addr
	// Gateway asks for a leg to the outside. Without it the task has no
	// default route.
	Gateway bool
	// Search domains and options of resolv.conf; the server is 127.0.0.11. The domains
	// are those of the Make that makes the namespace: later ones keep them.
	Search  []string
	Options []string
	// Hosts are further lines of /etc/hosts: one for each address of a name.
	Hosts map[string][]netip.Addr
}

// Sandbox is one that exists.
type Sandbox struct {
	Task  weft.ID
	NetNS string // path of the namespace file; in a list "" when it is gone, as after a power cut
	// GatewayAddr is the task's address on the gateway bridge; invalid
	// without a leg.
	GatewayAddr netip.Prefix
	// Files to bind-mount into the container.
	HostsPath, ResolvConfPath, HostnamePath string
	// Search are the domains that its resolv.conf was made with, if IsSearchKnown: of
	// a sandbox that an older weft has made they are not.
	Search        []string
	IsSearchKnown bool
}

// Maker makes sandboxes. Every method is idempotent: repeating Make after a
// crash completes what is missing, Destroy of what is not there succeeds. Safe
// for concurrent use with different tasks.
type Maker interface {
	Make(ctx context.Context, s Spec) (Sandbox, error)
	Destroy(ctx context.Context, task weft.ID) error
	// Keep reads the host's gateway bridge and these sandboxes back and makes
	// what differs from the wish. A sandbox that is not there is left out. It
	// goes on past failures and returns them joined.
	Keep(ctx context.Context, specs []Spec) error
	// List returns every sandbox of this node, found by name and mark.
	List(ctx context.Context) ([]Sandbox, error)
	// Gateway returns the host's gateway bridge subnet, making the bridge
	// if there is none.
	Gateway(ctx context.Context) (bridge string, subnet netip.Prefix, err error)
	// Close removes the gateway bridge and what else is not per task.
	Close(ctx context.Context) error
}
