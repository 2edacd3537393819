package nft

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
	"github.com/weftnet/weft/vxlan/netns"
)

// Address plan: tasks 10.0.16.N on bridge "br"; service address 10.0.16.200;
// the host's leg on the same bridge is 10.0.16.250 ("weft-ingress"); an outside
// client is 192.0.2.2 behind the host's 192.0.2.1. The IPv6 twin of a last byte N
// is fd00:16::N on the bridge and 2001:db8::N outside.
const (
	vip6Text    = "fd00:16::200"
	leg6Text    = "fd00:16::250"
	host6Text   = "2001:db8::1"
	client6Text = "2001:db8::2"

	vipText    = "10.0.16.200"
	legText    = "10.0.16.250"
	hostText   = "192.0.2.1"
	clientText = "192.0.2.2"
)

// fabric is a bridge in a hidden namespace with tasks on it.
type fabric struct {
	t   testing.TB
	dir string
	br  string // namespace of the bridge
	// ports are the names of the bridge's ports.
	ports []string
	tasks []ingress.EntryTask
}

func newFabric(t testing.TB) *fabric {
	f := &fabric{t: t, dir: t.TempDir()}
	// All tests share the host's namespace: a client's port that an earlier
	// one used would be led to that one's backend.
	must(t, netlink.ConntrackTableFlush(netlink.ConntrackTable))
	must(t, setUp("lo"))
	f.br = f.namespace("hidden")
	f.in(f.br, func() error {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br"}}); err != nil {
			return err
		}
		return setUp("br")
	})
	return f
}

func (f *fabric) namespace(name string) string {
	path, err := netns.Create(f.dir, name)
	must(f.t, err)
	f.t.Cleanup(func() {
		if err := netns.Remove(filepath.Join(f.dir, name)); err != nil {
			f.t.Error(err)
		}
	})
	return path
}

func (f *fabric) in(ns string, fn func() error) {
	f.t.Helper()
	must(f.t, netns.Do(ns, fn))
}

// port joins a namespace to the bridge; ns "" is the host.
func (f *fabric) port(ns, name, addr string, mac net.HardwareAddr) {
	f.t.Helper()
	host, err := netns.Current()
	must(f.t, err)
	defer host.Close()
	target := host
	if ns != "" {
		target, err = netns.Open(ns)
		must(f.t, err)
		defer target.Close()
	}
	// As in a sandbox: no waiting for duplicates of link-local addresses. The
	// host's leg asks for a task's neighbour from there if it sends for others.
	must(f.t, target.Do(func() error { return writeSysctl("net/ipv6/conf/default/accept_dad", "0") }))
	f.in(f.br, func() error {
		br, err := netlink.LinkByName("br")
		if err != nil {
			return err
		}
		v := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "p" + strings.ReplaceAll(addr, ".", ""), MasterIndex: br.Attrs().Index, Flags: net.FlagUp},
			PeerName:  name, PeerHardwareAddr: mac, PeerNamespace: netlink.NsFd(target.FD()),
		}
		f.ports = append(f.ports, v.Name)
		return netlink.LinkAdd(v)
	})
	must(f.t, target.Do(func() error {
		for _, l := range []string{"lo", name} {
			if err := setUp(l); err != nil {
				return err
			}
		}
		return errors.Join(addAddr(name, addr+"/24"), addAddr(name, twin(addr).String()+"/64"))
	}))
}

// twin is the IPv6 address beside an IPv4 one.
func twin(addr string) netip.Addr {
	last := addr[strings.LastIndexByte(addr, '.')+1:]
	return netip.MustParseAddr("fd00:16::" + last)
}

// task is a port with a server that answers with its name; backends also hold
// the service address on their loopback.
func (f *fabric) task(n int) ingress.Backend {
	id := weft.ID(fmt.Sprintf("task%d", n))
	addr := netip.MustParseAddr(fmt.Sprintf("10.0.16.%d", n))
	b := ingress.Backend{Task: id, Addr: addr, Addr6: twin(addr.String()), MAC: weft.EndpointMAC(id, addr)}
	ns := f.namespace(string(id))
	f.tasks = append(f.tasks, ingress.EntryTask{
		Task: id, NetNS: ns, Link: "eth0", Addr: netip.PrefixFrom(addr, 24), Addr6: netip.PrefixFrom(b.Addr6, 64),
	})
	f.port(ns, "eth0", addr.String(), b.MAC)
	f.in(ns, func() error {
		for k, v := range map[string]string{"arp_ignore": "1", "arp_announce": "2"} {
			if err := writeSysctl("net/ipv4/conf/all/"+k, v); err != nil {
				return err
			}
		}
		return errors.Join(addAddr("lo", vipText+"/32"), addAddr("lo", vip6Text+"/128"))
	})
	f.serve(ns, string(id))
	return b
}

// leg is the hardware address of the host's leg.
var leg = weft.NodeMAC("host", netip.MustParseAddr(legText))

// entry is how requests enter the bridge: by the host's leg, to the tasks made
// up to now.
func (f *fabric) entry() ingress.Entry {
	return ingress.Entry{
		Link: weft.IngressLeg, Addr: netip.MustParsePrefix(legText + "/24"), Tasks: f.tasks,
		Nodes: []ingress.EntryNode{{MAC: leg, Addr: netip.MustParseAddr(legText)}},
	}
}

// entry6 is that, with IPv6.
func (f *fabric) entry6() ingress.Entry {
	e := f.entry()
	e.Addr6 = netip.MustParsePrefix(leg6Text + "/64")
	return e
}

func (f *fabric) serve(ns, name string) {
	var lns []net.Listener
	var pc net.PacketConn
	f.in(ns, func() (err error) {
		ln, err := net.Listen("tcp", ":80")
		if err != nil {
			return err
		}
		lns = append(lns, ln)
		if ingresstest.HasSCTP() == nil {
			if ln, err = ingresstest.ListenSCTP(netip.AddrPortFrom(netip.IPv6Unspecified(), 80)); err != nil {
				return err
			}
			lns = append(lns, ln)
		}
		pc, err = net.ListenPacket("udp", ":7")
		return err
	})
	for _, ln := range lns {
		f.acceptAll(ln, name)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 1500)
		for {
			_, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			fmt.Fprintf(writerTo{pc, from}, "%s %s\n", name, from)
		}
	})
	f.t.Cleanup(func() { pc.Close(); wg.Wait() })
}

// acceptAll answers with a name, and echoes, until the test ends.
func (f *fabric) acceptAll(ln net.Listener, name string) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				// The end of a connection that was moved away from this
				// backend never comes: the end of the test must do.
				defer context.AfterFunc(f.t.Context(), func() { c.Close() })()
				defer c.Close()
				fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
				io.Copy(c, c)
			})
		}
	})
	f.t.Cleanup(func() { ln.Close(); wg.Wait() })
}

type writerTo struct {
	pc net.PacketConn
	to net.Addr
}

func (w writerTo) Write(b []byte) (int, error) { return w.pc.WriteTo(b, w.to) }

// client is a task's namespace with the service address resolved to the MAC
// that no device owns.
func (f *fabric) client(n int, s ingress.Service) string {
	ns := f.namespace(fmt.Sprintf("client%d", n))
	f.port(ns, "eth0", fmt.Sprintf("10.0.16.%d", n), nil)
	f.in(ns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.NeighAdd(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: s.VIP.AsSlice(), HardwareAddr: s.MAC, State: netlink.NUD_PERMANENT})
	})
	return ns
}

// get connects from ns and returns the server's name, the address it saw and
// the open connection.
func (f *fabric) get(ns, addr string) (name, seen string, c net.Conn, err error) {
	dial := func() error {
		var derr error
		c, derr = net.DialTimeout("tcp", addr, 3*time.Second)
		return derr
	}
	if ns == "" {
		err = dial()
	} else {
		err = netns.Do(ns, dial)
	}
	if err != nil {
		return "", "", nil, err
	}
	f.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(3 * time.Second))
	line, err := bufio.NewReader(c).ReadString('\n')
	name, seen, _ = strings.Cut(strings.TrimSpace(line), " ")
	return name, seen, c, err
}

func (f *fabric) apply(e *Engine, s ingress.Service) {
	f.t.Helper()
	must(f.t, e.Apply(context.Background(), ingress.Table{Networks: []ingress.Network{{
		VNI: 4097, NetNS: f.br, Bridge: "br", IPv6: s.VIP.Is6(), Ports: f.ports, Services: []ingress.Service{s},
	}}}))
}

func service(backends ...ingress.Backend) ingress.Service {
	vip := netip.MustParseAddr(vipText)
	return ingress.Service{ID: "web", VIP: vip, MAC: weft.VIPMAC("web", vip), Backends: backends}
}
