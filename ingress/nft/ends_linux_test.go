package nft

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// Address plan: a server, a client, and the service address behind the server.
const (
	endsServer, endsClient = "10.9.0.2", "10.9.0.9"
	endsVIPAddr            = "10.9.1.200"
	endsPort               = 80
	endsWait               = 5 * time.Second
)

// endsRig is a task that stands for a service address, and a client in another
// namespace; client and server are of one family.
type endsRig struct {
	*fabric
	e              *Engine
	server, client string // namespaces
	want           ingress.End
	own, vip       netip.Addr
}

func newEndsRig(t *testing.T) *endsRig {
	r := &endsRig{fabric: newFabric(t), e: New(t.TempDir())}
	must(t, r.e.Probe(t.Context()))
	r.server, r.client = r.namespace("server"), r.namespace("client")
	r.port(r.server, "eth0", endsServer, net.HardwareAddr{2, 0, 0, 0, 0, 2})
	r.port(r.client, "eth0", endsClient, net.HardwareAddr{2, 0, 0, 0, 0, 9})
	vip6 := twin(endsVIPAddr)
	r.in(r.server, func() error {
		return errors.Join(addAddr("lo", endsVIPAddr+"/32"), addAddr("lo", vip6.String()+"/128"))
	})
	r.in(r.client, func() error {
		return errors.Join(addRoute(endsVIPAddr+"/32", endsServer, 0), addRoute(vip6.String()+"/128", twin(endsServer).String(), 0))
	})
	r.want = ingress.End{Task: "web1", NetNS: r.server, Addrs: []ingress.EndAddr{
		{VIP: netip.MustParseAddr(endsVIPAddr), Own: netip.MustParseAddr(endsServer)}, {VIP: vip6, Own: twin(endsServer)},
	}}
	r.apply()
	return r
}

func (r *endsRig) apply() {
	r.t.Helper()
	must(r.t, r.e.applyEnds([]ingress.End{r.want}, true))
}

// of is the rig of one family.
func (r *endsRig) of(t *testing.T, a ingress.EndAddr) *endsRig {
	c := *r
	f := *r.fabric
	f.t = t
	c.fabric, c.own, c.vip = &f, a.Own, a.VIP
	return &c
}

// known counts what the task remembers in a map.
func (r *endsRig) known(name string) int {
	r.t.Helper()
	rules := familyOf(r.vip).endsRules(r.want)
	n := 0
	r.in(r.server, func() error {
		i := slices.IndexFunc(rules.sets, func(s set) bool { return s.name == name })
		have, err := readElements(rules.sets[i].object(rules.table()))
		n = len(have)
		return err
	})
	return n
}

func at(a netip.Addr) string { return netip.AddrPortFrom(a, endsPort).String() }

// listen waits at an address of the server; "" is all.
func (r *endsRig) listen(addr string) *net.TCPListener {
	r.t.Helper()
	var l net.Listener
	r.in(r.server, func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(addr, strconv.Itoa(endsPort)))
		return err
	})
	r.t.Cleanup(func() { l.Close() })
	must(r.t, l.(*net.TCPListener).SetDeadline(time.Now().Add(4*endsWait)))
	return l.(*net.TCPListener)
}

// datagrams answers each datagram with its own text from an address of the
// server; "" is all.
func (r *endsRig) datagrams(addr string) {
	r.t.Helper()
	var c net.PacketConn
	r.in(r.server, func() (err error) {
		c, err = net.ListenPacket("udp", net.JoinHostPort(addr, strconv.Itoa(endsPort)))
		return err
	})
	done := make(chan struct{})
	r.t.Cleanup(func() { c.Close(); <-done })
	go func() {
		defer close(done)
		b := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(b[:n], from) // the client says what it misses
		}
	}()
}

// dial connects from the client, from a port or (0) any.
func (r *endsRig) dial(network string, to netip.Addr, from uint16) (c net.Conn, err error) {
	local := netip.AddrPortFrom(netip.MustParseAddr(endsClient), from)
	if to.Is6() {
		local = netip.AddrPortFrom(twin(endsClient), from)
	}
	d := net.Dialer{Timeout: endsWait, Control: reuse}
	if network == "udp" {
		d.LocalAddr = net.UDPAddrFromAddrPort(local)
	} else {
		d.LocalAddr = net.TCPAddrFromAddrPort(local)
	}
	err = netns.Do(r.client, func() error {
		c, err = d.Dial(network, at(to))
		return err
	})
	if err == nil {
		r.t.Cleanup(func() { c.Close() })
		err = c.SetDeadline(time.Now().Add(endsWait))
	}
	return c, err
}

// said writes text and wants it back at the other end.
func said(from io.Writer, to io.Reader, text []byte) error {
	if _, err := from.Write(text); err != nil {
		return err
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(to, b); err != nil {
		return err
	}
	if !bytes.Equal(b, text) {
		return fmt.Errorf("other bytes arrived")
	}
	return nil
}

// TestEnds: a server of either kind answers from the service address, whichever
// address it waits at, and who waits at none of them is refused by it.
func TestEnds(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprintf("direct %t", direct), func(t *testing.T) { testEnds(t, direct) })
	}
}

func testEnds(t *testing.T, direct bool) {
	all := newEndsRig(t)
	all.want.Direct = direct
	all.apply()
	for _, a := range all.want.Addrs {
		for _, tc := range []struct {
			name string
			run  func(*endsRig)
		}{
			{"tcp to a server on its own address", (*endsRig).testOwn},
			{"tcp to a server on all addresses", (*endsRig).testAll},
			{"tcp to nobody", (*endsRig).testNobody},
			{"a connection of which one half is closed", (*endsRig).testHalf},
			{"a reset", (*endsRig).testReset},
			{"datagrams to a server on all addresses", func(r *endsRig) { r.testDatagrams("") }},
			{"datagrams to a server on its own address", func(r *endsRig) { r.testDatagrams(r.own.String()) }},
			{"datagrams to a server on the service address", func(r *endsRig) { r.testDatagrams(r.vip.String()) }},
			{"a datagram to nobody", (*endsRig).testNobodysDatagram},
		} {
			name := "IPv4 "
			if a.VIP.Is6() {
				name = "IPv6 "
			}
			t.Run(name+tc.name, func(t *testing.T) { tc.run(all.of(t, a)) })
		}
	}
}

// pair is a connection to the service address and its other end.
func (r *endsRig) pair(l *net.TCPListener, from uint16) (client, server *net.TCPConn) {
	r.t.Helper()
	c, err := r.dial("tcp", r.vip, from)
	must(r.t, err)
	s, err := l.AcceptTCP()
	must(r.t, err)
	r.t.Cleanup(func() { s.Close() })
	must(r.t, s.SetDeadline(time.Now().Add(endsWait)))
	return c.(*net.TCPConn), s
}

func (r *endsRig) testOwn() {
	l := r.listen(r.own.String())
	for range 2 { // one port of the client's, twice
		was := r.known(endsClosed)
		c, s := r.pair(l, 41000)
		if got := s.LocalAddr().String(); got != at(r.own) {
			r.t.Errorf("the server was asked at %s", got)
		}
		big := bytes.Repeat([]byte("weft"), 1<<16)
		for _, err := range []error{said(c, s, big), said(s, c, big)} {
			must(r.t, err)
		}
		if n := r.known(endsOpen); n != 1 {
			r.t.Errorf("%d connections known as open, want one", n)
		}
		must(r.t, c.Close())
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			r.t.Errorf("the server sees %v, want the end", err)
		}
		must(r.t, s.Close())
		r.settled(was)
	}
	// One that asks the task itself is no business of the service's.
	d, err := r.dial("tcp", r.own, 0)
	must(r.t, err)
	s, err := l.AcceptTCP()
	must(r.t, err)
	must(r.t, errors.Join(said(d, s, []byte("direct")), said(s, d, []byte("direct"))))
	must(r.t, s.Close())
}

// settled waits until no connection is known as open, and one at most is known
// as ending beyond those that were.
func (r *endsRig) settled(was int) {
	r.t.Helper()
	for end := time.Now().Add(endsWait); r.known(endsOpen) > 0; {
		if time.Now().After(end) {
			r.t.Fatalf("%d connections that ended are known as open", r.known(endsOpen))
		}
	}
	if n := r.known(endsClosed); n > was+1 {
		r.t.Errorf("%d connections known as ending, %d before", n, was)
	}
}

func (r *endsRig) testAll() {
	l := r.listen("")
	c, s := r.pair(l, 0)
	if got := s.LocalAddr().String(); got != at(r.vip) {
		r.t.Errorf("the server was asked at %s", got)
	}
	must(r.t, errors.Join(said(c, s, []byte("in")), said(s, c, []byte("out"))))
	if n := r.known(endsOpen); n != 0 {
		r.t.Errorf("%d connections remembered for a server that needs none", n)
	}
}

func (r *endsRig) testNobody() {
	if _, err := r.dial("tcp", r.vip, 0); !errors.Is(err, syscall.ECONNREFUSED) {
		r.t.Errorf("%v, want refused", err)
	}
	if n := r.known(endsOpen); n != 0 {
		r.t.Errorf("%d connections remembered of nobody", n)
	}
}

// testHalf: each end closes its half first, and the other goes on.
func (r *endsRig) testHalf() {
	l := r.listen(r.own.String())
	for _, serverFirst := range []bool{false, true} {
		was := r.known(endsClosed)
		c, s := r.pair(l, 0)
		first, other := c, s
		if serverFirst {
			first, other = s, c
		}
		must(r.t, said(first, other, []byte("first")))
		must(r.t, first.CloseWrite())
		if _, err := other.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			r.t.Fatalf("the other end sees %v, want the end", err)
		}
		for range 3 {
			must(r.t, said(other, first, bytes.Repeat([]byte("other"), 1<<12)))
		}
		must(r.t, other.Close())
		if _, err := first.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			r.t.Fatalf("the first end sees %v, want the end", err)
		}
		must(r.t, first.Close())
		r.settled(was)
	}
}

// testReset: what one end resets is reset at the other, by the service address, and is
// not known as open any more: short connections that end so must not fill the map.
func (r *endsRig) testReset() {
	l := r.listen(r.own.String())
	for _, byServer := range []bool{true, false} {
		c, s := r.pair(l, 0)
		first, other := s, c
		if !byServer {
			first, other = c, s
		}
		must(r.t, said(c, s, []byte("in")))
		must(r.t, first.SetLinger(0))
		must(r.t, first.Close())
		if _, err := other.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			r.t.Errorf("by the server %t: %v, want a reset", byServer, err)
		}
		if n := r.known(endsOpen); n != 0 {
			r.t.Errorf("by the server %t: %d connections known as open", byServer, n)
		}
	}
}

// testDatagrams: a server at an address answers from the one that was asked, whatever
// the client's socket asked before.
func (r *endsRig) testDatagrams(server string) {
	ask := func(when string, to netip.Addr, size int) {
		r.t.Helper()
		c, err := r.dial("udp", to, 42000)
		must(r.t, err)
		defer c.Close()
		if err := said(c, c, bytes.Repeat([]byte("d"), size)); err != nil {
			r.t.Errorf("%s: %v", when, err)
		}
	}
	r.datagrams(server)
	ask("one", r.vip, 100)
	ask("again, in pieces", r.vip, 20_000)
	if server != r.vip.String() {
		ask("the task itself", r.own, 100)
		ask("the service again", r.vip, 100)
	}
}

func (r *endsRig) testNobodysDatagram() {
	c, err := r.dial("udp", r.vip, 0)
	must(r.t, err)
	_, err = c.Write([]byte("nobody"))
	must(r.t, err)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
		r.t.Errorf("%v, want refused", err)
	}
}

// What somebody breaks there is mended and counted once, a service address more is
// no repair, and nothing is left of what is closed.
func TestEndsRepairs(t *testing.T) {
	r := newEndsRig(t)
	var got []string
	r.e.Repaired = func(r weft.Repair) { got = append(got, r.Kind) }
	for _, tc := range []struct {
		name  string
		spoil func() error
		want  []string
	}{
		{"nothing", func() error { return nil }, nil},
		{"table", func() error {
			c, err := open()
			if err != nil {
				return err
			}
			return removeTable(c, ruleset{family: nftables.TableFamilyIPv6, name: endsTable}.table())
		}, []string{kindTable}},
		{"sysctl", func() error { return writeSysctl("net/ipv4/fwmark_reflect", "0") }, []string{kindSysctl}},
	} {
		got = nil
		r.in(r.server, tc.spoil)
		for range 2 {
			r.apply()
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: repairs %v, want %v", tc.name, got, tc.want)
		}
	}
	got = nil
	r.want.Addrs = r.want.Addrs[:1]
	r.apply()
	if len(got) > 0 {
		t.Errorf("another wish was taken for repairs: %v", got)
	}
	must(t, r.e.Close(t.Context()))
	r.in(r.server, func() error {
		c, err := open()
		if err != nil {
			return err
		}
		tables, err := c.ListTables()
		if err == nil && len(tables) > 0 {
			err = fmt.Errorf("%d tables are left", len(tables))
		}
		return err
	})
	must(t, r.e.applyEnds([]ingress.End{{Task: "gone", NetNS: r.dir + "/gone"}}, true))
}
