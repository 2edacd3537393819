package bpf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan"
	overlay "github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Address plan: hosts 0 and 1 are 10.99.9.1 and .2 (fd99::1 and ::2) to each other,
// and to the client 198.18.N.1 and 2001:db8:N::1; it is 198.51.100.7 and
// 2001:db8:7::7 wherever it asks. Tasks have 10.0.16.N and fd16::N, legs .250 and .251.
const (
	meshClient  = "198.51.100.7"
	meshClient6 = "2001:db8:7::7"
)

// patience is long: the machine may be loaded.
const patience = 20 * time.Second

// meshRig is two hosts with the eBPF overlay and a client outside.
type meshRig struct {
	t       *testing.T
	dir     string
	client  string
	network weft.ID
	under6  bool
	hosts   [2]*meshRigHost
	// patience is how long a connection, and what must be answered, is waited for.
	patience time.Duration
}

type meshRigHost struct {
	ns       string
	node     weft.ID
	overlay  *overlay.Engine
	mesh     *Mesh // nil: this host has nftables alone
	engine   ingress.Engine
	leg      vxlan.HostLeg
	ports    []vxlan.Port
	addrs    map[string]string // by the client's address
	repaired []string
}

func (r *meshRig) mount(i int) string { return filepath.Join(r.dir, fmt.Sprintf("bpf%d", i)) }

func (h *meshRigHost) do(t testing.TB, f func() error) {
	t.Helper()
	must(t, netns.Do(h.ns, f))
}

func (r *meshRig) namespace(name string) string {
	path, err := netns.Create(r.dir, name)
	must(r.t, err)
	r.t.Cleanup(func() { netns.Remove(path) })
	must(r.t, netns.Do(path, func() error {
		must(r.t, writeProc("net/ipv6/conf/default/accept_dad", "0"))
		l, err := netlink.LinkByName("lo")
		return errors.Join(err, netlink.LinkSetUp(l))
	}))
	return path
}

func writeProc(key, value string) error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0) }

// wire joins two namespaces by a veth with addresses.
func (r *meshRig) wire(a, name string, addrs []string, b, nameThere string, addrsThere []string) {
	r.t.Helper()
	other, err := netns.Open(b)
	must(r.t, err)
	defer other.Close()
	must(r.t, netns.Do(a, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: nameThere, PeerNamespace: netlink.NsFd(other.FD())}); err != nil {
			return err
		}
		return address(name, addrs)
	}))
	must(r.t, netns.Do(b, func() error { return address(nameThere, addrsThere) }))
}

func address(name string, addrs []string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, s := range addrs {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

func route(dst, via string) error {
	_, n, err := net.ParseCIDR(dst)
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{Dst: n, Gw: net.ParseIP(via)})
}

// newMeshRig has a Mesh on the hosts of fast, and nftables alone on the others.
func newMeshRig(t *testing.T, under6 bool, fast ...int) *meshRig {
	netnstest.NeedRoot(t)
	dir, err := os.MkdirTemp("/run", "mesh")
	must(t, err)
	r := &meshRig{t: t, dir: dir, network: weft.NewID(), under6: under6, patience: patience}
	r.client = r.namespace("client")
	must(t, netns.Do(r.client, func() error { return address("lo", []string{meshClient + "/32", meshClient6 + "/128"}) }))
	for i := range r.hosts {
		h := &meshRigHost{ns: r.namespace(fmt.Sprintf("host%d", i)), node: weft.NewID()}
		r.hosts[i] = h
		h.addrs = map[string]string{meshClient: fmt.Sprintf("198.18.%d.1", i), meshClient6: fmt.Sprintf("2001:db8:%d::1", i)}
		r.wire(h.ns, "out0", []string{h.addrs[meshClient] + "/24", h.addrs[meshClient6] + "/64"},
			r.client, fmt.Sprintf("eth%d", i), []string{fmt.Sprintf("198.18.%d.2/24", i), fmt.Sprintf("2001:db8:%d::2/64", i)})
		h.do(t, func() error {
			return errors.Join(route(meshClient+"/32", fmt.Sprintf("198.18.%d.2", i)), route(meshClient6+"/128", fmt.Sprintf("2001:db8:%d::2", i)))
		})
		leg := netip.AddrFrom4([4]byte{10, 0, 16, byte(250 + i)})
		h.leg = vxlan.HostLeg{Name: weft.IngressLeg, Addr: netip.PrefixFrom(leg, 24), Addr6: netip.MustParsePrefix(fmt.Sprintf("fd16::%d/64", 250+i)), MAC: weft.NodeMAC(h.node, leg)}
	}
	r.wire(r.hosts[0].ns, "under0", []string{"10.99.9.1/24", "fd99::1/64"}, r.hosts[1].ns, "under0", []string{"10.99.9.2/24", "fd99::2/64"})
	for i, h := range r.hosts {
		h.do(t, func() (err error) {
			h.overlay, err = overlay.New(overlay.Config{Node: h.node, Dir: r.mount(i), Log: slog.New(slog.DiscardHandler)})
			return err
		})
		h.engine = nft.New(r.dir)
		for _, f := range fast {
			if f == i {
				h.mesh = r.newMesh(i, h.engine)
				h.engine = h.mesh
			}
		}
		h.do(t, func() error { return h.engine.Probe(t.Context()) })
		if h.mesh != nil && h.mesh.Note() != "" {
			if strings.Contains(h.mesh.Note(), "by tcx") {
				netnstest.Missing(t, "tcx", errors.New(h.mesh.Note()))
			}
			t.Fatal(h.mesh.Note())
		}
	}
	t.Cleanup(func() {
		for i, h := range r.hosts {
			h.do(t, func() error {
				return errors.Join(h.engine.Close(context.Background()), h.overlay.Apply(context.Background(), vxlan.State{}))
			})
			if _, err := os.Stat(r.mount(i)); err == nil {
				if left, _ := filepath.Glob(r.mount(i) + "/*"); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
			}
		}
	})
	return r
}

// newMesh is a new process on a host.
func (r *meshRig) newMesh(i int, table ingress.Engine) *Mesh {
	h := r.hosts[i]
	m, err := NewMesh(MeshConfig{Node: h.node, Dir: r.mount(i), Table: table, Repaired: func(x weft.Repair) { h.repaired = append(h.repaired, x.Kind) }})
	must(r.t, err)
	m.patience = 0 // TestMeshAdoption is about that
	return m
}

func (r *meshRig) vtep(i int) netip.Addr {
	if r.under6 {
		return netip.MustParseAddr(fmt.Sprintf("fd99::%d", 1+i))
	}
	return vtep(i)
}

// task makes one on host i.
func (r *meshRig) task(i, n int) ingress.Backend {
	id, a := weft.ID(fmt.Sprintf("task%d", n)), netip.AddrFrom4([4]byte{10, 0, 16, byte(n)})
	p := vxlan.Port{Task: id, NetNS: r.namespace(string(id)), IfName: "eth0", Addr: netip.PrefixFrom(a, 24), MAC: weft.EndpointMAC(id, a),
		Addr6: netip.MustParsePrefix(fmt.Sprintf("fd16::%d/64", n))}
	r.hosts[i].ports = append(r.hosts[i].ports, p)
	return ingress.Backend{Task: id, Addr: a, Addr6: p.Addr6.Addr(), MAC: p.MAC}
}

// serve answers in a task with its name and who asks; UDP port 9 with what it got,
// or as many bytes as it is asked for.
func (r *meshRig) serve(b ingress.Backend) {
	var ln net.Listener
	var pc [2]net.PacketConn
	must(r.t, netns.Do(filepath.Join(r.dir, string(b.Task)), func() (err error) {
		if ln, err = net.Listen("tcp", ":80"); err != nil {
			return err
		}
		for i, port := range []string{":7", ":9"} {
			if pc[i], err = net.ListenPacket("udp", port); err != nil {
				return err
			}
		}
		return nil
	}))
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer context.AfterFunc(r.t.Context(), func() { c.Close() })()
				defer c.Close()
				fmt.Fprintf(c, "%s %s\n", b.Task, c.RemoteAddr())
				io.Copy(c, c)
			})
		}
	})
	for i := range pc {
		wg.Go(func() {
			buf := make([]byte, 65536)
			for {
				n, from, err := pc[i].ReadFrom(buf)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					continue
				}
				if i == 0 {
					n = copy(buf, fmt.Sprintf("%s %s\n", b.Task, from))
				} else if much, err := strconv.Atoi(string(buf[:n])); err == nil {
					n = copy(buf, strings.Repeat("y", much))
				}
				pc[i].WriteTo(buf[:n], from)
			}
		})
	}
	r.t.Cleanup(func() { ln.Close(); pc[0].Close(); pc[1].Close(); wg.Wait() })
}

// table is what host i is to do for these ports.
func (r *meshRig) table(i int, published ...ingress.Published) ingress.Table {
	h := r.hosts[i]
	t := ingress.Table{Published: published, Ingress: ingress.Entry{Link: weft.IngressLeg, Addr: h.leg.Addr, Addr6: h.leg.Addr6}}
	for _, o := range r.hosts {
		t.Ingress.Nodes = append(t.Ingress.Nodes, ingress.EntryNode{MAC: o.leg.MAC, Addr: o.leg.Addr.Addr()})
	}
	for _, p := range h.ports {
		t.Ingress.Tasks = append(t.Ingress.Tasks, ingress.EntryTask{Task: p.Task, NetNS: p.NetNS, Link: p.IfName, Addr: p.Addr, Addr6: p.Addr6})
	}
	t.Underlay = ingress.Underlay{Port: 4789, Self: r.vtep(i), Members: []netip.Addr{r.vtep(0), r.vtep(1)}}
	return t
}

// apply makes the network and the ports on both hosts.
func (r *meshRig) apply(published ...ingress.Published) {
	r.t.Helper()
	for i, h := range r.hosts {
		n := vxlan.Network{ID: r.network, VNI: weft.IngressVNI, MTU: 1430, VTEP: r.vtep(i), Port: 4789, Ports: h.ports, HostLeg: &h.leg,
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.16.0/24"), netip.MustParsePrefix("fd16::/64")}}
		o := r.hosts[1-i]
		for _, p := range o.ports {
			for _, a := range p.Addrs() {
				n.Peers = append(n.Peers, vxlan.Peer{Addr: a.Addr(), MAC: p.MAC, VTEP: r.vtep(1 - i)})
			}
		}
		for _, a := range o.leg.Addrs() {
			n.Peers = append(n.Peers, vxlan.Peer{Addr: a.Addr(), MAC: o.leg.MAC, VTEP: r.vtep(1 - i)})
		}
		h.do(r.t, func() error {
			if err := h.overlay.Apply(r.t.Context(), vxlan.State{Networks: map[uint32]vxlan.Network{weft.IngressVNI: n}}); err != nil {
				return err
			}
			return h.engine.Apply(r.t.Context(), r.table(i, published...))
		})
	}
}

func meshPorts(b ...ingress.Backend) []ingress.Published {
	return []ingress.Published{
		{Service: "web", Protocol: weft.TCP, Port: 30000, Target: 80, Backends: b},
		{Service: "web", Protocol: weft.TCP, Port: 30002, Target: 80, Backends: b},
		{Service: "web", Protocol: weft.UDP, Port: 30000, Target: 7, Backends: b},
		{Service: "web", Protocol: weft.UDP, Port: 30009, Target: 9, Backends: b},
	}
}

// forget empties the hosts' connection tracking: what goes on past it goes past
// the host.
func (r *meshRig) forget() {
	r.t.Helper()
	for _, h := range r.hosts {
		h.do(r.t, func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
	}
}

// dial opens a flow from the client's address, and a port of its own unless 0.
func (r *meshRig) dial(network, to string, from int) (net.Conn, error) {
	ip := net.ParseIP(meshClient)
	if strings.HasPrefix(to, "[") {
		ip = net.ParseIP(meshClient6)
	}
	d := net.Dialer{Timeout: r.patience, LocalAddr: &net.TCPAddr{IP: ip, Port: from}, Control: func(_, _ string, c syscall.RawConn) error {
		var opt error
		err := c.Control(func(fd uintptr) { opt = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		return errors.Join(err, opt)
	}}
	if network == "udp" {
		d.LocalAddr = &net.UDPAddr{IP: ip, Port: from}
	}
	var c net.Conn
	err := netns.Do(r.client, func() (err error) {
		c, err = d.DialContext(r.t.Context(), network, to)
		return err
	})
	if err == nil {
		r.t.Cleanup(func() { c.Close() })
	}
	return c, err
}

// say sends and gives the next answer, where none may come.
func say(c net.Conn, text string) (string, error) { return sayWithin(c, text, 2*time.Second) }

func sayWithin(c net.Conn, text string, patience time.Duration) (string, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if text != "" {
		if _, err := c.Write([]byte(text)); err != nil {
			return "", err
		}
	}
	buf := make([]byte, 65536)
	n, err := c.Read(buf)
	return strings.TrimSpace(string(buf[:n])), err
}

// open opens a flow and says which task answers, and as whom it sees the client.
func (r *meshRig) open(network, to string, from int) (c net.Conn, task string, seen netip.AddrPort, err error) {
	if c, err = r.dial(network, to, from); err != nil {
		return nil, "", seen, err
	}
	text := ""
	if network == "udp" {
		text = "x"
	}
	got, err := sayWithin(c, text, r.patience)
	if err != nil {
		return c, "", seen, err
	}
	task, at, _ := strings.Cut(got, " ")
	seen, err = netip.ParseAddrPort(at)
	return c, task, netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port()), err
}

// again uses a flow that is open. However loaded the machine is, an answer comes.
func again(network string, c net.Conn, task string) error {
	got, err := sayWithin(c, "again", patience)
	if err == nil && network == "tcp" && got != "again" || err == nil && network == "udp" && !strings.HasPrefix(got, task+" ") {
		err = fmt.Errorf("it answers %q", got)
	}
	return err
}

// flows is what host i knows, in the direction of requests.
func (r *meshRig) flows(i int) map[endsValue]turnValue {
	r.t.Helper()
	known := map[endsValue]turnValue{}
	for _, name := range []string{meshMapRequestsUdp, meshMapRequests} {
		m, err := ebpf.LoadPinnedMap(r.hosts[i].mesh.path(name), nil)
		must(r.t, err)
		defer m.Close()
		some, err := overlay.Dump[endsValue, turnValue](m)
		must(r.t, err)
		maps.Copy(known, some)
	}
	return known
}

func join(host string, port int) string { return net.JoinHostPort(host, fmt.Sprint(port)) }
