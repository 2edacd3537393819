package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Priorities of routing rules in a task's namespace. The kernel's own rule for
// local addresses stands at 0 and cannot be preceded; it moves to ruleLocal. So a
// task's own requests to its service addresses leave by the overlay, where they
// are balanced like everyone's, although the addresses are local: the table of
// connected routes is asked before the local one. What comes in for them is local
// as ever.
const (
	ruleVIP   = 50
	ruleLocal = 100
)

// families are those of LocalRule.
var families = map[string]int{familyV4: netlink.FAMILY_V4, familyV6: netlink.FAMILY_V6}

// inside is what a task's namespace holds. far is the inner end of its leg, nil
// without one.
type inside struct {
	state State
	far   netlink.Link
}

// readInside runs in the task's namespace and reads what want may differ from.
func readInside(want State) (inside, error) {
	in := inside{state: State{}}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return in, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	if err := readSettings(in.state, want); err != nil {
		return in, err
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		return in, fmt.Errorf("look up lo: %w", err)
	}
	in.state[Object{Loopback, "lo"}] = ""
	if lo.Attrs().Flags&net.FlagUp == 0 {
		in.state[Object{Loopback, "lo"}] = "it was down"
	}
	var missing netlink.LinkNotFoundError
	if in.far, err = h.LinkByName(LegName); errors.As(err, &missing) {
		in.far = nil
	} else if err != nil {
		return in, fmt.Errorf("look up %s: %w", LegName, err)
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return in, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		p := prefixOf(a.IPNet)
		switch {
		case p.Addr().IsLinkLocalUnicast(), p.Addr().IsLoopback() && p != loopbackNet:
		case a.LinkIndex == lo.Attrs().Index:
			in.state[Object{Address, p.String()}] = ""
		case in.far != nil && a.LinkIndex == in.far.Attrs().Index && p.Addr().Is4():
			in.state[Object{LegAddress, p.String()}] = ""
		}
	}
	for name, family := range families {
		if err := readRules(h, in.state, want, name, family); err != nil {
			return in, err
		}
	}
	return in, readRoutes(h, in)
}

// readSettings takes one that this kernel lacks, as IPv6's may be, as in order.
func readSettings(have, want State) error {
	for o, wanted := range want {
		if o.Class != Setting && o.Class != HostSetting {
			continue
		}
		value, err := readSysctl(o.Name)
		switch {
		case errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(o.Name, "net/ipv6/"):
			have[o] = wanted
		case err != nil:
			return fmt.Errorf("read sysctl %s: %w", o.Name, err)
		default:
			have[o] = value
		}
	}
	return nil
}

// readSysctl makes three system calls, os.ReadFile nine: it is called a thousand
// times in a pass over a hundred tasks.
func readSysctl(key string) (string, error) {
	fd, err := unix.Open("/proc/sys/"+key, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	var b [64]byte
	n, err := unix.Read(fd, b[:])
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return "", err
	}
	return strings.Join(strings.Fields(string(b[:n])), " "), nil
}

// readRules reads the local rule only where it is to be moved.
func readRules(h *netlink.Handle, have, want State, name string, family int) error {
	_, isMoving := want[Object{LocalRule, name}]
	// Without addresses nothing is asked of a kernel that may lack the family.
	if !isMoving && family == netlink.FAMILY_V6 && !hasIPv6() {
		return nil
	}
	rules, err := complete(func() ([]netlink.Rule, error) { return h.RuleList(family) })
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	for _, r := range rules {
		switch {
		case r.Table == unix.RT_TABLE_LOCAL && r.Priority <= 0 && isMoving:
			have[Object{LocalRule, name}] = ruleUnmoved
		case r.Table == unix.RT_TABLE_LOCAL && r.Priority == ruleLocal && isMoving:
			if o := (Object{LocalRule, name}); have[o] == "" {
				have[o] = ruleMoved
			}
		case r.Priority == ruleVIP && r.Dst != nil:
			o, text := Object{Rule, prefixOf(r.Dst).String()}, ruleToMain
			if r.Table != unix.RT_TABLE_MAIN || r.IifName != "lo" {
				text = fmt.Sprintf("for table %d and packets from %q", r.Table, r.IifName)
			}
			if have[o] == "" || have[o] == ruleToMain {
				have[o] = text
			}
		}
	}
	return nil
}

func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}

// readRoutes reads the default route of highest rank: others are the task's own.
func readRoutes(h *netlink.Handle, in inside) error {
	routes, err := complete(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil && prefixOf(r.Dst).Bits() != 0 || r.Priority != 0 || r.Tos != 0 {
			continue
		}
		via, _ := netip.AddrFromSlice(r.Gw)
		dev := LegName
		if in.far == nil || r.LinkIndex != in.far.Attrs().Index {
			dev = fmt.Sprintf("link %d", r.LinkIndex)
		}
		in.state[Object{Route, defaultRoute}] = routeText(via.Unmap(), dev)
	}
	return nil
}

// makeInside runs in the task's namespace and makes one change.
func makeInside(op Op, gateway netip.Addr) error {
	switch op.Class {
	case Setting:
		return writeSetting(op)
	case Loopback:
		return setUp("lo")
	case LocalRule:
		return moveLocalRule(families[op.Name])
	case Rule:
		return setRule(op)
	case Address:
		return setAddr("lo", op)
	case LegAddress:
		return setAddr(LegName, op)
	case Route:
		return setDefaultRoute(op, gateway)
	}
	panic(fmt.Sprintf("no way to make %s", op.Class))
}

func writeSetting(op Op) error {
	err := os.WriteFile("/proc/sys/"+op.Name, []byte(op.Value), 0o644)
	if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(op.Name, "net/ipv6/") {
		return nil // a kernel without IPv6
	}
	return err
}

func setUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// moveLocalRule makes the new rule before it deletes the old one: without any, no
// address of the task would be its own.
func moveLocalRule(family int) error {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table = family, ruleLocal, unix.RT_TABLE_LOCAL
	if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	r = netlink.NewRule()
	r.Family, r.Priority, r.Table = family, 0, unix.RT_TABLE_LOCAL
	if err := netlink.RuleDel(r); err != nil && !gone(err) {
		return err
	}
	return nil
}

// setRule makes the rules for an address one, or none.
func setRule(op Op) error {
	p, err := netip.ParsePrefix(op.Name)
	if err != nil {
		return err
	}
	family := netlink.FAMILY_V4
	if p.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	rules, err := complete(func() ([]netlink.Rule, error) { return netlink.RuleList(family) })
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	for i := range rules {
		if r := &rules[i]; r.Priority == ruleVIP && prefixOf(r.Dst) == p {
			if err := netlink.RuleDel(r); err != nil && !gone(err) {
				return err
			}
		}
	}
	if op.Away {
		return nil
	}
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.IifName, r.Dst = family, ruleVIP, unix.RT_TABLE_MAIN, "lo", ipNet(p)
	if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// setAddr puts an address on a link or takes it away.
func setAddr(link string, op Op) error {
	p, err := netip.ParsePrefix(op.Name)
	if err != nil {
		return err
	}
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: ipNet(p)}
	if op.Away {
		if err := netlink.AddrDel(l, a); err != nil && !gone(err) {
			return err
		}
		return nil
	}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if p.Bits() == 128 {
		// Without a route of its own in the main table, where the rules look
		// for the way out to a service address.
		a.Flags |= unix.IFA_F_NOPREFIXROUTE
	}
	if p.Addr().IsLoopback() {
		a.Scope = unix.RT_SCOPE_HOST
	}
	if err := netlink.AddrAdd(l, a); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func setDefaultRoute(op Op, gateway netip.Addr) error {
	all := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	if op.Away {
		if err := netlink.RouteDel(&netlink.Route{Dst: all}); err != nil && !gone(err) {
			return err
		}
		return nil
	}
	l, err := netlink.LinkByName(LegName)
	if err != nil {
		return err
	}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: gateway.AsSlice(), Dst: all})
}

// pingGroups is the widest range of groups that may open ICMP sockets, as Docker
// sets it. In a user namespace only mapped groups are allowed in the range.
func pingGroups() (string, error) {
	b, err := os.ReadFile("/proc/self/gid_map")
	if err != nil {
		return "", fmt.Errorf("read mapped groups: %w", err)
	}
	return "0 " + strconv.Itoa(lastGroup(string(b))), nil
}

// lastGroup is the last of the groups mapped from 0 on (user_namespaces(7)).
func lastGroup(gidMap string) int {
	for _, line := range strings.Split(gidMap, "\n") {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "0" {
			if n, err := strconv.Atoi(f[2]); err == nil && n > 0 {
				return min(n-1, 1<<31-1)
			}
		}
	}
	return 0
}
