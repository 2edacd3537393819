package ingresstest

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ingress"
)

// The suite's cases of SCTP. They are few and small: an association is slow to make on an
// emulated machine.
const (
	spreadSCTP = 40 // associations, of which four backends get 10 each
	someSCTP   = 12
)

// associations: they are spread, port by port, and stay while backends come and go.
func associations(s *Suite) error {
	flows, err := s.flows(weft.SCTP, portTCP, spreadSCTP)
	if err != nil {
		return err
	}
	got := map[weft.ID]int{}
	for _, f := range flows {
		got[f.Backend()]++
	}
	b := s.Lane.Backends(0)
	if err := evenly(got, b, spreadSCTP); err != nil {
		return err
	}
	for _, step := range [][]ingress.Backend{b, b[:3], b} {
		var kept []Flow
		for _, f := range flows {
			if has(step, f.Backend()) {
				kept = append(kept, f)
			}
		}
		if err := errors.Join(s.apply(step...), same(kept)); err != nil {
			return err
		}
		flows = kept
	}
	return nil
}

// associationsDrain: open ones stay with a backend that drains, new ones go to others,
// those from a port that it has served among them.
func associationsDrain(s *Suite) error {
	const port = 22000 // below what kernels choose from
	at := func(from uint16) (Flow, error) {
		return s.Lane.Open(0, weft.SCTP, from, netip.AddrPortFrom(s.VIP, portTCP))
	}
	b := append([]ingress.Backend(nil), s.Lane.Backends(0)...)
	for i := range 2 { // the client has ended its association, or has died
		f, err := at(port + uint16(i))
		if err != nil {
			return err
		}
		flows, err := s.flows(weft.SCTP, portTCP, someSCTP)
		if err != nil {
			return err
		}
		var step []ingress.Backend
		for _, k := range b {
			if k.Task == f.Backend() {
				k = draining(k)
			}
			step = append(step, k)
		}
		if err := errors.Join(s.apply(step...), same(append(flows, f))); err != nil {
			return err
		}
		drains := f.Backend()
		if c, ok := f.(interface{ Forget() error }); ok && i > 0 {
			err = c.Forget()
		} else if c, ok := f.(interface{ Reset() error }); ok {
			err = c.Reset()
		}
		if err != nil {
			return err
		}
		if f, err = at(port + uint16(i)); err != nil {
			return fmt.Errorf("port used again: %w", err)
		}
		if f.Backend() == drains {
			return fmt.Errorf("port used again: %s answers, which drains", drains)
		}
		got, err := s.count(weft.SCTP, portTCP, someSCTP)
		if err == nil && got[drains] > 0 {
			err = fmt.Errorf("new associations went to %v, %s drains", got, drains)
		}
		if err := errors.Join(err, same(append(flows, f)), s.apply(b...)); err != nil {
			return err
		}
	}
	return nil
}

// associationsEnd: a backend that is gone lets its associations go, with an answer.
func associationsEnd(s *Suite) error {
	flows, err := s.flows(weft.SCTP, portTCP, someSCTP)
	if err != nil {
		return err
	}
	gone := flows[0].Backend()
	var step []ingress.Backend
	for _, k := range s.Lane.Backends(0) {
		if k.Task != gone {
			step = append(step, k)
		}
	}
	if err := s.apply(step...); err != nil {
		return err
	}
	for _, f := range flows {
		if f.Backend() != gone {
			if err := same([]Flow{f}); err != nil {
				return err
			}
			continue
		}
		if id, err := f.Again(); err == nil && id == gone {
			return errors.New("an association of the one that is gone goes on")
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			return errors.New("an association of the one that is gone ends in silence")
		}
	}
	got, err := s.count(weft.SCTP, portTCP, someSCTP)
	if err == nil && got[gone] > 0 {
		err = fmt.Errorf("new associations went to %v, %s is gone", got, gone)
	}
	return err
}

// associationsRefused: without backends, or while all drain, a request is refused; what is open with one that drains goes on.
func associationsRefused(s *Suite) error {
	flows, err := s.flows(weft.SCTP, portTCP, 4)
	if err != nil {
		return err
	}
	if err := errors.Join(s.apply(s.allDraining()...), s.refusedSCTP(portTCP), same(flows), s.apply(), s.refusedSCTP(portTCP)); err != nil {
		return err
	}
	if err := s.apply(s.Lane.Backends(0)...); err != nil {
		return err
	}
	if s.Wire == nil {
		return nil
	}
	return s.refusedSCTP(portNone) // by the backend
}

// refusedSCTP asks on a raw socket where packets are real: that a request is refused is told
// on every kernel, though the sockets of some wait on over IPv6 (nft/DESIGN.md).
func (s *Suite) refusedSCTP(port uint16) error {
	if s.Wire == nil {
		return s.refused(weft.SCTP, port)
	}
	return s.Wire.refusesSCTP(netip.AddrPortFrom(s.VIP, port))
}

// associationsOwn: a server at the task's own address alone is reached, too.
func associationsOwn(s *Suite) error {
	flows, err := s.flows(weft.SCTP, portOwn, 4)
	return errors.Join(err, same(flows))
}
