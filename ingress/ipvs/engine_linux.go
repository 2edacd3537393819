package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	kernel "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan/netns"
)

// How long the kernel remembers a flow of which nothing is heard. Our own choices.
const (
	// timeoutTCP lets connections idle over TCP's default keepalive (7,200 s).
	timeoutTCP = 7500 * time.Second
	// timeoutFIN is for a connection of which the client has closed its half: it
	// may still read. Every connection that the client has closed stays as long.
	timeoutFIN = 360 * time.Second
	timeoutUDP = 300 * time.Second
)

// Config of an Engine.
type Config struct {
	// Node and NetNSDir are those of the overlay engine's Config: by them Close
	// finds the networks of a daemon that was killed. In NetNSDir Probe names a
	// namespace for a moment.
	Node     weft.ID
	NetNSDir string
	// Repaired, when set, gets every repair before the Apply returns that made it.
	// It must not block.
	Repaired func(weft.Repair)
}

// Engine is ingress.Engine on IPVS, for service addresses alone: a table with
// published ports is weft.ErrUnsupported. Its methods run in the network namespace
// of the calling process.
type Engine struct {
	cfg      Config
	divert   *nft.Diverter
	timeouts kernel.Config
	// places are what the last Apply left, by path of the namespace. Owned by Apply.
	places map[string]*place
	// whole is when the last pass over everything ended that had no fault; zero
	// after one that had. took is how long it lasted. Owned by Apply.
	whole time.Time
	took  time.Duration
	// express counts the passes that were not over everything. Owned by Apply.
	express int
	// bent: the last probe had to lead packets over the bridge.
	bent bool
}

var _ ingress.Engine = (*Engine)(nil)

// place is a namespace as the last Apply left it.
type place struct {
	inode       uint64 // a namespace made anew is empty, and that is nobody's fault
	bridge, mtu int    // so is a bridge
	mac         mac    // of the bridge
	devices     devices
	family      uint16 // IPVS's number among the generic netlink families
	state       state
	network     ingress.Network // the wish
}

// New returns an engine that has done nothing yet.
func New(cfg Config) (*Engine, error) {
	if cfg.Node == "" || !filepath.IsAbs(cfg.NetNSDir) {
		return nil, fmt.Errorf("configure service engine ipvs: a node and an absolute folder of namespaces (got %q) are needed: %w", cfg.NetNSDir, weft.ErrInvalid)
	}
	if cfg.Repaired == nil {
		cfg.Repaired = func(weft.Repair) {}
	}
	return &Engine{
		cfg: cfg, divert: nft.NewDiverter(cfg.Repaired), places: map[string]*place{},
		timeouts: kernel.Config{TimeoutTCP: timeoutTCP, TimeoutTCPFin: timeoutFIN, TimeoutUDP: timeoutUDP},
	}, nil
}

// Name implements ingress.Engine.
func (e *Engine) Name() string { return "ipvs" }

// Apply implements ingress.Engine. A network that fails is an
// ingress.NetworkError and does not keep the others from being applied. The table
// is kept: it must not be changed afterwards.
func (e *Engine) Apply(ctx context.Context, t ingress.Table) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(t.Published) > 0 {
		return fmt.Errorf("service engine ipvs: published ports are another engine's: %w", weft.ErrUnsupported)
	}
	if e.applyExpress(t) {
		e.express++
		return nil
	}
	e.whole = time.Time{}
	start := time.Now()
	var errs []error
	places := map[string]*place{}
	clean := true
	for _, n := range t.Networks {
		if err := ctx.Err(); err != nil {
			errs = append(errs, err)
			break
		}
		p, ok, err := e.applyNetwork(n)
		if p != nil {
			places[n.NetNS] = p
		}
		if clean = clean && ok; err != nil {
			errs = append(errs, &ingress.NetworkError{VNI: n.VNI, Err: fmt.Errorf("apply service addresses: %w", err)})
		}
	}
	e.places = places
	if clean && len(errs) == 0 {
		e.whole = time.Now()
		e.took = e.whole.Sub(start)
	}
	return errors.Join(errs...)
}

// applyNetwork makes one namespace right. ok says that nothing was repaired.
func (e *Engine) applyNetwork(n ingress.Network) (p *place, ok bool, err error) {
	want, planErr := plan(n)
	if planErr != nil {
		return nil, false, planErr
	}
	var st unix.Stat_t
	if err := unix.Stat(n.NetNS, &st); err != nil {
		return nil, false, &os.PathError{Op: "stat", Path: n.NetNS, Err: err}
	}
	left := e.places[n.NetNS]
	if left != nil && left.inode != st.Ino {
		left = nil
	}
	p = &place{inode: st.Ino, state: want, network: n}
	var repairs []weft.Repair
	var mac mac
	err = netns.Do(n.NetNS, func() (err error) {
		repairs, mac, err = e.inside(n, p, left)
		return err
	})
	if err == nil {
		p.mac = mac
		err = e.divert.Apply(p.diversion(n))
	}
	if err != nil {
		return left, false, err // its repairs are owed
	}
	for _, r := range repairs {
		e.cfg.Repaired(r)
	}
	return p, len(repairs) == 0, nil
}

// diversion is what leads packets here. Services of which all backends drain are
// found by no mark: what is new of them is refused by the namespace's own stack, at
// once, and not by IPVS, whose ICMP a client that is just connecting may miss.
func (p *place) diversion(n ingress.Network) nft.Diversion {
	d := nft.Diversion{VNI: n.VNI, NetNS: n.NetNS, MAC: p.mac[:], IPv6: n.IPv6, Speakers: n.Speakers}
	for _, s := range n.Services {
		if allDrain(s) {
			d.Unmarked = append(d.Unmarked, s.VIP)
		}
	}
	return d
}

func allDrain(s ingress.Service) bool {
	return len(s.Backends) > 0 && !slices.ContainsFunc(s.Backends, func(b ingress.Backend) bool { return !b.Draining })
}

// inside runs on a thread in the namespace. It fills in p.
func (e *Engine) inside(n ingress.Network, p, left *place) (repairs []weft.Repair, bridge mac, err error) {
	say := func(kind, object, reason string) {
		if left != nil && reason != "" {
			repairs = append(repairs, weft.Repair{Kind: kind, Object: fmt.Sprintf("%s of network %d", object, n.VNI), Reason: reason})
		}
	}
	family, err := family()
	if err != nil {
		return nil, mac{}, err
	}
	h, err := kernel.New("")
	if err != nil {
		return nil, mac{}, fmt.Errorf("open IPVS: %w", err)
	}
	defer h.Close()
	l, fault, err := openLeg(n.Bridge, weft.BalancerName(n.VNI), n.IPv6)
	if err != nil {
		return nil, mac{}, err
	}
	defer l.close()
	if err := l.setOut(n.VNI); err != nil {
		return nil, mac{}, err
	}
	p.devices = l.devices(p.state.near)
	bridge = mac(l.bridge.Attrs().HardwareAddr)
	p.bridge, p.mtu = l.bridge.Attrs().Index, l.bridge.Attrs().MTU
	if left != nil && left.bridge != p.bridge {
		left = nil // all of ours went with the bridge
	}
	if left != nil && left.mtu == p.mtu {
		say("balancer wrong", l.name, fault)
	}
	was, err := set(settings(l.name, n.Ports, n.IPv6))
	for _, s := range was {
		if fault == "" && left.had(s.key) {
			say("sysctl wrong", s.key, fmt.Sprintf("it was %q", s.value))
		}
	}
	if err != nil {
		return nil, mac{}, err
	}
	if fault != "" {
		if err := l.up(); err != nil {
			return nil, mac{}, err
		}
	}
	missing, err := l.ways(n.IPv6)
	for _, what := range missing {
		if fault == "" && left != nil && left.devices.out == p.devices.out {
			say("balancer wrong", l.name, "its "+what+" was gone")
		}
	}
	if err != nil {
		return nil, mac{}, err
	}
	if reason, err := e.setTimeouts(h); err != nil {
		return nil, mac{}, err
	} else {
		say("ipvs timeouts wrong", "ipvs", reason)
	}
	have, err := l.read(n.IPv6, p.state.near)
	if err != nil {
		return nil, mac{}, err
	}
	var strays []weft.Repair
	if have.services, strays, err = readServices(h, n.VNI); err != nil {
		return nil, mac{}, err
	}
	if left != nil {
		repairs = append(append(repairs, damage(n.VNI, left.stillThere(p, fault != ""), have, p.state)...), strays...)
	}
	p.family = family
	b := newBatcher(p.family, p.devices)
	defer b.close()
	return repairs, bridge, b.run(diff(have, p.state))
}

// stillThere is what must be left of the last pass: without what went with a device, or
// belongs on another one now.
func (p *place) stillThere(now *place, remade bool) state {
	s := p.state
	if remade {
		s.local, s.near, s.neigh = nil, nil, nil
	}
	if p.devices.out != now.devices.out || !maps.Equal(p.state.near, now.state.near) {
		s.neigh = nil
	}
	return s
}

// had reports that the last pass has made a setting: that of a port that has come since
// is nobody's fault.
func (p *place) had(key string) bool {
	return p != nil && slices.ContainsFunc(settings(weft.BalancerName(p.network.VNI), p.network.Ports, p.network.IPv6), func(s setting) bool { return s.key == key })
}

// family is the number of IPVS among the generic netlink families. Asking for it
// loads the module.
func family() (uint16, error) {
	f, err := netlink.GenlFamilyGet("IPVS") // IPVS_GENL_NAME
	if err != nil {
		return 0, fmt.Errorf("this kernel has no IPVS (module ip_vs): %w: %w", err, weft.ErrUnsupported)
	}
	return f.ID, nil
}

// setTimeouts returns what they were if they were not as wanted.
func (e *Engine) setTimeouts(h *kernel.Handle) (was string, err error) {
	c, err := h.GetConfig()
	if err != nil {
		return "", fmt.Errorf("read IPVS timeouts: %w", err)
	}
	if *c == e.timeouts {
		return "", nil
	}
	if err := h.SetConfig(&e.timeouts); err != nil {
		return "", fmt.Errorf("set IPVS timeouts: %w", err)
	}
	return fmt.Sprintf("they were %s, %s, %s", c.TimeoutTCP, c.TimeoutTCPFin, c.TimeoutUDP), nil
}

// flagHashed is set by the kernel on every service (IP_VS_SVC_F_HASHED).
const flagHashed = 2

// readServices returns the services that we might have made. What is none of
// them, as a service of one port or with another scheduler, is removed here.
func readServices(h *kernel.Handle, vni uint32) (map[key][]dest, []weft.Repair, error) {
	list, err := os.ReadFile("/proc/thread-self/net/ip_vs")
	if err != nil {
		return nil, nil, fmt.Errorf("read IPVS services: %w", err)
	}
	out, err := parse(string(list))
	if err == nil || !errors.Is(err, errOdd) {
		return out, nil, err
	}
	var strays []weft.Repair
	out = map[key][]dest{}
	services, err := h.GetServices()
	if err != nil {
		return nil, nil, fmt.Errorf("list IPVS services: %w", err)
	}
	for _, s := range services {
		k := key{s.AddressFamily == unix.AF_INET6, s.FWMark}
		if s.FWMark == 0 || s.SchedName != roundRobin || s.Flags&^flagHashed != 0 {
			strays = append(strays, weft.Repair{Kind: "service stray", Object: fmt.Sprintf("IPVS service %s %d (mark %08x, %s) of network %d", s.Address, s.Port, s.FWMark, s.SchedName, vni), Reason: reasonStray})
			if err := h.DelService(s); err != nil {
				return nil, nil, fmt.Errorf("remove IPVS service that is not weft's: %w", err)
			}
			continue
		}
		if out[k], err = readDests(h, s); err != nil {
			return nil, nil, err
		}
	}
	return out, strays, nil
}

// readDests returns the backends of a service in the order of their addresses; one
// that we would not have made is removed.
func readDests(h *kernel.Handle, s *kernel.Service) ([]dest, error) {
	list, err := h.GetDestinations(s)
	if err != nil {
		return nil, fmt.Errorf("list IPVS backends: %w", err)
	}
	var out []dest
	for _, d := range list {
		a, ok := netip.AddrFromSlice(d.Address)
		if !ok || d.Port != 0 || d.ConnectionFlags&kernel.ConnFwdMask != kernel.ConnFwdDirectRoute {
			if err := h.DelDestination(s, d); err != nil {
				return nil, fmt.Errorf("remove IPVS backend that is not weft's: %w", err)
			}
			continue
		}
		out = append(out, dest{a, d.Weight})
	}
	sortDests(out)
	return out, nil
}

// Stats implements ingress.Engine: published ports are counted by whoever has
// them, so the map is empty.
func (e *Engine) Stats(ctx context.Context) (ingress.Stats, error) {
	return ingress.Stats{Published: map[ingress.PortKey]uint64{}}, ctx.Err()
}

// Close implements ingress.Engine.
func (e *Engine) Close(ctx context.Context) error {
	names, err := netns.List(e.cfg.NetNSDir, weft.NetNSPrefix(e.cfg.Node)+"n")
	if err != nil {
		return fmt.Errorf("list hidden namespaces: %w", err)
	}
	paths := map[string]bool{}
	for _, name := range names {
		paths[filepath.Join(e.cfg.NetNSDir, name)] = true
	}
	for path := range e.places {
		paths[path] = true
	}
	e.places, e.whole = map[string]*place{}, time.Time{}
	var errs []error
	for path := range maps.Keys(paths) {
		if err := e.clear(path); err != nil && !errors.Is(err, weft.ErrNotFound) {
			errs = append(errs, fmt.Errorf("remove service addresses from %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}

// clear removes all of ours from a namespace: first what leads packets here.
func (e *Engine) clear(path string) error {
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	err = e.divert.Remove(path)
	return errors.Join(err, ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open rtnetlink socket: %w", err)
		}
		defer h.Close()
		links, err := h.LinkList()
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, l := range links {
			if m, ok := l.(*netlink.Macvlan); ok && m.Mode == netlink.MACVLAN_MODE_PASSTHRU && isNamed(m.Name, weft.BalancerName) {
				err = errors.Join(err, h.LinkDel(l))
			}
			if v, ok := l.(*netlink.Vxlan); ok && isNamed(v.Name, weft.VXLANName) {
				err = errors.Join(err, clearTunnel(h, v))
			}
		}
		if _, err := family(); errors.Is(err, weft.ErrUnsupported) {
			return err
		}
		k, err2 := kernel.New("")
		if err2 != nil {
			return errors.Join(err, fmt.Errorf("open IPVS: %w", err2))
		}
		defer k.Close()
		if err2 = k.Flush(); err2 != nil {
			err2 = fmt.Errorf("remove IPVS services: %w", err2)
		}
		return errors.Join(err, err2)
	}))
}

// isNamed reports whether name makes this one of some network's number.
func isNamed(have string, name func(vni uint32) string) bool {
	var vni uint32
	_, err := fmt.Sscanf(have, strings.TrimSuffix(name(0), "0")+"%d", &vni)
	return err == nil && have == name(vni)
}
