package netstate

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/dns"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan"
)

// The model: a few nodes on one small network, the leader's state in versions,
// and on each node the tables as its passes leave them, one table at a time. The
// gossip that a node has may be of any earlier version, owner by owner.

// reuseVersion is the leader's state at one moment.
type reuseVersion struct {
	services []Service
	tasks    map[weft.ID]reuseTask // that have not ended
	ended    map[weft.ID]bool      // tasks whose addresses rest
}

type reuseTask struct {
	node    int
	service weft.ID
	addr    netip.Prefix
}

// reuseNode is one node's tables and what it still has to do to them.
type reuseNode struct {
	Node
	version int         // of the leader's state, as last heard
	gossip  map[int]int // by owner: the version of its endpoints
	ended   map[weft.ID]bool
	steps   []func() // of the pass under way
	// carried is the version that the last whole pass was about.
	carried int

	have  vxlan.State
	names dns.Records
	lb    []ingress.Network
	table vxlan.State // what the kernel has: the union, between two steps
}

type reuseModel struct {
	versions []reuseVersion
	nodes    []*reuseNode
	frozen   map[int]bool // nodes that do nothing, not even confirm
	resting  map[netip.Prefix]int
	next     int
}

func (m *reuseModel) now() *reuseVersion { return &m.versions[len(m.versions)-1] }

// change begins a new version as a copy of the last.
func (m *reuseModel) change(f func(v *reuseVersion)) {
	last := m.now()
	v := reuseVersion{services: slices.Clone(last.services), tasks: maps.Clone(last.tasks), ended: map[weft.ID]bool{}}
	for id := range last.ended {
		v.ended[id] = true
	}
	f(&v)
	m.versions = append(m.versions, v)
}

// free lists the addresses that the leader may give out.
func (m *reuseModel) free() []netip.Prefix {
	var out []netip.Prefix
	for a := netip.MustParseAddr("10.0.16.2"); a.Compare(netip.MustParseAddr("10.0.16.7")) < 0; a = a.Next() {
		p := netip.PrefixFrom(a, 20)
		_, rests := m.resting[p]
		for _, t := range m.now().tasks {
			rests = rests || t.addr == p
		}
		for _, s := range m.now().services {
			rests = rests || s.VIPs[0].Addr == p
		}
		if !rests {
			out = append(out, p)
		}
	}
	return out
}

// release ends the rest of what all nodes have confirmed; force does so without
// those that are frozen, as after the bound.
func (m *reuseModel) release(force bool) {
	for p, freed := range m.resting {
		ok := true
		for i, n := range m.nodes {
			ok = ok && (n.carried >= freed || force && m.frozen[i])
		}
		if ok {
			delete(m.resting, p)
		}
	}
	// Tasks are mentioned for as long as an address of theirs rests.
	if len(m.resting) == 0 {
		m.change(func(v *reuseVersion) { v.ended = map[weft.ID]bool{} })
	}
}

func (m *reuseModel) hear(i int, gossip func(owner int) int) {
	n := m.nodes[i]
	n.version = len(m.versions) - 1
	maps.Copy(n.ended, m.versions[n.version].ended)
	for o := range m.nodes {
		n.gossip[o] = gossip(o)
	}
}

// input is what the node would derive from now: as package agent makes it.
func (m *reuseModel) input(i int) Input {
	n := m.nodes[i]
	v := m.versions[n.version]
	in := Input{Self: n.Node, NetNSDir: "/ns", DataPathPort: 4789, MTU: 1450, Networks: []weft.Network{front}, Services: v.services}
	for o, owner := range m.nodes {
		in.Nodes = append(in.Nodes, owner.Node)
		for id, t := range m.versions[n.gossip[o]].tasks {
			if o != i && t.node == o && !n.ended[id] {
				in.Endpoints = append(in.Endpoints, weft.OwnedEndpoint{Owner: owner.ID, VTEP: owner.VTEP, Endpoint: weft.Endpoint{
					Network: front.ID, Task: id, Service: t.service, Addr: t.addr.Addr(), State: weft.EndpointReady,
				}})
			}
		}
	}
	for id, t := range v.tasks {
		if t.node == i {
			in.Local = append(in.Local, LocalTask{NetNS: "/ns/" + string(id), State: weft.EndpointReady, Task: weft.Task{
				ID: id, Service: t.service, Attachments: []weft.Attachment{{Network: front.ID, Addr: t.addr}},
			}})
		}
	}
	return in
}

// pass queues the steps of one pass, as package agent takes them.
func (m *reuseModel) pass(i int) {
	n := m.nodes[i]
	in, version := m.input(i), n.version
	out := Derive(in)
	outs := []Output{out}
	if mid, ok := Between(n.have, out.Overlay, in); ok {
		outs = []Output{Derive(mid), out}
	}
	n.steps = nil
	for _, o := range outs {
		n.steps = append(n.steps,
			func() { n.table = Union(n.have, o.Overlay) },
			func() { n.lb = o.Ingress.Networks },
			func() { n.names = o.Names },
			func() { n.table, n.have = o.Overlay, o.Overlay })
	}
	n.steps = append(n.steps, func() { n.carried = version })
}

// deliver follows a packet from node i to an address: which task gets it, "" if
// none.
func (m *reuseModel) deliver(i int, to netip.Addr) weft.ID {
	net, ok := m.nodes[i].table.Networks[front.VNI]
	if !ok {
		return ""
	}
	var mac net6
	for _, p := range net.Ports {
		if p.Addr.Addr() == to {
			mac = macOf(p.MAC)
		}
	}
	for _, p := range net.Peers {
		if p.Addr == to {
			mac = macOf(p.MAC)
		}
	}
	for _, v := range net.VIPs {
		if v.Addr == to {
			mac = macOf(v.MAC)
		}
	}
	for _, l := range m.nodes[i].lb {
		for _, s := range l.Services {
			if s.VIP == to && len(s.Backends) > 0 && macOf(s.MAC) == mac {
				mac = macOf(s.Backends[m.next%len(s.Backends)].MAC)
			}
		}
	}
	if t := m.port(i, mac); t != "" {
		return t
	}
	for _, p := range net.Peers {
		if macOf(p.MAC) == mac {
			for o, owner := range m.nodes {
				if owner.VTEP == p.VTEP {
					return m.port(o, mac)
				}
			}
		}
	}
	return ""
}

type net6 [6]byte

func macOf(m net.HardwareAddr) net6 { return net6(m) }

// port is the task behind a hardware address on a node, if its process lives.
func (m *reuseModel) port(i int, mac net6) weft.ID {
	for _, p := range m.nodes[i].table.Networks[front.VNI].Ports {
		if _, lives := m.now().tasks[p.Task]; lives && macOf(p.MAC) == mac {
			return p.Task
		}
	}
	return ""
}

// check asks for every name on every node, and follows a packet to each address
// of the answer.
func (m *reuseModel) check(t *rapid.T) (answered int) {
	for i, n := range m.nodes {
		for _, zone := range n.names.Networks {
			for _, s := range zone.Services {
				to := slices.Clone(s.VIP)
				for _, k := range s.Tasks {
					to = append(to, k.Addrs...)
				}
				for _, a := range to {
					task := m.deliver(i, a)
					if task == "" {
						continue
					}
					answered++
					if got := m.now().tasks[task].service; string(got) != s.Name {
						t.Fatalf("%s asked for %s at %s, and task %s of %s got it", n.ID, s.Name, a, task, got)
					}
				}
			}
		}
	}
	return answered
}

// TestReusedAddressesNeverMislead: whatever order addresses are freed and given
// out in, however far nodes lag behind the leader and behind one another's
// gossip, between any two writes to any table: who asks for a service by name
// reaches a task of it, or nobody. A frozen node misses the rest of an address
// altogether, as one does that is away for longer than the bound.
func TestReusedAddressesNeverMislead(t *testing.T) {
	total := 0
	rapid.Check(t, func(t *rapid.T) {
		m := &reuseModel{versions: []reuseVersion{{tasks: map[weft.ID]reuseTask{}}}, frozen: map[int]bool{}, resting: map[netip.Prefix]int{}}
		for i := range 3 {
			m.nodes = append(m.nodes, &reuseNode{Node: Node{ID: weft.ID(fmt.Sprintf("n%d", i)), VTEP: netip.AddrFrom4([4]byte{10, 99, 0, byte(i + 1)})},
				gossip: map[int]int{}, ended: map[weft.ID]bool{}})
		}
		node := rapid.IntRange(0, len(m.nodes)-1)
		for range 400 {
			switch rapid.IntRange(0, 9).Draw(t, "op") {
			case 0, 1, 2:
				m.create(t, node.Draw(t, "on"))
			case 3:
				m.end(t)
			case 4, 5, 6:
				i := node.Draw(t, "node")
				if m.frozen[i] {
					break
				}
				if len(m.nodes[i].steps) == 0 {
					m.hear(i, func(o int) int {
						return rapid.IntRange(m.nodes[i].gossip[o], len(m.versions)-1).Draw(t, "gossip")
					})
					m.pass(i)
				}
				for range rapid.IntRange(1, 9).Draw(t, "steps") {
					if len(m.nodes[i].steps) > 0 {
						m.nodes[i].steps[0]()
						m.nodes[i].steps = m.nodes[i].steps[1:]
						total += m.check(t)
					}
				}
			case 7:
				i := node.Draw(t, "node")
				m.frozen[i] = !m.frozen[i] && len(m.frozen) < 1
				if !m.frozen[i] {
					delete(m.frozen, i)
				}
			case 8:
				m.release(false)
			default:
				m.release(true)
			}
			m.next++
			total += m.check(t)
		}
	})
	t.Logf("%d packets arrived", total)
	if total < 1000 {
		t.Errorf("only %d packets arrived at all", total)
	}
}

// create makes a service with its address, or a task of one.
func (m *reuseModel) create(t *rapid.T, on int) {
	free := m.free()
	if len(free) == 0 {
		return
	}
	addr := rapid.SampledFrom(free).Draw(t, "addr")
	m.change(func(v *reuseVersion) {
		if len(v.services) == 0 || len(v.services) < 3 && rapid.IntRange(0, 3).Draw(t, "what") == 0 {
			m.next++
			id := weft.ID(fmt.Sprintf("s%d", m.next))
			v.services = append(v.services, Service{ID: id, Name: string(id), VIPs: []weft.VIP{{Network: front.ID, Addr: addr}},
				Networks: []weft.NetworkTarget{{Network: front.ID}}})
			return
		}
		v.tasks[weft.NewID()] = reuseTask{node: on, service: rapid.SampledFrom(v.services).Draw(t, "service").ID, addr: addr}
	})
}

// end stops a task, or removes a service that has none; what it had rests.
func (m *reuseModel) end(t *rapid.T) {
	m.change(func(v *reuseVersion) {
		at := len(m.versions) // of the version that this becomes
		used := map[weft.ID]bool{}
		var ids []weft.ID
		for id, k := range v.tasks {
			used[k.service] = true
			ids = append(ids, id)
		}
		slices.SortFunc(ids, func(a, b weft.ID) int { return v.tasks[a].addr.Addr().Compare(v.tasks[b].addr.Addr()) })
		for i, s := range v.services {
			if !used[s.ID] && rapid.Bool().Draw(t, "service") {
				m.resting[s.VIPs[0].Addr] = at
				v.services = slices.Delete(slices.Clone(v.services), i, i+1)
				return
			}
		}
		if len(ids) > 0 {
			id := rapid.SampledFrom(ids).Draw(t, "task")
			m.resting[v.tasks[id].addr] = at
			v.ended[id] = true
			delete(v.tasks, id)
		}
	})
}
