package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

func tcp(port uint16) weft.PortSpec { return weft.PortSpec{Protocol: weft.TCP, Published: port} }

func TestPorts(t *testing.T) {
	p := NewPorts()
	if err := p.Take(tcp(8080), "service web"); err != nil {
		t.Fatal(err)
	}
	if err := p.Take(tcp(8080), "service web"); err != nil {
		t.Errorf("same holder: %v", err)
	}
	err := p.Take(tcp(8080), "service api")
	if !errors.Is(err, weft.ErrConflict) || !strings.HasSuffix(err.Error(), "8080/tcp is already in use by service web") {
		t.Errorf("other holder: %v", err)
	}
	if err := p.Take(weft.PortSpec{Protocol: weft.UDP, Published: 8080}, "service api"); err != nil {
		t.Errorf("other protocol: %v", err)
	}
	media := weft.PortSpec{Protocol: weft.UDP, Published: 8000, Count: 100}
	err = p.Take(media, "service media")
	if !errors.Is(err, weft.ErrConflict) || !strings.HasSuffix(err.Error(), "8000-8099/udp is already in use by service api: 8080/udp") {
		t.Errorf("range over a port: %v", err)
	}
	for _, err := range []error{
		p.Take(weft.PortSpec{Protocol: "dccp", Published: 1}, "x"), p.Take(tcp(0), "x"), p.Hold(tcp(0), "x"),
		p.Take(weft.PortSpec{Protocol: weft.SCTP, Published: 65535, Count: 2}, "x"),
	} {
		if !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("got %v", err)
		}
	}
	if _, err := p.Pick(weft.PortSpec{Protocol: "dccp"}, "x"); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("got %v", err)
	}
	if err := p.Take(tcp(30001), "service api"); err != nil {
		t.Fatal(err)
	}
	if got, err := p.Pick(weft.PortSpec{Protocol: weft.TCP, Count: 3}, "service run"); err != nil || got != 30002 {
		t.Errorf("a run of three: %d, %v", got, err)
	}
	for want := range uint16(weft.LastPublishedPort - weft.FirstPublishedPort + 1) {
		want += weft.FirstPublishedPort
		if want >= 30001 && want <= 30004 {
			continue
		}
		if got, err := p.Pick(tcp(0), "service many"); err != nil || got != want {
			t.Fatalf("got %d, %v; want %d", got, err, want)
		}
	}
	if _, err := p.Pick(tcp(0), "service more"); !errors.Is(err, weft.ErrUnavailable) {
		t.Errorf("full: %v", err)
	}
}

// slowPorts says the same port by port: who holds (protocol, port), and where.
type slowPorts map[weft.Protocol]map[int][]weft.HeldPort

func (s slowPorts) hold(p weft.PortSpec, by string) {
	if s[p.Protocol] == nil {
		s[p.Protocol] = map[int][]weft.HeldPort{}
	}
	for i := range p.Ports() {
		at := int(p.Published) + i
		s[p.Protocol][at] = append(s[p.Protocol][at], weft.HeldPort{Port: p, By: by})
	}
}

func (s slowPorts) taken(p weft.PortSpec, by string) bool {
	for i := range p.Ports() {
		for _, h := range s[p.Protocol][int(p.Published)+i] {
			if h.By != by && h.Port.Meets(&p) {
				return true
			}
		}
	}
	return false
}

func (s slowPorts) pick(p weft.PortSpec, by string) int {
	for first := int(weft.FirstPublishedPort); first+p.Ports()-1 <= int(weft.LastPublishedPort); first++ {
		p.Published = uint16(first)
		if !s.taken(p, "nobody") {
			s.hold(p, by)
			return first
		}
	}
	return 0
}

// TestPortsAgainstTwin runs the same calls on ranges and on a table of single
// ports.
func TestPortsAgainstTwin(t *testing.T) {
	ips := [][]netip.Addr{nil, nil, nil, {netip.MustParseAddr("10.0.0.1")}, {netip.MustParseAddr("10.0.0.2")}, {netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("10.0.0.1")}}
	rapid.Check(t, func(t *rapid.T) {
		fast, slow := NewPorts(), slowPorts{}
		for range rapid.IntRange(1, 40).Draw(t, "calls") {
			p := weft.PortSpec{
				Protocol: rapid.SampledFrom([]weft.Protocol{weft.TCP, weft.TCP, weft.UDP}).Draw(t, "protocol"),
				Count:    uint16(rapid.SampledFrom([]int{0, 0, 1, 2, 5, 900, 2000, 10001}).Draw(t, "count")),
				IPs:      rapid.SampledFrom(ips).Draw(t, "ips"),
			}
			if rapid.IntRange(0, 4).Draw(t, "by link") == 0 {
				p.IPs, p.Interface = nil, rapid.SampledFrom([]string{"lo", "eth0", "eth1"}).Draw(t, "link")
			}
			by := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "by")
			base := rapid.SampledFrom([]int{1, 30000, 32760, 55000}).Draw(t, "base")
			switch p.Published = uint16(base + rapid.IntRange(0, 12).Draw(t, "published")); rapid.IntRange(0, 4).Draw(t, "call") {
			case 0:
				if err := fast.Hold(p, by); err != nil {
					t.Fatal(err)
				}
				slow.hold(p, by)
			case 1, 2:
				err := fast.Take(p, by)
				if taken := slow.taken(p, by); taken != errors.Is(err, weft.ErrConflict) || !taken && err != nil {
					t.Fatalf("take %+v for %s: %v, taken: %v", p, by, err, taken)
				}
				if err == nil {
					slow.hold(p, by)
				}
			case 3:
				h, taken := fast.Holder(p, by)
				if taken != slow.taken(p, by) || taken && (h.By == by || !h.Port.Clashes(&p)) {
					t.Fatalf("holder of %+v but %s: %+v %v", p, by, h, taken)
				}
			default:
				got, err := fast.Pick(p, by)
				if want := slow.pick(p, by); int(got) != want || (want == 0) != errors.Is(err, weft.ErrUnavailable) {
					t.Fatalf("pick for %+v: %d, %v; want %d", p, got, err, want)
				}
			}
		}
	})
}

// BenchmarkPorts is what the leader does for one more service: it fills the table
// from the state, looks and picks.
func BenchmarkPorts(b *testing.B) {
	for _, services := range []int{10, 2000} {
		b.Run(fmt.Sprint("services=", services), func(b *testing.B) {
			for b.Loop() {
				p := NewPorts()
				for i := range services {
					if err := p.Hold(tcp(uint16(10000+i)), "service"); err != nil {
						b.Fatal(err)
					}
				}
				if err := p.Hold(weft.PortSpec{Protocol: weft.UDP, Published: 10000, Count: 10001}, "service media"); err != nil {
					b.Fatal(err)
				}
				if err := p.Take(tcp(9999), "service new"); err != nil {
					b.Fatal(err)
				}
				if _, err := p.Pick(tcp(0), "service new"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
