package linux

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// LinkGroup marks the links that weft makes beside bridges (IFLA_GROUP).
const LinkGroup = linkGroup

// PairKind is what a Pair is made of.
type PairKind string

const (
	PairVeth PairKind = "veth"
	// PairNetkit runs a program where the far end sends, and drops what it sends
	// while there is none (Linux 6.7).
	PairNetkit PairKind = "netkit"
)

// Pair is two links without a bridge, for an engine that hooks into the near one:
// that one is in the namespace of the calling thread, the host's.
type Pair struct {
	// Kind of a pair that is made; one that stands keeps its own. "" is PairVeth.
	Kind PairKind
	// Name of the near end, Alias its ifalias, at most 255 bytes.
	Name, Alias string
	MTU         int // of both ends, bytes
	// NetNS is the path of the far end's namespace, "" for the host's own.
	NetNS    string
	FarName  string
	FarMAC   net.HardwareAddr
	FarAddrs []netip.Prefix
	// FarAlias, when set, proves whose the far end is. A link of its name
	// that is neither the near end's other side nor has this alias is
	// weft.ErrConflict.
	FarAlias string
}

// Set makes the pair, or repairs it in place, and returns the near end as it was
// before the last changes: its name, index and kind are as they are.
// The far end is as wanted when it returns, the near end is up.
func (p Pair) Set() (netlink.Link, error) {
	if err := aliasFits(p.Alias); err != nil {
		return nil, err
	}
	near, err := dial()
	if err != nil {
		return nil, err
	}
	defer near.close()
	ns, err := p.open()
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	far, err := dialAt(ns)
	if err != nil {
		return nil, err
	}
	defer far.close()
	if p.FarAlias != "" {
		if err := p.refuseForeign(near, far); err != nil {
			return nil, err
		}
	}
	w, h := &writer{}, &hidden{conn: near}
	v := veth{kind: p.Kind, name: p.Name, alias: p.Alias, ns: ns, far: far,
		end: end{name: p.FarName, mac: p.FarMAC, addrs: p.FarAddrs, mtu: p.MTU, alias: p.FarAlias}}
	a, b, err := w.pair(h, v)
	if err != nil {
		return nil, err
	}
	if a != nil {
		if err := near.setPolicies(a); err != nil {
			return nil, err
		}
	} else if a, b, err = w.addPair(h, v); err != nil {
		return nil, err
	}
	return a, p.setUp(near, far, a, b, v.end)
}

func (p Pair) setUp(near, far *conn, a, b netlink.Link, e end) error {
	if err := Quiet(p.Name); err != nil {
		return err
	}
	if err := near.LinkSetAlias(a, p.Alias); err != nil {
		return fmt.Errorf("set alias of %s: %w", p.Name, err)
	}
	if p.FarAlias != "" {
		if err := far.LinkSetAlias(b, p.FarAlias); err != nil {
			return fmt.Errorf("set alias of %s: %w", p.FarName, err)
		}
	}
	if err := near.LinkSetMTU(a, p.MTU); err != nil {
		return fmt.Errorf("set MTU of %s to %d: %w", p.Name, p.MTU, err)
	}
	if err := near.LinkSetUp(a); err != nil {
		return fmt.Errorf("set %s up: %w", p.Name, err)
	}
	if p.NetNS == "" {
		if err := legSysctls(p.FarName, p.FarAddrs); err != nil {
			return err
		}
	}
	return setEnd(far, b, e)
}

func (p Pair) open() (*netns.Handle, error) {
	if p.NetNS == "" {
		return netns.Current()
	}
	return netns.Open(p.NetNS)
}

func (p Pair) refuseForeign(near, far *conn) error {
	a, err := near.find(p.Name)
	if err != nil {
		return err
	}
	b, err := far.find(p.FarName)
	if err != nil || b == nil {
		return err
	}
	paired := a != nil && a.Attrs().ParentIndex == b.Attrs().Index && b.Attrs().ParentIndex == a.Attrs().Index
	if !paired && b.Attrs().Alias != p.FarAlias {
		return fmt.Errorf("make host leg %s: this host has a link of that name that weft did not make; rename it: %w", p.FarName, weft.ErrConflict)
	}
	return nil
}

// Far is what the far end of a pair has: the addresses as vxlan.Port has them.
type Far struct {
	MAC         net.HardwareAddr
	Addr, Addr6 netip.Prefix
	// Fault says what is wrong with it, "" = nothing.
	Fault string
}

// ReadFar looks at the far end of near, which is called name in the namespace
// at path ("" for the calling thread's own). A namespace that is gone is
// weft.ErrNotFound.
func ReadFar(near netlink.Link, path, name string) (Far, error) {
	ns, err := Pair{NetNS: path}.open()
	if err != nil {
		return Far{}, err
	}
	defer ns.Close()
	c, err := dialAt(ns)
	if err != nil {
		return Far{}, err
	}
	defer c.close()
	e, err := readEnd(c, name, near.Attrs())
	return Far{MAC: e.mac, Addr: e.addr, Addr6: e.addr6, Fault: e.fault}, err
}

// Quiet keeps a link of the host's namespace from speaking by itself: no
// link-local address, no router solicitation, no multicast report.
func Quiet(name string) error {
	return setSysctls([]sysctl{{"net/ipv6/conf/" + name + "/disable_ipv6", "1"}})
}

// Complete repeats a netlink dump that was interrupted by a change: such a list
// may lack objects that were there all the time.
func Complete[T any](dump func() ([]T, error)) ([]T, error) { return complete(dump) }

// UDPHolder names the program that has a UDP port of the calling thread's
// namespace, for an error message.
func UDPHolder(port uint16) string { return udpHolder(port) }
