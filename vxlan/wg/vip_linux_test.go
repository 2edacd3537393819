package wg

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	balance "github.com/weftnet/weft/ingress/bpf"
	"github.com/weftnet/weft/ingress/nft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
)

// names serves the name of a task by TCP and UDP at an address of it.
func names(t *testing.T, p vxlan.Port, name string, addr netip.AddrPort) {
	t.Helper()
	at := addr.String()
	must(t, netns.Do(p.NetNS, func() error {
		l, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		u, err := net.ListenPacket("udp", at)
		if err != nil {
			return errors.Join(err, l.Close())
		}
		t.Cleanup(func() { l.Close(); u.Close() }) // end both loops
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, name)
				c.Close()
			}
		}()
		go func() {
			buf := make([]byte, 100)
			for {
				_, from, err := u.ReadFrom(buf)
				if err != nil {
					return
				}
				u.WriteTo([]byte(name), from)
			}
		}()
		return nil
	}))
}

// ask asks a service address once. The socket is connected: an answer from
// another address would not be heard.
func ask(from vxlan.Port, network string, to netip.AddrPort) (name string, err error) {
	err = netns.Do(from.NetNS, func() error {
		c, err := net.DialTimeout(network, to.String(), 2*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		if network == "udp" {
			if _, err := io.WriteString(c, "?"); err != nil {
				return err
			}
		}
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		name = string(buf[:n])
		return err
	})
	return name, err
}

// TestServiceAddress: a service address leads to tasks on this and other nodes,
// over TCP and UDP, the answers come from it, and it turns away from a task that
// goes.
func TestServiceAddress(t *testing.T) {
	t.Run("IPv4", func(t *testing.T) {
		onEach(t, 3, func(t *testing.T, overlays []string) {
			serviceAddress(t, overlays, 1, netip.MustParseAddr("10.100.1.200"))
		})
	})
	t.Run("IPv6", func(t *testing.T) {
		onEach(t, 3, func(t *testing.T, overlays []string) {
			serviceAddress(t, overlays, 3, netip.MustParseAddr("fd77::200"))
		})
	})
}

// balancer is the service engine for the host's overlay.
func (h *host) balancer() ingress.Engine {
	h.t.Helper()
	if h.overlay != onEBPF {
		return nft.New(h.dir)
	}
	services, err := balance.New(balance.Config{Node: h.node, Dir: h.bpfDir()})
	must(h.t, err)
	return ingress.Split{Services: services, Published: nft.New(h.dir)}
}

func speaker(p vxlan.Port) ingress.Speaker {
	return ingress.Speaker{MAC: net.HardwareAddr(p.MAC[:]), Addrs: []netip.Addr{p.Addr.Addr()}}
}

// hold gives a task a service address, as the sandbox of a backend does.
func hold(t *testing.T, p vxlan.Port, vip netip.Addr) {
	t.Helper()
	must(t, netns.Do(p.NetNS, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		a := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(vip, vip.BitLen()))}
		if vip.Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		return errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(lo, a),
			os.WriteFile("/proc/sys/net/ipv4/conf/all/arp_ignore", []byte("1"), 0o644),
			os.WriteFile("/proc/sys/net/ipv4/conf/all/arp_announce", []byte("2"), 0o644),
			os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644))
	}))
}

func serviceAddress(t *testing.T, overlays []string, v int, vip netip.Addr) {
	const port = 7000
	hosts := rig(t, overlays, "")
	applyAll(t, hosts, 0, v)
	client := hosts[0]
	vni := uint32(5000 + v)
	service := weft.NewID()
	engine := client.balancer()
	must(t, client.ns.Do(func() error { return engine.Probe(context.Background()) }))
	backend := map[string]ingress.Backend{}
	for _, h := range hosts[1:] {
		p, name := h.tasks[v], fmt.Sprint("task on host ", h.i)
		names(t, p, name, netip.AddrPortFrom(p.Addr.Addr(), port))
		backend[name] = ingress.Backend{Task: p.Task, Addr: p.Addr.Addr(), MAC: p.MAC}
	}
	// A backend beside the client has the address itself and answers directly.
	beside := client.addTask(netip.PrefixFrom(client.tasks[v].Addr.Addr().Next(), client.tasks[v].Addr.Bits()))
	local := "task on host 1"
	hold(t, beside, vip)
	names(t, beside, local, netip.AddrPortFrom(vip, port))
	backend[local] = ingress.Backend{Task: beside.Task, Addr: beside.Addr.Addr(), MAC: beside.MAC}
	lead := func(backends ...ingress.Backend) {
		t.Helper()
		known := map[*host][]weft.NodeKey{}
		for _, h := range hosts {
			known[h] = h.keys(0)
		}
		want := client.state(hosts, 0, known, v)
		n := want.Networks[vni]
		n.VIPs = []vxlan.VIP{{Addr: vip, MAC: weft.VIPMAC(service, vip)}}
		n.Ports = append(n.Ports, beside)
		var remote []ingress.Backend
		for _, b := range backends {
			if b.Task != beside.Task {
				remote = append(remote, b)
			}
		}
		want.Networks[vni] = n
		must(t, client.apply(want))
		nsDir := filepath.Join(client.dir, "netns")
		must(t, client.ns.Do(func() error {
			return engine.Apply(context.Background(), ingress.Table{
				Networks: []ingress.Network{{
					VNI: vni, IPv6: vip.Is6(), NetNS: filepath.Join(nsDir, weft.OverlayNetNS(client.node, vni)), Bridge: weft.BridgeName(vni),
					Ports:    []string{weft.PortVethName(client.tasks[v].Task, n.ID), weft.PortVethName(beside.Task, n.ID)},
					Speakers: []ingress.Speaker{speaker(client.tasks[v]), speaker(beside)},
					Services: []ingress.Service{{ID: service, VIP: vip, MAC: weft.VIPMAC(service, vip), Backends: backends}},
				}},
				Router: ingress.Router{NetNS: filepath.Join(nsDir, weft.CryptNetNS(client.node)), VNIs: []uint32{vni}, Backends: remote},
			})
		}))
	}
	a, b := "task on host 2", "task on host 3"
	lead(backend[a], backend[b], backend[local])
	for _, network := range []string{"tcp", "udp"} {
		heard := map[string]int{}
		for range 60 {
			name, err := ask(client.tasks[v], network, netip.AddrPortFrom(vip, port))
			if err != nil {
				t.Fatalf("%s: %v after %v", network, err, heard)
			}
			heard[name]++
		}
		if heard[a] < 5 || heard[b] < 5 || heard[local] < 5 {
			t.Errorf("%s: answers %v", network, heard)
		}
	}
	lead(backend[a], backend[b])
	// One flow of datagrams, from one port, follows to the task that is left.
	must(t, netns.Do(client.tasks[v].NetNS, func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(vip, port).String())
		if err != nil {
			return err
		}
		defer c.Close()
		say := func() (string, error) {
			buf := make([]byte, 100)
			c.SetDeadline(time.Now().Add(2 * time.Second))
			if _, err := io.WriteString(c, "?"); err != nil {
				return "", err
			}
			n, err := c.Read(buf)
			return string(buf[:n]), err
		}
		first, err := say()
		if err != nil {
			return err
		}
		other := map[string]string{a: b, b: a}[first]
		lead(backend[other])
		if got, err := say(); err != nil || got != other {
			return fmt.Errorf("after %q has gone: %q, %v", first, got, err)
		}
		return nil
	}))
	// Direct traffic to a backend is not translated and not confused with it.
	if name, err := ask(client.tasks[v], "tcp", netip.AddrPortFrom(backend[a].Addr, port)); err != nil || name != a {
		t.Errorf("asked directly: %q, %v", name, err)
	}
}
