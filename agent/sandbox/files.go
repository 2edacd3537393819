package sandbox

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/weftnet/weft"
)

// Resolver is the address of the resolver inside every task, as Docker's.
const Resolver = "127.0.0.11"

// Validate checks what a person may have chosen. Violations wrap
// weft.ErrInvalid.
func (s Spec) Validate() error {
	if !s.Task.Valid() {
		return fmt.Errorf("sandbox of task %q: not a task id: %w", s.Task, weft.ErrInvalid)
	}
	if err := validName(s.Hostname, 63); err != nil {
		return fmt.Errorf("sandbox of task %s: hostname: %w", s.Task.Short(), err)
	}
	for _, d := range s.Search {
		if err := validName(d, 253); err != nil {
			return fmt.Errorf("sandbox of task %s: search domain: %w", s.Task.Short(), err)
		}
	}
	for _, o := range s.Options {
		if o == "" || strings.ContainsAny(o, " \t\r\n#;") {
			return fmt.Errorf("sandbox of task %s: resolver option %q is not one word: %w", s.Task.Short(), o, weft.ErrInvalid)
		}
	}
	for name, addrs := range s.Hosts {
		if err := validName(name, 253); err != nil {
			return fmt.Errorf("sandbox of task %s: hosts: %w", s.Task.Short(), err)
		}
		if len(addrs) == 0 || slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !a.IsValid() || a.Zone() != "" }) {
			return fmt.Errorf("sandbox of task %s: hosts: %q has no address: %w", s.Task.Short(), name, weft.ErrInvalid)
		}
	}
	for _, v := range s.VIPs {
		if !v.IsValid() || v.IsUnspecified() || v.IsMulticast() || v.IsLoopback() {
			return fmt.Errorf("sandbox of task %s: service address %s is not a unicast address: %w", s.Task.Short(), v, weft.ErrInvalid)
		}
	}
	return nil
}

// validName takes letters, digits, hyphens and dots (RFC 1123 section 2.1) and
// the underscore, which Docker's names may hold; labels of 1-63 characters
// (RFC 1035 section 2.3.4) that neither begin nor end with a hyphen. The first
// label of a hostname of 64 bytes would not fit the kernel's nodename.
func validName(name string, longest int) error {
	if name == "" || len(name) > longest {
		return fmt.Errorf("%q must have 1-%d characters: %w", name, longest, weft.ErrInvalid)
	}
	for _, label := range strings.Split(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("%q: each part between dots must have 1-63 characters and no hyphen at its ends: %w", name, weft.ErrInvalid)
		}
		for _, c := range label {
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return fmt.Errorf("%q: %q is not a letter, digit, hyphen or underscore: %w", name, c, weft.ErrInvalid)
			}
		}
	}
	return nil
}

func hostsFile(s Spec) string {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	names := make([]string, 0, len(s.Hosts))
	for name := range s.Hosts {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for _, a := range s.Hosts[name] {
			fmt.Fprintf(&b, "%s\t%s\n", a, name)
		}
	}
	return b.String()
}

func resolvConf(s Spec) string {
	var b strings.Builder
	b.WriteString("nameserver " + Resolver + "\n")
	if len(s.Search) > 0 {
		b.WriteString("search " + strings.Join(s.Search, " ") + "\n")
	}
	options := slices.Clone(s.Options)
	if !slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }) {
		options = append(options, "ndots:0")
	}
	b.WriteString("options " + strings.Join(options, " ") + "\n")
	return b.String()
}

// writeFiles writes the three files in place: they are bind-mounted into the
// container, so a file put in their place would not be seen there. The folder is there.
func writeFiles(sb Sandbox, s Spec) error {
	for _, f := range []struct{ path, text string }{
		{sb.HostsPath, hostsFile(s)}, {sb.ResolvConfPath, resolvConf(s)}, {sb.HostnamePath, s.Hostname + "\n"},
	} {
		if old, err := os.ReadFile(f.path); err == nil && string(old) == f.text {
			continue
		}
		if err := os.WriteFile(f.path, []byte(f.text), 0o644); err != nil {
			return fmt.Errorf("write files of task %s: %w", s.Task.Short(), err)
		}
	}
	return nil
}

// pickSubnet returns want if it overlaps nothing that is used, else the next
// prefix of its size that does not: upward through 172.16.0.0/12, then
// 192.168.0.0/16 (RFC 1918).
func pickSubnet(want netip.Prefix, used []netip.Prefix) (netip.Prefix, error) {
	free := func(p netip.Prefix) bool {
		return !slices.ContainsFunc(used, p.Overlaps)
	}
	if free(want) {
		return want, nil
	}
	for _, pool := range []string{"172.16.0.0/12", "192.168.0.0/16"} {
		all := netip.MustParsePrefix(pool)
		if want.Bits() < all.Bits() {
			continue
		}
		first, count := 0, 1<<(want.Bits()-all.Bits())
		if all.Overlaps(want) {
			first = int((word(want.Addr())-word(all.Addr()))>>(32-want.Bits())) + 1
		}
		for i := range count {
			n := uint32((first+i)%count) << (32 - want.Bits())
			if p := netip.PrefixFrom(addr4(word(all.Addr())+n), want.Bits()); free(p) {
				return p, nil
			}
		}
	}
	return netip.Prefix{}, fmt.Errorf("choose a subnet for the gateway bridge: every /%d of 172.16.0.0/12 and 192.168.0.0/16 is in use on this host: %w", want.Bits(), weft.ErrConflict)
}

// pickAddr returns the lowest free host address of subnet. The first belongs
// to the bridge; network and broadcast address to nobody.
func pickAddr(subnet netip.Prefix, used map[netip.Addr]bool) (netip.Prefix, error) {
	base, size := word(subnet.Addr()), uint32(1)<<(32-subnet.Bits())
	for i := uint32(2); i < size-1; i++ {
		if a := addr4(base + i); !used[a] {
			return netip.PrefixFrom(a, subnet.Bits()), nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("choose a gateway address: all %d of %s are in use: %w", size-3, subnet, weft.ErrConflict)
}

func word(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func addr4(w uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(w >> 24), byte(w >> 16), byte(w >> 8), byte(w)})
}
