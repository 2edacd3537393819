package api

import (
	"time"

	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

// serviceSpec converts a request that has passed the rules and checkService.
// Every default that Docker's API leaves open is filled in here, so that what
// is stored says what runs.
func serviceSpec(d *swarm.ServiceSpec) weft.ServiceSpec {
	t := &d.TaskTemplate
	s := weft.ServiceSpec{
		Name:     d.Name,
		Labels:   orEmpty(d.Labels),
		Update:   updateConfig(d.UpdateConfig),
		Rollback: updateConfig(d.RollbackConfig),
		Restart: weft.RestartPolicy{
			Condition: weft.RestartAny,
			Delay:     weft.DefaultRestartDelay,
		},
		ForceUpdate: t.ForceUpdate,
		Container:   containerSpec(t.ContainerSpec),
	}
	switch {
	case d.Mode.Global != nil:
		s.Mode = weft.ModeGlobal
	case d.Mode.Replicated != nil && d.Mode.Replicated.Replicas != nil:
		s.Replicas = *d.Mode.Replicated.Replicas
	default:
		s.Replicas = 1
	}
	if r := t.Resources; r != nil && r.Limits != nil {
		s.Limits = weft.Resources{NanoCPUs: r.Limits.NanoCPUs, MemoryBytes: r.Limits.MemoryBytes}
	}
	if p := t.RestartPolicy; p != nil {
		s.Restart.Condition = restartCondition(p.Condition)
	}
	if t.Placement != nil {
		s.Constraints = t.Placement.Constraints
	}
	for _, n := range t.Networks {
		s.Networks = append(s.Networks, weft.NetworkTarget{Network: weft.ID(n.Target), Aliases: n.Aliases})
	}
	if e := d.EndpointSpec; e != nil {
		if e.Mode == swarm.ResolutionModeDNSRR {
			s.EndpointMode = weft.EndpointDNSRR
		}
		s.Ports = portSpecs(e.Ports)
	}
	return s
}

func restartCondition(c swarm.RestartPolicyCondition) weft.RestartCondition {
	switch c {
	case swarm.RestartPolicyConditionNone:
		return weft.RestartNone
	case swarm.RestartPolicyConditionOnFailure:
		return weft.RestartOnFailure
	}
	return weft.RestartAny
}

func containerSpec(c *swarm.ContainerSpec) weft.ContainerSpec {
	out := weft.ContainerSpec{
		Image:     c.Image,
		Args:      c.Args,
		Env:       c.Env,
		Dir:       c.Dir,
		User:      c.User,
		Hostname:  c.Hostname,
		StopGrace: weft.DefaultStopGrace,
		Health:    healthCheck(c.Healthcheck),
		DNS:       dnsConfig(c.DNSConfig),
	}
	for _, line := range c.Hosts {
		h, _ := weft.ParseHostEntry(line) // checkService has said what is wrong
		out.Hosts = append(out.Hosts, h)
	}
	if c.StopGracePeriod != nil {
		out.StopGrace = *c.StopGracePeriod
	}
	for _, m := range c.Mounts {
		w := weft.Mount{Type: weft.MountType(m.Type), Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly}
		if w.Type == "" {
			w.Type = weft.MountVolume
		}
		if m.TmpfsOptions != nil {
			w.TmpfsSize = m.TmpfsOptions.SizeBytes
		}
		out.Mounts = append(out.Mounts, w)
	}
	return out
}

func dnsConfig(d *swarm.DNSConfig) weft.DNSConfig {
	if d == nil {
		return weft.DNSConfig{}
	}
	return weft.DNSConfig{Nameservers: d.Nameservers, Search: d.Search, Options: d.Options}
}

// dockerSpec is serviceSpec backwards; what it makes passes the rules again,
// because clients send back what they were given.
func dockerSpec(s *weft.ServiceSpec) swarm.ServiceSpec {
	out := swarm.ServiceSpec{
		Annotations:    swarm.Annotations{Name: s.Name, Labels: orEmpty(s.Labels)},
		TaskTemplate:   dockerTaskSpec(s),
		UpdateConfig:   dockerUpdate(s.Update),
		RollbackConfig: dockerUpdate(s.Policy(weft.RollbackRunning)),
		EndpointSpec:   &swarm.EndpointSpec{Mode: swarm.ResolutionModeVIP, Ports: dockerPorts(s.Ports)},
	}
	if s.EndpointMode == weft.EndpointDNSRR {
		out.EndpointSpec.Mode = swarm.ResolutionModeDNSRR
	}
	if s.Mode == weft.ModeGlobal {
		out.Mode.Global = &swarm.GlobalService{}
	} else {
		replicas := s.Replicas
		out.Mode.Replicated = &swarm.ReplicatedService{Replicas: &replicas}
	}
	return out
}

func dockerTaskSpec(s *weft.ServiceSpec) swarm.TaskSpec {
	delay := s.Restart.Delay
	t := swarm.TaskSpec{
		ContainerSpec: dockerContainer(&s.Container),
		Resources: &swarm.ResourceRequirements{
			Limits:       &swarm.Limit{NanoCPUs: s.Limits.NanoCPUs, MemoryBytes: s.Limits.MemoryBytes},
			Reservations: &swarm.Resources{},
		},
		RestartPolicy: &swarm.RestartPolicy{
			Condition:   swarm.RestartPolicyCondition([...]string{"any", "on-failure", "none"}[s.Restart.Condition%3]),
			Delay:       &delay,
			MaxAttempts: new(uint64),
			Window:      new(time.Duration),
		},
		Placement:   &swarm.Placement{Constraints: s.Constraints},
		ForceUpdate: s.ForceUpdate,
		Runtime:     swarm.RuntimeContainer,
	}
	for _, n := range s.Networks {
		t.Networks = append(t.Networks, swarm.NetworkAttachmentConfig{Target: string(n.Network), Aliases: n.Aliases})
	}
	return t
}

func dockerContainer(c *weft.ContainerSpec) *swarm.ContainerSpec {
	grace := c.StopGrace
	out := &swarm.ContainerSpec{
		Image:           c.Image,
		Args:            c.Args,
		Hostname:        c.Hostname,
		Env:             c.Env,
		Dir:             c.Dir,
		User:            c.User,
		StopGracePeriod: &grace,
		Healthcheck:     dockerHealthCheck(c.Health),
		DNSConfig:       &swarm.DNSConfig{Nameservers: c.DNS.Nameservers, Search: c.DNS.Search, Options: c.DNS.Options},
		Isolation:       "default",
	}
	for _, h := range c.Hosts {
		out.Hosts = append(out.Hosts, h.String())
	}
	for _, m := range c.Mounts {
		d := mount.Mount{Type: mount.Type(m.Type), Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly}
		if m.TmpfsSize != 0 {
			d.TmpfsOptions = &mount.TmpfsOptions{SizeBytes: m.TmpfsSize}
		}
		out.Mounts = append(out.Mounts, d)
	}
	return out
}

// dockerService makes the answer for one service. The status is added by the
// list that was asked for it.
func dockerService(s *weft.Service) swarm.Service {
	out := swarm.Service{ID: string(s.ID), Meta: dockerMeta(s.Meta), Spec: dockerSpec(&s.Spec)}
	if s.Previous != nil {
		p := dockerSpec(s.Previous)
		out.PreviousSpec = &p
	}
	out.Endpoint = swarm.Endpoint{Spec: *out.Spec.EndpointSpec, Ports: dockerPorts(s.Ports)}
	for _, v := range s.VIPs {
		for _, a := range v.Addrs() { // a network of two families is there twice
			out.Endpoint.VirtualIPs = append(out.Endpoint.VirtualIPs, swarm.EndpointVirtualIP{NetworkID: string(v.Network), Addr: a})
		}
	}
	out.UpdateStatus = dockerUpdateStatus(s.Update)
	return out
}

func dockerMeta(m weft.Meta) swarm.Meta {
	return swarm.Meta{Version: swarm.Version{Index: m.Index}, CreatedAt: m.CreatedAt, UpdatedAt: m.UpdatedAt}
}

func optionalTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// orEmpty: a map in an answer is {}, never null.
func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}
