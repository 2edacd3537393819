package main

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
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/wg"
)

// Address plan of encrypt: underlay 10.99.9.0/30; tasks 10.100.9.10 and .20;
// "wireguard alone" 10.100.9.1 and .2, inside the same tunnel; VXLAN in it
// 10.97.9.0/30.
const (
	cryptVNI   = 5001
	cryptMTU   = 1440
	bulkTime   = 2 * time.Second
	aloneTable = 77
)

// encryptBench: what an encrypted network costs beyond WireGuard itself.
func encryptBench() benchmark {
	const (
		alone, network, stacked = "wireguard alone", "encrypted network", "VXLAN in wireguard"
		cpu, wall               = "CPU", "throughput"
	)
	return benchmark{
		Name:  "encrypt",
		About: "one TCP stream between two hosts through an encrypted network (CPU seconds for a gibibyte, user space only; MB/s), and through VXLAN inside WireGuard, against a socket on the WireGuard device itself",
		Prepare: func(ctx context.Context, r *rig) (plan, error) {
			f, err := newCryptField(ctx, slog.New(slog.NewTextHandler(r.log, nil)), "")
			if err != nil {
				return plan{}, err
			}
			run := func(from, to, at string) func(context.Context) (sample, error) {
				return func(ctx context.Context) (sample, error) {
					bytes, used, err := f.bulk(ctx, from, to, at)
					return sample{cpu: used.Seconds() / bytes * (1 << 30), wall: bytes / 1e6 / bulkTime.Seconds()}, err
				}
			}
			return plan{
				Metrics:  []metric{{cpu, "s/GiB", true}, {wall, "MB/s", true}},
				Baseline: variant{alone, run(f.crypt[0], f.crypt[1], "10.100.9.2")},
				Cases: []variant{
					{network, run(f.task[0], f.task[1], "10.100.9.20")},
					{stacked, run(f.crypt[0], f.crypt[1], "10.97.9.2")},
				},
				Close: f.close,
			}, nil
		},
	}
}

// cryptField is two hosts in namespaces, joined by one link.
type cryptField struct {
	dir         string
	host        [2]string // namespaces by path
	crypt, task [2]string
	engine      [2]*wg.Engine
	child       []string // pids of user-space engines
}

// newCryptField makes them with an engine of package wg; "" is the first that can
// be made here.
func newCryptField(ctx context.Context, log *slog.Logger, engine string) (*cryptField, error) {
	dir, err := os.MkdirTemp("", "weft-bench")
	if err != nil {
		return nil, err
	}
	f := &cryptField{dir: dir}
	if err := f.build(ctx, log, engine); err != nil {
		return nil, errors.Join(err, f.close(ctx))
	}
	return f, nil
}

func (f *cryptField) build(ctx context.Context, log *slog.Logger, engine string) error {
	if err := f.underlay(); err != nil {
		return err
	}
	keys := [2][]weft.NodeKey{}
	nodes := [2]weft.ID{weft.NewID(), weft.NewID()}
	for i := range f.host {
		dir := filepath.Join(f.dir, strconv.Itoa(i))
		bridge, err := linux.New(linux.Config{Node: nodes[i], NetNSDir: dir, Log: log})
		if err != nil {
			return err
		}
		if f.engine[i], err = wg.New(wg.Config{Node: nodes[i], NetNSDir: dir, RunDir: filepath.Join(dir, "wg"), KeyFile: filepath.Join(dir, "keys"), Overlay: bridge, Engine: engine, Log: log}); err != nil {
			return err
		}
		if err := netns.Do(f.host[i], func() error { return f.engine[i].Probe(ctx) }); err != nil {
			return err
		}
		if keys[i], err = f.engine[i].Keys(0); err != nil {
			return err
		}
		if f.task[i], err = netns.Create(dir, "task"); err != nil {
			return err
		}
		f.crypt[i] = filepath.Join(dir, weft.CryptNetNS(nodes[i]))
	}
	for i := range f.host {
		if err := netns.Do(f.host[i], func() error { return f.engine[i].Apply(ctx, f.state(i, nodes, keys)) }); err != nil {
			return err
		}
		if err := netns.Do(f.crypt[i], func() error { return f.alone(i) }); err != nil {
			return err
		}
	}
	f.child = childrenIn(f.crypt)
	return nil
}

func (f *cryptField) underlay() error {
	for i := range f.host {
		var err error
		if f.host[i], err = netns.Create(f.dir, fmt.Sprint("host", i)); err != nil {
			return err
		}
	}
	peer, err := netns.Open(f.host[1])
	if err != nil {
		return err
	}
	defer peer.Close()
	err = netns.Do(f.host[0], func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(peer.FD())})
	})
	for i := range f.host {
		err = errors.Join(err, netns.Do(f.host[i], func() error { return address("eth0", fmt.Sprintf("10.99.9.%d/30", i+1)) }))
	}
	return err
}

// address gives a link of the calling namespace an address and sets it up.
func address(link, addr string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return fmt.Errorf("look up %s: %w", link, err)
	}
	a, err := netlink.ParseAddr(addr)
	if err != nil {
		return err
	}
	return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
}

func (f *cryptField) state(i int, nodes [2]weft.ID, keys [2][]weft.NodeKey) vxlan.State {
	vtep := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, 9, byte(i + 1)}) }
	addr := func(last int) netip.Addr { return netip.AddrFrom4([4]byte{10, 100, 9, byte(last)}) }
	o := 1 - i
	mac := func(a netip.Addr) net.HardwareAddr { return weft.EndpointMAC("task", a) }
	n := vxlan.Network{
		ID: "bench", VNI: cryptVNI, MTU: cryptMTU, VTEP: vtep(i), Port: weft.VXLANPort, Encrypted: true,
		Subnets: []netip.Prefix{netip.PrefixFrom(addr(0), 24)},
		Ports:   []vxlan.Port{{Task: nodes[i], NetNS: f.task[i], IfName: "eth0", Addr: netip.PrefixFrom(addr(10*(i+1)), 24), MAC: mac(addr(10 * (i + 1)))}},
		Peers: []vxlan.Peer{
			{Addr: addr(10 * (o + 1)), MAC: mac(addr(10 * (o + 1))), VTEP: vtep(o)},
			{Addr: addr(o + 1), MAC: mac(addr(o + 1)), VTEP: vtep(o)},
		},
	}
	return vxlan.State{
		Networks:   map[uint32]vxlan.Network{cryptVNI: n},
		Encryption: vxlan.Encryption{Peers: []vxlan.EncryptionPeer{{Node: nodes[o], VTEP: vtep(o), Keys: keys[o]}}},
	}
}

// alone makes sockets on the WireGuard device itself possible, and a VXLAN
// device whose packets go through it, in the calling crypt namespace.
func (f *cryptField) alone(i int) error {
	wg0, err := netlink.LinkByName(weft.CryptLink(0))
	if err != nil {
		return err
	}
	own, other := net.IPv4(10, 100, 9, byte(i+1)), net.IPv4(10, 100, 9, byte(2-i))
	_, there, err := net.ParseCIDR("10.100.9.0/24")
	if err != nil {
		return err
	}
	_, inside, err := net.ParseCIDR("10.97.9.0/30")
	if err != nil {
		return err
	}
	through := netlink.NewRule()
	through.Priority, through.Src, through.Table, through.Family = 50, &net.IPNet{IP: own, Mask: net.CIDRMask(32, 32)}, aloneTable, unix.AF_INET
	stacked := netlink.NewRule()
	stacked.Priority, stacked.Dst, stacked.Table, stacked.Family = 51, inside, unix.RT_TABLE_MAIN, unix.AF_INET
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "stacked", cryptMTU-50
	return errors.Join(
		address("lo", own.String()+"/32"),
		netlink.RouteAdd(&netlink.Route{LinkIndex: wg0.Attrs().Index, Dst: there, Table: aloneTable, Scope: unix.RT_SCOPE_LINK}),
		netlink.RuleAdd(through), netlink.RuleAdd(stacked),
		netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: 9, SrcAddr: own, Group: other, Port: 4790}),
		address("stacked", fmt.Sprintf("10.97.9.%d/30", i+1)),
	)
}

// bulk sends one stream for bulkTime and returns how many bytes arrived and the
// CPU time of this process and of the engines' children for it.
func (f *cryptField) bulk(ctx context.Context, from, to, at string) (float64, time.Duration, error) {
	var l net.Listener
	err := netns.Do(to, func() (err error) {
		l, err = net.Listen("tcp4", at+":0")
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	defer l.Close()
	var c net.Conn
	err = netns.Do(from, func() (err error) {
		d := net.Dialer{}
		if strings.HasPrefix(at, "10.100.9.2") && len(at) == len("10.100.9.2") {
			d.LocalAddr = &net.TCPAddr{IP: net.IPv4(10, 100, 9, 1)}
		}
		c, err = d.DialContext(ctx, "tcp4", l.Addr().String())
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		return 0, 0, err
	}
	defer s.Close()
	before, err := f.used()
	if err != nil {
		return 0, 0, err
	}
	sent := make(chan error, 1) // what ended the sender
	end := time.Now().Add(bulkTime)
	go func() {
		buf := make([]byte, 1<<17)
		var err error
		for err == nil && time.Now().Before(end) {
			_, err = c.Write(buf)
		}
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	n, err := io.Copy(onlyWriter{io.Discard}, s)
	if err = errors.Join(err, <-sent); err != nil {
		return 0, 0, err
	}
	after, err := f.used()
	return float64(n), after - before, err
}

// onlyWriter keeps io.Copy from finding a shorter way than through user space.
type onlyWriter struct{ io.Writer }

// used is the CPU time so far of this process and of the engines' children.
func (f *cryptField) used() (time.Duration, error) {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0, err
	}
	sum := time.Duration(u.Utime.Nano() + u.Stime.Nano())
	for _, pid := range f.child {
		b, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil {
			return 0, err
		}
		// proc(5): behind the name in parentheses, fields 14 and 15 are user and
		// system time in ticks of 10 ms.
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		for _, i := range []int{11, 12} {
			ticks, err := strconv.Atoi(fields[i])
			if err != nil {
				return 0, err
			}
			sum += time.Duration(ticks) * 10 * time.Millisecond
		}
	}
	return sum, nil
}

// childrenIn are the processes that live in one of the namespaces.
func childrenIn(paths [2]string) []string {
	var out []string
	all, _ := filepath.Glob("/proc/[0-9]*/ns/net") // of a fixed pattern it is no error
	for _, p := range paths {
		var want unix.Stat_t
		if unix.Stat(p, &want) != nil {
			continue
		}
		for _, file := range all {
			var st unix.Stat_t
			if unix.Stat(file, &st) == nil && st.Ino == want.Ino && st.Dev == want.Dev {
				out = append(out, strings.Split(file, "/")[2])
			}
		}
	}
	return out
}

func (f *cryptField) close(ctx context.Context) error {
	var errs []error
	for i, e := range f.engine {
		if e != nil {
			errs = append(errs, netns.Do(f.host[i], func() error { return e.Apply(ctx, vxlan.State{}) }))
		}
	}
	for _, p := range append(f.host[:], f.task[:]...) {
		if p != "" {
			errs = append(errs, netns.Remove(p))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(f.dir))...)
}
