package main

import (
	"fmt"
	"math/big"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"
	"github.com/spf13/cobra"
)

// serviceFlags are the words of `service create`, as typed.
type serviceFlags struct {
	name, mode, user, dir, cpus, memory, restart, endpointMode string
	replicas                                                   uint64
	networks, publish, env, labels, constraints, mounts        []string
	names                                                      nameFlags
	stopGrace                                                  time.Duration
	detach, quiet                                              bool
	policies                                                   policies
}

// nameFlags are what the containers are called and how they look up names.
type nameFlags struct {
	hostname                        string
	servers, search, options, hosts []string
}

func (s *serviceFlags) install(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.name, "name", "", "name of the service")
	f.StringVar(&s.mode, "mode", "replicated", `"replicated" or "global" (one task per node)`)
	f.Uint64Var(&s.replicas, "replicas", 1, "number of tasks")
	f.StringArrayVar(&s.networks, "network", nil, "network to attach to")
	f.StringArrayVarP(&s.publish, "publish", "p", nil, "publish a port: [ADDRESS:][PORT:]TARGET[/udp|/sctp], ranges too (8000-8010:80-90), or target=…,published=…,protocol=…,mode=host,ip=…,interface=…,allow=CIDR")
	f.StringArrayVarP(&s.env, "env", "e", nil, "environment variable KEY=VALUE")
	f.StringArrayVarP(&s.labels, "label", "l", nil, "label KEY=VALUE")
	f.StringArrayVar(&s.constraints, "constraint", nil, "where tasks may run, e.g. node.hostname==h1")
	f.StringArrayVar(&s.mounts, "mount", nil, "type=bind|volume|tmpfs,source=…,target=…[,readonly]")
	f.StringVarP(&s.user, "user", "u", "", "user or uid[:gid]")
	f.StringVarP(&s.dir, "workdir", "w", "", "working directory")
	f.StringVar(&s.names.hostname, "hostname", "", "host name in the container")
	f.StringArrayVar(&s.names.servers, "dns", nil, "nameserver for names outside the cluster, instead of the node's")
	f.StringArrayVar(&s.names.search, "dns-search", nil, `search domain, instead of the node's ("." = none)`)
	f.StringArrayVar(&s.names.options, "dns-option", nil, "option of the container's resolver, e.g. ndots:1")
	f.StringArrayVar(&s.names.hosts, "host", nil, "line of /etc/hosts: NAME:ADDRESS or NAME=ADDRESS")
	f.StringVar(&s.cpus, "limit-cpu", "", "processors, e.g. 0.5")
	f.StringVar(&s.memory, "limit-memory", "", "memory, e.g. 256M")
	f.StringVar(&s.restart, "restart-condition", "", `"any", "on-failure" or "none"`)
	f.DurationVar(&s.stopGrace, "stop-grace-period", 0, "time between the stop signal and SIGKILL (default 10s)")
	f.StringVar(&s.endpointMode, "endpoint-mode", "", `"vip" or "dnsrr"`)
	f.BoolVarP(&s.detach, "detach", "d", false, "do not wait until the tasks run")
	f.BoolVarP(&s.quiet, "quiet", "q", false, "no progress")
	s.policies.install(cmd)
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
	c := &swarm.ContainerSpec{Image: args[0], Args: args[1:], Env: s.env, User: s.user, Dir: s.dir, Hostname: s.names.hostname}
	for _, m := range s.mounts {
		parsed, err := parseMount(m)
		if err != nil {
			return spec, err
		}
		c.Mounts = append(c.Mounts, parsed)
	}
	if err := s.names.set(c); err != nil {
		return spec, err
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
	if err := s.policies.change(cmd, &spec); err != nil {
		return spec, err
	}
	spec.EndpointSpec = &swarm.EndpointSpec{Mode: swarm.ResolutionMode(s.endpointMode)}
	return spec, publishAll(&spec, s.publish)
}

func (s *nameFlags) set(c *swarm.ContainerSpec) error {
	if len(s.servers)+len(s.search)+len(s.options) > 0 {
		c.DNSConfig = &swarm.DNSConfig{Search: s.search, Options: s.options}
	}
	for _, text := range s.servers {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return fmt.Errorf("--dns %q is no address", text)
		}
		c.DNSConfig.Nameservers = append(c.DNSConfig.Nameservers, a)
	}
	for _, text := range s.hosts {
		name, addr, ok := strings.Cut(text, "=")
		if !ok {
			name, addr, ok = strings.Cut(text, ":")
		}
		if a, err := netip.ParseAddr(strings.Trim(addr, "[]")); !ok || name == "" || err != nil {
			return fmt.Errorf("--host %q: write NAME:ADDRESS or NAME=ADDRESS", text)
		} else {
			c.Hosts = append(c.Hosts, a.String()+" "+name)
		}
	}
	return nil
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
