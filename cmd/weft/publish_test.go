package main

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
)

func TestPublish(t *testing.T) {
	port := func(published, target uint32, more ...string) swarm.PortConfig {
		p := swarm.PortConfig{Protocol: network.TCP, PublishMode: "ingress", TargetPort: target, PublishedPort: published}
		for _, m := range more {
			if m == "host" {
				p.PublishMode = "host"
			} else {
				p.Protocol = network.IPProtocol(m)
			}
		}
		return p
	}
	label := func(kv ...string) map[string]string {
		out := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			out["weft.publish."+kv[i]] = kv[i+1]
		}
		return out
	}
	for _, c := range []struct {
		in     string
		ports  []swarm.PortConfig
		labels map[string]string
		err    string
	}{
		{"80", []swarm.PortConfig{port(0, 80)}, nil, ""},
		{"8080:80", []swarm.PortConfig{port(8080, 80)}, nil, ""},
		{"53:53/udp", []swarm.PortConfig{port(53, 53, "udp")}, nil, ""},
		{"53:53/SCTP", []swarm.PortConfig{port(53, 53, "sctp")}, nil, ""},
		{"8000-8001:80-81", []swarm.PortConfig{port(8000, 80), port(8001, 81)}, nil, ""},
		{"80-81", []swarm.PortConfig{port(0, 80), port(0, 81)}, nil, ""},
		{"127.0.0.1:8080:80", []swarm.PortConfig{port(8080, 80)}, label("8080.ip", "127.0.0.1"), ""},
		{"[2001:db8::1]:8080:80", []swarm.PortConfig{port(8080, 80)}, label("8080.ip", "2001:db8::1"), ""},
		{"10.0.0.1::80/udp", []swarm.PortConfig{port(0, 80, "udp")}, label("80.ip", "10.0.0.1"), ""},
		{"127.0.0.1:8000-8001:80-81", []swarm.PortConfig{port(8000, 80), port(8001, 81)}, label("8000-8001.ip", "127.0.0.1"), ""},
		{"published=8080,target=80", []swarm.PortConfig{port(8080, 80)}, nil, ""},
		{"mode=host,target=80,published=8080,protocol=udp", []swarm.PortConfig{port(8080, 80, "host", "udp")}, nil, ""},
		{"mode=host,target=80", []swarm.PortConfig{port(0, 80, "host")}, nil, ""},
		{"ip=127.0.0.1,published=8080,target=80,allow=10.0.0.0/8", []swarm.PortConfig{port(8080, 80)}, label("8080.ip", "127.0.0.1", "8080.allow", "10.0.0.0/8"), ""},
		{"ip=127.0.0.1,ip=[fd00::1],target=80,allow=10.0.0.0/8,allow=fd00::/8", []swarm.PortConfig{port(0, 80)}, label("80.ip", "127.0.0.1,fd00::1", "80.allow", "10.0.0.0/8,fd00::/8"), ""},
		{"interface=eth0,target=80-81,published=80-81", []swarm.PortConfig{port(80, 80), port(81, 81)}, label("80-81.interface", "eth0"), ""},

		{"", nil, nil, `"" is no port`},
		{"0", nil, nil, "1 to 65535"},
		{"80:", nil, nil, `"" is no port`},
		{":80", nil, nil, `"" is no port`},
		{"8080:70000", nil, nil, "1 to 65535"},
		{"80-", nil, nil, `"" is no port`},
		{"::1:8080:80", nil, nil, `"::1" is no address: write 127.0.0.1:8080:80 or [2001:db8::1]:8080:80`},
		{"[::1]:8080:80", nil, nil, "::1 cannot be published on, as no packet from there leaves its device: write 127.0.0.1"},
		{"ip=127.0.0.1,ip=::1,target=80", nil, nil, "::1 cannot be published on"},
		{"[127.0.0.1]:8080:80", nil, nil, "is no address"},
		{"[::1:8080:80", nil, nil, "is no address"},
		{"host:8080:80", nil, nil, "is no address"},
		{"[::]:8080:80", nil, nil, "stands for all addresses"},
		{"ip=here,target=80", nil, nil, `"here" is no address`},
		{"10000-20000:80", nil, nil, "10001 published ports and 1 target ports"},
		{"80:8000-8001", nil, nil, "1 published ports and 2 target ports"},
		{"80/", nil, nil, `protocol ""`},
		{"published=8080", nil, nil, "target is missing"},
		{"target=,published=80", nil, nil, `"target" has no value`},
		{"target=80,speed=9", nil, nil, `"speed"`},
		{"target=80,mode=both", nil, nil, `"both"`},
		{"target=80,protocol=icmp", nil, nil, `"icmp"`},
	} {
		spec := swarm.ServiceSpec{EndpointSpec: &swarm.EndpointSpec{}}
		err := publishAll(&spec, []string{c.in})
		switch {
		case c.err != "":
			if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), fmt.Sprintf("--publish %q", c.in)) {
				t.Errorf("%q: error %v, want one with %q", c.in, err, c.err)
			}
		case err != nil || !reflect.DeepEqual(spec.EndpointSpec.Ports, c.ports) || !reflect.DeepEqual(spec.Labels, c.labels):
			t.Errorf("%q = %+v %v, %v", c.in, spec.EndpointSpec.Ports, spec.Labels, err)
		}
	}
}

func FuzzPublish(f *testing.F) {
	for _, s := range []string{"80", "[fd00::1]:8080-8081:80-81/udp", "ip=127.0.0.1,target=80,mode=host", "a::b", "-:-", "=,="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		w, err := parsePublish(s)
		if err != nil {
			return
		}
		for _, p := range w.configs() {
			if p.TargetPort < 1 || p.TargetPort > 65535 || p.PublishedPort > 65535 || w.isChosen != (p.PublishedPort == 0) {
				t.Fatalf("%q became %+v", s, p)
			}
		}
	})
}
