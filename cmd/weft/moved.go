package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/linux"
)

// A host may get another address while its node is a member: a lease that is not
// renewed, a machine that is moved. The node follows it on the same link. Others know
// it by its certificate, and learn the address with its next session.

// moveLook is how often a member looks at its host's addresses, moveLooks how often in a
// row it must find the same other address: one that is renewed may be away for a moment.
const (
	moveLook  = time.Second
	moveLooks = 2
)

// memberLinks are the links that have the addresses by which others know this node;
// "" = none has: a router forwards it.
type memberLinks struct {
	Advertise, DataPath string
}

// note remembers the links that have the addresses now; of an address that none has,
// the last one that had it.
func (s memberState) note(addrs []weft.HostAddr) memberState {
	for _, h := range addrs {
		if h.Addr == s.Advertise.Addr() {
			s.Links.Advertise = h.Interface
		}
		if h.Addr == s.DataPath {
			s.Links.DataPath = h.Interface
		}
	}
	return s
}

// follow is the state with the addresses that its links have now. An address that the
// host still has stays, as does one of a link that has none of its family, or several:
// the former may come back, of the latter nobody says which.
func (s memberState) follow(addrs []weft.HostAddr) memberState {
	advertise, dataPath := onLink(addrs, s.Links.Advertise, s.Advertise.Addr()), onLink(addrs, s.Links.DataPath, s.DataPath)
	if advertise == s.Advertise.Addr() && dataPath == s.DataPath {
		return s
	}
	old := s.Advertise
	s.Advertise, s.DataPath = netip.AddrPortFrom(advertise, old.Port()), dataPath
	if s.Listen.Addr() == old.Addr() {
		s.Listen = netip.AddrPortFrom(advertise, s.Listen.Port())
	}
	s.Managers = slices.Clone(s.Managers)
	for i, m := range s.Managers {
		if m == old {
			s.Managers[i] = s.Advertise
		}
	}
	return s
}

// onLink is the one address of the family that a link has when the host has not got have
// any more; else have.
func onLink(addrs []weft.HostAddr, link string, have netip.Addr) netip.Addr {
	var now []netip.Addr
	for _, h := range addrs {
		if h.Addr == have {
			return have
		}
		if link != "" && h.Interface == link && h.Addr.Is4() == have.Unmap().Is4() {
			now = append(now, h.Addr)
		}
	}
	if len(now) != 1 {
		return have
	}
	return now[0]
}

// catchUp follows the host's addresses to where they are when a member is taken up, and
// remembers their links.
func (ms *membership) catchUp(s memberState) (memberState, error) {
	addrs, err := linux.HostAddrs()
	if err != nil {
		return s, err
	}
	next := s.follow(addrs).note(addrs)
	if next.Advertise != s.Advertise || next.DataPath != s.DataPath {
		ms.log.Warn("the host has another address: the node is a member by it now", "was", s.Advertise, "is", next.Advertise, "data_path", next.DataPath)
	}
	if next.Advertise == s.Advertise && next.DataPath == s.DataPath && next.Links == s.Links {
		return next, nil
	}
	return next, next.save(ms.cfg.DataRoot)
}

// movedError ends a member whose host has another address. The next one has it.
type movedError struct{ was, is netip.Addr }

func (e *movedError) Error() string {
	return fmt.Sprintf("the host has no longer the address %s but %s: the node takes up its place again", e.was, e.is)
}

// watchAddrs ends with movedError when the host's addresses are others, and with ctx.
func (m *member) watchAddrs(ctx context.Context) error {
	m.mu.Lock()
	s := m.state
	m.mu.Unlock()
	tick := time.NewTicker(moveLook)
	defer tick.Stop()
	same := 0
	var last memberState
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		addrs, err := linux.HostAddrs()
		if err != nil {
			m.log.Warn("read the host's addresses", weft.KeyErr, err)
			continue
		}
		next := s.follow(addrs)
		if next.Advertise == s.Advertise && next.DataPath == s.DataPath {
			same = 0
			continue
		}
		if next.Advertise != last.Advertise || next.DataPath != last.DataPath {
			same = 0
		}
		last = next
		if same++; same < moveLooks {
			continue
		}
		if next.Advertise != s.Advertise {
			return &movedError{s.Advertise.Addr(), next.Advertise.Addr()}
		}
		return &movedError{s.DataPath, next.DataPath}
	}
}
