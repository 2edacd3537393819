package nft

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/vxlan/netns"
)

// The claims, in the times of users: a connection is silent for idleTime, or for
// halfTime while one half is closed. A run divides them, and all times of kernel
// and engine, by one number.
const (
	idleTime = 7000 * time.Second
	halfTime = 300 * time.Second
)

// TestIdleConnections: connections to service addresses and published ports, of
// both families, are silent for as long as they may, and then a byte each way
// arrives; their backend drains meanwhile. The host's own settings are those of a
// busy router. Without what weft sets all of them are cut, which shows that the
// test would see it.
func TestIdleConnections(t *testing.T) {
	host := map[string]string{ // a minute, and an hour, divided by all that is used here
		"net/netfilter/nf_conntrack_tcp_timeout_established": "1",
		"net/netfilter/nf_conntrack_tcp_timeout_close_wait":  "1",
		"net/netfilter/nf_conntrack_tcp_timeout_fin_wait":    "1",
	}
	for name, value := range host {
		was, err := readSysctl(name)
		must(t, err)
		must(t, writeSysctl(name, value))
		t.Cleanup(func() { must(t, writeSysctl(name, was)) })
	}
	for _, run := range []struct {
		name   string
		divide int
		silent time.Duration
		halves []bool // whether one half is closed
		with   bool   // what weft sets
	}{
		{"idle", 1000, idleTime / 1000, []bool{false}, true},
		{"half-close", 150, halfTime / 150, []bool{true}, true},
		// Engine's times of less than two seconds, and none on the host.
		{"without", 5000, 2 * time.Second, []bool{false, true}, false},
	} {
		t.Run(run.name, func(t *testing.T) {
			for what, err := range newMesh(t, 1).idle(run.divide, run.silent, run.halves, !run.with) {
				if (err == nil) != run.with {
					t.Errorf("%s: %v", what, err)
				}
			}
		})
	}
}

// held is a connection with both its ends; half: the client has closed its own.
type held struct {
	client, server *net.TCPConn
	half           bool
}

// idle opens connections, is silent, and says which of them live, by name.
func (m *mesh) idle(divide int, silent time.Duration, halves []bool, lacksTimes bool) map[string]error {
	h := m.hosts[0]
	h.e.hurry, h.e.lacksTimes = divide, lacksTimes
	a, b := m.task(11), m.task(12)
	taken := make(chan *net.TCPConn, 8)
	for _, k := range m.tasks {
		m.hold(k.NetNS, taken)
	}
	s := service(a, b)
	client := m.fabric.client(50, s)
	apply := func(s ingress.Service) {
		h.entry.Tasks = m.tasks
		must(m.t, h.do(func() error {
			return h.e.Apply(m.t.Context(), ingress.Table{
				Ingress:   h.entry,
				Published: []ingress.Published{{Service: "web", Protocol: weft.TCP, Port: 30000, Target: 81, Backends: s.Backends}},
				Networks:  []ingress.Network{{VNI: 4097, NetNS: m.br, Bridge: "br", Ports: m.fabric.ports, Services: []ingress.Service{s}}},
			})
		}))
	}
	apply(s)
	open := map[string]held{}
	for _, at := range []struct{ what, ns, from, to string }{ // a new port waits for a while with its IPv6 address
		{"port of IPv6", m.client, meshClient6, "[" + h.addr6 + "]:30000"},
		{"port", m.client, meshClient, h.addr + ":30000"},
		{"service address", client, "10.0.16.50", vipText + ":81"},
	} {
		for _, half := range halves {
			what := at.what
			if half {
				what += ", half closed"
			}
			open[what] = m.open(at.ns, at.from, at.to, half, taken)
		}
	}
	began := time.Now()
	for i := range s.Backends { // where flows are known by them alone
		s.Backends[i].Draining = true
	}
	apply(s)
	select {
	case <-time.After(silent - time.Since(began)):
	case <-m.t.Context().Done():
	}
	m.t.Logf("silent for %s of %s, times divided by %d", time.Since(began).Round(time.Millisecond), silent*time.Duration(divide), divide)
	out := map[string]error{}
	var wg sync.WaitGroup
	var mu sync.Mutex // guards: out
	for what, c := range open {
		wg.Go(func() {
			err := c.exchange()
			mu.Lock()
			out[what] = err
			mu.Unlock()
		})
	}
	wg.Wait()
	return out
}

// open opens a connection that is held.
func (m *mesh) open(ns, from, to string, half bool, taken <-chan *net.TCPConn) held {
	d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	var c net.Conn
	m.in(ns, func() (err error) { c, err = d.DialContext(m.t.Context(), "tcp", to); return err })
	m.t.Cleanup(func() { c.Close() })
	both := held{client: c.(*net.TCPConn), server: <-taken}
	must(m.t, both.exchange())
	if both.half = half; half {
		must(m.t, both.client.CloseWrite())
		if _, err := both.server.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			m.t.Fatalf("the end of one half brought %v", err)
		}
	}
	return both
}

// exchange sends a byte each way, or only to the client.
func (c held) exchange() error {
	deadline := time.Now().Add(time.Second)
	if err := errors.Join(c.client.SetDeadline(deadline), c.server.SetDeadline(deadline)); err != nil {
		return err
	}
	pass := func(from, to net.Conn) error {
		_, err := from.Write([]byte("x"))
		if err == nil {
			_, err = io.ReadFull(to, make([]byte, 1))
		}
		return err
	}
	if c.half {
		if err := pass(c.server, c.client); err != nil {
			return err
		}
		return c.acknowledged(deadline)
	}
	return errors.Join(pass(c.client, c.server), pass(c.server, c.client))
}

// acknowledged waits until the server's end has heard that all it sent has come.
func (c held) acknowledged(deadline time.Time) error {
	raw, err := c.server.SyscallConn()
	if err != nil {
		return err
	}
	for time.Now().Before(deadline) {
		var info *unix.TCPInfo
		var failed error
		err := raw.Control(func(fd uintptr) { info, failed = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
		if err := errors.Join(err, failed); err != nil {
			return err
		}
		if info.Unacked == 0 {
			return nil
		}
		<-time.After(time.Millisecond)
	}
	return errors.New("what it sent is not acknowledged")
}

// hold takes connections to port 81 of a task and does nothing with them.
func (m *mesh) hold(ns string, taken chan<- *net.TCPConn) {
	var ln net.Listener
	must(m.t, netns.Do(ns, func() (err error) { ln, err = net.Listen("tcp", ":81"); return err }))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			m.t.Cleanup(func() { c.Close() })
			taken <- c.(*net.TCPConn)
		}
	}()
	m.t.Cleanup(func() { ln.Close(); <-done })
}
