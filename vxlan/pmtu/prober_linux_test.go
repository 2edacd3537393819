package pmtu

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

const testPort = 7946

// node is a Prober in a namespace of its own.
type node struct {
	*Prober
	ns    string
	vtep  netip.Addr
	limit atomic.Int64
	// proven is what the kernel was told last.
	proven atomic.Int64
	link   chan struct{}
}

func ip(t *testing.T, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

// pair joins two namespaces by a cable; what is larger than the far end takes
// vanishes on it, without a word.
func pair(t *testing.T, a, b string) (nodes [2]*node) {
	t.Helper()
	dir := t.TempDir()
	for i, addr := range []string{a, b} {
		path, err := netns.Create(dir, fmt.Sprintf("n%d", i))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { netns.Remove(path) })
		n := &node{ns: path, vtep: netip.MustParseAddr(addr), link: make(chan struct{}, 1)}
		n.limit.Store(1500)
		n.Prober, err = New(Config{
			VTEP: n.vtep, Port: testPort, Listen: true, Keys: ringOf(strings.Repeat("s", 32)), Changed: n.link,
			Proven: func(_ netip.Addr, bytes int) error { n.proven.Store(int64(bytes)); return nil },
			Limit:  func(netip.Addr) (int, error) { return int(n.limit.Load()), nil },
			Log:    slog.New(slog.NewTextHandler(io.Discard, nil)),
		})
		if err != nil {
			t.Fatal(err)
		}
		nodes[i] = n
	}
	return nodes
}

func (n *node) setMTU(t *testing.T, mtu int) {
	t.Helper()
	if err := netns.Do(n.ns, func() error {
		out, err := exec.Command("ip", "link", "set", "wire", "mtu", fmt.Sprint(mtu)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// eventually waits until the path has an MTU.
func (n *node) eventually(t *testing.T, to netip.Addr, want int) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		mtus, changed := n.MTUs()
		if mtus[to] == want {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("MTU of the path from %s to %s is %d, want %d", n.vtep, to, mtus[to], want)
		}
	}
}

// TestProberOnAWire: the narrower end decides, in its direction only; a change
// that the far end knows of is noticed here within seconds although not a word
// of it comes by ICMP; and a path that becomes wider is used.
func TestProberOnAWire(t *testing.T) {
	for _, addrs := range [][2]string{{"10.99.8.1", "10.99.8.2"}, {"fd99::1", "fd99::2"}} {
		t.Run(addrs[0], func(t *testing.T) {
			nodes := pair(t, addrs[0], addrs[1])
			a, b := nodes[0], nodes[1]
			wireUp(t, a, b)
			ctx, cancel := context.WithCancel(t.Context())
			g, ctx := errgroup.WithContext(ctx)
			for _, n := range nodes {
				g.Go(func() error { return netns.Do(n.ns, func() error { return n.Run(ctx) }) })
			}
			a.limit.Store(9000)
			a.Watch([]netip.Addr{b.vtep})
			b.Watch([]netip.Addr{a.vtep})
			a.eventually(t, b.vtep, 1500)
			b.eventually(t, a.vtep, 1500)

			b.setMTU(t, 1400)
			b.limit.Store(1400)
			b.link <- struct{}{}
			a.eventually(t, b.vtep, 1400)
			b.eventually(t, a.vtep, 1400)

			b.setMTU(t, 9000)
			b.limit.Store(1280) // a route says so; the link takes all
			b.link <- struct{}{}
			a.eventually(t, b.vtep, 9000)
			b.eventually(t, a.vtep, 1280)
			for deadline := time.After(10 * time.Second); a.proven.Load() != 9000 || b.proven.Load() != 1280; {
				select {
				case <-time.After(10 * time.Millisecond):
				case <-deadline:
					t.Fatalf("the kernels were told %d and %d", a.proven.Load(), b.proven.Load())
				}
			}
			cancel()
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestReceiveIsStrict: a probe that was cut, or made by a stranger, has no answer.
func TestReceiveIsStrict(t *testing.T) {
	nodes := pair(t, "10.99.8.1", "10.99.8.2")
	n := nodes[0]
	from := netip.MustParseAddrPort("10.99.8.2:4000")
	good := n.sign.Load().marshal(frame{kind: kindProbe, size: 1300, id: 7}, 1300-28)
	answer := n.Receive(from, good)
	if f, ok := n.sign.Load().parse(answer); !ok || f != (frame{kind: kindAnswer, size: 1300, id: 7}) || len(answer) != headerBytes {
		t.Fatalf("the answer is %x", answer)
	}
	stranger, err := newSigner(ringOf("another secret"))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"cut": good[:1000], "nothing": nil, "a stranger's": stranger.marshal(frame{kind: kindProbe, size: 1300, id: 7}, 1300-28),
		"an answer": answer, "a hint": n.sign.Load().marshal(frame{kind: kindAgain}, 0),
	} {
		if got := n.Receive(from, b); got != nil {
			t.Errorf("%s is answered with %x", name, got)
		}
	}
	if got := n.Receive(netip.MustParseAddrPort("[fd00::1]:1"), good); got != nil {
		t.Error("a probe of another header's length is answered")
	}
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "tunnel address") {
		t.Errorf("got %v", err)
	}
}

// wireUp lays the cable. The end of a may send more than the end of b takes.
func wireUp(t *testing.T, a, b *node) {
	t.Helper()
	ip(t, "link add wire0 mtu 9000 type veth peer name wire1 mtu 1500")
	for i, n := range []*node{a, b} {
		name := fmt.Sprintf("wire%d", i)
		bits := 24
		if n.vtep.Is6() {
			bits = 64
		}
		ip(t, fmt.Sprintf("link set %s netns %s name wire", name, n.ns))
		if err := netns.Do(n.ns, func() error {
			for _, args := range []string{"link set lo up", fmt.Sprintf("addr add %s/%d dev wire nodad", n.vtep, bits), "link set wire up"} {
				if n.vtep.Is4() {
					args = strings.TrimSuffix(args, " nodad")
				}
				if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
					return fmt.Errorf("ip %s: %w: %s", args, err, out)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}
