package wg

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/bpf"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Address plan: the underlay is 10.99.8.0/24 and host i has .i in it. Network v
// is 10.100.<v>.0/24 with VNI 5000+v; host i's task on it has .10*i, and on
// network 2 fd77::/64 with the same last part.
const (
	// testPort and ten for each host: nodes need not agree on it.
	testPort = 51820
	underMTU = 1500
	testMTU  = underMTU - 60
)

// host is one node in a namespace of its own.
type host struct {
	t       *testing.T
	i       int
	ns      *netns.Handle
	dir     string
	node    weft.ID
	overlay string
	e       *Engine
	tasks   map[int]vxlan.Port // by network
}

// The overlay engines below this one.
const (
	onBridge = "bridge"
	onEBPF   = "ebpf"
)

// onEach runs a test of n hosts with each overlay engine, and with both in one
// cluster.
func onEach(t *testing.T, n int, f func(t *testing.T, overlays []string)) {
	for name, pair := range map[string][2]string{"bridge": {onBridge, onBridge}, "ebpf": {onEBPF, onEBPF}, "both": {onEBPF, onBridge}} {
		var overlays []string
		for i := range n {
			overlays = append(overlays, pair[i%2])
		}
		t.Run(name, func(t *testing.T) { f(t, overlays) })
	}
}

func vtep(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, 8, byte(i)}) }

// rig makes hosts with these overlay engines on one bridge in the test's own
// namespace, each with a task on every network.
func rig(t *testing.T, overlays []string, engine string) []*host {
	t.Helper()
	if err := probeUser(t.TempDir()); errors.Is(err, weft.ErrUnsupported) {
		netnstest.Missing(t, "root", err)
	}
	dir, err := os.MkdirTemp("/run", "wg")
	must(t, err)
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "under"}}
	must(t, netlink.LinkAdd(br))
	t.Cleanup(func() { netlink.LinkDel(br) })
	must(t, netlink.LinkSetUp(br))
	var hosts []*host
	for i := 1; i <= len(overlays); i++ {
		path, err := netns.Create(dir, fmt.Sprintf("h%d", i))
		must(t, err)
		h := &host{t: t, i: i, dir: filepath.Join(dir, fmt.Sprint(i)), node: weft.NewID(), overlay: overlays[i-1], tasks: map[int]vxlan.Port{}}
		h.ns, err = netns.Open(path)
		must(t, err)
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex = fmt.Sprintf("u%d", i), br.Index
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "under0", PeerNamespace: netlink.NsFd(h.ns.FD())}))
		u, err := netlink.LinkByName(attrs.Name)
		must(t, err)
		t.Cleanup(func() { // also when an engine is missing
			netlink.LinkDel(u)
			h.ns.Close()
			netns.Remove(path)
		})
		must(t, netlink.LinkSetUp(u))
		must(t, h.ns.Do(func() error {
			for _, name := range []string{"lo", "under0"} {
				l, err := netlink.LinkByName(name)
				if err != nil {
					return err
				}
				if name == "under0" {
					err = netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(vtep(i), 24))})
				}
				if err := errors.Join(err, netlink.LinkSetUp(l)); err != nil {
					return err
				}
			}
			return nil
		}))
		h.restart(engine)
		h.addTasks()
		t.Cleanup(func() {
			if err := h.apply(vxlan.State{}); err != nil {
				t.Error(err)
			}
			h.mustBeClean()
		})
		hosts = append(hosts, h)
	}
	return hosts
}

// restart makes a new engine, as a new daemon does.
func (h *host) restart(engine string) {
	h.t.Helper()
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	nsDir := filepath.Join(h.dir, "netns")
	var overlay vxlan.Engine
	var err error
	if h.overlay == onEBPF {
		overlay, err = bpf.New(bpf.Config{Node: h.node, Dir: h.bpfDir(), NetNSDir: nsDir, Log: log})
	} else {
		overlay, err = linux.New(linux.Config{Node: h.node, NetNSDir: nsDir, Log: log})
	}
	must(h.t, err)
	if err := h.ns.Do(func() error { return overlay.Probe(context.Background()) }); errors.Is(err, weft.ErrUnsupported) {
		netnstest.Missing(h.t, h.overlay, err)
	}
	h.e, err = New(Config{Node: h.node, NetNSDir: nsDir, RunDir: filepath.Join(h.dir, "wg"), KeyFile: filepath.Join(h.dir, "keys.json"), Port: uint16(testPort + 10*h.i), Engine: engine, Overlay: overlay, Log: log})
	must(h.t, err)
	must(h.t, h.ns.Do(func() error { return h.e.Probe(context.Background()) }))
	if _, isKernel := h.e.driver.(*kernelDriver); engine == "" && !isKernel && os.Getenv("WEFT_TEST_WIREGUARD") == EngineKernel {
		h.t.Fatalf("the kernel's WireGuard was expected: %v", h.e.Choices())
	}
}

func (h *host) bpfDir() string { return filepath.Join(h.dir, "bpf") }

// drops are the counters of the eBPF engine.
func (h *host) drops() map[string]uint64 {
	h.t.Helper()
	out, err := h.e.cfg.Overlay.(*bpf.Engine).Drops(context.Background())
	must(h.t, err)
	return out
}

// mustBeClean: nothing of the overlay is left in the host's namespace.
func (h *host) mustBeClean() {
	h.t.Helper()
	if _, err := os.Stat(h.bpfDir()); err == nil {
		h.t.Errorf("host %d: the bpffs is left behind", h.i)
	}
	must(h.t, h.ns.Do(func() error {
		ls, err := netlink.LinkList()
		for _, l := range ls {
			if l.Attrs().Name != "lo" && l.Attrs().Name != "under0" {
				h.t.Errorf("host %d: left behind: %s", h.i, l.Attrs().Name)
			}
		}
		return err
	}))
}

func (h *host) addTasks() {
	for net, addr := range map[int]string{1: "10.100.1.%d/24", 2: "10.100.2.%d/24", 3: "fd77::%d/64"} {
		h.tasks[net] = h.addTask(netip.MustParsePrefix(fmt.Sprintf(addr, 10*h.i)))
	}
}

// addTask makes the namespace of a task.
func (h *host) addTask(addr netip.Prefix) vxlan.Port {
	h.t.Helper()
	id := weft.NewID()
	path, err := netns.Create(filepath.Join(h.dir, "netns"), weft.TaskNetNS(h.node, id))
	must(h.t, err)
	h.t.Cleanup(func() { netns.Remove(path) })
	return vxlan.Port{Task: id, NetNS: path, IfName: "eth0", Addr: addr, MAC: weft.EndpointMAC(id, addr.Addr())}
}

func (h *host) apply(want vxlan.State) error {
	return h.ns.Do(func() error { return h.e.Apply(context.Background(), want) })
}

func (h *host) keys(epoch uint64) []weft.NodeKey {
	h.t.Helper()
	k, err := h.e.Keys(epoch)
	must(h.t, err)
	return k
}

// state is what host h wants of the networks, when the others have published
// the keys in known.
func (h *host) state(hosts []*host, epoch uint64, known map[*host][]weft.NodeKey, nets ...int) vxlan.State {
	st := vxlan.State{Networks: map[uint32]vxlan.Network{}, Encryption: vxlan.Encryption{Epoch: epoch}}
	for _, v := range nets {
		n := vxlan.Network{ID: weft.ID(fmt.Sprintf("net%d", v)), VNI: uint32(5000 + v), MTU: testMTU, VTEP: vtep(h.i), Port: 4789, Encrypted: true,
			Subnets: []netip.Prefix{h.tasks[v].Addr.Masked()}, Ports: []vxlan.Port{h.tasks[v]}}
		for _, o := range hosts {
			if o != h {
				n.Peers = append(n.Peers, vxlan.Peer{Addr: o.tasks[v].Addr.Addr(), MAC: o.tasks[v].MAC, VTEP: vtep(o.i)})
			}
		}
		st.Networks[n.VNI] = n
	}
	for _, o := range hosts {
		if o != h {
			st.Encryption.Peers = append(st.Encryption.Peers, vxlan.EncryptionPeer{Node: o.node, VTEP: vtep(o.i), Keys: known[o]})
		}
	}
	return st
}

func applyAll(t *testing.T, hosts []*host, epoch uint64, nets ...int) {
	t.Helper()
	known := map[*host][]weft.NodeKey{}
	for _, h := range hosts {
		known[h] = h.keys(epoch)
	}
	for _, h := range hosts {
		must(t, h.apply(h.state(hosts, epoch, known, nets...)))
	}
}

const marker = "the quick brown weft jumps over the lazy warp "

// exchange sends a megabyte of markers to a task and reads it back.
func exchange(from, to vxlan.Port) error {
	msg := strings.Repeat(marker, 1<<20/len(marker))
	return talk(from, to, func(c net.Conn) error {
		sent := make(chan error, 1)
		go func() { _, err := io.WriteString(c, msg); sent <- err }()
		got := make([]byte, len(msg))
		_, err := io.ReadFull(c, got)
		if err = errors.Join(err, <-sent); err == nil && string(got) != msg {
			err = errors.New("the answer is not what was sent")
		}
		return err
	})
}

// talk connects to an echo server in the namespace of a task.
func talk(from, to vxlan.Port, f func(net.Conn) error) error {
	l, err := echo(to)
	if err != nil {
		return err
	}
	defer l.Close()
	return netns.Do(from.NetNS, func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		return f(c)
	})
}

// echo serves until its listener is closed.
func echo(p vxlan.Port) (net.Listener, error) {
	var l net.Listener
	err := netns.Do(p.NetNS, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(p.Addr.Addr(), 0).String())
		return err
	})
	if err != nil {
		return nil, err
	}
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // ends with the client's connection
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	return l, nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// htons is for sockets of packets, whose protocol is in network order.
func htons(v uint16) uint16 { return v<<8 | v>>8 }

// capture collects every frame of host 1's underlay until stop is called.
func capture(t *testing.T) (stop func() []byte) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
	must(t, err)
	l, err := netlink.LinkByName("u1")
	must(t, err)
	must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: l.Attrs().Index}))
	tv := unix.NsecToTimeval(int64(50 * time.Millisecond))
	must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan []byte) // one value, when the reader has ended
	go func() {
		var all []byte
		buf := make([]byte, 1<<16)
		for ctx.Err() == nil {
			if n, _, err := unix.Recvfrom(fd, buf, 0); err == nil {
				all = append(all, buf[:n]...)
			}
		}
		unix.Close(fd)
		done <- all
	}()
	return func() []byte { cancel(); return <-done }
}
