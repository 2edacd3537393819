package nft

import (
	"cmp"
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// Rules of the host's firewall for what the host itself takes (the hook "input") hold for
// sockets of the host. What comes to a published port leaves for a task before that hook,
// so a rule there that names one does not do what somebody meant by it. It is not
// obeyed, it is told.

// expression is one of a rule as the kernel tells it: its name, and its attributes
// (linux/netfilter/nf_tables.h).
type expression struct {
	name string
	data []byte
}

// setElement is one of a set: a key, or where an interval ends, and the chain that it
// leads to.
type setElement struct {
	key   string
	isEnd bool
	chain string
}

// portSpan are ports from first to last.
type portSpan struct{ first, last uint16 }

// named is what a rule says of ports, and where it leads.
type named struct {
	protocols []weft.Protocol // none: it does not say
	spans     []portSpan
	chains    []string
	// accepts: it lets in what it is about; isNarrow: that is more than a port.
	accepts, isNarrow bool
}

// nfAccept is NF_ACCEPT (linux/netfilter.h).
const nfAccept = 1

// What a register holds, as far as it matters here.
type load uint8

const (
	loadsOther  load = iota
	loadsFamily      // of the packet, or something else that narrows nothing
	loadsProtocol
	loadsPort
)

// input reads a rule. sets gives the elements of a set of its table by name.
func input(rule []expression, sets func(name string) []setElement) (n named) {
	regs := map[uint32]load{}
	low, high := uint16(1), uint16(1<<16-1)
	isBetween := false
	for _, e := range rule {
		a := values(e.data)
		switch e.name {
		case "meta":
			regs[a.number(unix.NFTA_META_DREG)] = loadsOther
			switch a.number(unix.NFTA_META_KEY) {
			case unix.NFT_META_L4PROTO:
				regs[a.number(unix.NFTA_META_DREG)] = loadsProtocol
			case unix.NFT_META_NFPROTO:
				regs[a.number(unix.NFTA_META_DREG)] = loadsFamily
			}
		case "ct": // of a new connection all but its state is in the packet, too
			regs[a.number(unix.NFTA_CT_DREG)] = loadsFamily
		case "bitwise":
			regs[a.number(unix.NFTA_BITWISE_DREG)] = regs[a.number(unix.NFTA_BITWISE_SREG)]
		case "payload":
			regs[a.number(unix.NFTA_PAYLOAD_DREG)] = payload(a.number(unix.NFTA_PAYLOAD_BASE), a.number(unix.NFTA_PAYLOAD_OFFSET), a.number(unix.NFTA_PAYLOAD_LEN))
		case "cmp":
			of, op, value := regs[a.number(unix.NFTA_CMP_SREG)], a.number(unix.NFTA_CMP_OP), a.value(unix.NFTA_CMP_DATA)
			switch {
			case of == loadsOther:
				n.isNarrow = true
			case of == loadsProtocol && op == unix.NFT_CMP_EQ:
				n.protocol(value)
			case of == loadsPort && len(value) == 2:
				p := binary.BigEndian.Uint16(value)
				switch op {
				case unix.NFT_CMP_EQ:
					n.spans = append(n.spans, portSpan{p, p})
				case unix.NFT_CMP_GTE:
					low, isBetween = max(low, p), true
				case unix.NFT_CMP_LTE:
					high, isBetween = min(high, p), true
				}
			}
		case "range":
			from, to := a.value(unix.NFTA_RANGE_FROM_DATA), a.value(unix.NFTA_RANGE_TO_DATA)
			if regs[a.number(unix.NFTA_RANGE_SREG)] == loadsPort && a.number(unix.NFTA_RANGE_OP) == unix.NFT_RANGE_EQ && len(from) == 2 && len(to) == 2 {
				n.spans = append(n.spans, portSpan{binary.BigEndian.Uint16(from), binary.BigEndian.Uint16(to)})
			}
		case "lookup":
			n.lookup(a, regs[a.number(unix.NFTA_LOOKUP_SREG)], sets)
		case "match":
			n.match(cString(a[unix.NFTA_MATCH_NAME]), a[unix.NFTA_MATCH_INFO])
		case "immediate":
			attributes(a[unix.NFTA_IMMEDIATE_DATA], func(kind uint16, data []byte) {
				if kind == unix.NFTA_DATA_VERDICT {
					n.accepts = n.accepts || values(data).number(unix.NFTA_VERDICT_CODE) == nfAccept
					n.chain(verdictChain(data))
				}
			})
		}
	}
	if isBetween && low <= high {
		n.spans = append(n.spans, portSpan{low, high})
	}
	return n
}

// lookup reads what looks a register up in a set.
func (n *named) lookup(a fields, by load, sets func(name string) []setElement) {
	leads := a[unix.NFTA_LOOKUP_DREG] != nil && a.number(unix.NFTA_LOOKUP_DREG) == unix.NFT_REG_VERDICT
	if n.isNarrow = n.isNarrow || by == loadsOther; !leads && by == loadsOther {
		return // sets of addresses may be large, and are not read
	}
	elements := sets(cString(a[unix.NFTA_LOOKUP_SET]))
	for _, e := range elements {
		n.chain(e.chain)
	}
	isAny := a.number(unix.NFTA_LOOKUP_FLAGS) == 0 // else all but these
	switch {
	case isAny && by == loadsProtocol:
		for _, e := range elements {
			n.protocol([]byte(e.key))
		}
	case isAny && by == loadsPort:
		n.spans = append(n.spans, spansOf(elements)...)
	}
}

func (n *named) protocol(value []byte) {
	if len(value) == 0 {
		return
	}
	switch value[0] {
	case unix.IPPROTO_TCP:
		n.protocols = append(n.protocols, weft.TCP)
	case unix.IPPROTO_UDP:
		n.protocols = append(n.protocols, weft.UDP)
	case unix.IPPROTO_SCTP:
		n.protocols = append(n.protocols, weft.SCTP)
	}
}

func (n *named) chain(name string) {
	if name != "" {
		n.chains = append(n.chains, name)
	}
}

// match reads a match of iptables: struct xt_tcp and xt_udp (linux/netfilter/xt_tcpudp.h),
// struct xt_multiport_v1 (xt_multiport.h), in the host's order.
func (n *named) match(name string, info []byte) {
	port := func(at int) uint16 { return binary.NativeEndian.Uint16(info[at:]) }
	const isNot, isDestination, isEither = 0x02, 1, 2
	switch {
	case name == "tcp" && len(info) >= 12 || name == "udp" && len(info) >= 9:
		protocol, flags := weft.UDP, info[8]
		if name == "tcp" {
			protocol, flags = weft.TCP, info[11]
		}
		n.protocols = append(n.protocols, protocol)
		if s := (portSpan{port(4), port(6)}); flags&isNot == 0 && s != (portSpan{0, 1<<16 - 1}) {
			n.spans = append(n.spans, s)
		}
	case name == "multiport" && len(info) >= 48 && (info[0] == isDestination || info[0] == isEither) && info[47] == 0:
		for i := 0; i < int(min(info[1], 15)); i++ {
			s := portSpan{port(2 + 2*i), port(2 + 2*i)}
			if info[32+i] != 0 && i < 14 { // the next is where it ends
				i++
				s.last = port(2 + 2*i)
			}
			n.spans = append(n.spans, s)
		}
	case name != "comment" && name != "conntrack" && name != "state" && name != "limit":
		n.isNarrow = true
	}
}

// rules are those that are told of a rule in a chain: not of one that lets everybody ask,
// which a published port does, too.
func (n named) rules(chain string) (out []weft.InputRule) {
	if n.accepts && !n.isNarrow {
		return nil
	}
	protocols := n.protocols
	if len(protocols) == 0 {
		protocols = []weft.Protocol{weft.TCP, weft.UDP}
	}
	for _, s := range n.spans {
		if s.first = max(s.first, 1); s.first > s.last {
			continue
		}
		for _, p := range protocols {
			out = append(out, weft.InputRule{Protocol: p, First: s.first, Last: s.last, Chain: chain})
		}
	}
	return out
}

// payload is what a part of a packet is.
func payload(base, offset, size uint32) load {
	const protocolOf4, protocolOf6 = 9, 6 // in a header of IPv4 and of IPv6
	switch {
	case base == unix.NFT_PAYLOAD_TRANSPORT_HEADER && offset == thDestination && size == 2:
		return loadsPort
	case base == unix.NFT_PAYLOAD_NETWORK_HEADER && (offset == protocolOf4 || offset == protocolOf6) && size == 1:
		return loadsProtocol
	}
	return loadsOther
}

// spansOf are the ports of a set, or its intervals.
func spansOf(elements []setElement) (out []portSpan) {
	sorted := slices.Clone(elements)
	slices.SortStableFunc(sorted, func(a, b setElement) int {
		switch by := cmp.Compare(a.key, b.key); {
		case by != 0 || a.isEnd == b.isEnd:
			return by
		case a.isEnd: // where one ends the next may begin
			return -1
		}
		return 1
	})
	hasEnds := slices.ContainsFunc(sorted, func(e setElement) bool { return e.isEnd })
	for i, e := range sorted {
		if e.isEnd || len(e.key) < 2 {
			continue
		}
		s := portSpan{first: binary.BigEndian.Uint16([]byte(e.key)), last: binary.BigEndian.Uint16([]byte(e.key))}
		if hasEnds {
			s.last = 1<<16 - 1
			if i+1 < len(sorted) {
				s.last = binary.BigEndian.Uint16([]byte(sorted[i+1].key)) - 1
			}
		}
		out = append(out, s)
	}
	return out
}

// fields are attributes by kind.
type fields map[uint16][]byte

func values(b []byte) fields {
	out := fields{}
	attributes(b, func(kind uint16, data []byte) { out[kind] = data })
	return out
}

func (f fields) number(kind uint16) uint32 {
	if b := f[kind]; len(b) >= 4 {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// value is what an attribute wraps.
func (f fields) value(kind uint16) (value []byte) {
	attributes(f[kind], func(kind uint16, data []byte) {
		if kind == unix.NFTA_DATA_VALUE {
			value = data
		}
	})
	return value
}
