package linux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// Address plan: the underlay is 10.99.7.0/24 and host i has .i in it; the
// overlay is 10.100.0.0/24 and fd77::/64, task t of host i has 10*i+t.
const (
	testVNI  = 5001
	testPort = 4789
	testMTU  = 1450
)

// host is one node in a namespace of its own.
type host struct {
	t    testing.TB
	i    int
	ns   *netns.Handle
	node weft.ID
	k    *Kernel
	dir  string
	// repairs are those that were reported and not yet taken.
	repairs []weft.Repair
	// under6: the VTEP is of IPv6.
	under6 bool
}

// rig makes n hosts on one bridge in the test's own namespace.
func rig(t testing.TB, n int) []*host {
	t.Helper()
	dir := t.TempDir()
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "under"}}
	must(t, netlink.LinkAdd(br))
	t.Cleanup(func() { netlink.LinkDel(br) })
	must(t, netlink.LinkSetUp(br))
	var hosts []*host
	for i := 1; i <= n; i++ {
		path, err := netns.Create(dir, fmt.Sprintf("h%d", i))
		must(t, err)
		ns, err := netns.Open(path)
		must(t, err)
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex = fmt.Sprintf("u%d", i), br.Index
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "under0", PeerNamespace: netlink.NsFd(ns.FD())}))
		u, err := netlink.LinkByName(attrs.Name)
		must(t, err)
		must(t, netlink.LinkSetUp(u))
		h := &host{t: t, i: i, ns: ns, node: weft.NewID(), dir: filepath.Join(dir, fmt.Sprintf("n%d", i))}
		h.k, err = New(Config{Node: h.node, NetNSDir: h.dir, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
			Repaired: func(r weft.Repair) { h.repairs = append(h.repairs, r) }})
		must(t, err)
		must(t, ns.Do(func() error {
			l, err := netlink.LinkByName("under0")
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(h.vtep(), 24))}); err != nil {
				return err
			}
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetUp(lo), netlink.LinkSetUp(l))
		}))
		t.Cleanup(func() {
			if err := h.apply(vxlan.State{}); err != nil {
				t.Error(err)
			}
			netlink.LinkDel(u)
			ns.Close()
			netns.Remove(path)
		})
		hosts = append(hosts, h)
	}
	return hosts
}

func (h *host) vtep() netip.Addr {
	if h.under6 {
		return netip.MustParseAddr(fmt.Sprintf("fd99:7::%d", h.i))
	}
	return netip.AddrFrom4([4]byte{10, 99, 7, byte(h.i)})
}

// use6 gives the host an IPv6 underlay.
func (h *host) use6() {
	h.t.Helper()
	h.under6 = true
	must(h.t, h.ns.Do(func() error {
		l, err := netlink.LinkByName("under0")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(h.vtep(), 64)), Flags: unix.IFA_F_NODAD})
	}))
}

func (h *host) apply(want vxlan.State) error {
	return h.ns.Do(func() error { return h.k.Apply(context.Background(), want) })
}

// taken are the repairs since the last call.
func (h *host) taken() []weft.Repair {
	out := h.repairs
	h.repairs = nil
	return out
}

func (h *host) read() vxlan.State {
	h.t.Helper()
	var st vxlan.State
	must(h.t, h.ns.Do(func() (err error) { st, err = h.k.Read(context.Background()); return err }))
	return st
}

// task makes a task's namespace and describes its port.
func (h *host) task(n int, v6 bool) vxlan.Port {
	h.t.Helper()
	id := weft.NewID()
	path, err := netns.Create(h.dir, weft.TaskNetNS(h.node, id))
	must(h.t, err)
	h.t.Cleanup(func() { netns.Remove(path) })
	addr := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, 0, byte(10*h.i + n)}), 24)
	if v6 {
		addr = netip.MustParsePrefix(fmt.Sprintf("fd77::%d/64", 10*h.i+n))
	}
	return vxlan.Port{Task: id, NetNS: path, IfName: "eth0", Addr: addr, MAC: weft.EndpointMAC(id, addr.Addr())}
}

// network is the state of one network whose ports are on their hosts.
func network(h *host, id weft.ID, ports map[*host][]vxlan.Port) vxlan.Network {
	n := vxlan.Network{ID: id, VNI: testVNI, Subnets: []netip.Prefix{netip.MustParsePrefix("10.100.0.0/24"), netip.MustParsePrefix("fd77::/64")},
		MTU: testMTU, VTEP: h.vtep(), Port: testPort, Ports: ports[h]}
	for other, ps := range ports {
		for _, p := range ps {
			if other != h {
				for _, a := range p.Addrs() {
					n.Peers = append(n.Peers, vxlan.Peer{Addr: a.Addr(), MAC: p.MAC, VTEP: other.vtep()})
				}
			}
		}
	}
	return n
}

func state(ns ...vxlan.Network) vxlan.State {
	s := vxlan.State{Networks: map[uint32]vxlan.Network{}}
	for _, n := range ns {
		s.Networks[n.VNI] = n
	}
	return s
}

// exchange sends bytes by TCP from one namespace to the addresses of a port in
// another and back.
func exchange(from string, to vxlan.Port) error {
	for _, a := range to.Addrs() {
		if err := exchangeAt(from, to.NetNS, a.Addr()); err != nil {
			return err
		}
	}
	return nil
}

func exchangeAt(from, ns string, at netip.Addr) error {
	var l net.Listener
	err := netns.Do(ns, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(at, 7000).String())
		return err
	})
	if err != nil {
		return err
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		_, err = io.Copy(c, c)
		served <- err
	}()
	err = netns.Do(from, func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 3*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(3 * time.Second))
		msg := make([]byte, 100_000) // more than one segment of any MTU
		go c.Write(msg)              // ends with the connection's deadline
		_, err = io.ReadFull(c, make([]byte, len(msg)))
		return err
	})
	l.Close()
	<-served
	return err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
