package nft

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

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
	if leg.Addr6.IsValid() {
		added, err := setLinkLocal(l, leg.Addr6.Addr())
		if err != nil {
			return err
		}
		if added && e.set == now {
			e.report(weft.Repair{Kind: kindAddress, Object: "link-local address of " + leg.Link, Reason: "it was gone"})
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

// prepareGateway lets the host's own clients of 127.0.0.1 reach ports in mode
// host, which are behind the gateway bridge. As with the leg, the setting stays.
func (e *Engine) prepareGateway(t ingress.Table) error {
	if t.Gateway.Bridge == "" || !slices.ContainsFunc(t.Published, func(p ingress.Published) bool { return p.Host }) {
		e.gateway, e.gateway6 = "", 0
		return nil
	}
	if err := e.prepareGateway6(t.Gateway); err != nil {
		return err
	}
	key := "net/ipv4/conf/" + t.Gateway.Bridge + "/route_localnet"
	was, err := readSysctl(key)
	if err != nil || was == "1" {
		e.gateway = key
		return err
	}
	if err := writeSysctl(key, "1"); err != nil {
		return err
	}
	if e.gateway == key {
		e.report(weft.Repair{Kind: kindSysctl, Object: key, Reason: fmt.Sprintf("it was %s instead of 1", was)})
	}
	e.gateway = key
	return nil
}

// setLinkLocal gives the leg a link-local address. From there the host asks who
// has a task's address when it passes on a packet whose source is a client's, and
// not its own (RFC 4861 section 7.2.2); the overlay makes legs without.
func setLinkLocal(l netlink.Link, of netip.Addr) (added bool, err error) {
	return setAddr6(l, netip.PrefixFrom(linkLocal(of), 64))
}

// setAddr6 gives a link an address that is its own at once, and says whether it was
// not there.
func setAddr6(l netlink.Link, p netip.Prefix) (added bool, err error) {
	want := p.Addr()
	list := func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V6) }
	have, err := list()
	for i := 1; errors.Is(err, netlink.ErrDumpInterrupted) && i < dumpTries; i++ {
		have, err = list()
	}
	if err != nil {
		return false, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
	}
	if slices.ContainsFunc(have, func(a netlink.Addr) bool { return a.IP.Equal(want.AsSlice()) }) {
		return false, nil
	}
	a := &netlink.Addr{IPNet: &net.IPNet{IP: want.AsSlice(), Mask: net.CIDRMask(p.Bits(), 128)}, Flags: unix.IFA_F_NODAD}
	if err := netlink.AddrAdd(l, a); err != nil && !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("add address %s to %s: %w", want, l.Attrs().Name, err)
	}
	return true, nil
}

// linkLocal is the address with the interface identifier of a.
func linkLocal(a netip.Addr) netip.Addr {
	b := a.As16()
	copy(b[:8], []byte{0xfe, 0x80, 7: 0})
	return netip.AddrFrom16(b)
}
