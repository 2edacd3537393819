package api

import (
	"fmt"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

// serviceRules are the fields of swarm.ServiceSpec that service create and
// update honour (services_convert.go reads them), and those that may only
// stand at what weft does anyway.
func serviceRules() ruleSet {
	r := ruleSet{}
	r.honour("", "Name", "Labels", "Mode.Replicated.Replicas", "Mode.Global", "EndpointSpec.Mode")
	r.honour("TaskTemplate.", "ForceUpdate", "Placement.Constraints",
		"Networks[].Target", "Networks[].Aliases",
		"Resources.Limits.NanoCPUs", "Resources.Limits.MemoryBytes", "RestartPolicy.Condition")
	r.honour("TaskTemplate.ContainerSpec.", "Image", "Args", "Hostname", "Env", "Dir", "User", "StopGracePeriod",
		"Mounts[].Type", "Mounts[].Source", "Mounts[].Target", "Mounts[].ReadOnly", "Mounts[].TmpfsOptions.SizeBytes")
	r.honour("TaskTemplate.ContainerSpec.", "DNSConfig.Nameservers", "DNSConfig.Search", "DNSConfig.Options", "Hosts")
	honourHealth(r)
	r.honour("EndpointSpec.Ports[].", "Name", "Protocol", "TargetPort", "PublishedPort", "PublishMode")

	r["Mode.ReplicatedJob"] = absent()
	r["Mode.GlobalJob"] = absent()
	r["TaskTemplate.PluginSpec"] = absent()
	r["TaskTemplate.NetworkAttachmentSpec"] = absent()
	r["TaskTemplate.ContainerSpec.Mounts[].ImageOptions"] = absent()
	r["TaskTemplate.ContainerSpec.Mounts[].ClusterOptions"] = absent()
	r["TaskTemplate.Runtime"] = only("", "container")
	r["TaskTemplate.ContainerSpec.Init"] = only(false)
	r["TaskTemplate.ContainerSpec.Isolation"] = only("", "default")
	r["TaskTemplate.ContainerSpec.Mounts[].Consistency"] = only("", "default")
	r["TaskTemplate.ContainerSpec.Mounts[].BindOptions.Propagation"] = only("", "rprivate")
	r["TaskTemplate.ContainerSpec.Mounts[].VolumeOptions.DriverConfig.Name"] = only("", "local")
	// Docker's own defaults, which clients send along: a replacement starts
	// after five seconds, as often as needed.
	r["TaskTemplate.RestartPolicy.Delay"] = only(weft.DefaultRestartDelay)
	r["TaskTemplate.RestartPolicy.MaxAttempts"] = only(uint64(0))
	r["TaskTemplate.RestartPolicy.Window"] = only(time.Duration(0))
	honourUpdate(r)
	return r
}

// Bounds of a service.
const (
	maxName = 63 // a DNS label, RFC 1035 section 2.3.4
	// maxReplicas is our own: far above any cluster, far below what would
	// fill the memory of a manager.
	maxReplicas = 100_000
	// minMemory and minCPU are Docker's: below them nothing starts.
	minMemory = 4 << 20
	minCPU    = 1_000_000
)

var (
	serviceName   = regexp.MustCompile(`^[a-zA-Z0-9](?:[-_a-zA-Z0-9]*[a-zA-Z0-9])?$`)
	volumeName    = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)
	hostName      = regexp.MustCompile(`^[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?$`)
	constraintExp = regexp.MustCompile(`^\s*(node|engine)\.([a-zA-Z][\w.:/-]*)\s*(==|!=)\s*\S.*$`)
)

// checkService finds everything in a spec that the rules cannot: values out of
// range and fields that contradict each other. All faults are named at once.
func checkService(d *swarm.ServiceSpec) error {
	var faults []string
	bad := func(path, format string, a ...any) {
		fault := fmt.Sprintf(format, a...)
		if path != "" {
			fault = path + ": " + fault
		}
		faults = append(faults, fault)
	}
	if d.Name != "" && (len(d.Name) > maxName || !serviceName.MatchString(d.Name)) {
		bad("Name", "%q must be at most %d letters, digits, '-' and '_', and begin and end with a letter or digit", d.Name, maxName)
	}
	checkMode(d, bad)
	t := &d.TaskTemplate
	if t.ContainerSpec == nil {
		bad("TaskTemplate.ContainerSpec", "missing")
	} else {
		checkContainer(t.ContainerSpec, bad)
	}
	checkResources(t.Resources, bad)
	checkRestart(t.RestartPolicy, bad)
	checkUpdate(weft.FieldUpdate, d.UpdateConfig, bad)
	checkUpdate(weft.FieldRollback, d.RollbackConfig, bad)
	if t.Placement != nil {
		for i, c := range t.Placement.Constraints {
			if !constraintExp.MatchString(c) {
				bad(fmt.Sprintf("TaskTemplate.Placement.Constraints[%d]", i), "%q must be node.KEY==VALUE or node.KEY!=VALUE", c)
			}
		}
	}
	targets := map[string]bool{}
	for i, n := range t.Networks {
		at := fmt.Sprintf("TaskTemplate.Networks[%d].Target", i)
		switch {
		case n.Target == "":
			bad(at, "missing")
		case targets[n.Target]:
			bad(at, "network %s is given twice", n.Target)
		}
		targets[n.Target] = true
	}
	if before := len(faults); d.EndpointSpec != nil {
		if checkEndpoint(d.EndpointSpec, bad); len(faults) > before {
			return joined(weft.ErrInvalid, faults) // what labels say of ports that are wrong is nobody's concern
		}
	}
	checkServiceLabels(d, bad)
	return joined(weft.ErrInvalid, faults)
}

// badFunc takes a fault; without a path the text names it.
type badFunc func(path, format string, a ...any)

// checkLabels refuses the labels that weft keeps for its own options, on what has
// none.
func checkLabels(labels map[string]string, bad badFunc) {
	for k := range labels {
		if strings.HasPrefix(k, "weft.") {
			bad(fmt.Sprintf("Labels[%q]", k), "this version knows no label that begins with weft.")
		}
		if k == "" {
			bad("Labels", "a label without a name")
		}
	}
}

func checkMode(d *swarm.ServiceSpec, bad badFunc) {
	if d.Mode.Replicated != nil && d.Mode.Global != nil {
		bad("Mode", "Replicated and Global exclude each other")
	}
	if r := d.Mode.Replicated; r != nil && r.Replicas != nil && *r.Replicas > maxReplicas {
		bad("Mode.Replicated.Replicas", "%d is more than %d", *r.Replicas, maxReplicas)
	}
}

func checkContainer(c *swarm.ContainerSpec, bad badFunc) {
	const at = "TaskTemplate.ContainerSpec."
	if c.Image == "" {
		bad(at+"Image", "missing")
	} else if _, err := reference.ParseNormalizedNamed(c.Image); err != nil {
		bad(at+"Image", "%q: %v", c.Image, err)
	}
	for i, e := range c.Env {
		if k, v, _ := strings.Cut(e, "="); k == "" || strings.ContainsRune(e, 0) {
			bad(fmt.Sprintf("%sEnv[%d]", at, i), "%q must be NAME=value", e)
		} else if isTemplate(v) {
			bad(fmt.Sprintf("%sEnv[%d]", at, i), "templates are not supported yet: %q", e)
		}
	}
	switch {
	case isTemplate(c.Hostname):
		bad(at+"Hostname", "templates are not supported yet: %q", c.Hostname)
	case c.Hostname != "" && (len(c.Hostname) > maxName || !hostName.MatchString(c.Hostname)):
		bad(at+"Hostname", "%q is not a host name of at most %d characters", c.Hostname, maxName)
	}
	if c.Dir != "" && !path.IsAbs(c.Dir) {
		bad(at+"Dir", "%q must be an absolute path", c.Dir)
	}
	if c.StopGracePeriod != nil && *c.StopGracePeriod < 0 {
		bad(at+"StopGracePeriod", "%s is negative", *c.StopGracePeriod)
	}
	badIf(dnsConfig(c.DNSConfig).Validate(at+"DNSConfig"), bad)
	for i, h := range c.Hosts {
		if _, err := weft.ParseHostEntry(h); err != nil {
			bad(fmt.Sprintf("%sHosts[%d]", at, i), "%s", weft.Text(err))
		}
	}
	checkHealth(c.Healthcheck, bad)
	targets := map[string]bool{}
	for i := range c.Mounts {
		m := &c.Mounts[i]
		checkMount(fmt.Sprintf("%sMounts[%d].", at, i), m, bad)
		if clean := path.Clean(m.Target); targets[clean] {
			bad(fmt.Sprintf("%sMounts[%d].Target", at, i), "%s is given twice", m.Target)
		} else {
			targets[clean] = true
		}
	}
}

// isTemplate: Docker expands {{…}} in some fields; passing it on as text would
// be taking an option and ignoring it.
func isTemplate(s string) bool { return strings.Contains(s, "{{") }

func checkMount(at string, m *mount.Mount, bad badFunc) {
	if !path.IsAbs(m.Target) || path.Clean(m.Target) == "/" {
		bad(at+"Target", "%q must be an absolute path other than /", m.Target)
	}
	if isTemplate(m.Source) {
		bad(at+"Source", "templates are not supported yet: %q", m.Source)
		return
	}
	switch m.Type {
	case mount.TypeBind:
		if !path.IsAbs(m.Source) {
			bad(at+"Source", "%q must be an absolute path on the host", m.Source)
		}
	case mount.TypeVolume, "": // Docker's default is volume
		if m.Source != "" && !volumeName.MatchString(m.Source) {
			bad(at+"Source", "%q is not a volume name: letters, digits, '_', '.' and '-', at least two", m.Source)
		}
	case mount.TypeTmpfs:
		if m.Source != "" {
			bad(at+"Source", "a tmpfs has no source")
		}
	default:
		bad(at+"Type", "%q is not supported yet (bind, volume or tmpfs)", m.Type)
	}
	if m.TmpfsOptions != nil && m.TmpfsOptions.SizeBytes != 0 && (m.Type != mount.TypeTmpfs || m.TmpfsOptions.SizeBytes < 0) {
		bad(at+"TmpfsOptions.SizeBytes", "must be positive and on a tmpfs")
	}
}

func checkResources(r *swarm.ResourceRequirements, bad badFunc) {
	if r == nil || r.Limits == nil {
		return
	}
	const at = "TaskTemplate.Resources.Limits."
	if cpu := r.Limits.NanoCPUs; cpu < 0 || (cpu > 0 && cpu < minCPU) {
		bad(at+"NanoCPUs", "%d is less than 0.001 of a core", cpu)
	}
	if memory := r.Limits.MemoryBytes; memory < 0 || (memory > 0 && memory < minMemory) {
		bad(at+"MemoryBytes", "%d is less than 4 MiB", memory)
	}
}

func checkRestart(p *swarm.RestartPolicy, bad badFunc) {
	if p == nil {
		return
	}
	switch p.Condition {
	case "", swarm.RestartPolicyConditionAny, swarm.RestartPolicyConditionNone, swarm.RestartPolicyConditionOnFailure:
	default:
		bad("TaskTemplate.RestartPolicy.Condition", "%q must be none, on-failure or any", p.Condition)
	}
}
