package ipam

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"

	"github.com/weftnet/weft"
)

// Space is the addresses of one subnet. The network address (in IPv6 the
// routers' anycast address, RFC 4291 section 2.6.1), the broadcast address of
// IPv4 and the gateway are reserved from the start. Of a larger subnet the first
// 2^24 addresses are used: hardware addresses are derived from their last bits.
// It costs memory only for the parts of the subnet that are in use.
//
// Addresses are handed out next-fit: the search goes on behind the last one
// given, so that a freed address rests until the whole subnet has been walked
// and cannot meet a peer's stale entry for its former holder.
type Space struct {
	prefix  netip.Prefix
	gateway netip.Addr
	total   uint64 // addresses, reserved ones included
	size    uint64 // addresses that tasks and services may have
	used    uint64 // of those
	cursor  uint64 // offset where the next search starts
	pages   map[uint64]*page
}

// A page is a bitmap of 4,096 addresses: one for a network of the default
// mask length.
const (
	pageBits  = 4096
	pageWords = pageBits / 64
)

// maxBits of an address are the allocator's to choose.
const maxBits = 24

type page struct {
	words [pageWords]uint64
	set   int
}

// NewSpace returns the empty space of s. Without a gateway the first address
// is reserved for it. A subnet that CheckSubnet refuses (smaller than /29 or
// /125) gives a space of size zero: every Take and Next fails.
func NewSpace(s weft.Subnet) *Space {
	sp := &Space{prefix: s.Prefix, gateway: s.Gateway, pages: make(map[uint64]*page)}
	if CheckSubnet(s.Prefix, nil) != nil {
		return sp
	}
	if !sp.gateway.IsValid() {
		sp.gateway = s.Prefix.Addr().Next()
	}
	sp.total = uint64(1) << min(s.Prefix.Addr().BitLen()-s.Prefix.Bits(), maxBits)
	sp.size = sp.total
	reserved := []netip.Addr{s.Prefix.Addr(), sp.gateway}
	if s.Prefix.Addr().Is4() {
		reserved = append(reserved, Last(s.Prefix))
	}
	for _, a := range reserved {
		if off, ok := sp.offset(a); ok && sp.mark(off) {
			sp.size--
		}
	}
	sp.cursor = 0
	return sp
}

// Take reserves a. Errors: weft.ErrInvalid (not an address of the subnet that
// anyone may have), weft.ErrConflict (taken already). The next search starts
// behind the highest address taken, so that a space rebuilt from the state
// goes on where its predecessor was, in whatever order it is refilled.
func (s *Space) Take(a netip.Addr) error {
	a = a.Unmap()
	if err := s.check(a); err != nil {
		return err
	}
	off, _ := s.offset(a) // check knows it
	if !s.mark(off) {
		return fmt.Errorf("%w: address %s of subnet %s is taken", weft.ErrConflict, a, s.prefix)
	}
	s.used++
	s.cursor = max(s.cursor, off+1)
	return nil
}

// Next reserves and returns a free address. A full subnet is
// weft.ErrUnavailable with the numbers.
func (s *Space) Next() (netip.Addr, error) {
	if s.used >= s.size {
		return netip.Addr{}, fmt.Errorf("%w: subnet %s is full: %d of %d addresses are in use; scale down, or use a network with a larger subnet",
			weft.ErrUnavailable, s.prefix, s.used, s.size)
	}
	off := s.search(s.cursor)
	s.mark(off)
	s.used++
	s.cursor = off + 1
	return s.addr(off), nil
}

// Free gives a back. What is reserved, not taken or not of the subnet is left
// alone: freeing twice does no harm.
func (s *Space) Free(a netip.Addr) {
	a = a.Unmap()
	if s.check(a) != nil {
		return
	}
	off, _ := s.offset(a) // check knows it
	p := s.pages[off/pageBits]
	if p == nil {
		return
	}
	w, bit := off%pageBits/64, uint64(1)<<(off%64)
	if p.words[w]&bit == 0 {
		return
	}
	p.words[w] &^= bit
	s.used--
	if p.set--; p.set == 0 {
		delete(s.pages, off/pageBits)
	}
}

// Usage is how many addresses are taken, and of how many that may be.
func (s *Space) Usage() (used, size uint64) { return s.used, s.size }

// check says whether a is an address that a task or service may have.
func (s *Space) check(a netip.Addr) error {
	switch {
	case s.size == 0 || !s.prefix.Contains(a):
		return fmt.Errorf("%w: address %s is not in subnet %s", weft.ErrInvalid, a, s.prefix)
	case a == s.prefix.Addr():
		return fmt.Errorf("%w: %s is the network address of subnet %s", weft.ErrInvalid, a, s.prefix)
	case a.Is4() && a == Last(s.prefix):
		return fmt.Errorf("%w: %s is the broadcast address of subnet %s", weft.ErrInvalid, a, s.prefix)
	case a == s.gateway:
		return fmt.Errorf("%w: %s is the gateway of subnet %s", weft.ErrInvalid, a, s.prefix)
	}
	if _, ok := s.offset(a); !ok {
		return fmt.Errorf("%w: address %s is not among the first %d of subnet %s, which are the ones in use", weft.ErrInvalid, a, s.total, s.prefix)
	}
	return nil
}

// mark sets the bit and reports whether it was clear.
func (s *Space) mark(off uint64) bool {
	p := s.pages[off/pageBits]
	if p == nil {
		p = new(page)
		s.pages[off/pageBits] = p
	}
	w, bit := off%pageBits/64, uint64(1)<<(off%64)
	if p.words[w]&bit != 0 {
		return false
	}
	p.words[w] |= bit
	p.set++
	return true
}

// search returns the first clear bit at or behind from, around the end. The
// caller knows that there is one.
func (s *Space) search(from uint64) uint64 {
	if from >= s.total {
		from = 0
	}
	for off := from; ; {
		p := s.pages[off/pageBits]
		if p == nil {
			return off
		}
		w := off % pageBits / 64
		free := ^p.words[w] &^ (1<<(off%64) - 1)
		if p.set < pageBits && free != 0 {
			if hit := off&^63 + uint64(bits.TrailingZeros64(free)); hit < s.total {
				return hit
			}
		}
		if p.set == pageBits {
			off = off&^(pageBits-1) + pageBits
		} else {
			off = off&^63 + 64
		}
		if off >= s.total {
			off = 0
		}
	}
}

// offset is the number of an address in the subnet; false for those that are not
// handed out.
func (s *Space) offset(a netip.Addr) (uint64, bool) {
	if !s.prefix.Contains(a) {
		return 0, false
	}
	b, base := a.As16(), s.prefix.Addr().As16()
	off := binary.BigEndian.Uint64(b[8:]) - binary.BigEndian.Uint64(base[8:])
	return off, [8]byte(b[:8]) == [8]byte(base[:8]) && off < s.total
}

// addr is the inverse of offset. The subnet's own low bits are zero, so nothing
// carries beyond the last eight bytes.
func (s *Space) addr(off uint64) netip.Addr {
	b := s.prefix.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])+off)
	return netip.AddrFrom16(b).Unmap()
}
