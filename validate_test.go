package weft

import (
	"errors"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func goodService() ServiceSpec {
	s := ServiceSpec{Name: "web", Replicas: 2, Container: ContainerSpec{Image: "busybox"}}
	s.Defaults()
	return s
}

func TestServiceValidate(t *testing.T) {
	long := strings.Repeat("a", 64)
	for _, c := range []struct {
		name string
		edit func(*ServiceSpec)
		is   error  // nil = valid
		want string // beginning of the error: the path
	}{
		{"good", func(s *ServiceSpec) {}, nil, ""},
		{"stack name", func(s *ServiceSpec) { s.Name = "shop_web-1" }, nil, ""},
		{"no name", func(s *ServiceSpec) { s.Name = "" }, ErrInvalid, "Name: "},
		{"dot in name", func(s *ServiceSpec) { s.Name = "a.b" }, ErrInvalid, "Name: "},
		{"hyphen at the end", func(s *ServiceSpec) { s.Name = "a-" }, ErrInvalid, "Name: "},
		{"64 characters", func(s *ServiceSpec) { s.Name = long }, ErrInvalid, "Name: "},
		{"63 characters", func(s *ServiceSpec) { s.Name = long[1:] }, nil, ""},
		{"weft label", func(s *ServiceSpec) { s.Labels = map[string]string{"a": "", "weft.x": ""} }, ErrUnsupported, `Labels["weft.x"]: `},
		{"global with replicas", func(s *ServiceSpec) { s.Mode = ModeGlobal }, ErrInvalid, "Mode.Global: "},
		{"too many replicas", func(s *ServiceSpec) { s.Replicas = 1 << 40 }, ErrInvalid, "Mode.Replicated.Replicas: "},
		{"zero replicas", func(s *ServiceSpec) { s.Replicas = 0 }, nil, ""},
		{"no image", func(s *ServiceSpec) { s.Container.Image = "" }, ErrInvalid, "TaskTemplate.ContainerSpec.Image: "},
		{"env without =", func(s *ServiceSpec) { s.Container.Env = []string{"A=", "B"} }, ErrInvalid, "TaskTemplate.ContainerSpec.Env[1]: "},
		{"env without name", func(s *ServiceSpec) { s.Container.Env = []string{"=x"} }, ErrInvalid, "TaskTemplate.ContainerSpec.Env[0]: "},
		{"zero byte", func(s *ServiceSpec) { s.Container.Args = []string{"a", "\x00"} }, ErrInvalid, "TaskTemplate.ContainerSpec.Args[1]: "},
		{"relative dir", func(s *ServiceSpec) { s.Container.Dir = "x" }, ErrInvalid, "TaskTemplate.ContainerSpec.Dir: "},
		{"user", func(s *ServiceSpec) { s.Container.User = "a b" }, ErrInvalid, "TaskTemplate.ContainerSpec.User: "},
		{"hostname", func(s *ServiceSpec) { s.Container.Hostname = "a_b" }, ErrInvalid, "TaskTemplate.ContainerSpec.Hostname: "},
		{"good hostname", func(s *ServiceSpec) { s.Container.Hostname = "a.b-c.9" }, nil, ""},
		{"template", func(s *ServiceSpec) { s.Container.Hostname = "{{.Node.Hostname}}" }, ErrUnsupported, "TaskTemplate.ContainerSpec.Hostname: "},
		{"signal", func(s *ServiceSpec) { s.Container.StopSignal = "SIGWHAT" }, ErrInvalid, "TaskTemplate.ContainerSpec.StopSignal: "},
		{"good signal", func(s *ServiceSpec) { s.Container.StopSignal = "quit" }, nil, ""},
		{"signal number", func(s *ServiceSpec) { s.Container.StopSignal = "65" }, ErrInvalid, "TaskTemplate.ContainerSpec.StopSignal: "},
		{"grace", func(s *ServiceSpec) { s.Container.StopGrace = -1 }, ErrInvalid, "TaskTemplate.ContainerSpec.StopGracePeriod: "},
		{"mount target", func(s *ServiceSpec) { s.Container.Mounts = []Mount{{Type: MountTmpfs, Target: "x"}} }, ErrInvalid, `TaskTemplate.ContainerSpec.Mounts[0].Target: invalid argument: "x": must be an absolute path`},
		{"mount root", func(s *ServiceSpec) { s.Container.Mounts = []Mount{{Type: MountTmpfs, Target: "/x/.."}} }, ErrInvalid, "TaskTemplate.ContainerSpec.Mounts[0].Target: "},
		{"mount twice", func(s *ServiceSpec) {
			s.Container.Mounts = []Mount{{Type: MountTmpfs, Target: "/x"}, {Type: MountTmpfs, Target: "/x/"}}
		}, ErrInvalid, "TaskTemplate.ContainerSpec.Mounts[1].Target: "},
		{"bind source", func(s *ServiceSpec) { s.Container.Mounts = []Mount{{Type: MountBind, Source: "x", Target: "/x"}} }, ErrInvalid, "TaskTemplate.ContainerSpec.Mounts[0].Source: "},
		{"volume source", func(s *ServiceSpec) {
			s.Container.Mounts = []Mount{{Type: MountVolume, Source: "/x", Target: "/x"}}
		}, ErrInvalid, "TaskTemplate.ContainerSpec.Mounts[0].Source: "},
		{"anonymous volume", func(s *ServiceSpec) { s.Container.Mounts = []Mount{{Type: MountVolume, Target: "/x"}} }, nil, ""},
		{"mount type", func(s *ServiceSpec) { s.Container.Mounts = []Mount{{Type: "npipe", Target: "/x"}} }, ErrInvalid, "TaskTemplate.ContainerSpec.Mounts[0].Type: "},
		{"size of a bind", func(s *ServiceSpec) {
			s.Container.Mounts = []Mount{{Type: MountBind, Source: "/x", Target: "/x", TmpfsSize: 1}}
		}, ErrInvalid, "TaskTemplate.ContainerSpec.Mounts[0].TmpfsOptions.SizeBytes: "},
		{"negative CPU", func(s *ServiceSpec) { s.Limits.NanoCPUs = -1 }, ErrInvalid, "TaskTemplate.Resources.Limits.NanoCPUs: "},
		{"tiny memory", func(s *ServiceSpec) { s.Limits.MemoryBytes = 512 }, ErrInvalid, "TaskTemplate.Resources.Limits.MemoryBytes: "},
		{"reserve over limit", func(s *ServiceSpec) { s.Limits.NanoCPUs, s.Reservations.NanoCPUs = 1e9, 2e9 }, ErrInvalid, "TaskTemplate.Resources.Reservations.NanoCPUs: "},
		{"restart delay", func(s *ServiceSpec) { s.Restart.Delay = -1 }, ErrInvalid, "TaskTemplate.RestartPolicy.Delay: "},
		{"restart window", func(s *ServiceSpec) { s.Restart.Window = -1 }, ErrInvalid, "TaskTemplate.RestartPolicy.Window: "},
		{"attempts", func(s *ServiceSpec) { s.Restart.MaxAttempts = 1001 }, ErrInvalid, "TaskTemplate.RestartPolicy.MaxAttempts: "},
		{"condition", func(s *ServiceSpec) { s.Restart.Condition = 9 }, ErrInvalid, "TaskTemplate.RestartPolicy.Condition: "},
		{"constraint", func(s *ServiceSpec) { s.Constraints = []string{"node.role==worker", "x"} }, ErrInvalid, "TaskTemplate.Placement.Constraints[1]: "},
		{"network twice", func(s *ServiceSpec) { s.Networks = []NetworkTarget{{Network: "a"}, {Network: "a"}} }, ErrInvalid, "TaskTemplate.Networks[1].Target: "},
		{"network missing", func(s *ServiceSpec) { s.Networks = []NetworkTarget{{}} }, ErrInvalid, "TaskTemplate.Networks[0].Target: "},
		{"alias", func(s *ServiceSpec) { s.Networks = []NetworkTarget{{Network: "a", Aliases: []string{"b", "c d"}}} }, ErrInvalid, "TaskTemplate.Networks[0].Aliases[1]: "},
		{"target port 0", func(s *ServiceSpec) { s.Ports = []PortSpec{{Protocol: TCP}} }, ErrInvalid, "EndpointSpec.Ports[0].TargetPort: "},
		{"protocol", func(s *ServiceSpec) { s.Ports = []PortSpec{{Protocol: "dccp", Target: 1}} }, ErrInvalid, `EndpointSpec.Ports[0].Protocol: invalid argument: "dccp": use tcp, udp or sctp`},
		{"published twice", func(s *ServiceSpec) {
			s.Ports = []PortSpec{{Protocol: TCP, Target: 1, Published: 80}, {Protocol: UDP, Target: 1, Published: 80}, {Protocol: TCP, Target: 2, Published: 80}}
		}, ErrInvalid, "EndpointSpec.Ports[2].PublishedPort: "},
		{"chosen twice", func(s *ServiceSpec) { s.Ports = []PortSpec{{Protocol: TCP, Target: 1}, {Protocol: TCP, Target: 2}} }, nil, ""},
		{"dnsrr with ports", func(s *ServiceSpec) {
			s.EndpointMode, s.Ports = EndpointDNSRR, []PortSpec{{Protocol: TCP, Target: 1}}
		}, ErrInvalid, "EndpointSpec.Mode: "},
		{"update delay", func(s *ServiceSpec) { s.Update.Delay = -1 }, ErrInvalid, "UpdateConfig.Delay: "},
		{"failure action", func(s *ServiceSpec) { s.Update.OnFailure = 3 }, ErrInvalid, "UpdateConfig.FailureAction: "},
		{"rollback of a rollback", func(s *ServiceSpec) { s.Rollback.OnFailure = UpdateRollback }, ErrInvalid, "RollbackConfig.FailureAction: "},
		{"rollback delay", func(s *ServiceSpec) { s.Rollback.Delay = -1 }, ErrInvalid, "RollbackConfig.Delay: "},
		{"rollback ratio", func(s *ServiceSpec) { s.Rollback.MaxFailureRatio = -0.1 }, ErrInvalid, "RollbackConfig.MaxFailureRatio: "},
		{"rollback monitor", func(s *ServiceSpec) { s.Rollback.Monitor = -1 }, ErrInvalid, "RollbackConfig.Monitor: "},
		{"failure ratio", func(s *ServiceSpec) { s.Update.MaxFailureRatio = 1.1 }, ErrInvalid, "UpdateConfig.MaxFailureRatio: "},
		{"monitor", func(s *ServiceSpec) { s.Update.Monitor = -1 }, ErrInvalid, "UpdateConfig.Monitor: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := goodService()
			c.edit(&s)
			err := s.Validate()
			if !errors.Is(err, c.is) || err != nil && !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("got %v, want %v beginning %q", err, c.is, c.want)
			}
		})
	}
}

func TestDefaults(t *testing.T) {
	shared := []PortSpec{{Target: 80}}
	s := ServiceSpec{Ports: shared}
	s.Defaults()
	if s.Container.StopGrace != 0 || s.Restart.Delay != DefaultRestartDelay || s.Update != DefaultUpdate || s.Ports[0].Protocol != TCP || s.Replicas != 0 {
		t.Errorf("got %+v", s)
	}
	if shared[0].Protocol != "" {
		t.Error("wrote to the sender's ports")
	}
	s = ServiceSpec{Update: UpdateConfig{Delay: time.Second}}
	s.Defaults()
	if s.Update != (UpdateConfig{Delay: time.Second, Monitor: 5 * time.Second}) {
		t.Errorf("parallelism 0 means all, got %+v", s.Update)
	}
}

func TestImages(t *testing.T) {
	digest := "@sha256:" + strings.Repeat("0a", 32)
	for _, good := range []string{"busybox", "weft/whoami", "busybox:1.36", "library/a/b", "localhost/x", "localhost:5000/x:y", "r.example.com:443/a_b/c--d.e" + digest, "a:1" + digest, "[::1]:5000/x", "x__y"} {
		if err := checkImage(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "Busy", "a:", "a:.x", "a b", "/a", "a/", "a//b", "a@sha256:12", "a@md5:" + strings.Repeat("0", 32), "-a", "a:" + strings.Repeat("x", 129), strings.Repeat("a", 256), "host:port/x", "a\n"} {
		if err := checkImage(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestNetworkNamesFitBehindContainers: what PTR and SRV answer with is a name, whatever
// the service and the network are called.
func TestNetworkNamesFitBehindContainers(t *testing.T) {
	network := strings.Repeat(strings.Repeat("n", 63)+".", 2)
	if err := CheckNetworkName(network[:maxObjectName-1]); err != nil {
		t.Fatal(err)
	}
	for _, k := range []Task{{ID: NewID(), Node: NewID()}, {ID: NewID(), Slot: math.MaxUint64}} {
		full := k.Name(strings.Repeat("s", maxDNSLabel)) + "." + strings.Repeat("n", maxObjectName)
		if len(full) > maxDNSName {
			t.Errorf("%s has %d characters", full, len(full))
		}
	}
}

func TestNetworkValidate(t *testing.T) {
	subnet := func(p, g string) []Subnet {
		s := Subnet{Prefix: netip.MustParsePrefix(p)}
		if g != "" {
			s.Gateway = netip.MustParseAddr(g)
		}
		return []Subnet{s}
	}
	for _, c := range []struct {
		name string
		edit func(*NetworkSpec)
		is   error
		want string
	}{
		{"good", func(n *NetworkSpec) { n.Subnets = subnet("10.1.0.0/24", "10.1.0.254") }, nil, ""},
		{"name", func(n *NetworkSpec) { n.Name = "-x" }, ErrInvalid, "Name: "},
		{"no name", func(n *NetworkSpec) { n.Name = "" }, ErrInvalid, "Name: "},
		{"names as people have them", func(n *NetworkSpec) { n.Name = "My.Stack_default-2._x.-y" }, nil, ""},
		{"dot at the end", func(n *NetworkSpec) { n.Name = "front." }, ErrInvalid, "Name: invalid argument: \"front.\""},
		{"two dots", func(n *NetworkSpec) { n.Name = "a..b" }, ErrInvalid, `Name: invalid argument: "a..b": it stands`},
		{"long parts", func(n *NetworkSpec) { n.Name = strings.Repeat("a", 63) + "." + strings.Repeat("b", 63) }, nil, ""},
		{"long part", func(n *NetworkSpec) { n.Name = "a." + strings.Repeat("b", 64) }, ErrInvalid, `Name: invalid argument: "a.bb`},
		{"long name", func(n *NetworkSpec) { n.Name = strings.Repeat("abcdefg.", 16) + "b" }, ErrInvalid, `Name: invalid argument: "abcdefg.`},
		{"pre-defined", func(n *NetworkSpec) { n.Name = "host" }, ErrForbidden, "Name: "},
		{"driver", func(n *NetworkSpec) { n.Driver = "bridge" }, ErrUnsupported, "Driver: "},
		{"unknown option", func(n *NetworkSpec) { n.Options = map[string]string{"color": "red"} }, ErrUnsupported, `Options["color"]: `},
		{"MTU", func(n *NetworkSpec) { n.Options = map[string]string{OptionMTU: "576"} }, nil, ""},
		{"encap=auto", func(n *NetworkSpec) { n.Options = map[string]string{OptionEncap: EncapAuto} }, nil, ""},
		{"encap", func(n *NetworkSpec) { n.Options = map[string]string{OptionEncap: "geneve"} }, ErrInvalid, `Options["encap"]: invalid argument: "geneve": write one of vxlan, native, auto`},
		{"encap without a value", func(n *NetworkSpec) { n.Options = map[string]string{OptionEncap: ""} }, ErrInvalid, `Options["encap"]: invalid argument: "": write one of vxlan, native, auto`},
		{"encap and encrypted", func(n *NetworkSpec) { n.Options = map[string]string{OptionEncap: EncapVXLAN, OptionEncrypted: ""} }, ErrInvalid, `Options["encap"]: invalid argument: "vxlan": an encrypted network has a tunnel of its own: leave out`},
		{"encap of the ingress", func(n *NetworkSpec) { n.Ingress, n.Options = true, map[string]string{OptionEncap: EncapNative} }, ErrInvalid, `Options["encap"]: invalid argument: "native": packets of the ingress network`},
		{"encrypted=false", func(n *NetworkSpec) { n.Options = map[string]string{OptionEncrypted: "false"} }, ErrInvalid, `Options["encrypted"]: invalid argument: "false": leave the value out`},
		{"MTU in words", func(n *NetworkSpec) { n.Options = map[string]string{OptionMTU: "1400b"} }, ErrInvalid, `Options["com.docker.network.driver.mtu"]: invalid argument: "1400b": write a number`},
		{"MTU with sign", func(n *NetworkSpec) { n.Options = map[string]string{OptionMTU: "+1400"} }, ErrInvalid, `Options["com.docker.network.driver.mtu"]: `},
		{"no MTU", func(n *NetworkSpec) { n.Options = map[string]string{OptionMTU: ""} }, ErrInvalid, `Options["com.docker.network.driver.mtu"]: `},
		{"MTU too small", func(n *NetworkSpec) { n.Options = map[string]string{OptionMTU: "575"} }, ErrInvalid, `Options["com.docker.network.driver.mtu"]: invalid argument: 575: use 576 to 65535`},
		{"MTU too large", func(n *NetworkSpec) { n.Options = map[string]string{OptionMTU: "65536"} }, ErrInvalid, `Options["com.docker.network.driver.mtu"]: `},
		{"MTU below that of IPv6", func(n *NetworkSpec) {
			n.IPv6, n.Options = true, map[string]string{OptionMTU: "1279"}
		}, ErrInvalid, `Options["com.docker.network.driver.mtu"]: invalid argument: 1279: IPv6 needs 1280`},
		{"host bits", func(n *NetworkSpec) { n.Subnets = subnet("10.1.0.1/24", "") }, ErrInvalid, "IPAM.Config[0].Subnet: invalid argument: 10.1.0.1/24 has host bits set: use 10.1.0.0/24"},
		{"too small", func(n *NetworkSpec) { n.Subnets = subnet("10.1.0.0/30", "") }, ErrInvalid, "IPAM.Config[0].Subnet: invalid argument: 10.1.0.0/30 is too small: use /29 or larger"},
		{"too large", func(n *NetworkSpec) { n.Subnets = subnet("10.0.0.0/7", "") }, ErrInvalid, "IPAM.Config[0].Subnet: invalid argument: 10.0.0.0/7 is too large: use /8 or smaller"},
		{"IPv6", func(n *NetworkSpec) { n.IPv6, n.Subnets = true, subnet("fd00::/64", "fd00::ffff") }, nil, ""},
		{"both families", func(n *NetworkSpec) {
			n.IPv6, n.Subnets = true, append(subnet("fd00::/64", ""), subnet("10.1.0.0/24", "")...)
		}, nil, ""},
		{"IPv6 alone", func(n *NetworkSpec) { n.IPv6, n.NoIPv4, n.Subnets = true, true, subnet("fd00::/125", "fd00::7") }, nil, ""},
		{"no family", func(n *NetworkSpec) { n.NoIPv4 = true }, ErrInvalid, "EnableIPv4: "},
		{"IPv6 not asked for", func(n *NetworkSpec) { n.Subnets = subnet("fd00::/64", "") }, ErrInvalid, "IPAM.Config[0].Subnet: invalid argument: fd00::/64 is of IPv6"},
		{"IPv4 not wanted", func(n *NetworkSpec) { n.IPv6, n.NoIPv4, n.Subnets = true, true, subnet("10.1.0.0/24", "") }, ErrInvalid, "IPAM.Config[0].Subnet: "},
		{"two of IPv6", func(n *NetworkSpec) {
			n.IPv6, n.Subnets = true, append(subnet("fd00::/64", ""), subnet("fd01::/64", "")...)
		}, ErrUnsupported, "IPAM.Config[1]: "},
		{"IPv6 host bits", func(n *NetworkSpec) { n.IPv6, n.Subnets = true, subnet("fd00::1/64", "") }, ErrInvalid, "IPAM.Config[0].Subnet: invalid argument: fd00::1/64 has host bits set: use fd00::/64"},
		{"IPv6 too small", func(n *NetworkSpec) { n.IPv6, n.Subnets = true, subnet("fd00::/126", "") }, ErrInvalid, "IPAM.Config[0].Subnet: invalid argument: fd00::/126 is too small: use /125"},
		{"mapped", func(n *NetworkSpec) { n.IPv6, n.Subnets = true, subnet("::ffff:10.0.0.0/120", "") }, ErrInvalid, "IPAM.Config[0].Subnet: "},
		{"gateway of the other family", func(n *NetworkSpec) { n.IPv6, n.Subnets = true, subnet("fd00::/64", "10.0.0.1") }, ErrInvalid, "IPAM.Config[0].Gateway: "},
		{"gateway outside", func(n *NetworkSpec) { n.Subnets = subnet("10.1.0.0/24", "10.2.0.1") }, ErrInvalid, "IPAM.Config[0].Gateway: invalid argument: 10.2.0.1 is not in subnet 10.1.0.0/24: use an address of it, such as 10.1.0.1"},
		{"gateway is network", func(n *NetworkSpec) { n.Subnets = subnet("10.1.0.0/24", "10.1.0.0") }, ErrInvalid, "IPAM.Config[0].Gateway: "},
		{"gateway is broadcast", func(n *NetworkSpec) { n.Subnets = subnet("10.1.0.0/23", "10.1.1.255") }, ErrInvalid, "IPAM.Config[0].Gateway: "},
		{"gateway alone", func(n *NetworkSpec) { n.Subnets = []Subnet{{Gateway: netip.MustParseAddr("10.1.0.1")}} }, ErrInvalid, "IPAM.Config[0].Subnet: "},
		{"empty subnet", func(n *NetworkSpec) { n.Subnets = []Subnet{{}} }, ErrInvalid, "IPAM.Config[0].Subnet: "},
		{"two subnets", func(n *NetworkSpec) {
			n.Subnets = append(subnet("10.1.0.0/24", ""), subnet("10.2.0.0/24", "")...)
		}, ErrUnsupported, "IPAM.Config[1]: "},
		{"internal ingress", func(n *NetworkSpec) { n.Ingress, n.Internal = true, true }, ErrInvalid, "Ingress: "},
		{"label", func(n *NetworkSpec) { n.Labels = map[string]string{"weft.y": "1"} }, ErrUnsupported, `Labels["weft.y"]: `},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := NetworkSpec{Name: "net", Driver: DriverOverlay}
			c.edit(&n)
			err := n.Validate()
			if !errors.Is(err, c.is) || err != nil && !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("got %v, want %v beginning %q", err, c.is, c.want)
			}
		})
	}
}
