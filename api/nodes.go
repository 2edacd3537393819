package api

import (
	"cmp"
	"net/http"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

// nodeRules: what node update honours. The role is compared with the node's by
// the handler.
func nodeRules() ruleSet {
	r := ruleSet{}
	r.honour("", "Labels", "Availability", "Role")
	return r
}

func (s *Server) nodeList(c *call) error {
	f, err := c.filters("id", "name", "label", "node.label", "role", "membership")
	if err != nil {
		return err
	}
	if err := f.oneOf("role", "worker", "manager"); err != nil {
		return err
	}
	if err := f.oneOf("membership", "accepted", "pending"); err != nil {
		return err
	}
	all, err := s.cfg.Nodes.Nodes(c.Context())
	if err != nil {
		return err
	}
	out := []swarm.Node{}
	for i := range all {
		n := &all[i]
		// "label" is Docker's filter on engine labels, of which there are none.
		if f.prefix("id", string(n.ID)) && f.prefix("name", n.Description.Hostname) &&
			f.labels("node.label", n.Spec.Labels) && f.labels("label", nil) &&
			f.has("role", n.Spec.Role.String()) && f.has("membership", "accepted") {
			out = append(out, dockerNode(n))
		}
	}
	slices.SortFunc(out, func(a, b swarm.Node) int {
		return cmp.Or(cmp.Compare(a.Description.Hostname, b.Description.Hostname), cmp.Compare(a.ID, b.ID))
	})
	return c.json(out)
}

func (s *Server) nodeInspect(c *call) error {
	n, err := s.node(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	return c.json(dockerNode(&n))
}

func (s *Server) nodeUpdate(c *call) error {
	index, err := c.index()
	if err != nil {
		return err
	}
	n, err := s.node(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	var body swarm.NodeSpec
	if err := decode(c, &body); err != nil {
		return err
	}
	if err := s.rules.node.check(body); err != nil {
		return err
	}
	spec := weft.NodeSpec{Labels: orEmpty(body.Labels), Role: n.Spec.Role}
	if spec.Availability, err = availability(body.Availability, false); err != nil {
		return err
	}
	switch role := string(body.Role); {
	case role != "worker" && role != "manager":
		return invalidf("Role: %q must be worker or manager", role)
	case role != n.Spec.Role.String():
		return unsupportedf("Role: promoting and demoting nodes is not supported yet: let node %s leave and join again with the token of the other role", n.Description.Hostname)
	}
	if err := s.cfg.Nodes.UpdateNode(c.Context(), n.ID, index, spec); err != nil {
		return err
	}
	return c.status(http.StatusOK)
}

func (s *Server) nodeRemove(c *call) error {
	n, err := s.node(c.Context(), c.vars["name"])
	if err != nil {
		return err
	}
	if err := s.cfg.Nodes.RemoveNode(c.Context(), n.ID, c.bool("force")); err != nil {
		return err
	}
	return c.status(http.StatusOK)
}

// availability parses Docker's word; isOptional lets "" stand for active, as
// in init and join.
func availability(a swarm.NodeAvailability, isOptional bool) (weft.Availability, error) {
	switch strings.ToLower(string(a)) {
	case "active":
		return weft.AvailabilityActive, nil
	case "pause":
		return weft.AvailabilityPause, nil
	case "drain":
		return weft.AvailabilityDrain, nil
	case "":
		if isOptional {
			return weft.AvailabilityActive, nil
		}
	}
	return 0, invalidf("Availability: %q must be active, pause or drain", a)
}

func dockerNode(n *weft.Node) swarm.Node {
	d := &n.Description
	out := swarm.Node{
		ID:   string(n.ID),
		Meta: dockerMeta(n.Meta),
		Spec: swarm.NodeSpec{
			Annotations:  swarm.Annotations{Labels: orEmpty(n.Spec.Labels)},
			Role:         swarm.NodeRole(n.Spec.Role.String()),
			Availability: swarm.NodeAvailability(n.Spec.Availability.String()),
		},
		Description: swarm.NodeDescription{
			Hostname:  d.Hostname,
			Platform:  swarm.Platform{Architecture: d.Arch, OS: d.OS},
			Resources: swarm.Resources{NanoCPUs: d.NanoCPUs, MemoryBytes: d.MemoryBytes},
			Engine: swarm.EngineDescription{
				EngineVersion: d.EngineVersion,
				Plugins:       []swarm.PluginDescription{{Type: "Network", Name: weft.DriverOverlay}, {Type: "Volume", Name: "local"}},
			},
		},
		Status: swarm.NodeStatus{State: swarm.NodeState(n.Status.State.String()), Message: n.Status.Message},
	}
	if n.Status.Addr.IsValid() {
		out.Status.Addr = n.Status.Addr.String()
	}
	if m := n.Manager; m != nil {
		out.ManagerStatus = &swarm.ManagerStatus{Leader: m.Leader, Reachability: swarm.ReachabilityUnreachable}
		if m.Reachable {
			out.ManagerStatus.Reachability = swarm.ReachabilityReachable
		}
		if m.Addr.IsValid() {
			out.ManagerStatus.Addr = m.Addr.String()
		}
	}
	return out
}
