//go:build lab

package lab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Sizes of packets. Nothing is cut up in these tests: no host puts fragments
// together, as many firewalls drop them, so that a size that is wrong is a loss
// and not a delay.

// postBytes is what each task sends to each other one, and gets back.
const postBytes = 1 << 20

// TestFaultsMTU: five hosts with links of 9000, 9000, 1500, 1420 and 1280 bytes,
// and one path, in one direction, that loses what exceeds 1300 without a word.
// 20 pairs of tasks, on a plain network and on an encrypted one, and a port that
// five hosts publish, ten times each, carry 1 MiB each way, while nothing changes and while a link
// becomes narrower and wider again.
func TestFaultsMTU(t *testing.T) { mixedMTU(t, "flt-mtu", 1) }

// TestSoakMTU is the same, 20 times over the changes.
func TestSoakMTU(t *testing.T) {
	soak(t)
	mixedMTU(t, "soak-mtu", 20)
}

func mixedMTU(t *testing.T, name string, rounds int) {
	const port = 8097
	result := newSoakResult(t)
	r := newRig(t, name, "--hosts", "5", "--mtu", "9000")
	for host, mtu := range map[string]int{"h3": 1500, "h4": 1420, "h5": 1280} {
		r.must(r.weft, "lab", "mtu", "--name", r.name, host, strconv.Itoa(mtu))
	}
	hosts := []string{"h1", "h2", "h3", "h4", "h5"}
	for _, h := range hosts {
		r.refuseFragments(r.host(h).Paths.NetNS)
	}
	r.blackHole("h3", "h2", 1300)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "--opt", "encrypted", "secret")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "web", "--mode", "global", "--network", "front", "--network", "secret",
		"--publish", fmt.Sprintf("%d:7", port), "weft/whoami")...)
	var web []replica
	r.eventually("one task on every host", func() error {
		var err error
		if web, err = r.replicas("web", hosts...); err == nil && len(web) != len(hosts) {
			err = fmt.Errorf("%d run", len(web))
		}
		return err
	})
	link := map[string]int{"h1": 9000, "h2": 9000, "h3": 1500, "h4": 1420, "h5": 1280}
	want := func(from, to string) int {
		mtu := min(link[from], link[to])
		if from == "h3" && to == "h2" {
			mtu = min(mtu, 1300)
		}
		return mtu
	}
	// On an encrypted network a way that is narrower than the own link is a
	// multiple of 16.
	onNetwork := map[string]func(from, to string) int{
		"front": func(from, to string) int { return want(from, to) - 50 },
		"secret": func(from, to string) int {
			if want(from, to) == link[from] {
				return link[from] - 60
			}
			return (want(from, to) - 60) / 16 * 16
		},
	}
	known := func() {
		t.Helper()
		for _, from := range web {
			for _, to := range web {
				if from.host == to.host {
					continue
				}
				for network := range to.addrs {
					want := onNetwork[network]
					if want == nil {
						continue // ingress: of its own MTUs the published ports tell
					}
					mtu := want(from.host, to.host)
					r.eventually(fmt.Sprintf("MTU of %s from %s to %s", network, from.host, to.host), func() error {
						got, err := believedMTU(from.ns(), to.addrs[network])
						if err == nil && got != mtu {
							err = fmt.Errorf("is %d, want %d", got, mtu)
						}
						return err
					})
				}
			}
		}
	}
	known()
	before := r.fragments()
	r.posts(result, "while nothing changes", web, port)
	if after := r.fragments(); after != before {
		t.Errorf("the switch cut or refused %d packets although every size was known", after-before)
	}
	for i := range rounds {
		for _, mtu := range []int{1400, 9000} {
			var g errgroup.Group
			g.Go(func() error {
				link["h1"] = mtu
				_, err := r.run(t.Context(), r.weft, "lab", "mtu", "--name", r.name, "h1", strconv.Itoa(mtu))
				return err
			})
			r.posts(result, fmt.Sprintf("round %d, while h1 goes to %d", i+1, mtu), web, port)
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			known()
		}
	}
}

// posts sends from every task to every other, and from outside to every host,
// all at once.
func (r *rig) posts(result *soakResult, when string, web []replica, port int) {
	r.t.Helper()
	type post struct{ from, ns, to, addr string }
	var all []post
	for _, from := range web {
		for _, to := range web {
			if from.host != to.host {
				all = append(all, post{from.host, from.ns(), to.host, to.addrs["front"] + ":7"})
				if addr := to.addrs["secret"]; addr != "" {
					all = append(all, post{from.host, from.ns(), to.host + ", encrypted", addr + ":7"})
				}
			}
		}
		// Each host leads to a task of its choice: enough to meet most pairs.
		for range 2 * len(web) {
			all = append(all, post{"outside", r.clientNS(), from.host, fmt.Sprintf("%s:%d", r.host(from.host).Addr, port)})
		}
	}
	var mu sync.Mutex // guards: slowest, who
	var slowest time.Duration
	var who string
	var wg sync.WaitGroup
	for _, p := range all {
		wg.Go(func() {
			began := time.Now()
			ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
			defer cancel()
			err := within(p.ns, func() error { return echoed(ctx, p.addr) })
			took := time.Since(began)
			if err != nil {
				r.t.Errorf("%s: 1 MiB from %s to %s (%s) after %v: %v", when, p.from, p.to, p.addr, took.Round(time.Millisecond), err)
			}
			mu.Lock()
			defer mu.Unlock()
			if took > slowest {
				slowest, who = took, p.from+" to "+p.to
			}
		})
	}
	wg.Wait()
	result.printf("%s: %d posts of 1 MiB and back, slowest %v (%s)", when, len(all), slowest.Round(time.Millisecond), who)
}

// echoed sends postBytes to an echo server and wants them back.
func echoed(ctx context.Context, addr string) error {
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
	data := bytes.Repeat([]byte("what is sent comes back whole; "), postBytes/31+1)[:postBytes]
	var g errgroup.Group
	g.Go(func() error {
		if _, err := c.Write(data); err != nil {
			return err
		}
		return c.(*net.TCPConn).CloseWrite()
	})
	answer := bufio.NewReader(c)
	_, greeting := answer.ReadString('\n') // says whom the server saw
	h := sha256.New()
	n, err := io.Copy(h, answer)
	if err := errors.Join(greeting, err, g.Wait()); err != nil {
		return fmt.Errorf("%d bytes came back: %w", n, err)
	}
	if want := sha256.Sum256(data); !bytes.Equal(h.Sum(nil), want[:]) {
		return fmt.Errorf("%d bytes came back, not those that were sent", n)
	}
	return nil
}

// believedMTU is what the kernel in a namespace sends to an address in one piece.
func believedMTU(ns, to string) (mtu int, err error) {
	err = within(ns, func() error {
		c, err := net.Dial("udp", net.JoinHostPort(to, "9"))
		if err != nil {
			return err
		}
		defer c.Close()
		raw, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			return err
		}
		var optErr error
		err = raw.Control(func(fd uintptr) { mtu, optErr = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU) })
		return errors.Join(err, optErr)
	})
	return mtu, err
}

// refuseFragments gives a host no room to put packets together.
func (r *rig) refuseFragments(ns string) {
	r.t.Helper()
	err := within(ns, func() error {
		return errors.Join(setSysctl("net/ipv4/ipfrag_low_thresh", "0"), setSysctl("net/ipv4/ipfrag_high_thresh", "0"))
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// blackHole makes the switch lose what is larger than bytes from one host to
// another, and has it tell the sender nothing.
func (r *rig) blackHole(from, to string, bytes int) {
	r.t.Helper()
	a, b := r.host(from), r.host(to)
	p, err := newPlan(r.name, DefaultConfig().RunDir, DefaultConfig().DataDir)
	if err != nil {
		r.t.Fatal(err)
	}
	const table, priority = 1300, cutPriority + 1
	err = withLinks(p.netnsFile(switchName), func(h *netlink.Handle) error {
		out, err := h.LinkByName(portName(b.Index))
		if err != nil {
			return err
		}
		only := prefixOf(b)
		narrow := netlink.NewRule()
		narrow.Family, narrow.Priority, narrow.Table, narrow.IifName, narrow.Dst = netlink.FAMILY_V4, priority, table, portName(a.Index), only
		mute := netlink.NewRule()
		mute.Family, mute.Priority, mute.Type, mute.IifName, mute.IPProto, mute.Dst = netlink.FAMILY_V4, priority, unix.FR_ACT_BLACKHOLE, "lo", unix.IPPROTO_ICMP, prefixOf(a)
		return errors.Join(
			h.RouteReplace(&netlink.Route{LinkIndex: out.Attrs().Index, Dst: only, Scope: netlink.SCOPE_LINK, Table: table, MTU: bytes, MTULock: true}),
			h.RuleAdd(narrow), h.RuleAdd(mute))
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

func prefixOf(h Host) *net.IPNet {
	return &net.IPNet{IP: h.Addr.AsSlice(), Mask: net.CIDRMask(32, 32)}
}

// fragments counts the packets that the switch has cut up or refused for their
// size (RFC 4293: ipSystemStatsOutFragOKs, …OutFragFails), but for the probes,
// which are meant to be refused: only those that it cut.
func (r *rig) fragments() uint64 {
	r.t.Helper()
	p, err := newPlan(r.name, DefaultConfig().RunDir, DefaultConfig().DataDir)
	if err != nil {
		r.t.Fatal(err)
	}
	var n uint64
	err = within(p.netnsFile(switchName), func() error {
		b, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		lines := strings.Split(string(b), "\n")
		for i, name := range strings.Fields(lines[0]) {
			if name == "FragOKs" {
				n, err = strconv.ParseUint(strings.Fields(lines[1])[i], 10, 64)
				return err
			}
		}
		return fmt.Errorf("no FragOKs: %w", weft.ErrNotFound)
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}
