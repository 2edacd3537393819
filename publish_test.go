package weft

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func addrs(all ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range all {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// TestPublishValidate: what is wrong with a port, by the path of Docker's JSON in
// which ranges stand as single ports.
func TestPublishValidate(t *testing.T) {
	ports := func(p ...PortSpec) func(*ServiceSpec) { return func(s *ServiceSpec) { s.Ports = p } }
	labelled := func(labels map[string]string, p ...PortSpec) func(*ServiceSpec) {
		return func(s *ServiceSpec) { s.Labels, s.Ports = labels, p }
	}
	tcp := PortSpec{Protocol: TCP, Target: 80, Published: 8080}
	chosen := PortSpec{Protocol: TCP, Target: 80}
	media := PortSpec{Protocol: UDP, Target: 10000, Published: 10000, Count: 10001}
	host := func(p PortSpec) PortSpec { p.Mode = PublishHost; return p }
	const bad = ": invalid argument: "
	for _, c := range []struct {
		name string
		edit func(*ServiceSpec)
		is   error
		want string
	}{
		{"range", ports(media), nil, ""},
		{"sctp", ports(PortSpec{Protocol: SCTP, Target: 1, Published: 1}), nil, ""},
		{"last port", ports(PortSpec{Protocol: TCP, Target: 65535, Published: 65535}), nil, ""},
		{"mode", ports(PortSpec{Protocol: TCP, Target: 1, Mode: 2}), ErrInvalid, "EndpointSpec.Ports[0].PublishMode" + bad},
		{"name", ports(PortSpec{Protocol: TCP, Target: 1, Name: "a\n"}), ErrInvalid, "EndpointSpec.Ports[0].Name" + bad},
		{"good name", ports(PortSpec{Protocol: TCP, Target: 1, Name: "http über"}), nil, ""},
		{"targets beyond the end", ports(tcp, PortSpec{Protocol: TCP, Target: 65535, Published: 9000, Count: 2}), ErrInvalid, "EndpointSpec.Ports[1].TargetPort" + bad + "a range of 2 ports from 65535 on goes beyond 65535"},
		{"published beyond the end", ports(media, PortSpec{Protocol: TCP, Target: 1, Published: 65535, Count: 2}), ErrInvalid, "EndpointSpec.Ports[10001].PublishedPort" + bad},
		{"inside a range", ports(tcp, media, PortSpec{Protocol: UDP, Target: 5, Published: 20000}), ErrInvalid, "EndpointSpec.Ports[10002].PublishedPort" + bad + "20000/udp is already published by EndpointSpec.Ports[1]"},
		{"beside a range", ports(media, PortSpec{Protocol: UDP, Target: 5, Published: 20001}, PortSpec{Protocol: TCP, Target: 5, Published: 15000}), nil, ""},
		{"both modes", ports(tcp, host(tcp)), ErrInvalid, "EndpointSpec.Ports[1].PublishedPort" + bad + "8080/tcp is already published by EndpointSpec.Ports[0]"},
		{"dnsrr in mode host", func(s *ServiceSpec) { s.EndpointMode, s.Ports = EndpointDNSRR, []PortSpec{host(tcp)} }, nil, ""},
		{"dnsrr in both modes", func(s *ServiceSpec) { s.EndpointMode, s.Ports = EndpointDNSRR, []PortSpec{host(tcp), chosen} }, ErrInvalid, "EndpointSpec.Mode" + bad},

		{"host on IPv6", labelled(map[string]string{"weft.publish.8080.ip": "10.1.2.3,2001:db8::1"}, host(tcp)), nil, ""},
		{"ip", labelled(map[string]string{"weft.publish.8080.ip": "10.1.2.3,127.0.0.1,2001:db8::1"}, tcp), nil, ""},
		{"ip of a chosen port", labelled(map[string]string{"weft.publish.80.ip": "10.1.2.3"}, chosen), nil, ""},
		{"ip of a part", labelled(map[string]string{"weft.publish.10000-10009.ip": "10.1.2.3", "weft.publish.10010.ip": "10.1.2.4"}, media), nil, ""},
		{"all options", labelled(map[string]string{"weft.publish.8080.interface": "eth0", "weft.publish.8080.allow": "10.0.0.0/8,fd00::/8", "weft.source": "snat", "weft.drain": "25s"}, tcp), nil, ""},
		{"client", labelled(map[string]string{"weft.source": "client"}, tcp), nil, ""},
		{"unknown", labelled(map[string]string{"weft.drains": "1s"}, tcp), ErrUnsupported, `Labels["weft.drains"]: unsupported: unknown label; of names that begin with "weft." weft knows weft.drain, weft.publish.PORT.allow, weft.publish.PORT.interface, weft.publish.PORT.ip, weft.source`},
		{"unknown option", labelled(map[string]string{"weft.publish.8080.host": "x"}, tcp), ErrUnsupported, `Labels["weft.publish.8080.host"]: unsupported: unknown label; of names`},
		{"no option", labelled(map[string]string{"weft.publish.8080": "x"}, tcp), ErrUnsupported, `Labels["weft.publish.8080"]: unsupported`},
		{"no port", labelled(map[string]string{"weft.publish.http.ip": "10.1.2.3"}, tcp), ErrInvalid, `Labels["weft.publish.http.ip"]` + bad + `"http" is no port from 1 to 65535`},
		{"port 0", labelled(map[string]string{"weft.publish.0.ip": "10.1.2.3"}, tcp), ErrInvalid, `Labels["weft.publish.0.ip"]` + bad},
		{"port 65536", labelled(map[string]string{"weft.publish.65536.ip": "10.1.2.3"}, tcp), ErrInvalid, `Labels["weft.publish.65536.ip"]` + bad},
		{"range backwards", labelled(map[string]string{"weft.publish.9-8.ip": "10.1.2.3"}, tcp), ErrInvalid, `Labels["weft.publish.9-8.ip"]` + bad},
		{"port that is not published", labelled(map[string]string{"weft.publish.80.ip": "10.1.2.3"}, tcp), ErrInvalid, `Labels["weft.publish.80.ip"]` + bad + "the service does not publish port 80"},
		{"range that is not published whole", labelled(map[string]string{"weft.publish.8080-8081.ip": "10.1.2.3"}, tcp), ErrInvalid, `Labels["weft.publish.8080-8081.ip"]` + bad + "the service does not publish port 8081 of these"},
		{"two meanings", labelled(map[string]string{"weft.publish.80.ip": "10.1.2.3"}, chosen, PortSpec{Protocol: TCP, Target: 81, Published: 80}), ErrInvalid, `Labels["weft.publish.80.ip"]` + bad + "80 is a published port and the target"},
		{"said twice", labelled(map[string]string{"weft.publish.10000-10009.allow": "10.0.0.0/8", "weft.publish.10009.allow": "10.0.0.0/8"}, media), ErrInvalid, `Labels["weft.publish.10009.allow"]` + bad + `Labels["weft.publish.10000-10009.allow"] says already`},
		{"address and interface", labelled(map[string]string{"weft.publish.8080.ip": "10.1.2.3", "weft.publish.8080.interface": "eth0"}, tcp), ErrInvalid, `Labels["weft.publish.8080.ip"]` + bad + `Labels["weft.publish.8080.interface"] says already`},
		{"no address", labelled(map[string]string{"weft.publish.8080.ip": "10.1.2"}, tcp), ErrInvalid, `Labels["weft.publish.8080.ip"]` + bad + `"10.1.2" is no address`},
		{"empty address", labelled(map[string]string{"weft.publish.8080.ip": "10.1.2.3,"}, tcp), ErrInvalid, `Labels["weft.publish.8080.ip"]` + bad + `"" is no address`},
		{"every address", labelled(map[string]string{"weft.publish.8080.ip": "0.0.0.0"}, tcp), ErrInvalid, `Labels["weft.publish.8080.ip"]` + bad + "0.0.0.0 stands for all addresses"},
		{"zone", labelled(map[string]string{"weft.publish.8080.ip": "fe80::1%eth0"}, tcp), ErrInvalid, `Labels["weft.publish.8080.ip"]` + bad + `fe80::1%eth0 is an address of one link only: use "interface"`},
		{"mapped", labelled(map[string]string{"weft.publish.8080.ip": "::ffff:10.1.2.3"}, tcp), ErrInvalid, `Labels["weft.publish.8080.ip"]` + bad},
		{"multicast", labelled(map[string]string{"weft.publish.8080.ip": "224.0.0.1"}, tcp), ErrInvalid, `Labels["weft.publish.8080.ip"]` + bad},
		{"address twice", labelled(map[string]string{"weft.publish.8080.ip": "10.1.2.3,10.1.2.3"}, tcp), ErrInvalid, `Labels["weft.publish.8080.ip"]` + bad},
		{"loopback of IPv6", labelled(map[string]string{"weft.publish.8080.ip": "127.0.0.1,::1"}, tcp), ErrInvalid, `Labels["weft.publish.8080.ip"]` + bad + "::1 cannot be published on, as no packet from there leaves its device: write 127.0.0.1"},
		{"interface", labelled(map[string]string{"weft.publish.8080.interface": "eth0,eth1"}, tcp), ErrInvalid, `Labels["weft.publish.8080.interface"]` + bad},
		{"long interface", labelled(map[string]string{"weft.publish.8080.interface": "sixteencharacter"}, tcp), ErrInvalid, `Labels["weft.publish.8080.interface"]` + bad},
		{"allow without length", labelled(map[string]string{"weft.publish.8080.allow": "10.1.2.3"}, tcp), ErrInvalid, `Labels["weft.publish.8080.allow"]` + bad + `"10.1.2.3" has no prefix length: write 10.1.2.3/32`},
		{"allow with host bits", labelled(map[string]string{"weft.publish.8080.allow": "10.1.2.3/8"}, tcp), ErrInvalid, `Labels["weft.publish.8080.allow"]` + bad + "10.1.2.3/8 has host bits set: use 10.0.0.0/8"},
		{"allow nonsense", labelled(map[string]string{"weft.publish.8080.allow": "friends"}, tcp), ErrInvalid, `Labels["weft.publish.8080.allow"]` + bad},
		{"allow twice", labelled(map[string]string{"weft.publish.8080.allow": "10.0.0.0/8,10.0.0.0/8"}, tcp), ErrInvalid, `Labels["weft.publish.8080.allow"]` + bad},
		{"source", labelled(map[string]string{"weft.source": "yes"}, tcp), ErrInvalid, `Labels["weft.source"]` + bad + `"yes": write client or snat`},
		{"source without ports", labelled(map[string]string{"weft.source": "snat"}), ErrInvalid, `Labels["weft.source"]` + bad + "the service publishes no port"},
		{"drain", labelled(map[string]string{"weft.drain": "25"}), ErrInvalid, `Labels["weft.drain"]` + bad + `"25": write a duration from 0s to 1h0m0s, such as 25s`},
		{"negative drain", labelled(map[string]string{"weft.drain": "-1s"}), ErrInvalid, `Labels["weft.drain"]` + bad},
		{"bound without a label", ports(PortSpec{Protocol: TCP, Target: 80, Published: 8080, IPs: addrs("127.0.0.1")}), ErrInvalid, "EndpointSpec.Ports[0]" + bad + "say it by the label weft.publish.8080.ip"},
		{"limited without a label", ports(PortSpec{Protocol: TCP, Target: 80, Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}), ErrInvalid, "EndpointSpec.Ports[0]" + bad + "say it by the label weft.publish.80.allow"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := goodService()
			c.edit(&s)
			s.Defaults()
			err := s.Validate()
			if !errors.Is(err, c.is) || err != nil && !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("got %v\nwant %v beginning %q", err, c.is, c.want)
			}
		})
	}
}

// TestLabelsReachThePorts: a label about a part of a range cuts it.
func TestLabelsReachThePorts(t *testing.T) {
	s := goodService()
	s.Ports = []PortSpec{{Protocol: TCP, Target: 8000, Published: 8000, Count: 4}, {Protocol: UDP, Target: 53}}
	s.Labels = map[string]string{"weft.publish.8001-8002.ip": "10.1.2.3", "weft.publish.8002.allow": "10.0.0.0/8", "weft.publish.53.interface": "eth1"}
	s.Defaults()
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	allow := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	want := []PortSpec{
		{Protocol: TCP, Target: 8000, Published: 8000},
		{Protocol: TCP, Target: 8001, Published: 8001, IPs: addrs("10.1.2.3")},
		{Protocol: TCP, Target: 8002, Published: 8002, IPs: addrs("10.1.2.3"), Allow: allow},
		{Protocol: TCP, Target: 8003, Published: 8003},
		{Protocol: UDP, Target: 53, Interface: "eth1"},
	}
	if !slices.EqualFunc(s.Ports, want, PortSpec.Equal) {
		t.Errorf("got  %+v\nwant %+v", s.Ports, want)
	}
	for option, label := range map[string]string{PublishIP: "weft.publish.8001-8002.ip", PublishAllow: "weft.publish.8002.allow", PublishInterface: ""} {
		if got := s.PublishLabel(&s.Ports[2], option); got != label {
			t.Errorf("%s of port 8002 is said by %q, want %q", option, got, label)
		}
	}
	// The label goes, and so does what it said, once a client sends the
	// service back as it was shown: by labels and bare ports.
	s.Labels = nil
	if err := s.Validate(); !errors.Is(err, ErrInvalid) {
		t.Errorf("ports that are bound without a label: %v", err)
	}
}

// TestLabelWarnings: who names the first port of a range may have meant all of it.
func TestLabelWarnings(t *testing.T) {
	media := PortSpec{Protocol: UDP, Target: 10000, Published: 10000, Count: 10001}
	web := []PortSpec{{Protocol: TCP, Target: 80, Published: 80}, {Protocol: TCP, Target: 81, Published: 81}}
	for _, c := range []struct {
		name   string
		labels map[string]string
		ports  []PortSpec
		want   []string
	}{
		{"first of a range", map[string]string{"weft.publish.10000.allow": "10.0.0.0/8"}, []PortSpec{media},
			[]string{"label weft.publish.10000.allow says nothing of the other ports of 10000-20000/udp; weft.publish.10000-20000.allow would speak of all"}},
		{"the range", map[string]string{"weft.publish.10000-20000.allow": "10.0.0.0/8"}, []PortSpec{media}, nil},
		{"two neighbours are no range", map[string]string{"weft.publish.80.allow": "10.0.0.0/8"}, web, nil},
		{"a port of its own", map[string]string{"weft.publish.80.allow": "10.0.0.0/8"}, append([]PortSpec{media}, web...), nil},
		{"none", map[string]string{"a": "b"}, []PortSpec{media}, nil},
	} {
		s := goodService()
		s.Labels, s.Ports = c.labels, c.ports
		for _, when := range []string{"as sent", "as stored"} {
			if err := s.Validate(); when == "as stored" && err != nil {
				t.Fatal(err)
			}
			if got := s.LabelWarnings(); !slices.Equal(got, c.want) {
				t.Errorf("%s, %s: %q, want %q", c.name, when, got, c.want)
			}
			s.Defaults()
		}
	}
}

// drawPorts draws what a service may publish: no port twice.
func drawPorts(t *rapid.T) []PortSpec {
	var out []PortSpec
	taken := map[Protocol]map[int]bool{TCP: {}, UDP: {}}
	for range rapid.IntRange(0, 12).Draw(t, "ports") {
		p := PortSpec{
			Name:      rapid.SampledFrom([]string{"", "", "", "a"}).Draw(t, "name"),
			Protocol:  rapid.SampledFrom([]Protocol{TCP, UDP}).Draw(t, "protocol"),
			Mode:      rapid.SampledFrom([]PublishMode{PublishIngress, PublishIngress, PublishHost}).Draw(t, "mode"),
			Target:    uint16(rapid.IntRange(1, 30).Draw(t, "target")),
			Published: uint16(rapid.IntRange(0, 20).Draw(t, "published")),
			Count:     uint16(rapid.IntRange(0, 3).Draw(t, "count")),
			IPs:       rapid.SampledFrom([][]netip.Addr{nil, nil, addrs("10.0.0.1"), addrs("10.0.0.2")}).Draw(t, "ips"),
		}
		if rapid.IntRange(0, 3).Draw(t, "beside") > 0 {
			p.Target = p.Published + 5 // so that neighbours match on both sides
		}
		isTaken := false
		for i := range p.Ports() {
			isTaken = isTaken || taken[p.Protocol][int(p.Published)+i]
		}
		if p.Published != 0 && isTaken {
			continue
		}
		for i := range p.Ports() {
			if p.Published != 0 {
				taken[p.Protocol][int(p.Published)+i] = true
			}
		}
		out = append(out, p)
	}
	return out
}

// TestJoinIsTheInverseOfExpand: single ports say the same before and after, no two
// ranges are left that could be one, and neither cares for the order.
func TestJoinIsTheInverseOfExpand(t *testing.T) {
	text := func(ports []PortSpec) []string {
		var out []string
		for _, p := range ExpandPorts(ports) {
			if p.Count == 1 {
				p.Count = 0
			}
			out = append(out, fmt.Sprintf("%+v", p))
		}
		slices.Sort(out)
		return out
	}
	rapid.Check(t, func(t *rapid.T) {
		in := drawPorts(t)
		joined := JoinPorts(in)
		if got, want := text(joined), text(in); !slices.Equal(got, want) {
			t.Fatalf("joined\n%v\nwant\n%v", got, want)
		}
		if again := JoinPorts(joined); !slices.EqualFunc(again, joined, PortSpec.Equal) {
			t.Fatalf("joined again\n%+v\nonce\n%+v", again, joined)
		}
		if again := JoinPorts(ExpandPorts(joined)); !slices.EqualFunc(again, joined, PortSpec.Equal) {
			t.Fatalf("expanded and joined\n%+v\nonce\n%+v", again, joined)
		}
		shuffled := rapid.Permutation(ExpandPorts(in)).Draw(t, "order")
		if got := JoinPorts(shuffled); len(got) != len(JoinPorts(ExpandPorts(in))) || !slices.Equal(text(got), text(in)) {
			t.Fatalf("in another order %+v", got)
		}
	})
}

// TestClashesAgainstTwin compares with every port on every address of a host.
func TestClashesAgainstTwin(t *testing.T) {
	links := map[string][]string{"lo": {"127.0.0.1"}, "eth0": {"10.0.0.1"}, "eth1": {"10.0.0.2"}}
	type socket struct {
		Protocol
		port int
		addr string
	}
	sockets := func(p *PortSpec) map[socket]bool {
		out := map[socket]bool{}
		for i := range p.Ports() {
			for link, all := range links {
				for _, a := range all {
					isOn := !p.IsBound() || p.Interface == link || slices.Contains(p.IPs, netip.MustParseAddr(a))
					if isOn {
						out[socket{p.Protocol, int(p.Published) + i, a}] = true
					}
				}
			}
		}
		return out
	}
	draw := func(t *rapid.T) PortSpec {
		p := PortSpec{
			Protocol:  rapid.SampledFrom([]Protocol{TCP, UDP}).Draw(t, "protocol"),
			Published: uint16(rapid.IntRange(1, 9).Draw(t, "published")),
			Count:     uint16(rapid.IntRange(0, 4).Draw(t, "count")),
		}
		if rapid.Bool().Draw(t, "by link") {
			p.Interface = rapid.SampledFrom([]string{"", "lo", "eth0", "eth1"}).Draw(t, "link")
		} else {
			p.IPs = rapid.SampledFrom([][]netip.Addr{nil, addrs("10.0.0.1"), addrs("10.0.0.1", "127.0.0.1"), addrs("127.0.0.1"), addrs("10.0.0.2")}).Draw(t, "ips")
		}
		return p
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := draw(t), draw(t)
		shared := false
		for s := range sockets(&a) {
			shared = shared || sockets(&b)[s]
		}
		got := a.Clashes(&b)
		if got != b.Clashes(&a) {
			t.Fatalf("%+v and %+v: not the same both ways", a, b)
		}
		// A link may come to have another's address; else they must agree.
		isByBoth := (a.Interface != "") != (b.Interface != "") && a.IsBound() && b.IsBound()
		if shared && !got || !shared && got && !isByBoth {
			t.Fatalf("%+v and %+v: clash %v, on one host %v", a, b, got, shared)
		}
	})
}

// TestNeedsRestartOfPorts: who may connect and where is no task's affair, in the
// mesh.
func TestNeedsRestartOfPorts(t *testing.T) {
	base := PortSpec{Protocol: TCP, Target: 80, Published: 8080}
	for name, c := range map[string]struct {
		edit         func(*PortSpec)
		ingress, own bool
	}{
		"nothing":   {func(*PortSpec) {}, false, false},
		"count 1":   {func(p *PortSpec) { p.Count = 1 }, false, false},
		"range":     {func(p *PortSpec) { p.Count = 2 }, true, true},
		"addresses": {func(p *PortSpec) { p.IPs = addrs("10.0.0.1") }, false, true},
		"interface": {func(p *PortSpec) { p.Interface = "eth0" }, false, true},
		"clients":   {func(p *PortSpec) { p.Allow = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")} }, false, true},
		"target":    {func(p *PortSpec) { p.Target = 81 }, true, true},
		"published": {func(p *PortSpec) { p.Published = 81 }, true, true},
	} {
		for mode, want := range map[PublishMode]bool{PublishIngress: c.ingress, PublishHost: c.own} {
			old := base
			old.Mode = mode
			edited := old
			c.edit(&edited)
			if got := NeedsRestart(&ServiceSpec{Ports: []PortSpec{old}}, &ServiceSpec{Ports: []PortSpec{edited}}); got != want {
				t.Errorf("%s in mode %s: restart %v, want %v", name, mode, got, want)
			}
		}
	}
	host := base
	host.Mode = PublishHost
	if !NeedsRestart(&ServiceSpec{Ports: []PortSpec{base}}, &ServiceSpec{Ports: []PortSpec{host}}) {
		t.Error("another mode restarts nothing")
	}
}

func FuzzLabels(f *testing.F) {
	f.Add("weft.publish.80.ip", "10.0.0.1")
	f.Add("weft.publish.80-90.allow", "10.0.0.0/8,fd00::/8")
	f.Add("weft.publish.53.interface", "eth0")
	f.Fuzz(func(t *testing.T, key, value string) {
		s := goodService()
		s.Labels = map[string]string{key: value}
		s.Ports = []PortSpec{{Protocol: TCP, Target: 80, Published: 80, Count: 11}, {Protocol: UDP, Target: 53}}
		s.Defaults()
		if s.Validate() != nil {
			return
		}
		again := s
		again.Labels, again.Ports = maps.Clone(s.Labels), ExpandPorts(s.Ports)
		again.Defaults()
		if !slices.EqualFunc(again.Ports, s.Ports, PortSpec.Equal) {
			t.Fatalf("%q=%q: %+v, the second time %+v", key, value, s.Ports, again.Ports)
		}
	})
}
