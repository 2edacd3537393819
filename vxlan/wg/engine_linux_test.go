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
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

func TestPacketsCrossEncrypted(t *testing.T) { onEach(t, 2, packetsCrossEncrypted) }

func packetsCrossEncrypted(t *testing.T, overlays []string) {
	hosts := rig(t, overlays, "")
	stop := capture(t)
	applyAll(t, hosts, 0, 1, 2, 3)
	for v := 1; v <= 3; v++ {
		for _, h := range hosts {
			o := hosts[2-h.i]
			if err := exchange(h.tasks[v], o.tasks[v]); err != nil {
				t.Fatalf("network %d: %s to %s: %v", v, h.tasks[v].Addr, o.tasks[v].Addr, err)
			}
		}
	}
	seen := stop()
	if len(seen) < 1<<20 { // of twelve; the reader may be late for some
		t.Errorf("%d bytes were captured: the capture proves nothing", len(seen))
	}
	if strings.Contains(string(seen), marker) {
		t.Error("the underlay carried plain text")
	}
	for _, h := range hosts {
		if err := h.apply(h.state(hosts, 0, map[*host][]weft.NodeKey{hosts[0]: hosts[0].keys(0), hosts[1]: hosts[1].keys(0)}, 1, 2, 3)); err != nil {
			t.Errorf("apply again: %v", err)
		}
	}
}

// TestNetworksStayApart: neither a task nor another node gets from one encrypted
// network into another.
func TestNetworksStayApart(t *testing.T) { onEach(t, 2, networksStayApart) }

func networksStayApart(t *testing.T, overlays []string) {
	hosts := rig(t, overlays, "")
	applyAll(t, hosts, 0, 1, 2)
	a, b := hosts[0], hosts[1]
	if err := exchange(a.tasks[1], b.tasks[1]); err != nil {
		t.Fatal(err)
	}
	// A task that sends everything to its network's router.
	must(t, netns.Do(a.tasks[1].NetNS, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		gw := net.IP{10, 100, 1, 20} // answered for by the router
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: gw, Dst: ipNet(netip.MustParsePrefix("10.100.2.0/24"))})
	}))
	// And the way back, so that only the wall between can stop it.
	must(t, netns.Do(b.tasks[2].NetNS, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IP{10, 100, 2, 10}, Dst: ipNet(netip.MustParsePrefix("10.100.1.0/24"))})
	}))
	heard, err := listenUDP(b.tasks[2])
	must(t, err)
	defer heard.Close()
	to := heard.LocalAddr().String()
	send := func(from vxlan.Port) {
		must(t, netns.Do(from.NetNS, func() error {
			c, err := net.Dial("udp", to)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte(from.Addr.String()))
			return err
		}))
	}
	send(a.tasks[1])
	send(a.tasks[2]) // the proof that the listener hears
	heard.SetReadDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 100)
	n, _, err := heard.ReadFrom(buf)
	if err != nil || string(buf[:n]) != a.tasks[2].Addr.String() {
		t.Errorf("heard %q, %v; want only %s", buf[:n], err, a.tasks[2].Addr)
	}
}

func listenUDP(p vxlan.Port) (c net.PacketConn, err error) {
	err = netns.Do(p.NetNS, func() (err error) {
		c, err = net.ListenPacket("udp", netip.AddrPortFrom(p.Addr.Addr(), 0).String())
		return err
	})
	return c, err
}

// requests asks and answers on one connection, and on a new one now and then,
// until stop is called; that returns how many there were, the slowest, and the
// first failure.
func requests(from, to vxlan.Port) (stop func() (int, time.Duration, error), err error) {
	l, err := echo(to)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{}) // closed by the client when it has ended
	count, slowest := 0, time.Duration(0)
	var failed error
	go func() {
		defer close(done)
		failed = netns.Do(from.NetNS, func() error {
			buf := make([]byte, len(marker))
			for ctx.Err() == nil {
				c, err := net.DialTimeout("tcp", l.Addr().String(), time.Second)
				if err != nil {
					return err
				}
				for range 50 {
					began := time.Now()
					c.SetDeadline(began.Add(time.Second))
					if _, err = io.WriteString(c, marker); err == nil {
						_, err = io.ReadFull(c, buf)
					}
					if err != nil {
						break
					}
					count++
					slowest = max(slowest, time.Since(began))
				}
				if err = errors.Join(err, c.Close()); err != nil {
					return err
				}
			}
			return nil
		})
	}()
	return func() (int, time.Duration, error) {
		cancel()
		<-done
		l.Close()
		return count, slowest, failed
	}, nil
}

// await repeats apply until the host sends to the other by the slot.
func (h *host) await(o *host, want vxlan.State, slot int) {
	h.t.Helper()
	for deadline := time.Now().Add(15 * time.Second); ; {
		must(h.t, h.apply(want))
		ring, err := h.e.keys.ensure(want.Encryption.Epoch)
		must(h.t, err)
		var have [weft.KeySlots]device
		for s := range have {
			have[s], err = h.e.driver.read(context.Background(), s)
			must(h.t, err)
		}
		if choose(want, ring, have)[vtep(o.i)] == slot {
			must(h.t, h.apply(want))
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("host %d does not change to slot %d; devices %+v", h.i, slot, have)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-h.t.Context().Done():
		}
	}
}

// TestRotationLosesNothing changes keys under requests, with every order in
// which the two nodes can hear of it.
func TestRotationLosesNothing(t *testing.T) { onEach(t, 2, rotationLosesNothing) }

func rotationLosesNothing(t *testing.T, overlays []string) {
	hosts := rig(t, overlays, "")
	a, b := hosts[0], hosts[1]
	applyAll(t, hosts, 0, 1)
	must(t, exchange(a.tasks[1], b.tasks[1]))
	seen := capture(t)
	stop, err := requests(a.tasks[1], b.tasks[1])
	must(t, err)
	known := map[*host][]weft.NodeKey{a: a.keys(0), b: b.keys(0)}
	for epoch := uint64(1); epoch <= 4; epoch++ {
		first, second := a, b
		if epoch%2 == 0 {
			first, second = b, a
		}
		at := map[*host]uint64{a: epoch - 1, b: epoch - 1}
		step := func(h *host) { must(t, h.apply(h.state(hosts, at[h], known, 1))) }
		at[first] = epoch
		step(first) // has a new key and has told nobody
		if epoch > 2 {
			at[second] = epoch
			step(second) // both, before either has heard of the other's
		}
		known[first] = first.keys(epoch)
		step(second)
		at[second] = epoch
		step(second)
		known[second] = second.keys(epoch)
		step(first)
		for _, h := range hosts {
			h.await(hosts[2-h.i], h.state(hosts, epoch, known, 1), int(epoch%2))
		}
	}
	n, slowest, err := stop()
	t.Logf("%d requests over 4 rotations, slowest %s", n, slowest)
	if err != nil {
		t.Errorf("a request was lost: %v", err)
	}
	if n < 40 { // ten for each
		t.Errorf("%d requests prove nothing", n)
	}
	if strings.Contains(string(seen()), marker) {
		t.Error("the underlay carried plain text")
	}
	for _, h := range hosts {
		if k := h.keys(4); k[0].Epoch != 3 || k[1].Epoch != 4 {
			t.Errorf("host %d has keys of epochs %d and %d", h.i, k[0].Epoch, k[1].Epoch)
		}
	}
}

// TestDaemonDies: a new daemon adopts the child without a lost request, and
// starts another when that is gone.
func TestDaemonDies(t *testing.T) { onEach(t, 2, daemonDies) }

func daemonDies(t *testing.T, overlays []string) {
	hosts := rig(t, overlays, EngineUser)
	a, b := hosts[0], hosts[1]
	applyAll(t, hosts, 0, 1)
	must(t, exchange(a.tasks[1], b.tasks[1]))
	child := func(h *host) int {
		pid, err := h.e.driver.(*userDriver).running()
		must(t, err)
		return pid
	}
	before := child(a)
	if before == 0 {
		t.Fatal("no child answers")
	}
	stop, err := requests(a.tasks[1], b.tasks[1])
	must(t, err)
	for range 3 {
		a.restart(EngineUser)
		applyAll(t, hosts, 0, 1)
	}
	if n, slowest, err := stop(); err != nil {
		t.Errorf("after %d requests, slowest %s: %v", n, slowest, err)
	}
	if after := child(a); after != before {
		t.Errorf("the child was %d and is %d", before, after)
	}
	if fi, err := os.Stat(a.e.cfg.KeyFile); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", fi, err)
	}
	must(t, unix.Kill(before, unix.SIGKILL))
	for deadline := time.Now().Add(5 * time.Second); child(a) == before && time.Now().Before(deadline); {
	}
	if err := exchange(a.tasks[1], b.tasks[1]); err == nil {
		t.Error("packets cross without an engine")
	}
	applyAll(t, hosts, 0, 1)
	if err := exchange(a.tasks[1], b.tasks[1]); err != nil {
		t.Errorf("with a new child: %v", err)
	}
	must(t, a.apply(vxlan.State{}))
	if pid := child(a); pid != 0 {
		t.Errorf("child %d outlives the last encrypted network", pid)
	}
}

// TestChildHangs: a child that answers nobody is told of, and made anew when it
// goes on.
func TestChildHangs(t *testing.T) {
	hosts := rig(t, []string{onBridge, onEBPF}, EngineUser)
	a, b := hosts[0], hosts[1]
	applyAll(t, hosts, 0, 1)
	must(t, exchange(a.tasks[1], b.tasks[1]))
	d := a.e.driver.(*userDriver)
	before, err := d.running()
	must(t, err)
	want := a.state(hosts, 0, map[*host][]weft.NodeKey{b: b.keys(0)}, 1)
	must(t, unix.Kill(before, unix.SIGSTOP))
	d.patience = 100 * time.Millisecond
	for i := range muteMost {
		if err := a.apply(want); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("pass %d says %v", i, err)
		}
	}
	d.patience = askLimit
	if pid, err := d.running(); pid != before {
		t.Errorf("the child was %d and is %d, %v: too soon", before, pid, err)
	}
	must(t, a.apply(want))
	if pid, err := d.running(); pid == before || pid == 0 {
		t.Errorf("the child was %d and is %d, %v", before, pid, err)
	}
	must(t, exchange(a.tasks[1], b.tasks[1]))
}

// TestRefusalEndsSilence: a device that refuses a change has answered.
func TestRefusalEndsSilence(t *testing.T) {
	u := newUserDriver(t.TempDir(), "", slog.New(slog.DiscardHandler))
	ln, err := net.Listen("unix", u.socket(1))
	must(t, err)
	defer ln.Close()
	u.patience = 50 * time.Millisecond
	ask := func(says string) error {
		served := make(chan error, 1)
		go func() {
			c, err := ln.Accept()
			if err == nil {
				defer c.Close()
				if says != "" {
					_, err = io.WriteString(c, says)
				}
				io.Copy(io.Discard, c) // until the asker goes
			}
			served <- err
		}()
		_, err := u.read(t.Context(), 1)
		must(t, <-served)
		return err
	}
	for i := 1; i <= muteMost; i++ {
		if err := ask(""); !errors.Is(err, os.ErrDeadlineExceeded) || u.mute[1] != i {
			t.Errorf("question %d without an answer: %v, counted %d", i, err, u.mute[1])
		}
	}
	u.patience = askLimit
	if err := ask("errno=22\n\n"); !errors.Is(err, errRefused) || u.mute[1] != 0 {
		t.Errorf("refused: %v, counted %d", err, u.mute[1])
	}
}

// TestChildGoesFirst: every thread of the child has its priority, and so has the
// session that it leads.
func TestChildGoesFirst(t *testing.T) {
	hosts := rig(t, []string{onBridge, onBridge}, EngineUser)
	applyAll(t, hosts, 0, 1)
	must(t, exchange(hosts[0].tasks[1], hosts[1].tasks[1])) // all threads there are
	d := hosts[0].e.driver.(*userDriver)
	pid, err := d.running()
	must(t, err)
	if b, err := os.ReadFile(d.logPath()); err != nil || strings.Contains(string(b), "operation not permitted") {
		netnstest.Missing(t, "root", fmt.Errorf("the child says %q, %w", b, err))
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	must(t, err)
	for _, th := range threads {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stat", pid, th.Name()))
		must(t, err)
		_, rest, _ := strings.Cut(string(b), ") ")
		if f := strings.Fields(rest); f[16] != strconv.Itoa(priority) { // proc_pid_stat(5): the 19th is nice
			t.Errorf("thread %s has nice %s", th.Name(), f[16])
		}
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/autogroup", pid))
	if err == nil && len(b) > 0 && !strings.HasSuffix(string(b), fmt.Sprintf(" nice %d\n", priority)) {
		t.Errorf("the session has %q", b)
	}
}

// TestFailsClosed: without devices, and without the way to them, nothing leaves,
// encrypted or not; the next pass mends both.
func TestFailsClosed(t *testing.T) { onEach(t, 2, failsClosed) }

func failsClosed(t *testing.T, overlays []string) {
	hosts := rig(t, overlays, "")
	a, b := hosts[0], hosts[1]
	applyAll(t, hosts, 0, 1, 2)
	must(t, exchange(a.tasks[1], b.tasks[1]))
	stop := capture(t)
	for name, spoil := range map[string]func() error{
		"no devices": func() error { return a.ns.Do(func() error { return a.e.driver.remove(context.Background()) }) },
		"no uplink": func() error {
			return netns.Do(a.e.path(), func() error {
				l, err := netlink.LinkByName(weft.RouterName(5001))
				if err != nil {
					return err
				}
				return netlink.LinkDel(l)
			})
		},
		"no routes": func() error {
			return netns.Do(a.e.path(), func() error {
				return netlink.RouteDel(&netlink.Route{Table: 5001, Scope: netlink.SCOPE_LINK, Dst: ipNet(netip.PrefixFrom(b.tasks[1].Addr.Addr(), 32))})
			})
		},
	} {
		must(t, spoil())
		to := b.tasks[1]
		l, err := echo(to)
		must(t, err)
		err = netns.Do(a.tasks[1].NetNS, func() error {
			c, err := net.DialTimeout("tcp", l.Addr().String(), time.Second)
			if err == nil {
				return errors.Join(errors.New("connected"), c.Close())
			}
			u, err := net.Dial("udp", l.Addr().String())
			if err != nil {
				return err
			}
			io.WriteString(u, marker) // refused or not: it is looked for below
			return u.Close()
		})
		l.Close()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		applyAll(t, hosts, 0, 1, 2)
		if err := exchange(a.tasks[1], to); err != nil {
			t.Errorf("%s: repaired: %v", name, err)
		}
	}
	seen := stop()
	if len(seen) < 1<<20 {
		t.Errorf("%d bytes were captured: the capture proves nothing", len(seen))
	}
	if strings.Contains(string(seen), marker) {
		t.Error("the underlay carried plain text")
	}
}

// TestWithoutEngine: the encrypted network is refused by name and nothing of it
// is made; the plain one works.
func TestWithoutEngine(t *testing.T) { onEach(t, 2, withoutEngine) }

func withoutEngine(t *testing.T, overlays []string) {
	hosts := rig(t, overlays, EngineNone)
	h := hosts[0]
	want := h.state(hosts, 0, nil, 1, 2)
	plain := want.Networks[5002]
	plain.Encrypted = false
	want.Networks[5002] = plain
	err := h.apply(want)
	var ne *vxlan.NetworkError
	if !errors.Is(err, weft.ErrUnsupported) || !errors.As(err, &ne) || ne.VNI != 5001 || !strings.Contains(err.Error(), "WireGuard") {
		t.Errorf("got %v", err)
	}
	if st, err := h.e.Read(context.Background()); err != nil || len(st.Networks) != 1 || st.Networks[5002].ID == "" {
		t.Errorf("the kernel holds %v, %v", st, err)
	}
	if k := h.keys(0); k != nil {
		t.Errorf("a node that cannot decrypt publishes %v", k)
	}
}

// TestInjectedVXLAN: plain VXLAN with the right VNI, MAC and source reaches no
// task of an encrypted network; the same to a plain network does.
func TestInjectedVXLAN(t *testing.T) { onEach(t, 2, injectedVXLAN) }

func injectedVXLAN(t *testing.T, overlays []string) {
	hosts := rig(t, overlays, "")
	a, b := hosts[0], hosts[1]
	for _, encrypted := range []bool{true, false} {
		known := map[*host][]weft.NodeKey{a: a.keys(0), b: b.keys(0)}
		for _, h := range hosts {
			st := h.state(hosts, 0, known, 1, 2)
			n := st.Networks[5001]
			n.Encrypted = encrypted
			if !encrypted {
				n.ID = "plain" // the option is fixed for the life of a network
			}
			st.Networks[5001] = n
			must(t, h.apply(st))
		}
		heard, err := listenUDP(b.tasks[1])
		must(t, err)
		must(t, exchange(a.tasks[1], b.tasks[1]))
		to := heard.LocalAddr().(*net.UDPAddr).AddrPort()
		frame := vxlanFrame(5001, a.tasks[1], b.tasks[1], to.Port(), "injected")
		must(t, a.ns.Do(func() error {
			c, err := net.Dial("udp", netip.AddrPortFrom(vtep(b.i), 4789).String())
			if err != nil {
				return err
			}
			defer c.Close()
			for range 3 {
				if _, err := c.Write(frame); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
					return err
				}
			}
			return nil
		}))
		// A packet of the network itself, behind the injected ones.
		must(t, netns.Do(a.tasks[1].NetNS, func() error {
			c, err := net.Dial("udp", to.String())
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("genuine"))
			return err
		}))
		heard.SetReadDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 100)
		n, _, err := heard.ReadFrom(buf)
		want := map[bool]string{true: "genuine", false: "injected"}[encrypted]
		if err != nil || string(buf[:n]) != want {
			t.Errorf("encrypted %v: heard %q first, %v; want %q", encrypted, buf[:n], err, want)
		}
		heard.Close()
		if encrypted && b.overlay == onEBPF {
			if n := b.drops()["unencrypted"]; n != 3 {
				t.Errorf("%d injected packets were counted: %v", n, b.drops())
			}
		}
	}
}

// vxlanFrame is an UDP datagram inside VXLAN (RFC 7348 section 5), without an
// inner UDP checksum (RFC 768: zero means none).
func vxlanFrame(vni uint32, from, to vxlan.Port, port uint16, text string) []byte {
	udp := append([]byte{0x30, 0x39, byte(port >> 8), byte(port), 0, byte(8 + len(text)), 0, 0}, text...)
	ip := append([]byte{0x45, 0, 0, byte(20 + len(udp)), 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, from.Addr.Addr().AsSlice()...)
	ip = append(ip, to.Addr.Addr().AsSlice()...)
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(ip[i])<<8 | uint32(ip[i+1])
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	ip[10], ip[11] = byte(^sum>>8), byte(^sum)
	b := []byte{0x08, 0, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni), 0}
	b = append(b, to.MAC...)
	b = append(b, from.MAC...)
	b = append(b, 0x08, 0x00)
	return append(append(b, ip...), udp...)
}

// TestProbeOfUserSpaceIsSteady: the device's own thread and Close both end at the
// same pipe, and either may be first.
func TestProbeOfUserSpaceIsSteady(t *testing.T) {
	netnstest.NeedRoot(t)
	for range 20 {
		must(t, probeUser(t.TempDir()))
	}
}
