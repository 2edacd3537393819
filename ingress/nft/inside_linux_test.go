package nft

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// What somebody breaks inside a task is mended, counted once, and not mistaken
// for a change of the wish.
func TestMeshRepairsInside(t *testing.T) {
	m := newMesh(t, 1)
	m.task(11)
	h := m.hosts[0]
	m.publish(m.ports(m.backend(11))...)
	var got []string
	h.e.Repaired = func(r weft.Repair) { got = append(got, r.Kind) }
	table := func(f nftables.TableFamily) func() error {
		return func() error {
			c, err := open()
			if err != nil {
				return err
			}
			return removeTable(c, ruleset{family: f, name: insideTable}.table())
		}
	}
	for _, tc := range []struct {
		name  string
		spoil func() error
		want  []string
	}{
		{"nothing", func() error { return nil }, nil},
		{"rule", func() error {
			rules, err := netlink.RuleList(netlink.FAMILY_V4)
			i := slices.IndexFunc(rules, func(r netlink.Rule) bool { return r.Priority == ruleMarked })
			if err != nil || i < 0 {
				return fmt.Errorf("no rule: %w", err)
			}
			return netlink.RuleDel(&rules[i])
		}, []string{kindRule}},
		{"route", func() error {
			return netlink.RouteDel(&netlink.Route{Table: wayTable, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
		}, []string{kindRoute}},
		{"route's MTU", func() error {
			routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: wayTable}, netlink.RT_FILTER_TABLE)
			if err != nil || len(routes) != 1 {
				return fmt.Errorf("%d routes: %w", len(routes), err)
			}
			routes[0].MTU = 700
			return netlink.RouteReplace(&routes[0])
		}, []string{kindRoute}},
		{"sysctl", func() error { return writeSysctl("net/ipv4/conf/eth0/src_valid_mark", "0") }, []string{kindSysctl}},
		{"table", table(nftables.TableFamilyIPv4), []string{kindTable}},
		{"link's table", table(nftables.TableFamilyNetdev), []string{kindTable}},
	} {
		got = nil
		m.in(m.tasks[0].NetNS, tc.spoil)
		for range 2 {
			m.publish(m.ports(m.backend(11))...)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: repairs %v, want %v", tc.name, got, tc.want)
		}
		m.wantKept(tc.name)
	}
	got = nil
	l, err := netlink.LinkByName(weft.IngressLeg)
	must(t, err)
	must(t, netlink.AddrDel(l, &netlink.Addr{IPNet: &net.IPNet{IP: linkLocal(h.entry.Addr6.Addr()).AsSlice(), Mask: net.CIDRMask(64, 128)}}))
	for range 2 {
		m.publish(m.ports(m.backend(11))...)
	}
	if !slices.Equal(got, []string{kindAddress}) {
		t.Errorf("the leg's link-local address: repairs %v", got)
	}
	m.wantKept("the leg's link-local address is back")
	got = nil
	h.entry.Addr = netip.MustParsePrefix("10.0.16.250/20")
	m.publish(m.ports(m.backend(11))...)
	if len(got) > 0 {
		t.Errorf("another wish was taken for repairs: %v", got)
	}
	// What is closed leaves no trace, and a task that has gone is no fault.
	must(t, h.e.Close(t.Context()))
	m.in(m.tasks[0].NetNS, func() error {
		for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := netlink.RuleList(fam)
			if err != nil {
				return err
			}
			for _, r := range rules {
				if r.Table == wayTable {
					return fmt.Errorf("rule %d is left", r.Priority)
				}
			}
		}
		c, err := open()
		if err != nil {
			return err
		}
		tables, err := c.ListTables()
		if err == nil && len(tables) > 0 {
			err = fmt.Errorf("%d tables are left", len(tables))
		}
		return err
	})
	m.tasks = append(m.tasks, ingress.EntryTask{Task: "gone", NetNS: m.dir + "/gone", Link: "eth0", Addr: netip.MustParsePrefix("10.0.16.99/24")})
	m.publish(m.ports(m.backend(11))...)
	m.wantKept("beside a task that has gone")
}
