package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// flowsIn waits for a map of flows to have so many elements.
func (f *fabric) flowsIn(name string, want int) {
	f.t.Helper()
	var have map[string]string
	deadline := time.Now().Add(3 * time.Second)
	for time.Now().Before(deadline) {
		if have = elements(f.t, f.br, bridgeRules(ingress.Network{}, false), name); len(have) == want {
			return
		}
	}
	f.t.Errorf("%s has %d elements, want %d", name, len(have), want)
}

// TestFlowsThatEnd: what a client has closed is known for a shorter time, and the
// last acknowledgements do not make it a long one again.
func TestFlowsThatEnd(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	s := service(f.task(11), f.task(12))
	ns := f.client(50, s)
	f.apply(e, s)
	var open []net.Conn
	for range 4 {
		_, _, c, err := f.get(ns, vipText+":80")
		must(t, err)
		must(t, echo(c))
		open = append(open, c)
	}
	f.flowsIn("flows", 4)
	f.flowsIn("ending", 0)
	for _, c := range open[:3] {
		must(t, c.Close())
	}
	f.flowsIn("flows", 1)
	f.flowsIn("ending", 3)
	must(t, echo(open[3]))
	f.flowsIn("flows", 1)
}

// TestFlowsWithoutRoom: while the maps of flows are full a new connection is
// served, and spread, all the same.
func TestFlowsWithoutRoom(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	s := service(f.task(11), f.task(12))
	ns := f.client(50, s)
	f.apply(e, s)
	small := bridgeRules(ingress.Network{Services: []ingress.Service{s}}, false)
	for i := range small.sets {
		if small.sets[i].dynamic {
			small.sets[i].size = 2
		}
	}
	must(t, withConn(f.br, func(conn *nftables.Conn) error { return loads(conn, small) }))
	count := map[string]int{}
	for range 40 {
		name, _, c, err := f.get(ns, vipText+":80")
		if err != nil {
			t.Fatalf("after %v: %v", count, err)
		}
		must(t, echo(c))
		count[name]++
	}
	if count["task11"] < 5 || count["task12"] < 5 {
		t.Errorf("40 connections went to %v", count)
	}
	f.flowsIn("flows", 2)
}

// TestEndedFlowsThatAreGone: one that is not there fails all that are deleted with it,
// and is no error by itself.
func TestEndedFlowsThatAreGone(t *testing.T) {
	f := newFabric(t)
	f.apply(New(f.dir), service())
	rules := bridgeRules(ingress.Network{}, false)
	flows := rules.sets[slices.IndexFunc(rules.sets, func(s set) bool { return s.name == "flows" })]
	key := func(n byte) []byte { return append([]byte{n}, make([]byte, ipv4.tupleBytes-1)...) }
	var is, isNot []nftables.SetElement
	for n := byte(1); n <= 3; n++ {
		is = append(is, nftables.SetElement{Key: key(n), Val: []byte{2, 0, 0, 0, 0, n}})
	}
	isNot = append(isNot, is[0], nftables.SetElement{Key: key(9), Val: []byte{2, 0, 0, 0, 0, 9}}, is[2])
	must(t, withConn(f.br, func(conn *nftables.Conn) error {
		return errors.Join(change(conn, flows.object(rules.table()), delta{add: is}), conn.Flush())
	}))
	must(t, netns.Do(f.br, func() error {
		if _, err := rules.deleteAll(flows, isNot); !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete all at once: %w", err)
		}
		made, err := rules.deleteEach(flows, isNot)
		if made != 2 {
			err = errors.Join(err, fmt.Errorf("%d transactions, want 2", made))
		}
		return err
	}))
	f.flowsIn("flows", 1)
}

// TestFlowsOfTheGoneUnderTraffic: while packets of many flows come as fast as they can
// and connections begin and end, no flow to a backend that has gone outlives the pass
// that takes it away. A packet that has found its flow before it was ended must not
// bring it back.
func TestFlowsOfTheGoneUnderTraffic(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	a, b := f.task(11), f.task(12)
	ns := f.client(50, service(a, b))
	f.apply(e, service(a, b))
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		var socks []*net.UDPConn
		for range 32 {
			f.in(ns, func() error {
				c, err := net.ListenUDP("udp4", nil)
				socks = append(socks, c)
				return err
			})
		}
		wg.Go(func() {
			to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(vipText + ":7"))
			for i := 0; ; i++ {
				select {
				case <-done:
					for _, c := range socks {
						c.Close()
					}
					return
				default:
					socks[i%len(socks)].WriteTo([]byte("x"), to) // what is refused meanwhile is nothing to us
				}
			}
		})
	}
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			// Those that were accepted by the backend that goes then fail, as they should.
			netns.Do(ns, func() error {
				c, err := net.DialTimeout("tcp4", vipText+":80", time.Second)
				if err == nil {
					c.Close()
				}
				return nil
			})
		}
	})
	defer func() { close(done); wg.Wait() }()
	rules := bridgeRules(ingress.Network{}, false)
	for round := range 15 {
		f.apply(e, service(a, b))
		f.flowsTo(rules, b, 10)
		f.apply(e, service(b))
		for look := range 3 {
			for _, name := range []string{"flows", "ending"} {
				for _, mac := range elements(t, f.br, rules, name) {
					if mac == string(a.MAC) {
						t.Fatalf("round %d, look %d: a flow of %s still leads to the backend that has gone", round, look, name)
					}
				}
			}
		}
	}
}

// flowsTo waits for so many flows, of which some lead elsewhere than to b.
func (f *fabric) flowsTo(rules ruleset, b ingress.Backend, want int) {
	f.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		others, have := 0, elements(f.t, f.br, rules, "flows")
		for _, mac := range have {
			if mac != string(b.MAC) {
				others++
			}
		}
		if len(have) >= want && others > 0 {
			return
		}
		f.in(f.br, func() error { // ended, so that the next packets choose anew
			_, err := rules.endFlowsOnce(func(string) bool { return true })
			return err
		})
	}
	f.t.Fatal("no flow leads to the other backend")
}

// TestFlowsOutliveTheirTable: a table that somebody has damaged, or that another build
// has made, is made anew; connections keep their backends, also those that get no new
// ones, and ends those of backends that went.
func TestFlowsOutliveTheirTable(t *testing.T) {
	f := newFabric(t)
	e := New(f.dir)
	b := []ingress.Backend{f.task(11), f.task(12), f.task(13)}
	s := service(b...)
	ns := f.client(50, s)
	f.apply(e, s)
	open := map[string]net.Conn{}
	for len(open) < len(b) {
		name, _, c, err := f.get(ns, vipText+":80")
		must(t, err)
		open[name] = c
	}
	for i := range b[:2] {
		b[i].Draining = true
	}
	f.apply(e, service(b...))
	spoil := func() {
		must(t, withConn(f.br, func(conn *nftables.Conn) error {
			table := ruleset{family: nftables.TableFamilyBridge}.table()
			rules, err := conn.GetRules(table, &nftables.Chain{Name: "errors", Table: table})
			if err != nil {
				return err
			}
			if err := conn.DelRule(rules[0]); err != nil {
				return err
			}
			return conn.Flush()
		}))
	}
	spoil()
	f.apply(e, service(b...))
	for name, c := range open {
		if err := echo(c); err != nil {
			t.Errorf("connection to %s after the table was made anew: %v", name, err)
		}
	}
	// One that starts now knows nothing, and one backend has gone meanwhile.
	spoil()
	f.apply(New(f.dir), service(b[1:]...))
	have := elements(t, f.br, bridgeRules(ingress.Network{}, false), "flows")
	for _, mac := range have {
		if mac == string(b[0].MAC) {
			t.Error("a flow still leads to a backend that is gone")
		}
	}
	if len(have) == 0 {
		t.Error("no flow is known any more")
	}
}
