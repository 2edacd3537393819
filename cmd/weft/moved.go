package main

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
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
	moveLooks = 3
)

// memberLinks are where the addresses are by which others know this node.
type memberLinks struct {
	Advertise, DataPath memberLink
}

// memberLink is the link that has, or had last, one of these addresses.
type memberLink struct {
	Name string // "" = none has it: a router forwards it
	// Beside are the other addresses that the link had with it: aliases, and those that
	// float between hosts. Nobody follows to one of them.
	Beside []netip.Addr
}

// note remembers where the addresses are now; of one that no link has, where it was last.
func (s memberState) note(addrs []weft.HostAddr) memberState {
	s.Links.Advertise, s.Links.DataPath = s.Links.Advertise.note(addrs, s.Advertise.Addr()), s.Links.DataPath.note(addrs, s.DataPath)
	return s
}

func (l memberLink) note(addrs []weft.HostAddr, have netip.Addr) memberLink {
	i := slices.IndexFunc(addrs, func(h weft.HostAddr) bool { return h.Addr == have })
	if i < 0 {
		return l
	}
	now := memberLink{Name: addrs[i].Interface}
	for _, h := range addrs {
		if h.Interface == now.Name && h.Addr != have {
			now.Beside = append(now.Beside, h.Addr)
		}
	}
	return now
}

// follow is the state with the addresses that its links have now. An address that the
// host still has stays, as does one of a link that has no new one of its family, or
// several: the former may come back, of the latter nobody says which.
func (s memberState) follow(addrs []weft.HostAddr) memberState {
	advertise, dataPath := s.Links.Advertise.follow(addrs, s.Advertise.Addr()), s.Links.DataPath.follow(addrs, s.DataPath)
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

// follow is the one new address of the family that the link has when the host has not got
// have any more; else have.
func (l memberLink) follow(addrs []weft.HostAddr, have netip.Addr) netip.Addr {
	var now []netip.Addr
	for _, h := range addrs {
		if h.Addr == have {
			return have
		}
		if l.Name != "" && h.Interface == l.Name && h.Addr.Is4() == have.Unmap().Is4() && !h.Addr.IsLinkLocalUnicast() && !slices.Contains(l.Beside, h.Addr) {
			now = append(now, h.Addr)
		}
	}
	if len(now) != 1 {
		return have
	}
	return now[0]
}

func (s memberState) isAt(o memberState) bool {
	return s.Advertise == o.Advertise && s.DataPath == o.DataPath
}

// moves counts in how many looks in a row a member's host had the same other addresses.
type moves struct {
	last memberState
	same int
}

// look takes what was found; true = it is for good.
func (m *moves) look(was, is memberState) bool {
	if was.isAt(is) {
		m.same = 0
		return false
	}
	if !m.last.isAt(is) {
		m.same = 0
	}
	m.last = is
	m.same++
	return m.same >= moveLooks
}

// catchUp follows the host's addresses to where they are when a member is taken up, and
// remembers their links. An error says that they are to be looked at again.
func (ms *membership) catchUp(s memberState) (memberState, error) {
	addrs, err := linux.HostAddrs()
	if err != nil {
		return s, err
	}
	next := s.follow(addrs).note(addrs)
	if !next.isAt(s) {
		if !ms.moves.look(s, next) {
			return s, fmt.Errorf("the host has no longer the address %s: %w until it is sure that it stays with %s", s.Advertise.Addr(), weft.ErrUnavailable, next.Advertise.Addr())
		}
		ms.log.Warn("the host has another address: the node is a member by it now", "was", s.Advertise, "is", next.Advertise, "data_path", next.DataPath)
	}
	ms.moves = moves{}
	if next.isAt(s) && reflect.DeepEqual(next.Links, s.Links) {
		return next, nil
	}
	return next, next.save(ms.cfg.DataRoot)
}

// movedError ends a member whose host has another address. The next one has it.
type movedError struct {
	was, is netip.Addr
	found   moves
}

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
	var found moves
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
		switch {
		case found.look(s, next):
			if next.Advertise != s.Advertise {
				return &movedError{s.Advertise.Addr(), next.Advertise.Addr(), found}
			}
			return &movedError{s.DataPath, next.DataPath, found}
		case next.isAt(s):
			if s, err = m.noteLinks(s, addrs); err != nil {
				m.log.Error("remember the links of the host's addresses", weft.KeyErr, err)
			}
		}
	}
}

// noteLinks remembers where the addresses are by now.
func (m *member) noteLinks(s memberState, addrs []weft.HostAddr) (memberState, error) {
	next := s.note(addrs)
	if reflect.DeepEqual(next.Links, s.Links) {
		return s, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Links = next.Links
	return next, m.state.save(m.cfg.DataRoot)
}
