package orchestrator

import (
	"fmt"
	"net/netip"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/ipam"
)

// families are the addresses of one network: a space for each family that it
// has. Not safe for concurrent use.
type families struct {
	spec   weft.NetworkSpec
	v4, v6 *ipam.Space // nil without
}

func newFamilies(spec weft.NetworkSpec) *families {
	f := &families{spec: spec}
	if s, ok := spec.Subnet(false); ok {
		f.v4 = ipam.NewSpace(s)
	}
	if s, ok := spec.Subnet(true); ok {
		f.v6 = ipam.NewSpace(s)
	}
	return f
}

func (f *families) of(a netip.Addr) *ipam.Space {
	if a.Unmap().Is4() {
		return f.v4
	}
	return f.v6
}

// Take is ipam.Space.Take in the space of a's family.
func (f *families) Take(a netip.Addr) error {
	s := f.of(a)
	if s == nil {
		return fmt.Errorf("network %s has no addresses of the family of %s: %w", f.spec.Name, a, weft.ErrInvalid)
	}
	return s.Take(a)
}

// Free is ipam.Space.Free in the space of a's family.
func (f *families) Free(a netip.Addr) {
	if s := f.of(a); s != nil {
		s.Free(a)
	}
}

// next reserves an address of each family that the network has, or none.
func (f *families) next(network weft.ID) (weft.Attachment, error) {
	at := weft.Attachment{Network: network}
	for _, s := range []*ipam.Space{f.v4, f.v6} { // the first one is IPv4 where there is one
		if s == nil {
			continue
		}
		a, err := s.Next()
		if err != nil {
			f.free(at)
			return weft.Attachment{}, err
		}
		subnet, _ := f.spec.Subnet(a.Is6())
		if p := host(a, subnet); at.Addr.IsValid() {
			at.Addr6 = p
		} else {
			at.Addr = p
		}
	}
	return at, nil
}

// take reserves all addresses of at, or none.
func (f *families) take(at weft.Attachment) error {
	for i, a := range at.Addrs() {
		if err := f.Take(a.Addr()); err != nil {
			for _, b := range at.Addrs()[:i] {
				f.Free(b.Addr())
			}
			return err
		}
	}
	return nil
}

// free gives all addresses of at back.
func (f *families) free(at weft.Attachment) {
	for _, a := range at.Addrs() {
		f.Free(a.Addr())
	}
}
