package orchestrator

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/orchestrator/schedule"
	"github.com/weftnet/weft/orchestrator/state"
)

// portRetry is how soon the leader looks again for a node for a task that asks for
// ports in mode host: a socket of a host that is in the way is no change that wakes
// it. About as often as nodes report theirs.
const portRetry = 3 * time.Second

// portChooser gives tasks their ports in mode host in one pass. Ports that the
// service names were judged by the scheduler as far as its node goes; others are
// chosen here, for each task by itself, from those free on its node.
type portChooser struct {
	p      *pass
	nodes  map[weft.ID]*schedule.NodeInfo
	of     map[weft.ID][]weft.PortSpec // by task
	none   map[weft.ID]string          // why a task gets none, and no node
	placed []placed                    // tasks with ports, in the order of decisions
	fixed  map[weft.ID][]weft.PortSpec // named ports of this pass, by node
}

type placed struct{ task, service, node weft.ID }

func newPortChooser(p *pass, nodes []schedule.NodeInfo) *portChooser {
	c := &portChooser{
		p: p, nodes: map[weft.ID]*schedule.NodeInfo{},
		of: map[weft.ID][]weft.PortSpec{}, none: map[weft.ID]string{}, fixed: map[weft.ID][]weft.PortSpec{},
	}
	for i := range nodes {
		c.nodes[nodes[i].Node.ID] = &nodes[i]
	}
	return c
}

// asks reports whether a task wants ports in mode host.
func (c *portChooser) asks(t *weft.Task) bool {
	spec, ok := c.p.view.Spec(t.Service, t.SpecVersion)
	return ok && len(spec.Spec.HostPorts()) > 0
}

// want notes what a task needs on the node that it goes to, if on any.
func (c *portChooser) want(t *weft.Task, node weft.ID) {
	if node == "" {
		return
	}
	spec, ok := c.p.view.Spec(t.Service, t.SpecVersion)
	if !ok {
		return
	}
	ports := spec.Spec.HostPorts()
	if len(ports) == 0 {
		return
	}
	c.of[t.ID] = ports
	c.placed = append(c.placed, placed{t.ID, t.Service, node})
	for _, port := range ports {
		if port.Published != 0 {
			c.fixed[node] = append(c.fixed[node], port)
		}
	}
}

// choose chooses. A service of the mesh that is created at the same time must not
// get the same port, and one may have been given a port that older tasks still ask
// for: so it takes the turn to edit, looks once more at what there is, and leaves
// the turn to the pass, which gives it back when all is stored.
func (c *portChooser) choose(ctx context.Context) error {
	if len(c.placed) == 0 {
		return nil
	}
	release, err := c.p.edit(ctx)
	if err != nil {
		return fmt.Errorf("choose ports: %w", err)
	}
	c.p.settled = release
	v := c.p.store.View()
	cluster, _ := v.Cluster()
	services := v.Services()
	mesh, err := meshPorts(cluster, services)
	if err != nil {
		return err
	}
	tables := map[weft.ID]*ipam.Ports{}
	for _, k := range c.placed {
		if c.blocked(v, mesh, k) {
			continue
		}
		if !slices.ContainsFunc(c.of[k.task], func(p weft.PortSpec) bool { return p.Published == 0 }) {
			continue
		}
		if tables[k.node] == nil {
			if tables[k.node], err = c.table(services, cluster, k.node); err != nil {
				return err
			}
		}
		c.pick(tables[k.node], k)
	}
	return nil
}

// blocked reports whether a named port has gone to the mesh. A service that moves
// its own port into the mesh keeps its older tasks going.
func (c *portChooser) blocked(v *state.Snapshot, mesh *ipam.Ports, k placed) bool {
	svc, _ := v.Service(k.service)
	for _, port := range c.of[k.task] {
		if port.Published == 0 {
			continue
		}
		if by, taken := mesh.Holder(port, "service "+svc.Spec.Name); taken {
			c.none[k.task] = fmt.Sprintf("port %s (mode host) is in use on every node by %s", port, by.By)
			return true
		}
	}
	return false
}

// table is what is taken on a node.
func (c *portChooser) table(services []weft.Service, cluster weft.Cluster, node weft.ID) (*ipam.Ports, error) {
	ports, err := meshPorts(cluster, services)
	if err != nil {
		return nil, err
	}
	// Also where no task of theirs is yet: one may come.
	holdServices(ports, services, weft.PublishHost, "")
	if n := c.nodes[node]; n != nil {
		holdNode(ports, &n.Node, nil)
		for _, h := range n.Ports {
			_ = ports.Hold(h.Port, h.By) //nolint:errcheck // it was valid when it was stored
		}
	}
	holdAll(ports, c.fixed[node], weft.PublishHost, "a task of this pass")
	return ports, nil
}

func (c *portChooser) pick(free *ipam.Ports, k placed) {
	ports := c.of[k.task]
	for i := range ports {
		if ports[i].Published != 0 {
			continue
		}
		first, err := free.Pick(ports[i], "task "+string(k.task))
		if err != nil {
			c.none[k.task] = fmt.Sprintf("no port for mode host on node %s: %s", c.nameOf(k.node), weft.Text(err))
			return
		}
		ports[i].Published = first
	}
}

func (c *portChooser) nameOf(node weft.ID) string {
	if n := c.nodes[node]; n != nil {
		return nodeName(n.Node)
	}
	return string(node)
}

// settle is the decision, or that the task waits because it did not get its ports.
func (c *portChooser) settle(d schedule.Decision) schedule.Decision {
	if why := c.none[d.Task]; why != "" {
		return schedule.Decision{Task: d.Task, Reason: why}
	}
	return d
}
