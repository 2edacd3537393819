package ipam

import (
	"cmp"
	"fmt"
	"slices"
	"sort"

	"github.com/weftnet/weft"
)

// Ports are the published ports of the cluster, or of one node, as ranges: each
// belongs to one holder per protocol and address. Not safe for concurrent use.
type Ports struct {
	by map[weft.Protocol]*spans
}

// spans are the ranges of one protocol. New ones go to the end; the first look
// after that sorts, so that filling costs one sort and each look a search.
type spans struct {
	list []*weft.HeldPort // by first port, once sorted
	// reach[i] is the last port of list[:i+1]: a search may begin behind what
	// does not reach its first port.
	reach  []int
	sorted bool
}

// NewPorts returns a table in which every port is free.
func NewPorts() *Ports { return &Ports{by: map[weft.Protocol]*spans{}} }

// Hold notes a range with its holder ("service web"), whoever else has it: what was
// legal when it was stored stays. Port 0, a range beyond 65535 or an unknown
// protocol is weft.ErrInvalid.
func (p *Ports) Hold(port weft.PortSpec, holder string) error {
	if err := check(&port); err != nil {
		return err
	}
	s := p.by[port.Protocol]
	if s == nil {
		s = &spans{}
		p.by[port.Protocol] = s
	}
	s.list, s.sorted = append(s.list, &weft.HeldPort{Port: port, By: holder}), false
	return nil
}

// Holder returns the lowest range that clashes with port and is held by anybody but
// holder. Of equal ones it is that of the first name.
func (p *Ports) Holder(port weft.PortSpec, holder string) (weft.HeldPort, bool) {
	s := p.by[port.Protocol]
	if s == nil {
		return weft.HeldPort{}, false
	}
	s.sort()
	from := sort.Search(len(s.list), func(i int) bool { return s.reach[i] >= int(port.Published) })
	for i := from; i < len(s.list) && int(s.list[i].Port.Published) <= port.LastPublished(); i++ {
		if h := s.list[i]; h.By != holder && h.Port.Clashes(&port) {
			return *h, true
		}
	}
	return weft.HeldPort{}, false
}

// Take reserves a range for holder; taking it again for the same holder succeeds.
// One that another holds, in whole or in part, is weft.ErrConflict and names the
// holder. Other errors are those of Hold.
func (p *Ports) Take(port weft.PortSpec, holder string) error {
	if err := check(&port); err != nil {
		return err
	}
	if h, taken := p.Holder(port, holder); taken {
		return Taken(&port, &h)
	}
	return p.Hold(port, holder)
}

// Taken is the refusal of a port that has a holder.
func Taken(port *weft.PortSpec, by *weft.HeldPort) error {
	what := ""
	if port.Ports() > 1 || by.Port.Ports() > 1 {
		first, last := max(port.Published, by.Port.Published), min(port.LastPublished(), by.Port.LastPublished())
		both := weft.PortSpec{Protocol: port.Protocol, Published: first, Count: uint16(last - int(first) + 1)}
		if what = ": " + both.String(); what == ": "+port.String() {
			what = ""
		}
	}
	return fmt.Errorf("%w: published port %s is already in use by %s%s", weft.ErrConflict, port, by.By, what)
}

// Pick reserves the lowest free range of port's size, on its addresses, among the
// automatic ports, and returns the first of it. Without one it is
// weft.ErrUnavailable.
func (p *Ports) Pick(port weft.PortSpec, holder string) (uint16, error) {
	port.Published = weft.FirstPublishedPort
	if err := check(&port); err != nil {
		return 0, err
	}
	if s := p.by[port.Protocol]; s != nil {
		s.sort()
		for i := range s.list {
			h := &s.list[i].Port
			if h.LastPublished() < int(port.Published) || !h.Meets(&port) {
				continue
			}
			if int(h.Published) > port.LastPublished() || h.LastPublished() >= int(weft.LastPublishedPort) {
				if int(h.Published) <= port.LastPublished() {
					return 0, full(&port)
				}
				break
			}
			port.Published = uint16(h.LastPublished() + 1)
		}
	}
	if port.LastPublished() > int(weft.LastPublishedPort) {
		return 0, full(&port)
	}
	return port.Published, p.Hold(port, holder)
}

func full(port *weft.PortSpec) error {
	if n := port.Ports(); n > 1 {
		return fmt.Errorf("%w: no %d automatic ports %d-%d/%s in a row are free; publish ports outside that range",
			weft.ErrUnavailable, n, weft.FirstPublishedPort, weft.LastPublishedPort, port.Protocol)
	}
	return fmt.Errorf("%w: all automatic ports %d-%d/%s are in use; publish a port outside that range",
		weft.ErrUnavailable, weft.FirstPublishedPort, weft.LastPublishedPort, port.Protocol)
}

func (s *spans) sort() {
	if s.sorted {
		return
	}
	slices.SortFunc(s.list, func(a, b *weft.HeldPort) int {
		return cmp.Or(cmp.Compare(a.Port.Published, b.Port.Published), cmp.Compare(a.By, b.By))
	})
	s.reach = s.reach[:0]
	last := 0
	for i := range s.list {
		last = max(last, s.list[i].Port.LastPublished())
		s.reach = append(s.reach, last)
	}
	s.sorted = true
}

func check(p *weft.PortSpec) error {
	switch {
	case p.Protocol != weft.TCP && p.Protocol != weft.UDP && p.Protocol != weft.SCTP:
		return fmt.Errorf("%w: protocol %q: use tcp, udp or sctp", weft.ErrInvalid, p.Protocol)
	case p.Published == 0:
		return fmt.Errorf("%w: port 0 cannot be published", weft.ErrInvalid)
	case p.LastPublished() > 65535:
		return fmt.Errorf("%w: the range of %d ports from %d on goes beyond 65535", weft.ErrInvalid, p.Ports(), p.Published)
	}
	return nil
}
