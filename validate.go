package weft

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of a specification.
const (
	// MaxRestartAttempts bounds RestartPolicy.MaxAttempts: attempts are
	// counted by the records of ended tasks, which are kept as long as they
	// count.
	MaxRestartAttempts = 1000
	// MaxReplicas bounds a service: what a manager is built to hold.
	MaxReplicas = 1_000_000
	// minCPU and minMemory are Docker's: less is a wrong unit.
	minCPU    = 1_000_000 // a thousandth of a core
	minMemory = 4 << 20
	// minSubnetHostBits: network, broadcast, gateway and a service address
	// leave four addresses for tasks in a /29; a /125 is as large.
	minSubnetHostBits = 3
	// minSubnetBits of IPv4: hardware addresses hold the last 24 bits of an
	// address. Of a larger IPv6 subnet no more than those are used.
	minSubnetBits = 8
)

// Defaults fills in what a client may leave out and a zero value cannot mean:
// protocol of ports, restart delay, update parameters. What labels say of ports
// goes into the ports, and neighbouring ports become ranges. It does not touch
// Replicas and StopGrace, whose zeros have a meaning.
func (s *ServiceSpec) Defaults() {
	if s.Restart.Delay == 0 {
		s.Restart.Delay = DefaultRestartDelay
	}
	if s.Update == (UpdateConfig{}) {
		s.Update = DefaultUpdate
	}
	if s.Update.Monitor == 0 {
		s.Update.Monitor = DefaultUpdate.Monitor
	}
	if s.Rollback == (UpdateConfig{}) {
		s.Rollback = DefaultUpdate
	}
	if s.Rollback.Monitor == 0 {
		s.Rollback.Monitor = DefaultUpdate.Monitor
	}
	if slices.ContainsFunc(s.Ports, func(p PortSpec) bool { return p.Protocol == "" }) {
		s.Ports = slices.Clone(s.Ports) // they may be shared with the sender
		for i := range s.Ports {
			if s.Ports[i].Protocol == "" {
				s.Ports[i].Protocol = TCP
			}
		}
	}
	if len(s.Ports) > 0 {
		s.obeyLabels()
	}
}

// Validate checks everything that can be judged without the state of the
// cluster, after Defaults. The error names the first wrong field by its path
// in Docker's JSON and says what is right. It wraps ErrInvalid, or
// ErrUnsupported for what is meaningful but not built.
func (s ServiceSpec) Validate() error {
	if err := checkName(s.Name); err != nil {
		return at("Name", err)
	}
	if err := s.validateMode(); err != nil {
		return err
	}
	if err := s.Container.validate(); err != nil {
		return err
	}
	if err := s.validateResources(); err != nil {
		return err
	}
	if err := s.Restart.validate(); err != nil {
		return err
	}
	for i, c := range s.Constraints {
		if _, err := ParseConstraint(c); err != nil {
			return at(fmt.Sprintf("TaskTemplate.Placement.Constraints[%d]", i), err)
		}
	}
	if err := s.validateNetworks(); err != nil {
		return err
	}
	if err := s.validateEndpoint(); err != nil {
		return err
	}
	if err := s.checkServiceLabels(); err != nil {
		return err
	}
	if err := s.Update.Validate(FieldUpdate); err != nil {
		return err
	}
	if err := s.Rollback.Validate(FieldRollback); err != nil {
		return err
	}
	return nil
}

func (s *ServiceSpec) validateMode() error {
	switch {
	case s.Mode > ModeGlobal:
		return invalid("Mode", "must be replicated or global")
	case s.Mode == ModeGlobal && s.Replicas != 0:
		return invalid("Mode.Global", "a global service has no number of replicas")
	case s.Replicas > MaxReplicas:
		return invalid("Mode.Replicated.Replicas", "%d is more than %d", s.Replicas, MaxReplicas)
	}
	return nil
}

func (s *ServiceSpec) validateResources() error {
	const base = "TaskTemplate.Resources."
	check := func(field string, r Resources) error {
		if r.NanoCPUs < 0 || r.NanoCPUs > 0 && r.NanoCPUs < minCPU {
			return invalid(base+field+".NanoCPUs", "%d: must be 0 or at least %d (a thousandth of a CPU)", r.NanoCPUs, minCPU)
		}
		if r.MemoryBytes < 0 || r.MemoryBytes > 0 && r.MemoryBytes < minMemory {
			return invalid(base+field+".MemoryBytes", "%d: must be 0 or at least %d (4 MiB)", r.MemoryBytes, minMemory)
		}
		return nil
	}
	if err := check("Limits", s.Limits); err != nil {
		return err
	}
	if err := check("Reservations", s.Reservations); err != nil {
		return err
	}
	if l := s.Limits.NanoCPUs; l > 0 && s.Reservations.NanoCPUs > l {
		return invalid(base+"Reservations.NanoCPUs", "%d is more than the limit %d", s.Reservations.NanoCPUs, l)
	}
	if l := s.Limits.MemoryBytes; l > 0 && s.Reservations.MemoryBytes > l {
		return invalid(base+"Reservations.MemoryBytes", "%d is more than the limit %d", s.Reservations.MemoryBytes, l)
	}
	return nil
}

func (r *RestartPolicy) validate() error {
	const base = "TaskTemplate.RestartPolicy."
	switch {
	case r.Condition > RestartNone:
		return invalid(base+"Condition", "must be any, on-failure or none")
	case r.Delay < 0:
		return invalid(base+"Delay", "must not be negative")
	case r.Window < 0:
		return invalid(base+"Window", "must not be negative")
	case r.MaxAttempts > MaxRestartAttempts:
		return invalid(base+"MaxAttempts", "%d is more than %d: use 0 for no limit", r.MaxAttempts, MaxRestartAttempts)
	}
	return nil
}

func (s *ServiceSpec) validateNetworks() error {
	seen := make(map[ID]bool, len(s.Networks))
	for i, n := range s.Networks {
		field := fmt.Sprintf("TaskTemplate.Networks[%d]", i)
		if n.Network == "" {
			return invalid(field+".Target", "a network name or id is missing")
		}
		if seen[n.Network] {
			return invalid(field+".Target", "network %s is given twice", n.Network)
		}
		seen[n.Network] = true
		for j, a := range n.Aliases {
			if err := checkName(a); err != nil {
				return at(fmt.Sprintf("%s.Aliases[%d]", field, j), err)
			}
		}
	}
	return nil
}

func (c *ContainerSpec) validate() error {
	const base = "TaskTemplate.ContainerSpec."
	if err := checkImage(c.Image); err != nil {
		return at(base+"Image", err)
	}
	for _, l := range []struct {
		field string
		list  []string
	}{{"Command", c.Entrypoint}, {"Args", c.Args}} {
		for i, a := range l.list {
			if strings.ContainsRune(a, 0) {
				return invalid(fmt.Sprintf("%s%s[%d]", base, l.field, i), "contains a zero byte")
			}
		}
	}
	for i, e := range c.Env {
		if err := checkEnv(e); err != nil {
			return at(fmt.Sprintf("%sEnv[%d]", base, i), err)
		}
	}
	if c.Dir != "" && (!path.IsAbs(c.Dir) || strings.ContainsRune(c.Dir, 0)) {
		return invalid(base+"Dir", "%q: must be an absolute path", c.Dir)
	}
	if strings.ContainsFunc(c.User, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return invalid(base+"User", "%q: write NAME, UID or UID:GID", c.User)
	}
	if err := checkHostname(c.Hostname); err != nil {
		return at(base+"Hostname", err)
	}
	if err := checkLabels(base+"Labels", c.Labels); err != nil {
		return err
	}
	if err := checkMounts(base+"Mounts", c.Mounts); err != nil {
		return err
	}
	if err := checkSignal(c.StopSignal); err != nil {
		return at(base+"StopSignal", err)
	}
	if err := c.Health.Validate(base + "Healthcheck"); err != nil {
		return err
	}
	if err := c.DNS.Validate(base + "DNSConfig"); err != nil {
		return err
	}
	if err := checkHosts(base+"Hosts", c.Hosts); err != nil {
		return err
	}
	if c.StopGrace < 0 || c.StopGrace > 24*time.Hour {
		return invalid(base+"StopGracePeriod", "%s: must be 0 to 24h", c.StopGrace)
	}
	return nil
}

func checkMounts(base string, mounts []Mount) error {
	seen := make(map[string]int, len(mounts))
	for i, m := range mounts {
		field := fmt.Sprintf("%s[%d]", base, i)
		if !path.IsAbs(m.Target) || strings.ContainsRune(m.Target, 0) {
			return invalid(field+".Target", "%q: must be an absolute path", m.Target)
		}
		target := path.Clean(m.Target)
		if target == "/" {
			return invalid(field+".Target", "the root of the container cannot be mounted over")
		}
		if j, ok := seen[target]; ok {
			return invalid(field+".Target", "%s is already mounted by %s[%d]", target, base, j)
		}
		seen[target] = i
		if err := checkSource(field, &m); err != nil {
			return err
		}
		if m.TmpfsSize < 0 || m.TmpfsSize > 0 && m.Type != MountTmpfs {
			return invalid(field+".TmpfsOptions.SizeBytes", "%d: must be 0, or positive on a tmpfs", m.TmpfsSize)
		}
	}
	return nil
}

func checkSource(field string, m *Mount) error {
	switch m.Type {
	case MountBind:
		if !path.IsAbs(m.Source) || strings.ContainsRune(m.Source, 0) {
			return invalid(field+".Source", "%q: a bind mount needs an absolute path on the host", m.Source)
		}
	case MountVolume:
		if m.Source != "" && !isObjectName(m.Source) {
			return invalid(field+".Source", "%q: a volume name is letters, digits, '_', '.' and '-', beginning with a letter or digit; a path needs type bind", m.Source)
		}
	case MountTmpfs:
		if m.Source != "" {
			return invalid(field+".Source", "%q: a tmpfs has no source", m.Source)
		}
	default:
		return invalid(field+".Type", "%q: use bind, volume or tmpfs", string(m.Type))
	}
	return nil
}

// Validate checks what can be judged without the state of the cluster: name,
// driver, subnets, options. Errors as ServiceSpec.Validate; ErrForbidden for
// the names that Docker reserves.
func (n NetworkSpec) Validate() error {
	if err := CheckNetworkName(n.Name); err != nil {
		return at("Name", err)
	}
	switch n.Name {
	case "bridge", "host", "none", "default", "container":
		return at("Name", fmt.Errorf("%w: %q is a pre-defined network and cannot be created", ErrForbidden, n.Name))
	}
	if n.Driver != DriverOverlay {
		return at("Driver", fmt.Errorf("%w: %q: only %q can be created", ErrUnsupported, n.Driver, DriverOverlay))
	}
	if err := checkLabels("Labels", n.Labels); err != nil {
		return err
	}
	if n.Ingress && (n.Internal || n.Attachable) {
		return invalid("Ingress", "the ingress network is neither internal nor attachable")
	}
	if err := n.CheckOptions(); err != nil {
		return err
	}
	if n.NoIPv4 && !n.IPv6 {
		return invalid("EnableIPv4", "a network without IPv4 needs IPv6: set EnableIPv6 (--ipv6), or leave IPv4 on")
	}
	return n.validateSubnets()
}

// validateSubnets: one subnet of each family that the network has.
func (n *NetworkSpec) validateSubnets() error {
	first := map[bool]int{} // by Is6
	for i, s := range n.Subnets {
		field := fmt.Sprintf("IPAM.Config[%d]", i)
		if err := s.validate(field); err != nil {
			return err
		}
		is6 := s.Prefix.Addr().Is6()
		switch j, again := first[is6]; {
		case again:
			return at(field, fmt.Errorf("%w: %s is of the family of IPAM.Config[%d]: this version gives a network one subnet of each family", ErrUnsupported, s.Prefix, j))
		case is6 && !n.IPv6:
			return invalid(field+".Subnet", "%s is of IPv6, which this network does not have: set EnableIPv6 (--ipv6), or leave the subnet out", s.Prefix)
		case !is6 && n.NoIPv4:
			return invalid(field+".Subnet", "%s is of IPv4, which this network does not have: leave it out, or leave EnableIPv4 on", s.Prefix)
		}
		first[is6] = i
	}
	return nil
}

func (s *Subnet) validate(field string) error {
	p, g := s.Prefix, s.Gateway
	switch {
	case !p.IsValid() && g.IsValid():
		return invalid(field+".Subnet", "a gateway needs a subnet")
	case !p.IsValid():
		return invalid(field+".Subnet", "is not an address range: write 10.1.0.0/24 or fd00:1::/64")
	case p.Addr().Is4In6():
		return invalid(field+".Subnet", "%s is IPv4 written as IPv6: write 10.1.0.0/24", p)
	case p != p.Masked():
		return invalid(field+".Subnet", "%s has host bits set: use %s", p, p.Masked())
	case p.Bits() > p.Addr().BitLen()-minSubnetHostBits:
		return invalid(field+".Subnet", "%s is too small: use /%d or larger", p, p.Addr().BitLen()-minSubnetHostBits)
	case p.Addr().Is4() && p.Bits() < minSubnetBits:
		return invalid(field+".Subnet", "%s is too large: use /%d or smaller", p, minSubnetBits)
	case !g.IsValid():
		return nil
	case !p.Contains(g):
		return invalid(field+".Gateway", "%s is not in subnet %s: use an address of it, such as %s", g, p, p.Addr().Next())
	case g == p.Addr():
		return invalid(field+".Gateway", "%s is the network address of %s: use another, such as %s", g, p, p.Addr().Next())
	case g.Is4() && g == broadcast(p):
		return invalid(field+".Gateway", "%s is the broadcast address of %s: use another, such as %s", g, p, p.Addr().Next())
	}
	return nil
}

// broadcast is the last address of an IPv4 prefix.
func broadcast(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// invalid is an ErrInvalid about a field.
func invalid(field, format string, args ...any) error {
	return at(field, fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...)))
}

// at puts the path of a field before an error.
func at(field string, err error) error { return fmt.Errorf("%s: %w", field, err) }

// checkSignal accepts a name with or without SIG, or a number.
func checkSignal(s string) error {
	if s == "" {
		return nil
	}
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > 64 {
			return fmt.Errorf("%w: signal number %d: must be 1 to 64", ErrInvalid, n)
		}
		return nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if strings.HasPrefix(name, "RTMIN") || strings.HasPrefix(name, "RTMAX") {
		return nil
	}
	if !slices.Contains(strings.Fields(signalNames), name) {
		return fmt.Errorf("%w: unknown signal %q", ErrInvalid, s)
	}
	return nil
}

// signalNames of Linux (signal(7)), without SIG.
const signalNames = `HUP INT QUIT ILL TRAP ABRT IOT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM
	STKFLT CHLD CLD CONT STOP TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO POLL PWR SYS`
