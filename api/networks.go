package api

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

// networkRules: what network create honours.
func networkRules() ruleSet {
	r := ruleSet{}
	r.honour("", "Name", "Driver", "Internal", "Attachable", "Labels", "Options",
		"EnableIPv4", "EnableIPv6", "IPAM.Config[].Subnet", "IPAM.Config[].Gateway")
	r["Scope"] = only("", "swarm")
	r["IPAM.Driver"] = only("", "default")
	return r
}

func (s *Server) networkRoutes(add adder) {
	add("GET", "/networks", s.networkList)
	add("POST", "/networks/create", s.networkCreate)
	add("GET", "/networks/{name}", s.networkInspect)
	add("DELETE", "/networks/{name}", s.inCluster(s.networkRemove))
}

var networkName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

func (s *Server) networkCreate(c *call) error {
	var body network.CreateRequest
	// CheckDuplicate (until 1.43) asks for what is always done: names are
	// unique.
	if err := decode(c, &body, "CheckDuplicate"); err != nil {
		return err
	}
	spec, err := s.networkSpec(&body)
	if err != nil {
		return err
	}
	return s.inCluster(func(c *call) error {
		n, err := s.cfg.Networks.CreateNetwork(c.Context(), spec)
		if err != nil {
			return err
		}
		writeJSON(c.w, http.StatusCreated, network.CreateResponse{ID: string(n.ID)})
		return nil
	})(c)
}

// networkSpec judges and converts the body of network create.
func (s *Server) networkSpec(d *network.CreateRequest) (weft.NetworkSpec, error) {
	none := weft.NetworkSpec{}
	if err := s.rules.network.check(*d); err != nil {
		return none, err
	}
	switch d.Name {
	case network.NetworkBridge, network.NetworkHost, network.NetworkNone, network.NetworkDefault:
		return none, fmt.Errorf("operation is not permitted on predefined %s network: %w", d.Name, weft.ErrForbidden)
	}
	if len(d.Name) > maxName || !networkName.MatchString(d.Name) {
		return none, invalidf("Name: %q must be at most %d letters, digits, '_', '.' and '-', and begin with a letter or digit", d.Name, maxName)
	}
	if err := weft.CheckNetworkName(d.Name); err != nil {
		return none, invalidf("Name: %s", weft.Text(err))
	}
	if d.Driver != weft.DriverOverlay {
		driver := d.Driver
		if driver == "" {
			driver = network.NetworkBridge // Docker's default
		}
		return none, unsupportedf("Driver: network %s would have driver %s, and weft makes networks across hosts only: use --driver overlay", d.Name, driver)
	}
	var faults []string
	checkLabels(d.Labels, func(path, format string, a ...any) {
		faults = append(faults, path+": "+fmt.Sprintf(format, a...))
	})
	out := weft.NetworkSpec{
		Name: d.Name, Labels: orEmpty(d.Labels), Driver: d.Driver,
		Internal: d.Internal, Attachable: d.Attachable, Options: d.Options,
		IPv6: d.EnableIPv6 != nil && *d.EnableIPv6, NoIPv4: d.EnableIPv4 != nil && !*d.EnableIPv4,
	}
	if out.NoIPv4 && !out.IPv6 {
		faults = append(faults, "EnableIPv4: a network without IPv4 needs IPv6: set EnableIPv6 (--ipv6), or leave IPv4 on")
	}
	if d.IPAM != nil {
		for i, cfg := range d.IPAM.Config {
			fault := checkSubnet(cfg, d.IPAM.Config[:i])
			if fault == "" {
				fault = checkFamily(cfg.Subnet, &out)
			}
			if fault != "" {
				faults = append(faults, fmt.Sprintf("IPAM.Config[%d].%s", i, fault))
			}
			out.Subnets = append(out.Subnets, weft.Subnet{Prefix: cfg.Subnet, Gateway: cfg.Gateway})
		}
	}
	if len(faults) > 0 {
		return out, joined(weft.ErrInvalid, faults)
	}
	return out, out.CheckOptions()
}

// checkSubnet returns what is wrong with one address range, "" when nothing.
func checkSubnet(c network.IPAMConfig, before []network.IPAMConfig) string {
	p, g := c.Subnet, c.Gateway
	least, most := 8, 29
	if p.IsValid() && p.Addr().Is6() {
		least, most = 16, 125
	}
	switch {
	case !p.IsValid():
		return "Subnet: missing: a gateway needs the subnet that it is in"
	case p.Addr().Is4In6():
		return fmt.Sprintf("Subnet: %s is IPv4 written as IPv6: write it as 10.1.0.0/24", p)
	case p != p.Masked():
		return fmt.Sprintf("Subnet: %s has host bits set: it should be %s", p, p.Masked())
	case p.Bits() < least || p.Bits() > most:
		return fmt.Sprintf("Subnet: %s must be /%d to /%d", p, least, most)
	case g.IsValid() && !p.Contains(g):
		return fmt.Sprintf("Gateway: %s is not in %s: use an address of it, such as %s", g, p, p.Addr().Next())
	case g.IsValid() && g == p.Addr():
		return fmt.Sprintf("Gateway: %s is the address of the network itself: use another, such as %s", g, p.Addr().Next())
	case g.IsValid() && g.Is4() && !p.Contains(g.Next()):
		return fmt.Sprintf("Gateway: %s is the broadcast address of %s: use another, such as %s", g, p, p.Addr().Next())
	}
	for _, o := range before {
		if o.Subnet.IsValid() && o.Subnet.Overlaps(p) {
			return fmt.Sprintf("Subnet: %s overlaps %s: leave one of them out", p, o.Subnet)
		}
	}
	return ""
}

// checkFamily returns what is wrong with a subnet on a network of these families.
func checkFamily(p netip.Prefix, n *weft.NetworkSpec) string {
	switch {
	case p.Addr().Is6() && !n.IPv6:
		return fmt.Sprintf("Subnet: %s is of IPv6, which this network does not have: set EnableIPv6 (--ipv6), or leave the subnet out", p)
	case p.Addr().Is4() && n.NoIPv4:
		return fmt.Sprintf("Subnet: %s is of IPv4, which this network does not have: leave it out, or leave EnableIPv4 on", p)
	}
	return ""
}

func (s *Server) networkList(c *call) error {
	f, err := c.filters("id", "name", "driver", "type", "label", "scope", "dangling")
	if err != nil {
		return err
	}
	if err := f.oneOf("type", "custom", "builtin"); err != nil {
		return err
	}
	if err := f.oneOf("scope", "swarm", "local", "global"); err != nil {
		return err
	}
	dangling, isSet, err := f.flag("dangling")
	if err != nil {
		return err
	}
	if isSet {
		return unsupportedf("filter dangling=%t is not supported yet", dangling)
	}
	out := []network.Summary{}
	// Outside a cluster there are no networks; `docker network ls` is no error.
	if s.cfg.Swarm.Local().State == weft.LocalInactive {
		return c.json(out)
	}
	all, err := s.cfg.Networks.Networks(c.Context())
	if err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b weft.Network) int { return cmp.Compare(a.Spec.Name, b.Spec.Name) })
	for i := range all {
		n := &all[i]
		kind := "custom"
		if n.Spec.Ingress {
			kind = "builtin"
		}
		if f.prefix("id", string(n.ID)) && f.matches("name", n.Spec.Name) && f.has("driver", n.Spec.Driver) &&
			f.has("type", kind) && f.labels("label", n.Spec.Labels) && f.has("scope", "swarm") {
			out = append(out, network.Summary{Network: dockerNetwork(n)})
		}
	}
	return c.json(out)
}

func (s *Server) networkInspect(c *call) error {
	ref := c.vars["name"]
	scope := c.query.Get("scope")
	if s.cfg.Swarm.Local().State == weft.LocalInactive || (scope != "" && scope != "swarm") {
		return notFoundf("network %s not found", ref)
	}
	n, err := s.network(c.Context(), ref)
	if err != nil {
		return err
	}
	out := network.Inspect{Network: dockerNetwork(&n)}
	if out.Containers, err = s.localEndpoints(c.Context(), n.ID); err != nil {
		return err
	}
	if err := s.addMembers(c.Context(), &n, &out, c.bool("verbose")); err != nil {
		return err
	}
	return c.json(out)
}

func (s *Server) networkRemove(c *call) error {
	n, err := s.network(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	if n.Spec.Ingress {
		return unsupportedf("removing the %s network is not supported: published ports need it", n.Spec.Name)
	}
	if err := s.cfg.Networks.RemoveNetwork(c.Context(), n.ID); err != nil {
		return err
	}
	return c.status(http.StatusNoContent)
}

// localEndpoints are the containers of this node on a network.
func (s *Server) localEndpoints(ctx context.Context, id weft.ID) (map[string]network.EndpointResource, error) {
	out := map[string]network.EndpointResource{}
	all, err := s.cfg.Containers.Containers(ctx)
	if errors.Is(err, weft.ErrUnavailable) {
		// The container runtime is starting. The network is the cluster's, and
		// docker asks for it before it creates a service.
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	for i := range all {
		c := &all[i]
		for _, a := range c.Networks {
			if a.Network != id || c.State.Status != "running" {
				continue
			}
			e := network.EndpointResource{Name: c.Name, EndpointID: endpointID(c.Task, id)}
			if a.Addr.IsValid() {
				e.IPv4Address, e.IPv6Address = byFamily(a)
				e.MacAddress = network.HardwareAddr(weft.EndpointMAC(c.Task, a.Addr.Addr()))
			}
			out[c.ID] = e
		}
	}
	return out, nil
}

// byFamily sorts an attachment's addresses as Docker shows them.
func byFamily(a weft.Attachment) (v4, v6 netip.Prefix) {
	for _, p := range a.Addrs() {
		if p.Addr().Is4() {
			v4 = p
		} else {
			v6 = p
		}
	}
	return v4, v6
}

// addMembers fills in the nodes that take part in a network, and with verbose
// its services and tasks, of all nodes: weft knows them, where Docker shows
// those of the node that was asked.
func (s *Server) addMembers(ctx context.Context, n *weft.Network, out *network.Inspect, isVerbose bool) error {
	list, err := s.cfg.Tasks.Tasks(ctx, weft.TaskFilter{})
	if err != nil {
		return err
	}
	nodes, err := s.cfg.Nodes.Nodes(ctx)
	if err != nil {
		return err
	}
	byID := map[weft.ID]*weft.Node{}
	for i := range nodes {
		byID[nodes[i].ID] = &nodes[i]
	}
	view, err := s.taskView(ctx, &list)
	if err != nil {
		return err
	}
	members, err := s.networkServices(ctx, n.ID, isVerbose)
	if err != nil {
		return err
	}
	peers := map[weft.ID]bool{}
	for i := range list.Tasks {
		t := &list.Tasks[i]
		addr, isOn := attachedTo(t, n.ID)
		node := byID[t.Node]
		if !isOn || node == nil || t.Status.State != weft.TaskRunning {
			continue
		}
		vtep := nodeVTEP(node)
		if !peers[node.ID] {
			peers[node.ID] = true
			out.Peers = append(out.Peers, network.PeerInfo{Name: node.Description.Hostname, IP: vtep})
		}
		if m := members[t.Service]; m != nil {
			m.info.Tasks = append(m.info.Tasks, network.Task{
				Name: t.Name(view.spec(t).Name), EndpointID: endpointID(t.ID, n.ID),
				EndpointIP: addr.Addr(), Info: map[string]string{"Host IP": vtep.String()},
			})
		}
	}
	slices.SortFunc(out.Peers, func(a, b network.PeerInfo) int { return cmp.Compare(a.Name, b.Name) })
	if isVerbose {
		out.Services = map[string]network.ServiceInfo{}
		for _, m := range members {
			slices.SortFunc(m.info.Tasks, func(a, b network.Task) int { return cmp.Compare(a.Name, b.Name) })
			out.Services[m.name] = m.info
		}
	}
	return nil
}

// memberService is a service on a network, as `network inspect -v` shows it.
type memberService struct {
	name string
	info network.ServiceInfo
}

func (s *Server) networkServices(ctx context.Context, id weft.ID, isVerbose bool) (map[weft.ID]*memberService, error) {
	out := map[weft.ID]*memberService{}
	if !isVerbose {
		return out, nil
	}
	all, err := s.cfg.Services.Services(ctx)
	if err != nil {
		return nil, err
	}
	for i := range all {
		v := &all[i]
		m := &memberService{name: v.Spec.Name, info: network.ServiceInfo{Ports: []string{}, Tasks: []network.Task{}}}
		isOn := slices.ContainsFunc(v.Spec.Networks, func(t weft.NetworkTarget) bool { return t.Network == id })
		for _, vip := range v.VIPs {
			if vip.Network == id {
				isOn, m.info.VIP = true, vip.Addr.Addr()
			}
		}
		if !isOn {
			continue
		}
		for _, p := range v.Ports {
			m.info.Ports = append(m.info.Ports, fmt.Sprintf("Target: %s, Publish: %s", p.TargetText(), p.PublishedText()))
		}
		out[v.ID] = m
	}
	return out, nil
}

func nodeVTEP(n *weft.Node) netip.Addr {
	if n.DataPath.IsValid() {
		return n.DataPath
	}
	return n.Status.Addr
}

func attachedTo(t *weft.Task, id weft.ID) (netip.Prefix, bool) {
	for _, a := range t.Attachments {
		if a.Network == id {
			return a.Addr, true
		}
	}
	return netip.Prefix{}, false
}

// endpointID is 64 hexadecimal digits, as Docker's clients expect; it names the
// pair and nothing else.
func endpointID(task, net weft.ID) string {
	sum := sha256.Sum256([]byte("weft endpoint " + string(task) + " " + string(net)))
	return hex.EncodeToString(sum[:])
}

// dockerNetwork is the shape of /networks.
func dockerNetwork(n *weft.Network) network.Network {
	out := network.Network{
		Name: n.Spec.Name, ID: string(n.ID), Created: n.Meta.CreatedAt, Scope: "swarm", Driver: n.Spec.Driver,
		EnableIPv4: !n.Spec.NoIPv4, EnableIPv6: n.Spec.IPv6, Internal: n.Spec.Internal, Attachable: n.Spec.Attachable, Ingress: n.Spec.Ingress,
		IPAM:    network.IPAM{Driver: "default", Options: map[string]string{}, Config: []network.IPAMConfig{}},
		Options: map[string]string{}, Labels: orEmpty(n.Spec.Labels),
	}
	for k, v := range n.Spec.Options {
		out.Options[k] = v
	}
	if n.VNI != 0 {
		out.Options[vniOption] = strconv.FormatUint(uint64(n.VNI), 10)
	}
	for _, sub := range n.Spec.Subnets {
		out.IPAM.Config = append(out.IPAM.Config, network.IPAMConfig{Subnet: sub.Prefix, Gateway: sub.Gateway})
	}
	return out
}

// vniOption is where Docker shows the VNI of an overlay.
const vniOption = "com.docker.network.driver.overlay.vxlanid_list"

// swarmNetwork is the shape inside a task.
func swarmNetwork(n *weft.Network) swarm.Network {
	out := swarm.Network{
		ID: string(n.ID), Meta: dockerMeta(n.Meta),
		Spec: swarm.NetworkSpec{
			Annotations:         swarm.Annotations{Name: n.Spec.Name, Labels: orEmpty(n.Spec.Labels)},
			DriverConfiguration: &swarm.Driver{Name: n.Spec.Driver, Options: n.Spec.Options},
			IPv6Enabled:         n.Spec.IPv6,
			Internal:            n.Spec.Internal, Attachable: n.Spec.Attachable, Ingress: n.Spec.Ingress,
			IPAMOptions: &swarm.IPAMOptions{Driver: swarm.Driver{Name: "default"}},
			Scope:       "swarm",
		},
		DriverState: swarm.Driver{Name: n.Spec.Driver, Options: map[string]string{}},
		IPAMOptions: &swarm.IPAMOptions{Driver: swarm.Driver{Name: "default"}},
	}
	if n.VNI != 0 {
		out.DriverState.Options[vniOption] = strconv.FormatUint(uint64(n.VNI), 10)
	}
	for _, sub := range n.Spec.Subnets {
		out.IPAMOptions.Configs = append(out.IPAMOptions.Configs, swarm.IPAMConfig{Subnet: sub.Prefix, Gateway: sub.Gateway})
	}
	return out
}
