package ipam

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// naivePick tries every subnet of every pool in turn.
func naivePick(p Pools, used []netip.Prefix) (netip.Prefix, bool) {
	for _, pool := range p.Prefixes {
		for a := pool.Addr(); a.IsValid() && pool.Contains(a); {
			c := netip.PrefixFrom(a, p.MaskLength)
			free := true
			for _, u := range used {
				free = free && !u.Overlaps(c)
			}
			if free {
				return c, true
			}
			a = Last(c).Next()
		}
	}
	return netip.Prefix{}, false
}

func TestPickAgreesWithNaive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := Pools{Prefixes: []netip.Prefix{pfx("10.0.0.0/22"), pfx("172.16.0.0/23")}, MaskLength: rapid.IntRange(23, 27).Draw(t, "mask")}
		var used []netip.Prefix
		for range rapid.IntRange(0, 30).Draw(t, "n") {
			var a netip.Addr
			if rapid.Bool().Draw(t, "pool") {
				a = netip.AddrFrom4([4]byte{10, 0, rapid.Byte().Draw(t, "c") % 5, rapid.Byte().Draw(t, "d")})
			} else {
				a = netip.AddrFrom4([4]byte{172, 16, rapid.Byte().Draw(t, "c") % 3, rapid.Byte().Draw(t, "d")})
			}
			used = append(used, netip.PrefixFrom(a, rapid.SampledFrom([]int{8, 20, 22, 23, 24, 25, 26, 28, 30, 32}).Draw(t, "bits")))
		}
		want, ok := naivePick(p, used)
		got, err := p.Pick(used)
		if ok != (err == nil) || got != want {
			t.Fatalf("used %v: got %v (%v), want %v %v", used, got, err, want, ok)
		}
		if err != nil && !errors.Is(err, weft.ErrUnavailable) {
			t.Fatal(err)
		}
	})
}

func TestPickErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		p    Pools
		used []netip.Prefix
		is   error
		text string
	}{
		{"no pools", Pools{MaskLength: 24}, nil, weft.ErrInvalid, "no address pool"},
		{"mask larger than pool", Pools{[]netip.Prefix{pfx("10.0.0.0/24")}, 20}, nil, weft.ErrInvalid, "use 24 to 29"},
		{"mask too long", Pools{[]netip.Prefix{pfx("10.0.0.0/24")}, 30}, nil, weft.ErrInvalid, "use 24 to 29"},
		{"host bits", Pools{[]netip.Prefix{pfx("10.0.0.1/24")}, 26}, nil, weft.ErrInvalid, "use 10.0.0.0/24"},
		{"pools overlap", Pools{[]netip.Prefix{pfx("10.0.0.0/16"), pfx("10.0.4.0/24")}, 26}, nil, weft.ErrInvalid, "overlaps address pool 10.0.0.0/16"},
		{"IPv6", Pools{[]netip.Prefix{pfx("fd00::/48")}, 64}, nil, weft.ErrUnsupported, "IPv6"},
		{"loopback", Pools{[]netip.Prefix{pfx("127.0.0.0/8")}, 24}, nil, weft.ErrInvalid, "127.0.0.0/8"},
		{"full names what is in the way", Pools{[]netip.Prefix{pfx("10.0.0.0/24")}, 24}, []netip.Prefix{pfx("192.168.0.0/16"), pfx("10.0.0.7/32")}, weft.ErrUnavailable, "in the way: 10.0.0.7/32;"},
		{"mapped", Pools{[]netip.Prefix{pfx("10.0.0.0/24")}, 24}, []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr("::ffff:10.0.0.0"), 120)}, weft.ErrUnavailable, "in the way: 10.0.0.0/24;"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.p.Pick(c.used)
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, %v; want %v with %q", got, err, c.is, c.text)
			}
		})
	}
}

func TestPick6(t *testing.T) {
	ula := pfx("fd12:3456:789a::/48")
	used := []netip.Prefix{pfx("10.0.0.0/8"), pfx("fd12:3456:789a::/64"), pfx("fd12:3456:789a:1:8000::/65"), pfx("fd12:3456:789a:3::/64")}
	if got, err := Pick6(ula, used); err != nil || got != pfx("fd12:3456:789a:2::/64") {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err := Pick6(ula, []netip.Prefix{pfx("fc00::/7")}); !errors.Is(err, weft.ErrUnavailable) || !strings.Contains(err.Error(), "fc00::/7") {
		t.Errorf("got %v, %v", got, err)
	}
	for _, p := range []netip.Prefix{{}, pfx("10.0.0.0/8"), pfx("fd00::/80")} {
		if got, err := Pick6(p, nil); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s: got %v, %v", p, got, err)
		}
	}
}

// The addresses of a large subnet are its first 2^24.
func TestLargeSubnets(t *testing.T) {
	s := NewSpace(weft.Subnet{Prefix: pfx("fd00::/64")})
	if err := s.Take(netip.MustParseAddr("fd00::ff:ffff")); err != nil {
		t.Error(err)
	}
	for _, a := range []string{"fd00::100:0", "fd00::1:0:0:5"} {
		if err := s.Take(netip.MustParseAddr(a)); !errors.Is(err, weft.ErrInvalid) || !strings.Contains(err.Error(), "first 16777216") {
			t.Errorf("%s: %v", a, err)
		}
	}
	if a, err := s.Next(); err != nil || a != netip.MustParseAddr("fd00::2") {
		t.Errorf("behind the last: %v, %v", a, err)
	}
	short := NewSpace(weft.Subnet{Prefix: pfx("fd00:0:0:8::/62")})
	if err := short.Take(netip.MustParseAddr("fd00:0:0:9::5")); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("an address of the second /64: %v", err)
	}
}

func TestPickTopOfAddressSpace(t *testing.T) {
	p := Pools{[]netip.Prefix{pfx("223.255.255.0/24")}, 25}
	got, err := p.Pick([]netip.Prefix{pfx("223.255.255.0/25")})
	if err != nil || got != pfx("223.255.255.128/25") {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestCheckSubnet(t *testing.T) {
	used := []Named{{pfx("10.1.0.0/16"), "network web"}, {pfx("10.2.0.5/24"), "host route on node h2"}, {pfx("fd77:0:0:9::/64"), "network six"}}
	for _, c := range []struct {
		want string
		is   error
		text string
	}{
		{"10.3.0.0/24", nil, ""},
		{"10.3.0.0/29", nil, ""},
		{"10.3.0.0/30", weft.ErrInvalid, "use /29 or larger"},
		{"10.3.0.1/24", weft.ErrInvalid, "use 10.3.0.0/24"},
		{"10.1.4.0/24", weft.ErrConflict, "overlaps 10.1.0.0/16 (network web)"},
		{"10.0.0.0/8", weft.ErrConflict, "network web"},
		{"10.2.0.0/25", weft.ErrConflict, "overlaps 10.2.0.0/24 (host route on node h2)"},
		{"fd00::/64", nil, ""},
		{"fd00::/125", nil, ""},
		{"fd00::/126", weft.ErrInvalid, "use /125 or larger"},
		{"fd00::/128", weft.ErrInvalid, "use /125 or larger"},
		{"fd00::1/64", weft.ErrInvalid, "use fd00::/64"},
		{"fd77:0:0:8::/62", weft.ErrConflict, "overlaps fd77:0:0:9::/64 (network six)"},
		{"fe80::/64", weft.ErrInvalid, "overlaps fe80::/10"},
		{"ff02::/64", weft.ErrInvalid, "hosts cannot use"},
		{"::/0", weft.ErrInvalid, "hosts cannot use"},
		{"::ffff:10.3.0.0/120", weft.ErrInvalid, "hosts cannot use"},
		{"224.0.0.0/24", weft.ErrInvalid, "hosts cannot use"},
		{"0.0.0.0/0", weft.ErrInvalid, "hosts cannot use"},
	} {
		err := CheckSubnet(pfx(c.want), used)
		if !errors.Is(err, c.is) || err != nil && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: got %v, want %v with %q", c.want, err, c.is, c.text)
		}
	}
	if err := CheckSubnet(netip.Prefix{}, nil); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("zero prefix: %v", err)
	}
}

// A space against a plain set, through random takes, allocations and frees.
func TestSpaceAgreesWithSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		host := []int{3, 4, 6, 13}
		base, reserved := netip.MustParseAddr("10.0.0.0"), 3
		isIPv6 := rapid.Bool().Draw(t, "IPv6")
		if isIPv6 {
			base, reserved = netip.MustParseAddr("fd00:0:0:1::"), 2
			host = append(host, 64)
		}
		number := func(n byte) netip.Addr {
			b := base.AsSlice()
			b[len(b)-1] = n
			a, _ := netip.AddrFromSlice(b)
			return a
		}
		bits := rapid.SampledFrom(host).Draw(t, "host bits")
		p := netip.PrefixFrom(base, base.BitLen()-bits).Masked()
		sub := weft.Subnet{Prefix: p}
		if rapid.Bool().Draw(t, "gateway") {
			sub.Gateway = number(5)
		}
		s := NewSpace(sub)
		gw := sub.Gateway
		if !gw.IsValid() {
			gw = number(1)
		}
		last := Last(p)
		if isIPv6 {
			last = netip.Addr{} // it is an address like any other
		}
		set := map[netip.Addr]bool{}
		_, size := s.Usage()
		if size != 1<<min(bits, 24)-uint64(reserved) {
			t.Fatalf("size %d", size)
		}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			// The high half of the range lies outside the smaller subnets.
			a := number(rapid.Byte().Draw(t, "addr") % 80)
			switch rapid.IntRange(0, 3).Draw(t, "op") {
			case 0:
				err := s.Take(a)
				usable := p.Contains(a) && a != p.Addr() && a != last && a != gw
				switch {
				case !usable:
					if !errors.Is(err, weft.ErrInvalid) {
						t.Fatalf("take %v: %v", a, err)
					}
				case set[a]:
					if !errors.Is(err, weft.ErrConflict) {
						t.Fatalf("take %v again: %v", a, err)
					}
				case err != nil:
					t.Fatal(err)
				default:
					set[a] = true
				}
			case 1:
				s.Free(a)
				delete(set, a)
			default:
				got, err := s.Next()
				if uint64(len(set)) == size {
					if !errors.Is(err, weft.ErrUnavailable) {
						t.Fatalf("full: %v, %v", got, err)
					}
					break
				}
				if err != nil || set[got] || !p.Contains(got) || got == p.Addr() || got == last || got == gw {
					t.Fatalf("next: %v, %v", got, err)
				}
				set[got] = true
			}
			if used, _ := s.Usage(); used != uint64(len(set)) {
				t.Fatalf("used %d, want %d", used, len(set))
			}
		}
	})
}

func TestFreedAddressRests(t *testing.T) {
	s := NewSpace(weft.Subnet{Prefix: pfx("10.0.0.0/24")})
	first, err := s.Next()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 252 { // 253 may be had, one is given
		s.Free(first)
		a, err := s.Next()
		if err != nil || a == first {
			t.Fatalf("after %d: %v, %v", i, a, err)
		}
	}
	if a, err := s.Next(); err != nil || a != first {
		t.Fatalf("after the whole subnet: %v, %v", a, err)
	}
}

func TestSpaceRefilledInAnyOrderGoesOnBehindTheHighest(t *testing.T) {
	for _, order := range [][]string{{"10.0.0.9", "10.0.0.3"}, {"10.0.0.3", "10.0.0.9"}} {
		s := NewSpace(weft.Subnet{Prefix: pfx("10.0.0.0/24")})
		for _, a := range order {
			if err := s.Take(netip.MustParseAddr(a)); err != nil {
				t.Fatal(err)
			}
		}
		if a, err := s.Next(); err != nil || a != netip.MustParseAddr("10.0.0.10") {
			t.Errorf("%v: %v, %v", order, a, err)
		}
	}
}

func TestSpaceOfNothing(t *testing.T) {
	for _, sub := range []weft.Subnet{{}, {Prefix: pfx("fd00::/126")}, {Prefix: pfx("10.0.0.0/31")}} {
		s := NewSpace(sub)
		if _, err := s.Next(); !errors.Is(err, weft.ErrUnavailable) {
			t.Errorf("%v: next: %v", sub, err)
		}
		if err := s.Take(netip.MustParseAddr("10.0.0.1")); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%v: take: %v", sub, err)
		}
		s.Free(netip.MustParseAddr("10.0.0.1"))
		s.Free(netip.Addr{})
	}
}

func TestFullSpaceSaysHowFull(t *testing.T) {
	s := NewSpace(weft.Subnet{Prefix: pfx("10.0.0.0/29")})
	for range 5 {
		if _, err := s.Next(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Next(); err == nil || !strings.Contains(err.Error(), "subnet 10.0.0.0/29 is full: 5 of 5 addresses") {
		t.Errorf("got %v", err)
	}
}

func TestPickVNI(t *testing.T) {
	used := map[uint32]bool{}
	for i := range uint32(3) {
		v, err := PickVNI(used)
		if err != nil || v != weft.FirstVNI+i {
			t.Fatalf("got %d, %v", v, err)
		}
		used[v] = true
	}
	delete(used, weft.FirstVNI+1)
	if v, err := PickVNI(used); err != nil || v != weft.FirstVNI+1 {
		t.Errorf("got %d, %v", v, err)
	}
}

func BenchmarkSpaceNextFullButOne(b *testing.B) {
	s := NewSpace(weft.Subnet{Prefix: pfx("10.0.0.0/16")})
	for {
		if _, err := s.Next(); err != nil {
			break
		}
	}
	hole := netip.MustParseAddr("10.0.128.7")
	for b.Loop() {
		s.Free(hole)
		if a, err := s.Next(); err != nil || a != hole {
			b.Fatal(a, err)
		}
	}
}
