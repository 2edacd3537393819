package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/orchestrator/ca"
)

// gossipWord makes this program the nodes of bench gossip. It runs in a network
// namespace of its own.
const gossipWord = "gossip-nodes"

// joining is how many nodes join at a time; those before them are in their tables then.
// Of 200 that begin at once on two processors most of NetworkDB's joins fail, and with five at
// a time both tables' joins take a slow machine's processors for minutes. As many join in
// peers/networkdb.
const joining = 2

// serveGossip obeys the lines of board.go with weft's nodes; they end with stdin.
func serveGossip(stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, cancel := context.WithCancel(context.Background())
	f := &weftFleet{ctx: ctx}
	err := serveFleet(stdin, stdout, f)
	cancel()
	f.wg.Wait()
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

// weftFleet is nodes of package gossip with certificates of one authority.
type weftFleet struct {
	ctx   context.Context
	wg    sync.WaitGroup // of all that nodes run
	net   weft.ID
	nodes []*fleetNode
}

var _ fleet = &weftFleet{}

// fleetNode is a node and what it publishes.
type fleetNode struct {
	*gossip.Gossip
	id  weft.ID
	mu  sync.Mutex // guards: own
	own []weft.Endpoint
}

func (f *weftFleet) start(n int, b *board) error {
	if err := loopbackUp(); err != nil {
		return err
	}
	f.net = weft.NewID()
	if err := f.make(n); err != nil {
		return err
	}
	b.begin(n) // certificates are there before a node starts
	turns := make(chan struct{}, joining)
	for i, node := range f.nodes {
		turns <- struct{}{}
		node.Attach([]weft.ID{f.net})
		if err := f.put(i, []int{i}, nil); err != nil {
			return err
		}
		f.wg.Go(func() { f.watch(i, b) })
		f.wg.Go(func() {
			if err := node.Run(f.ctx); err != nil {
				slog.Error("a node has ended", weft.KeyErr, err)
			}
		})
		f.wg.Go(func() {
			f.joined(node, max(0, i-joining))
			<-turns
		})
	}
	return nil
}

// joined waits until a node sees so many endpoints.
func (f *weftFleet) joined(node *fleetNode, n int) {
	for {
		all, changed := node.Snapshot()
		if len(all) > n {
			return
		}
		select {
		case <-changed:
		case <-f.ctx.Done():
			return
		}
	}
}

// make makes n nodes that know the first one's address.
func (f *weftFleet) make(n int) error {
	now := time.Now()
	root, err := ca.NewRoot("bench", now)
	if err != nil {
		return err
	}
	cluster := weft.NewID()
	for i := range n {
		id := weft.NewID()
		key, csr, err := ca.NewCSR()
		if err != nil {
			return err
		}
		cert, err := ca.Sign(root, csr, ca.Identity{Node: id, Role: weft.RoleWorker, Cluster: cluster}, now)
		if err != nil {
			return err
		}
		c, err := ca.NewCredentials(ca.Bundle{Cert: cert, Key: key, CA: root.Cert}, time.Now)
		if err != nil {
			return err
		}
		addr := fleetAddr(i)
		g, err := gossip.New(gossip.Config{
			Node: id, Bind: addr, Advertise: addr, VTEP: addr.Addr(),
			Keys: weft.GossipRing{Sends: weft.GossipKey{Key: []byte("0123456789abcdef0123456789abcdef")}},
			Log:  slog.New(slog.DiscardHandler), Identity: fleetIdentity{c}, Seeds: func() []netip.AddrPort { return []netip.AddrPort{fleetAddr(0)} },
		})
		if err != nil {
			return err
		}
		f.nodes = append(f.nodes, &fleetNode{Gossip: g, id: id})
	}
	return nil
}

func fleetAddr(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, byte(1 + i/250), byte(1 + i%250)}), weft.GossipPort)
}

// watch reads the table at every change, as the agent does.
func (f *weftFleet) watch(i int, b *board) {
	node := f.nodes[i]
	seen := make([]bool, maxKey)
	for {
		all, changed := node.Snapshot()
		var news []int
		for _, e := range all {
			if k := fleetKey(e.Addr); e.Owner != node.id && !seen[k] {
				seen[k] = true
				news = append(news, k)
			}
		}
		b.saw(i, news...)
		select {
		case <-changed:
		case <-f.ctx.Done():
			return
		}
	}
}

// put implements fleet.
func (f *weftFleet) put(node int, keys, old []int) error {
	if node >= len(f.nodes) {
		return fmt.Errorf("node %d of %d", node, len(f.nodes))
	}
	n := f.nodes[node]
	n.mu.Lock()
	defer n.mu.Unlock()
	n.own = slices.DeleteFunc(n.own, func(e weft.Endpoint) bool { return slices.Contains(old, fleetKey(e.Addr)) })
	for _, k := range keys {
		n.own = append(n.own, weft.Endpoint{
			Network: f.net, Task: weft.NewID(), Service: fleetService(k), Slot: uint64(k), State: weft.EndpointReady,
			Addr: netip.AddrFrom4([4]byte{10, byte(k >> 16), byte(k >> 8), byte(k)}),
		})
	}
	n.Publish(n.own)
	return nil
}

// fleetService is that of a key: tens of tasks each.
func fleetService(k int) weft.ID { return weft.ID(fmt.Sprintf("service%018d", k/50)) }

// fleetKey is what the address of an endpoint was made from.
func fleetKey(a netip.Addr) int {
	b := a.As4()
	return int(b[1])<<16 | int(b[2])<<8 | int(b[3])
}

// fleetIdentity is a node's certificate as gossip takes it.
type fleetIdentity struct{ *ca.Credentials }

var _ gossip.Identity = fleetIdentity{}

// Trust implements gossip.Identity.
func (i fleetIdentity) Trust(cert []byte) (weft.ID, *ecdsa.PublicKey, error) {
	id, key, err := i.Credentials.Trust(cert)
	return id.Node, key, err
}

// ServerTLS implements gossip.Identity.
func (i fleetIdentity) ServerTLS() *tls.Config { return i.GossipConfig() }

// ClientTLS implements gossip.Identity.
func (i fleetIdentity) ClientTLS(peer weft.ID) *tls.Config {
	return i.ClientConfig(ca.ProtoGossip, ca.Peer{Node: peer})
}

// loopbackUp makes a new namespace's addresses of 127/8 work.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring the loopback device up: %w", err)
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("bring the loopback device up: %w", err)
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r); err != nil {
		return fmt.Errorf("bring the loopback device up: %w", err)
	}
	return nil
}
