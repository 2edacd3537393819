package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// setInside runs in the task's namespace: loopback, service addresses,
// sysctls.
func setInside(s Spec) error {
	for _, k := range []struct{ key, value string }{
		// A service address on lo must not be answered for on the overlay:
		// the bridge answers for it (direct return).
		{"net/ipv4/conf/all/arp_ignore", "1"}, {"net/ipv4/conf/default/arp_ignore", "1"},
		{"net/ipv4/conf/all/arp_announce", "2"}, {"net/ipv4/conf/default/arp_announce", "2"},
		// Answers from a service address, which is on our own lo too, and
		// what we ask of our own service and the balancer gives back to us.
		{"net/ipv4/conf/all/accept_local", "1"}, {"net/ipv4/conf/default/accept_local", "1"},
		// As Docker: any user may bind any port and ping.
		{"net/ipv4/ip_unprivileged_port_start", "0"},
		// Addresses come from an allocator; waiting for duplicates would
		// cost the first packets.
		{"net/ipv6/conf/all/accept_dad", "0"}, {"net/ipv6/conf/default/accept_dad", "0"},
		// What leaves by a port has that port's address: for a request to our
		// own service RFC 6724 section 5 rule 1 would choose the service's.
		{"net/ipv6/conf/default/use_oif_addrs_only", "1"},
	} {
		err := os.WriteFile("/proc/sys/"+k.key, []byte(k.value), 0o644)
		if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(k.key, "net/ipv6/") {
			continue // a kernel without IPv6
		}
		if err != nil {
			return fmt.Errorf("set sysctl %s=%s: %w", k.key, k.value, err)
		}
	}
	if err := openPing(); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("look up lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	var v4, v6 []netip.Prefix
	for _, v := range s.VIPs {
		v = v.Unmap()
		if p := netip.PrefixFrom(v, v.BitLen()); v.Is4() {
			v4 = append(v4, p)
		} else {
			v6 = append(v6, p)
		}
	}
	if err := setRules(v4, netlink.FAMILY_V4); err != nil {
		return err
	}
	// Without IPv6 addresses nothing is asked of a kernel that may lack it.
	if _, err := os.Stat("/proc/net/if_inet6"); err == nil || len(v6) > 0 {
		if err := setRules(v6, netlink.FAMILY_V6); err != nil {
			return err
		}
	}
	if err := setAddrs(lo, v4, netlink.FAMILY_V4); err != nil {
		return err
	}
	return setAddrs(lo, v6, netlink.FAMILY_V6)
}

// Priorities of routing rules in a task's namespace. The kernel's own rule for
// local addresses stands at 0 and cannot be preceded; it moves to ruleLocal.
const (
	ruleVIP   = 50
	ruleLocal = 100
)

// setRules makes a task's own requests to its service addresses leave by the
// overlay, where they are balanced like everyone's, although the addresses are
// local: the table of connected routes is asked before the local one. What comes
// in for them is local as ever.
func setRules(vips []netip.Prefix, family int) error {
	rules, err := netlink.RuleList(family)
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	have := map[netip.Prefix]bool{}
	local, moved := false, false
	for i := range rules {
		r := &rules[i]
		switch {
		case r.Table == unix.RT_TABLE_LOCAL && r.Priority == ruleLocal:
			moved = true
		case r.Table == unix.RT_TABLE_LOCAL && r.Priority <= 0:
			local = true
		case r.Priority == ruleVIP && r.Dst != nil:
			p := prefixOf(r.Dst)
			if have[p] = true; !slices.Contains(vips, p) {
				if err := netlink.RuleDel(r); err != nil && !gone(err) {
					return fmt.Errorf("delete routing rule of %s: %w", p, err)
				}
			}
		}
	}
	for _, p := range vips {
		if have[p] {
			continue
		}
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.IifName, r.Dst = family, ruleVIP, unix.RT_TABLE_MAIN, "lo", ipNet(p)
		if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add routing rule of %s: %w", p, err)
		}
	}
	if len(vips) == 0 {
		return nil
	}
	if !moved {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table = family, ruleLocal, unix.RT_TABLE_LOCAL
		if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("move routing rule of local addresses: %w", err)
		}
	}
	if local {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table = family, 0, unix.RT_TABLE_LOCAL
		if err := netlink.RuleDel(r); err != nil && !gone(err) {
			return fmt.Errorf("move routing rule of local addresses: %w", err)
		}
	}
	return nil
}

// openPing lets every group open ICMP sockets, as Docker does. In a user
// namespace only mapped groups are allowed in the range.
func openPing() error {
	const key = "/proc/sys/net/ipv4/ping_group_range"
	err := os.WriteFile(key, []byte("0 2147483647"), 0o644)
	if errors.Is(err, unix.EINVAL) {
		var b []byte
		if b, err = os.ReadFile("/proc/self/gid_map"); err == nil {
			err = os.WriteFile(key, []byte("0 "+strconv.Itoa(lastGroup(string(b)))), 0o644)
		}
	}
	if err != nil {
		return fmt.Errorf("set sysctl net.ipv4.ping_group_range: %w", err)
	}
	return nil
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
