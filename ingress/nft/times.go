package nft

import (
	"slices"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// How long connection tracking knows a connection to a published port of which
// nothing is heard. The kernel forgets one of which one half is closed after 60 s,
// and whatever comes of the other half later finds no way back.
const (
	// closingTimeout: as endingTimeout, what the other half brings may take 300 s
	// to begin.
	closingTimeout = 360 * time.Second
	// openTimeout is the kernel's default (nf_conntrack_tcp_timeout_established),
	// whatever the host has made of it.
	openTimeout = 5 * 24 * time.Hour
)

// times are a policy of connection tracking for TCP, by state; they are an object
// of the table, which rules give to a connection's first packet. If the table is
// replaced connections go on with the host's own.
type times struct {
	name   string
	family *family
	states map[uint16]time.Duration
}

// lasting are those of published ports. What is not ours is as the kernel has it
// (tcp_timeouts in nf_conntrack_proto_tcp.c), since a policy has all states.
func (f *family) lasting() times {
	return times{"lasting", f, map[uint16]time.Duration{
		expr.CtStateTCPSYNSENT: 120 * time.Second, expr.CtStateTCPSYNRECV: 60 * time.Second, expr.CtStateTCPESTABLISHED: openTimeout,
		expr.CtStateTCPFINWAIT: closingTimeout, expr.CtStateTCPCLOSEWAIT: closingTimeout, expr.CtStateTCPLASTACK: 30 * time.Second,
		expr.CtStateTCPTIMEWAIT: 120 * time.Second, expr.CtStateTCPCLOSE: 10 * time.Second, expr.CtStateTCPSYNSENT2: 120 * time.Second,
		expr.CtStateTCPRETRANS: 300 * time.Second, expr.CtStateTCPUNACK: 300 * time.Second,
	}}
}

// lastingRules give new connections to published ports these times. They stand in a
// chain of address translation, which new connections alone meet.
func lastingRules(links ...string) []rule {
	var rules []rule
	for _, l := range links {
		if l == "" {
			continue
		}
		rules = append(rules, rule{"port of a task, by " + l + ": a connection that lasts", join(
			outLink(expr.CmpOpEq, l), translated(expr.CmpOpNeq), []expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
				&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: "lasting"},
			})})
	}
	return rules
}

// withoutTimes is the ruleset for kernels that lack such policies.
func (r ruleset) withoutTimes() ruleset {
	r.times, r.chains = nil, slices.Clone(r.chains)
	for i, c := range r.chains {
		r.chains[i].rules = slices.DeleteFunc(slices.Clone(c.rules), func(ru rule) bool {
			return slices.ContainsFunc(ru.exprs, func(e expr.Any) bool { _, ok := e.(*expr.Objref); return ok })
		})
	}
	return r
}

// hurried is the ruleset with all times divided.
func (r ruleset) hurried(by int) ruleset {
	if by <= 1 {
		return r
	}
	d := time.Duration(by)
	r.sets, r.times, r.chains = slices.Clone(r.sets), slices.Clone(r.times), slices.Clone(r.chains)
	for i := range r.sets {
		r.sets[i].timeout /= d
	}
	for i, t := range r.times {
		states := map[uint16]time.Duration{}
		for state, s := range t.states {
			states[state] = s / d
		}
		r.times[i].states = states
	}
	for i, c := range r.chains {
		r.chains[i].rules = slices.Clone(c.rules)
		for k, ru := range c.rules {
			exprs := slices.Clone(ru.exprs)
			for n, e := range exprs {
				if ds, ok := e.(*expr.Dynset); ok {
					short := *ds
					short.Timeout /= d
					exprs[n] = &short
				}
			}
			r.chains[i].rules[k].exprs = exprs
		}
	}
	return r
}
