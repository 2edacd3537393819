package nft

import (
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/ingress"
)

// TCP's option of the largest segment: its number, and where the value stands in
// it (RFC 9293 section 3.2).
const (
	optionMSS         = 2
	mssOffset, mssLen = 2, 2
)

// clampRules lower the largest segment that both sides of a forwarded connection
// announce to what fits the narrower of the routes to them: a client that hears
// no ICMP still sends what fits the way to a task, and a task's segments fit the
// way to the client. They hold in the table of either family.
func clampRules(t ingress.Table) []rule {
	var rules []rule
	for _, link := range []string{t.Ingress.Link, t.Gateway.Bridge} {
		if link == "" {
			continue
		}
		rules = append(rules,
			rule{"segments into " + link + ": as large as the way takes", join(outLink(expr.CmpOpEq, link), clamp())},
			rule{"segments out of " + link + ": as large as the way takes", join(inLink(link), clamp())})
	}
	return rules
}

func clamp() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{flagSYN}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: optionMSS, Offset: mssOffset, Len: mssLen, Op: expr.ExthdrOpTcpopt},
	}
}
