//go:build lab

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Encrypted networks: what stands on the wire between hosts while keys change
// and daemons die. Labs are named "enc-…".

// secret is what no frame of the underlay may hold.
const secret = "weft-marker-7f3a91c05e"

// askSecret is ask with the marker in the request, and so in the answer.
func askSecret(addr string) func(context.Context) error {
	return func(ctx context.Context) error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		deadline, _ := ctx.Deadline()
		if err := c.SetDeadline(deadline); err != nil {
			return err
		}
		if _, err := io.WriteString(c, "GET /"+secret+" HTTP/1.0\r\n\r\n"); err != nil {
			return err
		}
		b, err := io.ReadAll(c)
		if err == nil && !bytes.Contains(b, []byte(secret)) {
			err = fmt.Errorf("%s answered %q", addr, b)
		}
		return err
	}
}

// tap looks at every frame that crosses a host's underlay, both ways.
type tap struct {
	// sees reports whether a frame is one that is looked for; nil: it has the marker.
	sees func(frame []byte) bool

	frames, plain atomic.Int64 // plain: those that are looked for
	first         atomic.Value // the first of these
}

// run looks until ctx ends. It is to be waited for.
func (p *tap) run(ctx context.Context, ns string) error {
	var fd int
	err := within(ns, func() (err error) {
		// Protocols are in network order (packet(7)).
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.ETH_P_ALL<<8)
		return err
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	quarter := unix.NsecToTimeval(int64(250 * time.Millisecond))
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &quarter),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20))
	if err != nil {
		return err
	}
	links := map[int]bool{} // the underlay's, and not what the host makes of it
	err = within(ns, func() error {
		l, err := netlink.LinkByName(hostLink)
		if err == nil {
			links[l.Attrs().Index] = true
		}
		return err
	})
	if err != nil {
		return err
	}
	sees := p.sees
	if sees == nil {
		sees = func(frame []byte) bool { return bytes.Contains(frame, []byte(secret)) }
	}
	buf := make([]byte, 1<<16)
	for ctx.Err() == nil {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if l, ok := from.(*unix.SockaddrLinklayer); !ok || !links[l.Ifindex] {
			continue
		}
		p.frames.Add(1)
		if sees(buf[:n]) && p.plain.Add(1) == 1 {
			p.first.Store(fmt.Sprintf("%x", buf[:min(n, 128)]))
		}
	}
	return nil
}

// TestLabEncryptedNetwork: 2 changes of keys and the death of 3 daemons under 100
// requests a second; soak: 10 and 30, and 10,000 requests.
func TestLabEncryptedNetwork(t *testing.T) { encrypted(t, "enc-net", 2, 200) }

// TestSoakEncryptedNetwork is TestLabEncryptedNetwork in its long form.
func TestSoakEncryptedNetwork(t *testing.T) {
	soak(t)
	encrypted(t, "enc-net-s", 10, 10000)
}

func encrypted(t *testing.T, lab string, rounds, least int) {
	result := newSoakResult(t)
	r := newRig(t, lab)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "--opt", "encrypted", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "weft/whoami")...)
	var web []replica
	r.eventually("one task on every host", func() (err error) {
		if web, err = r.replicas("web", three...); err == nil && len(web) != 3 {
			err = fmt.Errorf("%d run", len(web))
		}
		return err
	})
	var vip string
	r.eventually("VIP of web", func() (err error) { vip, err = r.vip("web"); return err })
	var tasks, vips []place
	for i, p := range web {
		next := web[(i+1)%len(web)]
		tasks = append(tasks, place{p.ns(), askSecret(next.addrs["front"] + ":80")})
		vips = append(vips, place{p.ns(), askSecret(vip + ":80")})
	}
	for _, p := range slices.Concat(tasks, vips) {
		r.eventually("first answers", func() error { return askOnce(t.Context(), p.ns, p.ask) })
	}
	// A daemon that dies before it has written down what it knows of the others
	// must first be told again, on every network.
	for _, h := range three {
		r.eventually("what "+h+" remembers", func() error {
			b, err := os.ReadFile(filepath.Join(r.host(h).Paths.DataRoot, "agent", "endpoints.json"))
			for _, p := range web {
				if a := p.addrs["front"]; p.host != h && err == nil && !bytes.Contains(b, []byte(`"`+a+`"`)) {
					err = fmt.Errorf("nothing of %s", a)
				}
			}
			return err
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	taps := map[string]*tap{}
	for _, h := range three {
		taps[h] = &tap{}
		g.Go(func() error { return taps[h].run(ctx, r.host(h).Paths.NetNS) })
	}
	began := time.Now()
	direct, byVIP := &flow{name: "task on another host", rate: 50}, &flow{name: "VIP", rate: 50}
	g.Go(func() error { return direct.run(ctx, tasks) })
	g.Go(func() error { return byVIP.run(ctx, vips) })
	for round := range rounds {
		r.rotate()
		for i, h := range three {
			if (round+i)%2 == 0 { // while others change
				r.killDaemon(h)
				r.must(r.weft, "lab", "start", "--name", r.name, h)
			}
		}
		r.changed(uint64(round + 1))
	}
	for _, f := range []*flow{direct, byVIP} {
		r.eventually("enough requests", func() error {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.sent < least/2 {
				return fmt.Errorf("%d of %d", f.sent, least/2)
			}
			return nil
		})
	}
	r.injected(web)
	cancel()
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	for _, f := range []*flow{direct, byVIP} {
		result.printf("%v", f)
		f.mustNotHaveFailed(t, began, always)
	}
	result.printf("%d changes of keys, 3 kills of a daemon in two of them", rounds)
	for h, p := range taps {
		result.printf("%s: %d frames, %d with the marker", h, p.frames.Load(), p.plain.Load())
		if p.plain.Load() > 0 {
			t.Errorf("%s: the underlay carried plain text, first %s", h, p.first.Load())
		}
		if p.frames.Load() < int64(least) {
			t.Errorf("%s: %d frames: the capture proves nothing", h, p.frames.Load())
		}
	}
	r.tapWorks()
}

// rotate asks for new keys as soon as the last ones are taken up.
func (r *rig) rotate() {
	r.t.Helper()
	r.eventually("change of keys", func() error {
		_, err := r.run(r.t.Context(), r.weft, "-H", "unix://"+r.host("h1").Paths.Socket, "swarm", "rotate-keys")
		return err
	})
}

// changed waits until every host sends by the device of the epoch, and by no other.
func (r *rig) changed(epoch uint64) {
	r.t.Helper()
	slot := int(epoch % weft.KeySlots)
	for _, h := range three {
		r.eventually(h+" sends by "+weft.CryptLink(slot), func() error {
			ns, err := filepath.Glob(filepath.Join(r.host(h).Paths.ExecRoot, "netns", "*-crypt"))
			if err != nil || len(ns) != 1 {
				return fmt.Errorf("namespaces %q, %v", ns, err)
			}
			routes := map[string]int{}
			err = within(ns[0], func() error {
				list, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
				for _, x := range list {
					if l, err := netlink.LinkByIndex(x.LinkIndex); err == nil {
						routes[l.Attrs().Name]++
					}
				}
				return err
			})
			if err == nil && (routes[weft.CryptLink(slot)] < 2 || routes[weft.CryptLink(1-slot)] > 0) {
				err = fmt.Errorf("routes %v", routes)
			}
			return err
		})
	}
}

// injected sends plain VXLAN with the right VNI, hardware address and source
// from a member to a task, and then something genuine: only that arrives.
func (r *rig) injected(web []replica) {
	r.t.Helper()
	out := r.must(r.on("h1", "network", "inspect", "-f", `{{index .Options "com.docker.network.driver.overlay.vxlanid_list"}}`, "front")...)
	var vni uint32
	if _, err := fmt.Sscan(out, &vni); err != nil {
		r.t.Fatal(err)
	}
	from, to := web[0], web[1]
	var heard net.PacketConn
	var mac net.HardwareAddr
	err := within(to.ns(), func() (err error) {
		if heard, err = net.ListenPacket("udp", to.addrs["front"]+":0"); err != nil {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		if err == nil {
			mac = l.Attrs().HardwareAddr
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	defer heard.Close()
	at := heard.LocalAddr().(*net.UDPAddr).AddrPort()
	frame := plainVXLAN(vni, mac, netip.MustParseAddr(from.addrs["front"]), at, "injected")
	send := func(ns, to string, payload []byte) {
		r.t.Helper()
		err := within(ns, func() error {
			c, err := net.Dial("udp", to)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write(payload)
			return err
		})
		if err != nil {
			r.t.Fatal(err)
		}
	}
	for range 3 {
		send(r.host(from.host).Paths.NetNS, fmt.Sprintf("%s:%d", r.host(to.host).Addr, weft.VXLANPort), frame)
	}
	send(from.ns(), at.String(), []byte("genuine"))
	buf := make([]byte, 100)
	if err := heard.SetReadDeadline(time.Now().Add(settle)); err != nil {
		r.t.Fatal(err)
	}
	n, _, err := heard.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "genuine" {
		r.t.Errorf("a task of an encrypted network heard %q, %v", buf[:n], err)
	}
}

// plainVXLAN is a datagram in VXLAN (RFC 7348 section 5); its inner UDP checksum
// is zero, which means none (RFC 768).
func plainVXLAN(vni uint32, mac net.HardwareAddr, from netip.Addr, to netip.AddrPort, text string) []byte {
	udp := append([]byte{0x30, 0x39, byte(to.Port() >> 8), byte(to.Port()), 0, byte(8 + len(text)), 0, 0}, text...)
	ip := append([]byte{0x45, 0, 0, byte(20 + len(udp)), 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, from.AsSlice()...)
	ip = append(ip, to.Addr().AsSlice()...)
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(ip[i])<<8 | uint32(ip[i+1])
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	ip[10], ip[11] = byte(^sum>>8), byte(^sum)
	b := []byte{0x08, 0, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni), 0}
	b = append(append(b, mac...), 0x02, 0, 0, 0, 0, 1, 0x08, 0x00)
	return append(append(b, ip...), udp...)
}

// tapWorks proves that the tap sees the marker where there is one.
func (r *rig) tapWorks() {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	var p tap
	g.Go(func() error { return p.run(ctx, r.host("h2").Paths.NetNS) })
	r.eventually("the tap sees plain text", func() error {
		err := within(r.host("h1").Paths.NetNS, func() error {
			c, err := net.Dial("udp", fmt.Sprintf("%s:9", r.host("h2").Addr))
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = io.WriteString(c, secret)
			return err
		})
		if err == nil && p.plain.Load() == 0 {
			err = errors.New("not yet")
		}
		return err
	})
	cancel()
	if err := g.Wait(); err != nil {
		r.t.Error(err)
	}
}

// TestLabEncryptedWithoutEngine: no engine, no traffic: a task on an encrypted
// network is refused with the reason, and one on another network runs.
func TestLabEncryptedWithoutEngine(t *testing.T) {
	r := besideRig(t, "enc-none", "--hosts", "1", "--encryption-engine", "none")
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "--opt", "encrypted", "front")...)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "back")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--network", "front", "weft/whoami")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "plain", "--network", "back", "weft/whoami")...)
	r.eventually("the refusal and the other task", func() error {
		web, err := r.run(t.Context(), r.on("h1", "service", "ps", "--no-trunc", "--format", "{{.CurrentState}} {{.Error}}", "web")...)
		if err != nil {
			return err
		}
		if strings.Contains(web, "Running") {
			t.Fatalf("a task runs on a network that cannot be encrypted:\n%s", web)
		}
		if !strings.Contains(web, "WireGuard") {
			return fmt.Errorf("tasks of web: %q", web)
		}
		plain, err := r.run(t.Context(), r.on("h1", "service", "ps", "--format", "{{.CurrentState}}", "plain")...)
		if err == nil && !strings.Contains(plain, "Running") {
			err = fmt.Errorf("tasks of plain: %q", plain)
		}
		return err
	})
}
