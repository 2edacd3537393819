package nft

import (
	"fmt"
	"testing"

	"github.com/google/nftables/expr"
)

// registers are the 32 bits each that a rule has loaded so far, by number.
type registers map[uint32]bool

// span is registers from one that holds bytes.
type span struct{ first, bytes uint32 }

// word is the least that is read or loaded.
func word(r uint32) span { return span{r, 4} }

func (s span) each(f func(uint32)) {
	first := s.first
	if first >= 1 && first <= 4 {
		first = 8 + (first-1)*4 // NFT_REG_1 to 4 are four of NFT_REG32 each (linux/netfilter/nf_tables.h)
	}
	for i := uint32(0); i < (s.bytes+3)/4; i++ {
		f(first + i)
	}
}

// uses are the registers that an expression reads, and those that it loads. Where it is
// not told how much, that is taken to be as much as any address or name.
func (r *ruleset) uses(e expr.Any) (reads, loads []span, err error) {
	set := func(name string) (set, error) {
		for _, s := range r.sets {
			if s.name == name {
				return s, nil
			}
		}
		return set{}, fmt.Errorf("no set %q", name)
	}
	nonzero := func(all ...uint32) (out []span) {
		for _, n := range all {
			if n != 0 {
				out = append(out, word(n))
			}
		}
		return out
	}
	const most = 16
	switch x := e.(type) {
	case *expr.Payload:
		if x.OperationType == expr.PayloadWrite {
			return []span{{x.SourceRegister, x.Len}}, nil, nil
		}
		return nil, []span{{x.DestRegister, x.Len}}, nil
	case *expr.Meta:
		if x.SourceRegister {
			return []span{word(x.Register)}, nil, nil
		}
		return nil, []span{{x.Register, most}}, nil
	case *expr.Ct:
		if x.SourceRegister {
			return []span{word(x.Register)}, nil, nil
		}
		return nil, []span{{x.Register, most}}, nil
	case *expr.Lookup:
		s, err := set(x.SetName)
		if err != nil {
			return nil, nil, err
		}
		reads = []span{{x.SourceRegister, s.key.Bytes}}
		if x.DestRegister != 0 {
			loads = []span{{x.DestRegister, s.data.Bytes}}
		}
		return reads, loads, nil
	case *expr.Dynset:
		s, err := set(x.SetName)
		reads = []span{{x.SrcRegKey, s.key.Bytes}}
		if x.SrcRegData != 0 {
			reads = append(reads, span{x.SrcRegData, s.data.Bytes})
		}
		return reads, nil, err
	case *expr.Cmp:
		return []span{{x.Register, uint32(len(x.Data))}}, nil, nil
	case *expr.Range:
		return []span{{x.Register, uint32(len(x.FromData))}}, nil, nil
	case *expr.Bitwise:
		return []span{{x.SourceRegister, x.Len}}, []span{{x.DestRegister, x.Len}}, nil
	case *expr.Byteorder:
		return []span{{x.SourceRegister, x.Len}}, []span{{x.DestRegister, x.Len}}, nil
	case *expr.Hash:
		return []span{{x.SourceRegister, x.Length}}, []span{word(x.DestRegister)}, nil
	case *expr.Immediate:
		return nil, []span{{x.Register, uint32(len(x.Data))}}, nil
	case *expr.Fib:
		return nil, []span{word(x.Register)}, nil
	case *expr.Rt:
		return nil, []span{word(x.Register)}, nil
	case *expr.Socket:
		return nil, []span{word(x.Register)}, nil
	case *expr.Exthdr:
		if x.SourceRegister != 0 {
			return []span{{x.SourceRegister, x.Len}}, nil, nil
		}
		return nil, []span{{x.DestRegister, x.Len}}, nil
	case *expr.NAT:
		return nonzero(x.RegAddrMin, x.RegAddrMax, x.RegProtoMin, x.RegProtoMax), nil, nil
	case *expr.TProxy:
		return nonzero(x.RegAddr, x.RegPort), nil, nil
	case *expr.Masq:
		if !x.ToPorts {
			return nil, nil, nil
		}
		return nonzero(x.RegProtoMin, x.RegProtoMax), nil, nil
	case *expr.Verdict, *expr.Counter, *expr.Reject, *expr.Notrack, *expr.Objref:
		return nil, nil, nil
	}
	return nil, nil, fmt.Errorf("no one has said what %T reads", e)
}

// TestRulesReadWhatTheyHaveLoaded: what another rule has left in a register is no
// business of this one, and newer kernels (Debian's 6.12.117 is one) refuse such a rule
// with ENODATA (nft_parse_register_load). A diversion's was one.
func TestRulesReadWhatTheyHaveLoaded(t *testing.T) {
	all := goldenRulesets()
	for _, f := range families(true) {
		for _, direct := range []bool{false, true} {
			e := endsProbe()
			e.Direct = direct
			all = append(all, namedRules{fmt.Sprintf("ends%s direct %t", f.suffix, direct), f.endsRules(e)})
		}
	}
	for _, tc := range all {
		for _, c := range tc.rules.chains {
			for _, r := range c.rules {
				loaded := registers{}
				for i, e := range r.exprs {
					reads, loads, err := tc.rules.uses(e)
					if err != nil {
						t.Fatalf("%s, rule %q: %v", tc.name, r.words, err)
					}
					for _, s := range reads {
						s.each(func(n uint32) {
							if !loaded[n] {
								t.Errorf("%s, rule %q: expression %d, %T, reads register %d, which the rule has not loaded", tc.name, r.words, i, e, n)
							}
						})
					}
					for _, s := range loads {
						s.each(func(n uint32) { loaded[n] = true })
					}
				}
			}
		}
	}
}

// TestEndsJoinPiecesWhereNeeded: a rule that has the kernel put pieces together costs every
// packet of the family a hook each way. IPv4's input hook stands behind that anyway.
func TestEndsJoinPiecesWhereNeeded(t *testing.T) {
	for _, f := range families(true) {
		joins := false
		for _, c := range f.endsRules(endsProbe()).chains {
			for _, r := range c.rules {
				for _, e := range r.exprs {
					_, is := e.(*expr.TProxy)
					joins = joins || is
				}
			}
		}
		if joins != f.is6 {
			t.Errorf("IPv6 %t: pieces are put together: %t", f.is6, joins)
		}
	}
}
