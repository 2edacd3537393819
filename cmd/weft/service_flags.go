package main

import (
	"fmt"
	"math/big"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
	"github.com/spf13/cobra"
)

// serviceFlags are the words of `service create`, as typed.
type serviceFlags struct {
	name, mode, user, dir, hostname, cpus, memory, restart, endpointMode string
	replicas                                                             uint64
	networks, publish, env, labels, constraints, mounts                  []string
	stopGrace                                                            time.Duration
	detach, quiet                                                        bool
}

func (s *serviceFlags) install(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.name, "name", "", "name of the service")
	f.StringVar(&s.mode, "mode", "replicated", `"replicated" or "global" (one task per node)`)
	f.Uint64Var(&s.replicas, "replicas", 1, "number of tasks")
	f.StringArrayVar(&s.networks, "network", nil, "network to attach to")
	f.StringArrayVarP(&s.publish, "publish", "p", nil, "publish a port on every host: [PORT:]TARGET[/udp]; tasks see the address of the host that took the request, not the client's")
	f.StringArrayVarP(&s.env, "env", "e", nil, "environment variable KEY=VALUE")
	f.StringArrayVarP(&s.labels, "label", "l", nil, "label KEY=VALUE")
	f.StringArrayVar(&s.constraints, "constraint", nil, "where tasks may run, e.g. node.hostname==h1")
	f.StringArrayVar(&s.mounts, "mount", nil, "type=bind|volume|tmpfs,source=…,target=…[,readonly]")
	f.StringVarP(&s.user, "user", "u", "", "user or uid[:gid]")
	f.StringVarP(&s.dir, "workdir", "w", "", "working directory")
	f.StringVar(&s.hostname, "hostname", "", "host name in the container")
	f.StringVar(&s.cpus, "limit-cpu", "", "processors, e.g. 0.5")
	f.StringVar(&s.memory, "limit-memory", "", "memory, e.g. 256M")
	f.StringVar(&s.restart, "restart-condition", "", `"any", "on-failure" or "none"`)
	f.DurationVar(&s.stopGrace, "stop-grace-period", 0, "time between the stop signal and SIGKILL (default 10s)")
	f.StringVar(&s.endpointMode, "endpoint-mode", "", `"vip" or "dnsrr"`)
	f.BoolVarP(&s.detach, "detach", "d", false, "do not wait until the tasks run")
	f.BoolVarP(&s.quiet, "quiet", "q", false, "no progress")
}

// spec turns the flags into what the API takes; every error names its flag.
func (s *serviceFlags) spec(cmd *cobra.Command, args []string) (swarm.ServiceSpec, error) {
	var spec swarm.ServiceSpec
	var err error
	spec.Name = s.name
	if spec.Labels, err = keyValues("label", s.labels); err != nil {
		return spec, err
	}
	if spec.Mode, err = s.serviceMode(cmd); err != nil {
		return spec, err
	}
	c := &swarm.ContainerSpec{Image: args[0], Args: args[1:], Env: s.env, User: s.user, Dir: s.dir, Hostname: s.hostname}
	for _, m := range s.mounts {
		parsed, err := parseMount(m)
		if err != nil {
			return spec, err
		}
		c.Mounts = append(c.Mounts, parsed)
	}
	if cmd.Flags().Changed("stop-grace-period") {
		c.StopGracePeriod = &s.stopGrace
	}
	spec.TaskTemplate.ContainerSpec = c
	if spec.TaskTemplate.Resources, err = s.limits(); err != nil {
		return spec, err
	}
	if s.restart != "" {
		spec.TaskTemplate.RestartPolicy = &swarm.RestartPolicy{Condition: swarm.RestartPolicyCondition(s.restart)}
	}
	if len(s.constraints) > 0 {
		spec.TaskTemplate.Placement = &swarm.Placement{Constraints: s.constraints}
	}
	for _, n := range s.networks {
		spec.TaskTemplate.Networks = append(spec.TaskTemplate.Networks, swarm.NetworkAttachmentConfig{Target: n})
	}
	spec.EndpointSpec = &swarm.EndpointSpec{Mode: swarm.ResolutionMode(s.endpointMode)}
	for _, p := range s.publish {
		port, err := parsePublish(p)
		if err != nil {
			return spec, err
		}
		spec.EndpointSpec.Ports = append(spec.EndpointSpec.Ports, port)
	}
	return spec, nil
}

func (s *serviceFlags) serviceMode(cmd *cobra.Command) (swarm.ServiceMode, error) {
	switch s.mode {
	case "replicated":
		return swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &s.replicas}}, nil
	case "global":
		if cmd.Flags().Changed("replicas") {
			return swarm.ServiceMode{}, fmt.Errorf("--replicas does not go with --mode global: it runs one task on each node")
		}
		return swarm.ServiceMode{Global: &swarm.GlobalService{}}, nil
	}
	return swarm.ServiceMode{}, fmt.Errorf("--mode %q: use replicated or global", s.mode)
}

func (s *serviceFlags) limits() (*swarm.ResourceRequirements, error) {
	if s.cpus == "" && s.memory == "" {
		return nil, nil
	}
	limit := &swarm.Limit{}
	if s.cpus != "" {
		r, ok := new(big.Rat).SetString(s.cpus)
		if !ok || r.Sign() < 0 {
			return nil, fmt.Errorf("--limit-cpu %q is no number of processors like 0.5", s.cpus)
		}
		nano := r.Mul(r, big.NewRat(1e9, 1))
		if !nano.IsInt() {
			return nil, fmt.Errorf("--limit-cpu %q is finer than a billionth of a processor", s.cpus)
		}
		limit.NanoCPUs = nano.Num().Int64()
	}
	if s.memory != "" {
		n, err := units.RAMInBytes(s.memory)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("--limit-memory %q is no size like 256M", s.memory)
		}
		limit.MemoryBytes = n
	}
	return &swarm.ResourceRequirements{Limits: limit}, nil
}

// parsePublish reads [PORT:]TARGET[/PROTOCOL] and the long form
// published=8080,target=80,protocol=tcp,mode=ingress.
func parsePublish(s string) (swarm.PortConfig, error) {
	bad := func(why string) (swarm.PortConfig, error) {
		return swarm.PortConfig{}, fmt.Errorf("--publish %q: %s", s, why)
	}
	port := swarm.PortConfig{Protocol: network.TCP, PublishMode: swarm.PortConfigPublishModeIngress}
	var err error
	if strings.Contains(s, "=") {
		return parseLongPublish(s)
	}
	rest, proto, ok := strings.Cut(s, "/")
	if ok {
		port.Protocol = network.IPProtocol(strings.ToLower(proto))
	}
	parts := strings.Split(rest, ":")
	switch len(parts) {
	case 1:
	case 2:
		if port.PublishedPort, err = parsePort(parts[0]); err != nil {
			return bad(err.Error())
		}
	default:
		if _, err := netip.ParseAddr(strings.Trim(strings.Join(parts[:len(parts)-2], ":"), "[]")); err == nil {
			return bad("publishing on one address is not supported yet: leave the address out")
		}
		return bad("use [PORT:]TARGET[/udp]")
	}
	if port.TargetPort, err = parsePort(parts[len(parts)-1]); err != nil {
		return bad(err.Error())
	}
	return port, nil
}

func parseLongPublish(s string) (swarm.PortConfig, error) {
	port := swarm.PortConfig{Protocol: network.TCP, PublishMode: swarm.PortConfigPublishModeIngress}
	for _, kv := range strings.Split(s, ",") {
		k, v, _ := strings.Cut(kv, "=")
		var err error
		switch k {
		case "target":
			port.TargetPort, err = parsePort(v)
		case "published":
			port.PublishedPort, err = parsePort(v)
		case "protocol":
			port.Protocol = network.IPProtocol(v)
		case "mode":
			port.PublishMode = swarm.PortConfigPublishMode(v)
		default:
			err = fmt.Errorf("unknown key %q: use published, target, protocol, mode", k)
		}
		if err != nil {
			return port, fmt.Errorf("--publish %q: %w", s, err)
		}
	}
	if port.TargetPort == 0 {
		return port, fmt.Errorf("--publish %q: target is missing", s)
	}
	return port, nil
}

func parsePort(s string) (uint32, error) {
	if strings.Contains(s, "-") {
		return 0, fmt.Errorf("port ranges are not supported yet")
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n < 1 || n > 65535 {
		return 0, fmt.Errorf("%q is no port from 1 to 65535", s)
	}
	return uint32(n), nil
}

// parseMount reads type=…,source=…,target=…[,readonly].
func parseMount(s string) (mount.Mount, error) {
	m := mount.Mount{Type: mount.TypeVolume}
	for _, kv := range strings.Split(s, ",") {
		k, v, hasValue := strings.Cut(kv, "=")
		switch strings.ToLower(k) {
		case "type":
			m.Type = mount.Type(v)
		case "source", "src":
			m.Source = v
		case "target", "dst", "destination":
			m.Target = v
		case "readonly", "ro":
			m.ReadOnly = !hasValue || v == "true" || v == "1"
		case "tmpfs-size":
			n, err := units.RAMInBytes(v)
			if err != nil {
				return m, fmt.Errorf("--mount %q: tmpfs-size %q is no size like 64M", s, v)
			}
			m.TmpfsOptions = &mount.TmpfsOptions{SizeBytes: n}
		default:
			return m, fmt.Errorf("--mount %q: unknown key %q", s, k)
		}
	}
	if m.Target == "" {
		return m, fmt.Errorf("--mount %q: target is missing", s)
	}
	if !slices.Contains([]mount.Type{mount.TypeBind, mount.TypeVolume, mount.TypeTmpfs}, m.Type) {
		return m, fmt.Errorf("--mount %q: type %q: use bind, volume or tmpfs", s, m.Type)
	}
	return m, nil
}
