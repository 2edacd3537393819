package nft

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
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
	// lacksTimes: the kernel cannot give a connection times of its own. Found
	// out by Probe.
	lacksTimes bool
	// lacksSCTP: connection tracking does not know SCTP, so that its ports cannot be
	// translated. Found out by Probe.
	lacksSCTP bool
	// hurry divides all times that flows are known for; 0 and 1 leave them. Tests
	// of idle connections set it before the first Apply.
	hurry int
	// without6: the last Apply has left no IPv6 table. Owned by Apply.
	without6 bool
	// kept, by namespace, are the backends that the last Apply let flows lead
	// to. While none of them goes, the flow table need not be read, which is
	// the one part that grows with traffic. Owned by Apply.
	kept map[string]map[string]bool
	// host is the table whose published ports the host's namespace has, its
	// tracked flows among them; nil = nobody knows. Owned by Apply.
	host *ingress.Table
	// routed are the backends behind the router after the last Apply; nil
	// before the first. Owned by Apply.
	routed map[netip.Addr]bool
	// places are what the last Apply left, by path of the namespace ("" is
	// the host's). Owned by Apply.
	places map[string]*place
	// set are the sysctls of the ingress leg that were right after the last
	// Apply, and of which link. Owned by Apply.
	set legLink
	// gateway is the sysctl of the gateway bridge that was right after the last
	// Apply. Owned by Apply.
	gateway string
	// gateway6 is the index of the gateway bridge when it last had its IPv6 address;
	// 0 = it is to have none. Owned by Apply.
	gateway6 int
	// within is what the last Apply left in tasks' namespaces, last the table
	// it was given. Owned by Apply.
	within inside
	last   ingress.Table
	// ends are what the last Apply left in the namespaces of tasks that stand for
	// service addresses, by their paths. Owned by Apply.
	ends map[string]*taskEnd

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

// Note says what this engine does not do on this host.
func (e *Engine) Note() string {
	if !e.lacksSCTP {
		return ""
	}
	return noSCTP + ", so ports of SCTP are not published"
}

const noSCTP = "this kernel does not track connections of SCTP (CONFIG_NF_CT_PROTO_SCTP)"

// Unanswered are the published ports that Apply leaves out, and those of which it leaves
// out addresses that they are bound to. What an unbound port lacks is the Note's to say,
// and what is yet to be made (the ingress network's leg, the gateway bridge) is not missing.
func (e *Engine) Unanswered(t ingress.Table) []ingress.Unanswered {
	var out []ingress.Unanswered
	for i := range t.Published {
		p := &t.Published[i]
		if p.Protocol == weft.SCTP && e.lacksSCTP {
			out = append(out, ingress.Unanswered{Published: *p, Reason: noSCTP})
			continue
		}
		six := ipv6.boundTo(*p)
		if why := e.lacks6(&t, p.Host); len(six) > 0 && why != "" {
			out = append(out, ingress.Unanswered{Published: *p, Addrs: six, Reason: why})
		}
	}
	return out
}

// lacks6 is why ports, of mode host or of the mesh, are not answered on IPv6; "" = they are.
func (e *Engine) lacks6(t *ingress.Table, isHost bool) string {
	switch {
	case !e.ip6:
		return "this kernel does not translate IPv6"
	case isHost && t.Gateway.Bridge != "" && !t.Gateway.Addr6.IsValid():
		return "the host has no IPv6 behind its gateway bridge"
	case !isHost && t.Ingress.Link != "" && !t.Ingress.Addr6.IsValid():
		return "the ingress network has no IPv6"
	}
	return ""
}

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
		return nil
	})
	if err == nil {
		err = netns.Do(path, func() error {
			if err := e.probeHost(); err != nil {
				return err
			}
			if err := e.probeInside(); err != nil {
				return fmt.Errorf("%w: keeping clients' addresses: %w", weft.ErrUnsupported, err)
			}
			if err := e.probeEnds(); err != nil {
				return fmt.Errorf("%w: service addresses in tasks (nft_socket): %w", weft.ErrUnsupported, err)
			}
			if _, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET); err != nil {
				return fmt.Errorf("%w: connection tracking over netlink (nf_conntrack_netlink): %w", weft.ErrUnsupported, err)
			}
			return nil
		})
	}
	return errors.Join(err, netns.Remove(path))
}

// probeHost loads the host's tables in the calling thread's namespace.
func (e *Engine) probeHost() error {
	conn, err := open()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	e.lacksTimes = loads(conn, hostRules(probeTable)) != nil
	if err := loads(conn, hostRules(probeTable).withoutTimes()); err != nil {
		return fmt.Errorf("%w: nftables address translation: %w", weft.ErrUnsupported, err)
	}
	rules6 := hostRules6(probeTable)
	if e.lacksTimes {
		rules6 = rules6.withoutTimes()
	}
	e.ip6 = loads(conn, rules6) == nil
	_, err = readSysctl("net/netfilter/nf_conntrack_sctp_timeout_established")
	e.lacksSCTP = errors.Is(err, fs.ErrNotExist)
	return nil
}

// probeTable has the parts of which the host's table is made with published ports.
var probeTable = ingress.Table{Ingress: ingress.Entry{Link: weft.IngressLeg, Addr: netip.MustParsePrefix("192.0.2.1/32")}}

func loads(conn *nftables.Conn, r ruleset) error {
	_, _, err := converge(conn, r, nil)
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
	if e.lacksSCTP {
		t.Published = slices.DeleteFunc(slices.Clone(t.Published), func(p ingress.Published) bool { return p.Protocol == weft.SCTP })
	}
	places := map[string]*place{}
	audit := sameTable(&e.last, &t) // nothing is new: look at everything
	e.last = t
	if err := e.applyInside(t, audit); err != nil {
		errs = append(errs, &ingress.NetworkError{VNI: weft.IngressVNI, Err: err})
	}
	if err := e.applyEnds(t.Ends, audit); err != nil {
		errs = append(errs, err)
	}
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
		keep, err := e.applyNetwork(n, places)
		if err != nil {
			errs = append(errs, &ingress.NetworkError{VNI: n.VNI, Err: fmt.Errorf("apply service addresses: %w", err)})
			continue
		}
		kept[n.NetNS] = keep
	}
	e.kept, e.places = kept, places
	return errors.Join(errs...)
}

// applyNetwork returns the backends that flows may lead to now.
func (e *Engine) applyNetwork(n ingress.Network, places map[string]*place) (map[string]bool, error) {
	p, err := e.placeAt(n.NetNS, fmt.Sprintf("network %d", n.VNI))
	if err != nil {
		return nil, err
	}
	places[n.NetNS] = p
	if done, err := e.expressNetwork(n, p); err != nil || done {
		return e.kept[n.NetNS], err
	}
	p.network = nil
	rules := bridgeRules(n, e.reject)
	rules.flowsFit = contains(rules.prune, e.kept[n.NetNS])
	err = withConn(n.NetNS, func(conn *nftables.Conn) error {
		if err := e.converge(p, conn, rules); err != nil || !e.atPorts {
			return err
		}
		return e.converge(p, conn, portRules(n))
	})
	if err != nil {
		return nil, err
	}
	p.network = &n
	return rules.prune, nil
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
	if err := e.prepareGateway(t); err != nil {
		return errors.Join(legErr, err)
	}
	was := e.host
	done, err := e.expressHost(p, &t)
	if e.host = nil; err != nil {
		return errors.Join(legErr, err)
	}
	if !done {
		err = e.applyHostWhole(p, t, was)
	}
	if err == nil {
		e.host = &t
	}
	return errors.Join(legErr, err)
}

// applyHostWhole is applyHost for a wish of which all is looked at; was is Engine.host.
func (e *Engine) applyHostWhole(p *place, t ingress.Table, was *ingress.Table) error {
	conn, err := open()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	if err := e.converge(p, conn, hostRules(t)); err != nil {
		return err
	}
	if err := e.applyHost6(p, conn, t); err != nil {
		return err
	}
	now := trackableOf(t)
	if was != nil {
		if before := trackableOf(*was); now.follows(&before) {
			return nil
		}
	}
	return now.release()
}

// applyHost6 makes the IPv6 table where the host can be asked over IPv6, or where
// the overlay's packets come over it, and removes it where not.
func (e *Engine) applyHost6(p *place, conn *nftables.Conn, t ingress.Table) error {
	under6 := slices.ContainsFunc(t.Underlay.Members, func(a netip.Addr) bool { return a.Unmap().Is6() })
	if (t.Ingress.Addr6.IsValid() || t.Gateway.Addr6.IsValid() || under6) && e.ip6 {
		e.without6 = false
		return e.converge(p, conn, hostRules6(t))
	}
	if e.without6 {
		return nil
	}
	if err := removeTable(conn, ruleset{family: nftables.TableFamilyIPv6}.table()); err != nil && e.ip6 {
		return err
	}
	e.without6 = true
	delete(p.left, nftables.TableFamilyIPv6)
	return nil
}

// removeTable deletes a table of weft's; one that is not there does no harm.
func removeTable(conn *nftables.Conn, table *nftables.Table) error {
	conn.AddTable(table)
	conn.DelTable(table)
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("remove nftables table %s: %w", table.Name, err)
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
	bridge, gateway6 := e.last.Gateway.Bridge, e.last.Gateway.Addr6
	e.host, e.without6, e.places, e.set, e.last, e.gateway6 = nil, false, nil, legLink{}, ingress.Table{}, 0
	within := errors.Join(e.closeInside(), e.closeEnds())
	conn, err := open()
	if err != nil {
		return errors.Join(within, fmt.Errorf("open nftables: %w", err))
	}
	err = removeTable(conn, ruleset{family: nftables.TableFamilyIPv4}.table())
	if e.ip6 {
		err = errors.Join(err, removeTable(conn, ruleset{family: nftables.TableFamilyIPv6}.table()))
	}
	if gateway6.IsValid() {
		err = errors.Join(err, removeAddr6(bridge, gateway6))
	}
	return errors.Join(within, err)
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
func open() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(prepareSocket))
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

// withConn calls f with a connection, inside the namespace at path.
func withConn(path string, f func(*nftables.Conn) error) error {
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(func() error {
		conn, err := open()
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		return f(conn)
	})
}
