package ingresstest

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// Lane is where the suite of service addresses runs: an engine with networks of
// equal addresses. On network 0 are a client and four backends of the service web,
// on network 1, where there is one, a client and one backend of another service
// with the same address.
type Lane interface {
	// Apply makes these the services of the networks, by network.
	Apply(services ...[]ingress.Service) error
	// Backends of a network.
	Backends(network int) []ingress.Backend
	// Open begins a flow from the client of a network; from 0 is any port of its.
	// Nobody there is an error, ErrRefused or not.
	Open(network int, p weft.Protocol, from uint16, to netip.AddrPort) (Flow, error)
}

// Suite is one run of the suite, of one family.
type Suite struct {
	Lane Lane
	VIP  netip.Addr
	// Client is the address of the client, on every network.
	Client netip.Addr
	// Wire is the same lane where packets are real; nil = the cases that need them
	// are left out.
	Wire *Wire
	// Many is how many services "many services" has. 0 = 1,000.
	Many int
}

// Ports on which a Rig's tasks serve. Every answer begins with a line: the task
// and the client's address as it sees it.
const (
	portTCP  = 80 // echoes, on all addresses; SCTP too
	portLate = 81 // answers a while after the client has closed its half
	portOwn  = 82 // echoes, on the task's own addresses alone; UDP and SCTP too
	portUDP  = 7  // echoes, on all addresses
	portVIP  = 8  // echoes datagrams, on the service addresses alone
	// portErrors is as portVIP, for those whose clients close too early.
	portErrors = 9
	portNone   = 999 // nobody listens
)

// Limits of chance: what a right engine exceeds once in a million runs.
const (
	chiSquare3  = 30.7 // chi-square, three degrees of freedom
	spreadFlows = 80
)

// Run runs the suite. Each case begins with web's four backends taking connections.
func (s *Suite) Run(t *testing.T) {
	for _, c := range []struct {
		name string
		wire bool
		run  func(*Suite) error
	}{
		{"distribution", false, distribution},
		{"stickiness", false, stickiness},
		{"drain", false, drain},
		{"backend death", false, death},
		{"all backends gone", false, allGone},
		{"all backends drain", false, allDrain},
		{"all ports", false, allPorts},
		{"udp", false, datagrams},
		{"udp moves with its backend", false, datagramsMove},
		{"port reuse", false, portReuse},
		{"equal addresses in two networks", false, equalAddresses},
		{"many services", false, manyServices},
		{"sctp", false, associations},
		{"sctp drains", false, associationsDrain},
		{"sctp backend death", false, associationsEnd},
		{"sctp without backends", false, associationsRefused},
		{"idle", true, idle},
		{"half-close", true, halfClose},
		{"fragments", true, fragments},
		{"fragments stay with their flow", true, fragmentsStay},
		{"bulk", true, bulk},
		{"icmp errors", true, icmpErrors},
		{"ping", true, ping},
		{"hairpin", true, hairpin},
		{"udp to a server on all addresses", true, udpWildcard},
		{"tcp to a server on its own address", true, tcpOwn},
		{"udp to a server on its own address", true, udpOwn},
		{"sctp to a server on its own address", true, associationsOwn},
	} {
		if c.wire && s.Wire == nil {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			err := s.Lane.Apply([]ingress.Service{s.web(s.Lane.Backends(0)...)})
			if err != nil {
				t.Fatalf("apply: %v", err)
			}
			err = c.run(s)
			if r, ok := s.Lane.(interface{ Release() }); ok {
				r.Release()
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func (s *Suite) web(backends ...ingress.Backend) ingress.Service {
	return ingress.Service{ID: "web", VIP: s.VIP, MAC: weft.VIPMAC("web", s.VIP), Backends: backends}
}

func (s *Suite) apply(backends ...ingress.Backend) error {
	return s.Lane.Apply([]ingress.Service{s.web(backends...)})
}

func (s *Suite) open(p weft.Protocol, port uint16) (Flow, error) {
	f, err := s.Lane.Open(0, p, 0, netip.AddrPortFrom(s.VIP, port))
	if err != nil {
		return nil, fmt.Errorf("open %s flow to %s port %d: %w", p, s.VIP, port, err)
	}
	if f.Seen() != s.Client {
		return nil, fmt.Errorf("the backend saw %s, want %s", f.Seen(), s.Client)
	}
	return f, nil
}

// count opens n flows and counts who answers.
func (s *Suite) count(p weft.Protocol, port uint16, n int) (map[weft.ID]int, error) {
	got := map[weft.ID]int{}
	for range n {
		f, err := s.open(p, port)
		if err != nil {
			return got, err
		}
		got[f.Backend()]++
	}
	return got, nil
}

func evenly(got map[weft.ID]int, backends []ingress.Backend, flows int) error {
	want, sum := float64(flows)/float64(len(backends)), 0.0
	for _, b := range backends {
		d := float64(got[b.Task]) - want
		sum += d * d / want
	}
	if sum > chiSquare3 {
		return fmt.Errorf("%d flows went to %v: chi-square %.1f, at most %.1f", flows, got, sum, chiSquare3)
	}
	return nil
}

func distribution(s *Suite) error {
	got, err := s.count(weft.TCP, portTCP, spreadFlows)
	if err != nil {
		return err
	}
	return evenly(got, s.Lane.Backends(0), spreadFlows)
}

// same sends more on flows, which must stay where they are.
func same(flows []Flow) error {
	for _, f := range flows {
		if id, err := f.Again(); err != nil || id != f.Backend() {
			return fmt.Errorf("more on a flow of %s went to %q, %v", f.Backend(), id, err)
		}
	}
	return nil
}

func (s *Suite) flows(p weft.Protocol, port uint16, n int) ([]Flow, error) {
	var out []Flow
	for range n {
		f, err := s.open(p, port)
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	return out, nil
}

func stickiness(s *Suite) error {
	flows, err := s.flows(weft.TCP, portTCP, 30)
	if err != nil {
		return err
	}
	b := s.Lane.Backends(0)
	for _, step := range [][]ingress.Backend{b, b[:3], b, {b[3], b[0], b[2], b[1]}} {
		var kept []Flow
		for _, f := range flows {
			if has(step, f.Backend()) {
				kept = append(kept, f)
			}
		}
		if err := errors.Join(s.apply(step...), same(kept)); err != nil {
			return err
		}
		flows = kept // those of one that has gone have ended
	}
	return nil
}

func has(backends []ingress.Backend, id weft.ID) bool {
	for _, b := range backends {
		if b.Task == id {
			return true
		}
	}
	return false
}

func drain(s *Suite) error {
	flows, err := s.flows(weft.TCP, portTCP, 30)
	if err != nil {
		return err
	}
	b := append([]ingress.Backend(nil), s.Lane.Backends(0)...)
	b[1] = draining(b[1])
	if err := errors.Join(s.apply(b...), same(flows)); err != nil {
		return err
	}
	got, err := s.count(weft.TCP, portTCP, 40)
	if err == nil && got[b[1].Task] > 0 {
		err = fmt.Errorf("new flows went to %v, %s drains", got, b[1].Task)
	}
	return errors.Join(err, same(flows))
}

// death: a backend that is gone lets its flows go: the next packet is answered, by
// a reset, and no new one comes to it.
func death(s *Suite) error {
	b := s.Lane.Backends(0)
	flows, err := s.flows(weft.TCP, portTCP, 30)
	if err != nil {
		return err
	}
	if err := s.apply(b[1:]...); err != nil {
		return err
	}
	n := 0
	for _, f := range flows {
		if f.Backend() != b[0].Task {
			if err := same([]Flow{f}); err != nil {
				return err
			}
			continue
		}
		n++
		if id, err := f.Again(); err == nil && id == b[0].Task {
			return errors.New("a flow of the one that is gone goes on")
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			return errors.New("a flow of the one that is gone ends in silence")
		}
	}
	if n == 0 {
		return errors.New("no flow had been there")
	}
	got, err := s.count(weft.TCP, portTCP, 40)
	if err == nil && got[b[0].Task] > 0 {
		err = fmt.Errorf("new flows went to %v, %s is gone", got, b[0].Task)
	}
	return err
}

func (s *Suite) refused(p weft.Protocol, port uint16) error {
	start := time.Now()
	if _, err := s.open(p, port); !errors.Is(err, ErrRefused) {
		return fmt.Errorf("%s to port %d: %v after %s, want refused", p, port, err, time.Since(start))
	}
	return nil
}

func allGone(s *Suite) error {
	if err := s.apply(); err != nil {
		return err
	}
	for range 10 { // not only as often as errors are limited to
		if err := errors.Join(s.refused(weft.TCP, portTCP), s.refused(weft.UDP, portVIP)); err != nil {
			return err
		}
	}
	if err := s.apply(s.Lane.Backends(0)[0]); err != nil {
		return err
	}
	_, err := s.open(weft.TCP, portTCP)
	return err
}

// allDraining are the backends of the first service, as ones that drain.
func (s *Suite) allDraining() (b []ingress.Backend) {
	for _, k := range s.Lane.Backends(0) {
		b = append(b, draining(k))
	}
	return b
}

func allDrain(s *Suite) error {
	flows, err := s.flows(weft.TCP, portTCP, 10)
	if err != nil {
		return err
	}
	if err := errors.Join(s.apply(s.allDraining()...), same(flows)); err != nil {
		return err
	}
	for range 10 {
		if err := s.refused(weft.TCP, portTCP); err != nil {
			return err
		}
	}
	return same(flows)
}

func allPorts(s *Suite) error {
	for _, port := range []uint16{portTCP, portLate} {
		got, err := s.count(weft.TCP, port, 40)
		if err != nil {
			return err
		}
		if len(got) < 2 {
			return fmt.Errorf("40 flows to port %d went to %v", port, got)
		}
	}
	if s.Wire == nil {
		return nil
	}
	return errors.Join(s.refused(weft.TCP, portNone), s.refused(weft.UDP, portNone)) // by the backend
}

func datagrams(s *Suite) error {
	got, err := s.count(weft.UDP, portVIP, spreadFlows)
	if err != nil {
		return err
	}
	flows, err := s.flows(weft.UDP, portVIP, 20)
	return errors.Join(err, evenly(got, s.Lane.Backends(0), spreadFlows), same(flows), same(flows))
}

// datagramsMove: a client that sends from one port all the time is not held to a
// backend that has gone, nor to the answer that there is none.
func datagramsMove(s *Suite) error {
	b := s.Lane.Backends(0)
	if err := s.apply(b[0]); err != nil {
		return err
	}
	f, err := s.open(weft.UDP, portVIP)
	if err != nil {
		return err
	}
	for _, to := range b[1:] {
		if err := s.apply(to); err != nil {
			return err
		}
		if id, err := f.Again(); err != nil || id != to.Task {
			return fmt.Errorf("more on a flow whose backend was replaced went to %q, %v, want %s", id, err, to.Task)
		}
	}
	if err := s.apply(); err != nil {
		return err
	}
	if id, err := f.Again(); err == nil {
		return fmt.Errorf("%s answered for a service without backends", id)
	}
	if err := s.apply(b[0]); err != nil {
		return err
	}
	if id, err := f.Again(); err != nil || id != b[0].Task {
		return fmt.Errorf("more on a flow after there are backends again went to %q, %v", id, err)
	}
	return nil
}

// portReuse: a client's port that is used again is served at once, whether its
// last connection's backend takes, drains or has gone.
func portReuse(s *Suite) error {
	const port = 21000 // below what kernels choose from
	b := s.Lane.Backends(0)
	again := func(what string, may ...ingress.Backend) error {
		f, err := s.Lane.Open(0, weft.TCP, port, netip.AddrPortFrom(s.VIP, portTCP))
		if err != nil {
			return fmt.Errorf("%s: port used again: %w", what, err)
		}
		if c, ok := f.(interface{ Resent() (int, error) }); ok {
			if n, err := c.Resent(); n > 0 || err != nil {
				return fmt.Errorf("%s: port used again: %d segments were sent again, %w", what, n, err)
			}
		}
		if !has(may, f.Backend()) {
			return fmt.Errorf("%s: port used again: answered by %s", what, f.Backend())
		}
		if c, ok := f.(interface{ Reset() error }); ok {
			return c.Reset()
		}
		return nil
	}
	for range 10 {
		if err := again("all take", b...); err != nil {
			return err
		}
	}
	for i := range b {
		others := append(append([]ingress.Backend(nil), b[:i]...), b[i+1:]...)
		for _, step := range []struct {
			what string
			are  []ingress.Backend
			may  []ingress.Backend
		}{
			{"one drains", append([]ingress.Backend{draining(b[i])}, others...), others},
			{"one is gone", others, others},
			{"it is back", b, b},
		} {
			if err := s.apply(step.are...); err != nil {
				return err
			}
			if err := again(step.what, step.may...); err != nil {
				return err
			}
		}
	}
	return nil
}

func equalAddresses(s *Suite) error {
	here, there := s.Lane.Backends(0), s.Lane.Backends(1)
	if len(there) == 0 {
		return errors.New("there is one network only")
	}
	other := s.web(there...)
	other.ID = "other"
	if err := s.Lane.Apply([]ingress.Service{s.web(here...)}, []ingress.Service{other}); err != nil {
		return err
	}
	for range 20 {
		for n, all := range [][]ingress.Backend{here, there} {
			f, err := s.Lane.Open(n, weft.TCP, 0, netip.AddrPortFrom(s.VIP, portTCP))
			if err != nil {
				return fmt.Errorf("network %d: %w", n, err)
			}
			if !has(all, f.Backend()) {
				return fmt.Errorf("network %d: %s of the other one answered", n, f.Backend())
			}
		}
	}
	other.Backends = nil
	if err := s.Lane.Apply([]ingress.Service{s.web(here...)}, []ingress.Service{other}); err != nil {
		return err
	}
	if _, err := s.Lane.Open(1, weft.TCP, 0, netip.AddrPortFrom(s.VIP, portTCP)); !errors.Is(err, ErrRefused) {
		return fmt.Errorf("without backends on one of two networks: %v, want refused", err)
	}
	_, err := s.open(weft.TCP, portTCP)
	return err
}

// manyServices: one is found among many, and changes with them there.
func manyServices(s *Suite) error {
	many := s.Many
	if many == 0 {
		many = 1000
	}
	b := s.Lane.Backends(0)
	all := []ingress.Service{s.web(b...)}
	for i := range many - 1 {
		vip := netip.AddrFrom4([4]byte{10, 3, byte(i >> 8), byte(i)})
		if s.VIP.Is6() {
			vip = netip.AddrFrom16([16]byte{0: 0xfd, 1: 3, 14: byte(i >> 8), 15: byte(i), 13: 1})
		}
		id := weft.ID(fmt.Sprintf("many%d", i))
		all = append(all, ingress.Service{ID: id, VIP: vip, MAC: weft.VIPMAC(id, vip), Backends: b[i%4:]})
	}
	if err := s.Lane.Apply(all); err != nil {
		return err
	}
	got, err := s.count(weft.TCP, portTCP, 40)
	if err != nil {
		return err
	}
	if len(got) != len(b) {
		return fmt.Errorf("40 flows went to %v", got)
	}
	all = append([]ingress.Service(nil), all...)
	all[0] = s.web(b[2])
	if err := s.Lane.Apply(all); err != nil {
		return err
	}
	if got, err = s.count(weft.TCP, portTCP, 20); err == nil && got[b[2].Task] != 20 {
		err = fmt.Errorf("20 flows went to %v, one backend is left", got)
	}
	return err
}
