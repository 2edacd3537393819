package weft

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestDNSConfig(t *testing.T) {
	a := netip.MustParseAddr
	long := strings.Repeat("a", 64)
	for _, tc := range []struct {
		name string
		c    DNSConfig
		want string // "" = accepted, else what the error names
	}{
		{"empty", DNSConfig{}, ""},
		{"all", DNSConfig{[]netip.Addr{a("192.0.2.1"), a("fd00::1")}, []string{"Example.com", "my_stack.lan"}, []string{"ndots:15", "rotate", "timeout:1"}}, ""},
		{"no domains at all", DNSConfig{Search: []string{"."}}, ""},
		{"none and some", DNSConfig{Search: []string{".", "lan"}}, "Search[0]"},
		{"four servers", DNSConfig{Nameservers: []netip.Addr{a("fd00::1"), a("fd00::2"), a("fd00::3"), a("fd00::4")}}, "Nameservers"},
		{"no server", DNSConfig{Nameservers: []netip.Addr{a("fd00::1"), {}}}, "Nameservers[1]"},
		{"unspecified", DNSConfig{Nameservers: []netip.Addr{a("0.0.0.0")}}, "Nameservers[0]"},
		{"multicast", DNSConfig{Nameservers: []netip.Addr{a("ff02::fb")}}, "Nameservers[0]: ff02::fb is no host"},
		{"broadcast", DNSConfig{Nameservers: []netip.Addr{a("255.255.255.255")}}, "Nameservers[0]: 255.255.255.255 is no host"},
		{"zone", DNSConfig{Nameservers: []netip.Addr{a("fd00::1%eth0")}}, "Nameservers[0]: fd00::1%eth0 has a zone"},
		{"loopback", DNSConfig{Nameservers: []netip.Addr{a("192.0.2.1"), a("127.0.0.1")}}, "Nameservers[1]: 127.0.0.1 is a loopback address"},
		{"another loopback", DNSConfig{Nameservers: []netip.Addr{a("127.0.0.53")}}, "the nodes' own nameservers are asked"},
		{"IPv6 loopback", DNSConfig{Nameservers: []netip.Addr{a("::1")}}, "Nameservers[0]: ::1 is a loopback address"},
		{"loopback in IPv6", DNSConfig{Nameservers: []netip.Addr{a("::ffff:127.0.0.1")}}, "is a loopback address"},
		{"the resolver itself", DNSConfig{Nameservers: []netip.Addr{a("127.0.0.11")}}, "Nameservers[0]: 127.0.0.11 is the resolver that every task has"},
		{"link-local", DNSConfig{Nameservers: []netip.Addr{a("fe80::1")}}, "Nameservers[0]: fe80::1 is link-local"},
		{"link-local with a zone", DNSConfig{Nameservers: []netip.Addr{a("fe80::1%eth0")}}, "is link-local"},
		{"a cloud's own", DNSConfig{Nameservers: []netip.Addr{a("169.254.169.253")}}, ""},
		{"twice", DNSConfig{Nameservers: []netip.Addr{a("fd00::1"), a("fd00::1")}}, "Nameservers[1]"},
		{"long label", DNSConfig{Search: []string{"ok", long + ".com"}}, "Search[1]"},
		{"long domain", DNSConfig{Search: []string{strings.Repeat("a.", 127)}}, "Search[0]"},
		{"a line break", DNSConfig{Search: []string{"a\nnameserver 1.1.1.1"}}, "Search[0]"},
		{"empty label", DNSConfig{Search: []string{"a..b"}}, "Search[0]"},
		{"two words", DNSConfig{Options: []string{"ndots:1 rotate"}}, "Options[0]"},
		{"ndots without a number", DNSConfig{Options: []string{"rotate", "ndots"}}, "Options[1]"},
		{"ndots of a word", DNSConfig{Options: []string{"ndots:x"}}, "Options[0]"},
		{"too many ndots", DNSConfig{Options: []string{"ndots:16"}}, "at most 15"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := ServiceSpec{Name: "a", Replicas: 1, Container: ContainerSpec{Image: "a", DNS: tc.c}}
			err := s.Validate()
			if tc.want == "" && err != nil || tc.want != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(Text(err), tc.want)) {
				t.Errorf("error %v, want one that names %q", err, tc.want)
			}
		})
	}
	node := []string{"of.the.node"}
	for _, tc := range []struct{ search, want []string }{{nil, node}, {[]string{"."}, nil}, {[]string{"mine"}, []string{"mine"}}} {
		if got := (DNSConfig{Search: tc.search}).SearchDomains(node); strings.Join(got, " ") != strings.Join(tc.want, " ") {
			t.Errorf("search %q gives %q, want %q", tc.search, got, tc.want)
		}
	}
}

func TestHostEntry(t *testing.T) {
	for line, want := range map[string]string{
		"10.0.0.1 db": "10.0.0.1 db", "fd00::1\tdb  db.example": "fd00::1 db db.example",
		"": "", "db": "", "10.0.0.1": "", "db 10.0.0.1": "", "10.0.0.1 a#b": "", "10.0.0.1 a\n10.0.0.2 b": "", "fe80::1%eth0 db": "", "10.0.0.1 -a": "", "host-gateway db": "",
	} {
		h, err := ParseHostEntry(line)
		switch {
		case want == "" && !errors.Is(err, ErrInvalid):
			t.Errorf("%q: %v, %v, want ErrInvalid", line, h, err)
		case want != "" && (err != nil || h.String() != want):
			t.Errorf("%q: %v, %v, want %q", line, h, err, want)
		}
	}
	one := ContainerSpec{Hosts: []HostEntry{{netip.MustParseAddr("10.0.0.1"), []string{"a"}}}}
	two := ContainerSpec{Hosts: []HostEntry{{netip.MustParseAddr("10.0.0.1"), []string{"b"}}}}
	if sameContainer(&one, &two) || !sameContainer(&one, &one) || sameContainer(&ContainerSpec{DNS: DNSConfig{Search: []string{"a"}}}, &ContainerSpec{}) {
		t.Error("a change of names or hosts is not seen, or seen where there is none")
	}
}
