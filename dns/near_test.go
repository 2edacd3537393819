package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft"
)

// nearServer is a nameserver of tasks, at an address that two networks have.
var nearServer = netip.MustParseAddr("10.1.7.5")

// says answers every A question with an address, cut off on UDP if it is told to.
func says(last byte, cut bool) func(*miekg.Msg, string) *miekg.Msg {
	return func(q *miekg.Msg, network string) *miekg.Msg {
		m := good(q, network)
		m.Answer[0].(*miekg.A).A = net.IPv4(192, 0, 2, last)
		if cut && network == "udp" {
			m.Answer, m.Truncated = nil, true
		}
		return m
	}
}

// inside is a task's Dial: the stubs stand where the addresses lead inside. asked
// counts the questions by network and address.
type inside struct {
	mu    sync.Mutex // guards: everything, once somebody asks
	stubs map[netip.Addr]*stub
	asked []string
}

func (i *inside) dial(ctx context.Context, network, address string) (net.Conn, error) {
	i.mu.Lock()
	i.asked = append(i.asked, network+" "+address)
	s := i.stubs[netip.MustParseAddrPort(address).Addr()]
	i.mu.Unlock()
	if s == nil {
		return nil, errors.New("no route to host")
	}
	to := s.udp.LocalAddr().String()
	if network == "tcp" {
		to = s.tcp.Addr().String()
	}
	return (&net.Dialer{}).DialContext(ctx, network, to)
}

// remove takes a nameserver away.
func (i *inside) remove(server netip.Addr) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.stubs, server)
}

func (i *inside) String() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return strings.Join(i.asked, ", ")
}

// nearView is a task with nameservers of its own on a network.
func nearView(network weft.ID, i *inside, servers ...netip.Addr) View {
	return View{
		Networks: []weft.ID{network}, Nameservers: servers, Dial: i.dial,
		Near: []Near{{network, netip.MustParsePrefix("10.1.0.0/16")}, {network, netip.MustParsePrefix("fd00:1::/64")}},
	}
}

// TestNearNameservers: a nameserver on a task's own network is asked from inside the
// task, and what it says is nobody's on another network, whose subnet may be equal.
func TestNearNameservers(t *testing.T) {
	host := newStub(t, good)
	r := newRig(t, Config{TryTimeout: 4 * time.Second}, map[netip.AddrPort]*stub{ns1: host, netip.AddrPortFrom(nearServer, 53): host})
	onBlue := &inside{stubs: map[netip.Addr]*stub{nearServer: newStub(t, says(8, true))}}
	onRed := &inside{stubs: map[netip.Addr]*stub{nearServer: newStub(t, says(9, false))}}
	// A task may be on a network that covers a nameserver of the host.
	covering := View{Networks: []weft.ID{red}, Dial: onRed.dial, Near: []Near{{red, netip.PrefixFrom(ns1.Addr(), 24)}}}
	for _, c := range []struct {
		name, want string
		view       View
	}{
		{"cut off on UDP", "192.0.2.8", nearView(blue, onBlue, nearServer)},
		{"in the cache", "192.0.2.8", nearView(blue, &inside{}, nearServer)},
		{"equal subnet, another network", "192.0.2.9", nearView(red, onRed, nearServer)},
		{"the host's, whatever covers it", "192.0.2.7", covering},
		{"no way inside", "192.0.2.7", View{Networks: []weft.ID{blue}, Nameservers: []netip.Addr{nearServer}}},
		{"on no network of the task", "192.0.2.7", nearView(blue, onRed, ns1.Addr())},
	} {
		r.stop()
		r.serve(c.view)
		if got := show(r.ask("udp", "example.com."), false); got != "NOERROR "+c.want {
			t.Errorf("%s: %q, want %s", c.name, got, c.want)
		}
	}
	if got, want := onBlue.String(), "udp 10.1.7.5:53, tcp 10.1.7.5:53"; got != want {
		t.Errorf("asked inside: %s, want %s", got, want)
	}
	if got, want := onRed.String(), "udp 10.1.7.5:53"; got != want {
		t.Errorf("asked inside the other: %s, want %s", got, want)
	}
}

// TestNearFailsAlone: a nameserver that fails on one network is not asked last on
// another, nor on the host's side, and the next of the list is asked.
func TestNearFailsAlone(t *testing.T) {
	host := newStub(t, good)
	r := newRig(t, Config{TryTimeout: 4 * time.Second}, map[netip.AddrPort]*stub{ns1: host, netip.AddrPortFrom(nearServer, 53): host})
	second := netip.MustParseAddr("fd00:1::5")
	dead := &inside{stubs: map[netip.Addr]*stub{second: newStub(t, says(9, false))}}
	for i, want := range []string{
		"udp 10.1.7.5:53, udp [fd00:1::5]:53",
		"udp 10.1.7.5:53, udp [fd00:1::5]:53, udp [fd00:1::5]:53", // the failed one is last now
	} {
		r.stop()
		r.serve(nearView(blue, dead, nearServer, second))
		r.want("udp", fmt.Sprintf("n%d.example.com.", i), "NOERROR 192.0.2.9")
		if got := dead.String(); got != want {
			t.Errorf("asked %s, want %s", got, want)
		}
	}
	live := &inside{stubs: map[netip.Addr]*stub{nearServer: newStub(t, says(8, false)), second: newStub(t, says(9, false))}}
	r.stop()
	r.serve(nearView(red, live, nearServer, second))
	r.want("udp", "example.com.", "NOERROR 192.0.2.8")
	r.stop()
	r.serve(View{Networks: []weft.ID{blue}, Nameservers: []netip.Addr{nearServer, ns2.Addr()}})
	r.want("udp", "example.com.", "NOERROR 192.0.2.7")
}

// TestNearAnswersInternal: who is on internal networks alone asks nameservers there
// and nobody else.
func TestNearAnswersInternal(t *testing.T) {
	host := newStub(t, good)
	r := newRig(t, Config{TryTimeout: 4 * time.Second}, map[netip.AddrPort]*stub{ns1: host, ns2: host})
	near := &inside{stubs: map[netip.Addr]*stub{nearServer: newStub(t, says(8, false))}}
	for _, c := range []struct {
		want    string
		servers []netip.Addr
	}{
		{"NXDOMAIN", nil},
		{"NXDOMAIN", []netip.Addr{ns1.Addr()}},
		{"NOERROR 192.0.2.8", []netip.Addr{ns1.Addr(), nearServer}},
	} {
		v := nearView(blue, near, c.servers...)
		v.Internal = true
		r.stop()
		r.serve(v)
		r.want("udp", "example.com.", c.want)
		r.want("udp", "web.", "NOERROR 10.1.0.2")
		r.want("udp", "nope.", "NXDOMAIN")
	}
	near.remove(nearServer)
	r.want("udp", "other.example.com.", "SERVFAIL") // and not by the host's
	if n := host.asked.Load(); n != 0 {
		t.Errorf("%d questions of a task on internal networks left by the host", n)
	}
}

// TestNearIsBounded: who does not answer inside costs its time, and no more.
func TestNearIsBounded(t *testing.T) {
	r := newRig(t, Config{TryTimeout: time.Millisecond}, nil)
	near := &inside{stubs: map[netip.Addr]*stub{nearServer: newStub(t, silent)}}
	r.stop()
	r.serve(nearView(blue, near, nearServer))
	r.want("udp", "example.com.", "SERVFAIL")
	r.want("udp", "web.", "NOERROR 10.1.0.2")
	if got := near.String(); got != "udp 10.1.7.5:53" {
		t.Errorf("asked %s", got)
	}
}
