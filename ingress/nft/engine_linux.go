package nft

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// Engine is ingress.Engine on nftables. Its methods run in the network
// namespace of the calling process, which is the host's.
type Engine struct {
	scratch string // folder for the probe's namespace file
	// reject says that the kernel can refuse on a bridge (nft_reject_bridge),
	// atPorts that it cannot, but on a device (nft_reject_netdev). Both are
	// found out by Probe, before any Apply.
	reject, atPorts bool
	// ip6 says that the kernel translates IPv6, so that published ports can
	// be answered on it. Found out by Probe.
	ip6 bool
	// without6: the last Apply has left no IPv6 table. Owned by Apply.
	without6 bool
	// kept, by namespace, are the backends that the last Apply let flows lead
	// to. While none of them goes, the flow table need not be read, which is
	// the one part that grows with traffic. Owned by Apply.
	kept map[string]map[string]bool
	// tracked is what the last Apply left for connection tracking to lead
	// datagrams to; nil before the first. Owned by Apply.
	tracked *trackable
	// routed are the backends behind the router after the last Apply; nil
	// before the first. Owned by Apply.
	routed map[netip.Addr]bool
	// places are what the last Apply left, by path of the namespace ("" is
	// the host's). Owned by Apply.
	places map[string]*place
	// set are the sysctls of the ingress leg that were right after the last
	// Apply, and of which link. Owned by Apply.
	set legLink

	// Repaired, when not nil, gets every repair before the Apply returns that
	// made it. It is set before the first Apply and must not block.
	Repaired func(weft.Repair)
}

// New returns an engine that has done nothing yet. scratchDir is a folder in
// which Probe may name a namespace for a moment.
func New(scratchDir string) *Engine { return &Engine{scratch: scratchDir} }

// CanRefuse reports whether requests to a service address without backends are
// refused at once; otherwise they are dropped on the bridge and the client waits
// for its own limit.
func (e *Engine) CanRefuse() bool { return e.reject || e.atPorts }

// CanPublish6 reports whether published ports are answered on the host's IPv6
// addresses, too, where the ingress network has IPv6.
func (e *Engine) CanPublish6() bool { return e.ip6 }

// Name implements ingress.Engine.
func (e *Engine) Name() string { return "nft" }

// Probe loads both tables into a namespace of its own. It must have succeeded
// once before Apply, and is not called at the same time as Apply.
func (e *Engine) Probe(ctx context.Context) error {
	path, err := netns.Create(e.scratch, "weft-probe-nft")
	if err != nil {
		return fmt.Errorf("make probe namespace: %w", err)
	}
	err = withConn(path, func(conn *nftables.Conn) error {
		e.reject = loads(conn, bridgeRules(ingress.Network{IPv6: true}, true)) == nil
		if err := loads(conn, bridgeRules(ingress.Network{IPv6: true}, false)); err != nil {
			return fmt.Errorf("%w: nftables bridge table: %w", weft.ErrUnsupported, err)
		}
		e.atPorts = !e.reject && loads(conn, portProbe(true)) == nil
		if err := loads(conn, hostRules(ingress.Table{})); err != nil {
			return fmt.Errorf("%w: nftables address translation: %w", weft.ErrUnsupported, err)
		}
		e.ip6 = loads(conn, hostRules6(ingress.Table{})) == nil
		return nil
	})
	if err == nil {
		err = netns.Do(path, func() error {
			if _, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET); err != nil {
				return fmt.Errorf("%w: connection tracking over netlink (nf_conntrack_netlink): %w", weft.ErrUnsupported, err)
			}
			return nil
		})
	}
	return errors.Join(err, netns.Remove(path))
}

func loads(conn *nftables.Conn, r ruleset) error {
	_, err := converge(conn, r, nil)
	return err
}

// Apply implements ingress.Engine: one transaction in the host's namespace and
// one per network. A namespace that fails does not keep the others from being
// applied; all errors are returned joined, those of one network as
// ingress.NetworkError.
func (e *Engine) Apply(ctx context.Context, t ingress.Table) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var errs []error
	places := map[string]*place{}
	if err := e.applyHost(t, places); err != nil {
		errs = append(errs, fmt.Errorf("apply published ports: %w", err))
	}
	if err := e.applyRouter(t.Router, places); err != nil {
		for _, vni := range t.Router.VNIs {
			errs = append(errs, &ingress.NetworkError{VNI: vni, Err: fmt.Errorf("apply service addresses behind the router: %w", err)})
		}
	}
	kept := map[string]map[string]bool{}
	for _, n := range t.Networks {
		if err := ctx.Err(); err != nil {
			errs = append(errs, err)
			break
		}
		rules := bridgeRules(n, e.reject)
		rules.flowsFit = contains(rules.prune, e.kept[n.NetNS])
		if err := e.applyNetwork(n, rules, places); err != nil {
			errs = append(errs, &ingress.NetworkError{VNI: n.VNI, Err: fmt.Errorf("apply service addresses: %w", err)})
			continue
		}
		kept[n.NetNS] = rules.prune
	}
	e.kept, e.places = kept, places
	return errors.Join(errs...)
}

func (e *Engine) applyNetwork(n ingress.Network, rules ruleset, places map[string]*place) error {
	p, err := e.placeAt(n.NetNS, fmt.Sprintf("network %d", n.VNI))
	if err != nil {
		return err
	}
	places[n.NetNS] = p
	return withConn(n.NetNS, func(conn *nftables.Conn) error {
		if err := e.converge(p, conn, rules); err != nil || !e.atPorts {
			return err
		}
		return e.converge(p, conn, portRules(n))
	})
}

// contains reports whether all that earlier transactions let flows lead to may
// stay. Without an earlier transaction of this process nobody knows.
func contains(keep, earlier map[string]bool) bool {
	if earlier == nil {
		return false
	}
	for mac := range earlier {
		if !keep[mac] {
			return false
		}
	}
	return true
}

func (e *Engine) applyHost(t ingress.Table, places map[string]*place) error {
	p, err := e.placeAt("", "the host")
	if err != nil {
		return err
	}
	places[""] = p
	var legErr error
	if t.Ingress.Link != "" {
		if err := e.prepareLeg(t.Ingress, len(t.Published) > 0 && e.ip6); err != nil {
			// The rules name the leg and can stand without it: only who is
			// on the ingress network has to wait for it.
			legErr = &ingress.NetworkError{VNI: weft.IngressVNI, Err: err}
		}
	}
	conn, err := open()
	if err != nil {
		return errors.Join(legErr, fmt.Errorf("open nftables: %w", err))
	}
	if err := e.converge(p, conn, hostRules(t)); err != nil {
		return errors.Join(legErr, err)
	}
	if err := e.applyHost6(p, conn, t); err != nil {
		return errors.Join(legErr, err)
	}
	now := trackableOf(t)
	if !now.follows(e.tracked) {
		if err := now.release(); err != nil {
			return errors.Join(legErr, err)
		}
	}
	e.tracked = &now
	return legErr
}

// applyHost6 makes the IPv6 table where the host can be asked over IPv6, or where
// the overlay's packets come over it, and removes it where not.
func (e *Engine) applyHost6(p *place, conn *nftables.Conn, t ingress.Table) error {
	under6 := slices.ContainsFunc(t.Underlay.Members, func(a netip.Addr) bool { return a.Unmap().Is6() })
	if (t.Ingress.Addr6.IsValid() || under6) && e.ip6 {
		e.without6 = false
		return e.converge(p, conn, hostRules6(t))
	}
	if e.without6 {
		return nil
	}
	if err := removeTable(conn, nftables.TableFamilyIPv6); err != nil && e.ip6 {
		return err
	}
	e.without6 = true
	delete(p.left, nftables.TableFamilyIPv6)
	return nil
}

// removeTable deletes weft's table of a family; one that is not there does no
// harm.
func removeTable(conn *nftables.Conn, f nftables.TableFamily) error {
	table := &nftables.Table{Name: weft.TableName, Family: f}
	conn.AddTable(table)
	conn.DelTable(table)
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("remove nftables table %s: %w", weft.TableName, err)
	}
	return nil
}

// prepareLeg lets requests cross from the host's other links to the ingress
// leg: forwarding on, and packets of the host itself from 127.0.0.0/8 may leave
// by it once they are translated. Forwarding is the host's own setting; weft
// turns it on and leaves it on, for other programs may need it by then. That of
// IPv6 waits until there is something to forward (with6).
func (e *Engine) prepareLeg(leg ingress.Entry, with6 bool) error {
	l, err := netlink.LinkByName(leg.Link)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return fmt.Errorf("%w: link %s is not there yet", weft.ErrUnavailable, leg.Link)
	}
	if err != nil {
		return fmt.Errorf("look up link %s: %w", leg.Link, err)
	}
	// A link made anew has the kernel's settings, and that is not theirs.
	now := legLink{leg.Link, l.Attrs().Index, leg.Addr6.IsValid()}
	wanted := [][2]string{
		{"net/ipv4/ip_forward", "1"},
		{"net/ipv4/conf/" + leg.Link + "/route_localnet", "1"},
	}
	if !leg.Addr6.IsValid() {
		// A leg without an IPv6 address speaks none: a link-local one would let
		// tasks reach the host's listeners on [::] past every rule of this table.
		wanted = append(wanted, [2]string{"net/ipv6/conf/" + leg.Link + "/disable_ipv6", "1"})
	}
	for _, kv := range wanted {
		was, err := readSysctl(kv[0])
		if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(kv[0], "net/ipv6/") {
			continue // no IPv6 in this kernel
		}
		if err != nil {
			return err
		}
		if was == kv[1] {
			continue
		}
		if err := writeSysctl(kv[0], kv[1]); err != nil {
			return err
		}
		if e.set == now {
			e.report(weft.Repair{Kind: kindSysctl, Object: kv[0], Reason: fmt.Sprintf("it was %s instead of %s", was, kv[1])})
		}
	}
	if leg.Addr6.IsValid() && with6 {
		if err := forward6(); err != nil {
			return err
		}
	}
	e.set = now
	return nil
}

// legLink is the ingress leg as its sysctls were set.
type legLink struct {
	name    string
	index   int
	hasIPv6 bool
}

func readSysctl(key string) (string, error) {
	b, err := os.ReadFile("/proc/sys/" + key)
	if err != nil {
		return "", fmt.Errorf("read sysctl %s: %w", key, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// forward6 turns IPv6 forwarding on. A host that forwards stops listening to
// routers, and would lose the addresses and the default route that it has from
// them, unless its links are told to go on (accept_ra 2, ip-sysctl.rst).
func forward6() error {
	const conf, forwarding = "net/ipv6/conf/", "net/ipv6/conf/all/forwarding"
	if on, err := os.ReadFile("/proc/sys/" + forwarding); err != nil || string(on) == "1\n" {
		return err
	}
	links, err := os.ReadDir("/proc/sys/" + conf)
	if err != nil {
		return fmt.Errorf("list links of IPv6: %w", err)
	}
	for _, l := range links {
		key := conf + l.Name() + "/accept_ra"
		listens, err := os.ReadFile("/proc/sys/" + key)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the link has just gone
		}
		if err != nil {
			return fmt.Errorf("read sysctl %s: %w", key, err)
		}
		if string(listens) != "1\n" {
			continue
		}
		if err := writeSysctl(key, "2"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return writeSysctl(forwarding, "1")
}

func writeSysctl(key, value string) error {
	if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0); err != nil {
		return fmt.Errorf("set sysctl %s to %s: %w", key, value, err)
	}
	return nil
}

// Stats implements ingress.Engine. The nft engine counts packets per rule, not
// per port, so the map is empty.
func (e *Engine) Stats(ctx context.Context) (ingress.Stats, error) {
	return ingress.Stats{Published: map[ingress.PortKey]uint64{}}, nil
}

// Close implements ingress.Engine: it removes the host's table. The tables of
// networks go with their namespaces.
func (e *Engine) Close(ctx context.Context) error {
	e.tracked, e.without6, e.places, e.set = nil, false, nil, legLink{}
	conn, err := open()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	err = removeTable(conn, nftables.TableFamilyIPv4)
	if e.ip6 {
		err = errors.Join(err, removeTable(conn, nftables.TableFamilyIPv6))
	}
	return err
}

// Socket buffers in bytes. A transaction is one message to the kernel and one
// service of 2,048 tasks has a ring of 16,384 slots in it, at some 100 bytes
// each, twice when all change: the default of 208 KiB ends at 128 tasks. They
// are limits and not reserved; without privileges the kernel's own apply.
const (
	sendBuffer    = 64 << 20
	receiveBuffer = 8 << 20
)

// answerLimit bounds the wait for the kernel's answer to one transaction or list.
// Without it an answer that does not come would hold up the data plane for ever.
const answerLimit = 30 * time.Second

// open makes a connection whose transactions may be large. Each of them has a
// socket of its own.
func open(o ...nftables.ConnOption) (*nftables.Conn, error) {
	return nftables.New(append(o, nftables.WithSockOptions(prepareSocket))...)
}

// prepareSocket is generic so that the netlink library below nftables need not be
// named.
func prepareSocket[C interface {
	SetWriteBuffer(int) error
	SetReadBuffer(int) error
	SetReadDeadline(time.Time) error
}](c C) error {
	return errors.Join(c.SetWriteBuffer(sendBuffer), c.SetReadBuffer(receiveBuffer), c.SetReadDeadline(time.Now().Add(answerLimit)))
}

// withConn calls f with a connection into the namespace at path.
func withConn(path string, f func(*nftables.Conn) error) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer file.Close()
	conn, err := open(nftables.WithNetNSFd(int(file.Fd())))
	if err != nil {
		if errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("enter %s: not a network namespace (its mount is gone)", path)
		}
		return fmt.Errorf("enter %s: %w", path, err)
	}
	return f(conn)
}
