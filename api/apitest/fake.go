// Package apitest holds an in-memory cluster behind the interfaces of package
// api: one node that runs every task at once and in name only. Tests of api
// and of its clients run on it; it starts no goroutine and does no I/O.
package apitest

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/api"
)

// Cluster implements all back ends of api.Config. The zero value is not ready:
// use New. Safe for concurrent use.
type Cluster struct {
	// Now is the clock; tests with golden files fix it. Set before use.
	Now func() time.Time
	// NewID draws ids; tests with golden files count. Set before use.
	NewID func() weft.ID
	// Fail, when set before use, is asked before every call to the cluster
	// and its error returned: no leader, and the like.
	Fail func(method string) error
	// Counts are the repairs that the node tells of. Set before use.
	Counts []weft.RepairCount
	// Natives are the ways that the node tells of. Set before use.
	Natives []weft.Way

	mu       sync.Mutex // guards: all below
	index    uint64
	state    weft.LocalState
	cluster  weft.Cluster
	node     weft.Node
	services map[weft.ID]*weft.Service
	specs    map[weft.ID][]weft.SpecVersion
	tasks    map[weft.ID]*weft.Task
	networks map[weft.ID]*weft.Network
	images   []weft.Image
	nextPort uint16
	changed  chan struct{} // closed and replaced at each change of a task
}

var (
	_ api.Swarm          = (*Cluster)(nil)
	_ api.ServiceStore   = (*Cluster)(nil)
	_ api.TaskStore      = (*Cluster)(nil)
	_ api.NodeStore      = (*Cluster)(nil)
	_ api.NetworkStore   = (*Cluster)(nil)
	_ api.ContainerStore = (*Cluster)(nil)
	_ api.ImageStore     = (*Cluster)(nil)
	_ api.RepairLog      = (*Cluster)(nil)
	_ api.WayLog         = (*Cluster)(nil)
)

// New makes a node that is in no cluster.
func New() *Cluster {
	return &Cluster{
		Now: time.Now, NewID: weft.NewID, state: weft.LocalInactive,
		services: map[weft.ID]*weft.Service{}, specs: map[weft.ID][]weft.SpecVersion{},
		tasks: map[weft.ID]*weft.Task{}, networks: map[weft.ID]*weft.Network{},
		nextPort: weft.FirstPublishedPort, changed: make(chan struct{}),
	}
}

// Config fills in the back ends of c.
func (c *Cluster) Config() api.Config {
	return api.Config{Swarm: c, Services: c, Tasks: c, Nodes: c, Networks: c, Containers: c, Images: c, Repairs: c, Drains: c, Ways: c, Version: "0.0-test"}
}

func (c *Cluster) enter(method string) error {
	if c.Fail != nil {
		if err := c.Fail(method); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) metaLocked() weft.Meta {
	c.index++
	now := c.Now()
	return weft.Meta{Index: c.index, CreatedAt: now, UpdatedAt: now}
}

func (c *Cluster) touchLocked(m *weft.Meta, index uint64) error {
	if m.Index != index {
		return fmt.Errorf("object is at version %d: %w", m.Index, weft.ErrOutOfSequence)
	}
	c.index++
	m.Index, m.UpdatedAt = c.index, c.Now()
	return nil
}

// Local is the node's own view.
func (c *Cluster) Local() weft.LocalInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := weft.LocalInfo{
		State: c.state, Manager: c.state == weft.LocalActive, Description: description(), DataRoot: "/var/lib/weft",
		Engines: []weft.EngineChoice{{Kind: "overlay", Engine: "bridge", Chosen: true, Reason: "VXLAN and bridge devices work"}},
	}
	if l.Manager {
		l.Node, l.Addr = c.node.ID, c.node.Status.Addr
		l.Managers = []netip.AddrPort{c.node.Manager.Addr}
	}
	return l
}

// Drains returns what happens on a node whose neighbour was away once.
func (c *Cluster) Drains() (time.Time, []weft.RepairCount) {
	since, _ := c.Repairs()
	return since, []weft.RepairCount{
		{Kind: "confirmed", Count: 5, Last: since.Add(time.Minute), Object: "task 1", Reason: "by 2 other nodes"},
		{Kind: "passed", Count: 1, Last: since, Object: "task 2, node 3", Reason: "it did not answer within 2s"},
	}
}

// Repairs returns Counts, counted for an hour.
func (c *Cluster) Repairs() (time.Time, []weft.RepairCount) {
	return c.Now().Add(-time.Hour), c.Counts
}

// Ways returns Natives.
func (c *Cluster) Ways() []weft.Way { return c.Natives }

func description() weft.NodeDescription {
	return weft.NodeDescription{Hostname: "h1", OS: "linux", Arch: "x86_64", Kernel: "6.18.0", EngineVersion: "0.0-test", NanoCPUs: 2e9, MemoryBytes: 4 << 30}
}

// Init makes a cluster of this node, with the ingress network.
func (c *Cluster) Init(_ context.Context, r weft.InitRequest) (weft.ID, error) {
	if err := c.enter("Init"); err != nil {
		return "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	addr := netip.MustParseAddrPort("10.99.0.1:2377")
	if r.AdvertiseAddr.IsValid() {
		addr = r.AdvertiseAddr
	}
	c.state = weft.LocalActive
	c.node = weft.Node{
		ID: c.NewID(), Meta: c.metaLocked(), Spec: weft.NodeSpec{Role: weft.RoleManager, Availability: r.Availability},
		Description: description(), Status: weft.NodeStatus{State: weft.NodeReady, Addr: addr.Addr()}, DataPath: addr.Addr(),
		Manager: &weft.ManagerStatus{Addr: addr, Leader: true, Reachable: true},
	}
	c.cluster = weft.Cluster{
		ID: c.NewID(), Meta: c.metaLocked(), Spec: weft.DefaultClusterSpec(), AddrPools: weft.DefaultAddrPools(),
		MaskLength: cmp.Or(r.MaskLength, weft.DefaultMaskLength), DataPathPort: cmp.Or(r.DataPathPort, weft.VXLANPort),
		Tokens: weft.JoinTokens{Worker: "SWMTKN-1-ca-worker0", Manager: "SWMTKN-1-ca-manager0"},
	}
	id := c.NewID()
	c.networks[id] = &weft.Network{ID: id, Meta: c.metaLocked(), VNI: weft.IngressVNI, Spec: weft.NetworkSpec{
		Name: weft.IngressName, Driver: weft.DriverOverlay, Ingress: true, Labels: map[string]string{},
		Subnets: []weft.Subnet{{Prefix: netip.MustParsePrefix("10.255.0.0/16"), Gateway: netip.MustParseAddr("10.255.0.1")}},
	}}
	return c.node.ID, nil
}

// Join takes any token that begins as one.
func (c *Cluster) Join(ctx context.Context, r weft.JoinRequest) error {
	if !strings.HasPrefix(r.Token, "SWMTKN-1-") {
		return fmt.Errorf("join %s: the token is not valid: %w", r.Remotes[0], weft.ErrInvalid)
	}
	_, err := c.Init(ctx, weft.InitRequest{AdvertiseAddr: r.AdvertiseAddr, Availability: r.Availability})
	return err
}

// Leave forgets everything; a manager must be forced.
func (c *Cluster) Leave(_ context.Context, force bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !force {
		return fmt.Errorf("removing the last manager erases all current state of the swarm. Use `--force` to ignore this message: %w", weft.ErrUnavailable)
	}
	c.state, c.index = weft.LocalInactive, 0
	clear(c.services)
	clear(c.specs)
	clear(c.tasks)
	clear(c.networks)
	return nil
}

// Cluster is the cluster object.
func (c *Cluster) Cluster(context.Context) (weft.Cluster, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cluster, c.enter("Cluster")
}

// UpdateCluster stores the spec; a rotated token ends with the new index.
func (c *Cluster) UpdateCluster(_ context.Context, index uint64, u api.ClusterUpdate) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.touchLocked(&c.cluster.Meta, index); err != nil {
		return err
	}
	if u.RotateKeys && c.cluster.KeyEpoch > 0 { // the leader says so for some seconds
		return fmt.Errorf("rotate the keys of encrypted networks: the last change is being taken up: %w", weft.ErrConflict)
	}
	c.cluster.Spec = u.Spec
	if u.RotateKeys {
		c.cluster.KeyEpoch++
	}
	if u.RotateWorker {
		c.cluster.Tokens.Worker = fmt.Sprintf("SWMTKN-1-ca-worker%d", c.index)
	}
	if u.RotateManager {
		c.cluster.Tokens.Manager = fmt.Sprintf("SWMTKN-1-ca-manager%d", c.index)
	}
	return nil
}

// Nodes is the one node.
func (c *Cluster) Nodes(context.Context) ([]weft.Node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return []weft.Node{c.node}, c.enter("Nodes")
}

// UpdateNode stores the spec.
func (c *Cluster) UpdateNode(_ context.Context, id weft.ID, index uint64, spec weft.NodeSpec) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id != c.node.ID {
		return fmt.Errorf("node %s: %w", id, weft.ErrNotFound)
	}
	c.node.Spec = spec
	return c.touchLocked(&c.node.Meta, index)
}

// RemoveNode refuses: the one node is up.
func (c *Cluster) RemoveNode(_ context.Context, id weft.ID, _ bool) error {
	return fmt.Errorf("node %s is a manager and not down: %w", id, weft.ErrConflict)
}

// Networks lists all networks by name.
func (c *Cluster) Networks(context.Context) ([]weft.Network, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return values(c.networks, func(a, b *weft.Network) int { return cmp.Compare(a.Spec.Name, b.Spec.Name) }), c.enter("Networks")
}

// CreateNetwork gives a network the next VNI and, when it asks for none, a
// subnet by that number.
func (c *Cluster) CreateNetwork(_ context.Context, spec weft.NetworkSpec) (weft.Network, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.networks {
		if n.Spec.Name == spec.Name {
			return weft.Network{}, fmt.Errorf("network with name %s already exists: %w", spec.Name, weft.ErrConflict)
		}
	}
	k := len(c.networks)
	if _, given := spec.Subnet(false); !given && !spec.NoIPv4 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(k), 0}), 24)
		spec.Subnets = append(spec.Subnets, weft.Subnet{Prefix: p})
	}
	if _, given := spec.Subnet(true); !given && spec.IPv6 {
		p := netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 7: byte(k)}), 64)
		spec.Subnets = append(spec.Subnets, weft.Subnet{Prefix: p})
	}
	for i, s := range spec.Subnets {
		if !s.Gateway.IsValid() {
			spec.Subnets[i].Gateway = s.Prefix.Addr().Next()
		}
	}
	n := &weft.Network{ID: c.NewID(), Meta: c.metaLocked(), Spec: spec, VNI: weft.IngressVNI + uint32(k)}
	c.networks[n.ID] = n
	return *n, nil
}

// RemoveNetwork refuses while a service uses it.
func (c *Cluster) RemoveNetwork(_ context.Context, id weft.ID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.services {
		if slices.ContainsFunc(s.Spec.Networks, func(t weft.NetworkTarget) bool { return t.Network == id }) {
			return fmt.Errorf("network %s is in use by service %s: %w", c.networks[id].Spec.Name, s.Spec.Name, weft.ErrConflict)
		}
	}
	delete(c.networks, id)
	return nil
}

func values[T any](m map[weft.ID]*T, order func(a, b *T) int) []T {
	var ptrs []*T
	for _, v := range m {
		ptrs = append(ptrs, v)
	}
	slices.SortFunc(ptrs, order)
	out := []T{}
	for _, p := range ptrs {
		out = append(out, *p)
	}
	return out
}

// Images lists the images that were loaded, pulled and tagged.
func (c *Cluster) Images(context.Context) ([]weft.Image, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.images), nil
}

func fakeDigest() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // cannot fail, crypto/rand
	return "sha256:" + hex.EncodeToString(b[:])
}

// AddImage makes an image with a name and a digest under the same name.
func (c *Cluster) AddImage(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	repo := name[:strings.LastIndexByte(name, ':')]
	c.images = append(c.images, weft.Image{
		ID: fakeDigest(), Tags: []string{name}, Digests: []string{repo + "@" + fakeDigest()},
		Created: c.Now(), Size: 1 << 20, Arch: "amd64", OS: "linux",
	})
}

// LoadImage takes any bytes but "broken" for an archive of one image.
func (c *Cluster) LoadImage(_ context.Context, r io.Reader) ([]string, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read archive: %w", err)
	}
	if strings.HasPrefix(string(b), "broken") {
		return nil, fmt.Errorf("read archive: not a tar: %w", weft.ErrInvalid)
	}
	c.AddImage("docker.io/library/loaded:latest")
	return []string{"docker.io/library/loaded:latest"}, nil
}

// RemoveImage removes by name or id.
func (c *Cluster) RemoveImage(_ context.Context, ref string, _ bool) (untagged, deleted []string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, img := range c.images {
		if img.ID == ref || slices.ContainsFunc(img.Tags, func(t string) bool { return strings.Contains(t, "/"+ref) }) {
			c.images = slices.Delete(c.images, i, i+1)
			return img.Tags, []string{img.ID}, nil
		}
	}
	return nil, nil, fmt.Errorf("image %s: %w", ref, weft.ErrNotFound)
}

// PullImage reports two steps; an image called "missing" does not exist.
func (c *Cluster) PullImage(_ context.Context, ref, _ string, report func(id, status string, current, total int64)) error {
	if strings.Contains(ref, "missing") {
		return fmt.Errorf("pull %s: manifest unknown: %w", ref, weft.ErrNotFound)
	}
	report("layer1", "Downloading", 1, 2)
	report("layer1", "Pull complete", 2, 2)
	c.AddImage(ref)
	return nil
}

// TagImage adds a name.
func (c *Cluster) TagImage(_ context.Context, ref, name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.images {
		if strings.HasSuffix(c.images[i].Tags[0], "/"+ref) {
			c.images[i].Tags = append(slices.Clone(c.images[i].Tags), name)
			return nil
		}
	}
	return fmt.Errorf("image %s: %w", ref, weft.ErrNotFound)
}
