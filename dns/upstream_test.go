package dns

import (
	"net/netip"
	"testing"
	"time"

	miekg "github.com/miekg/dns"
)

// TestUpstreamsWithoutEDNS: a nameserver that refuses questions with OPT is asked without,
// each time, and is asked once more only.
func TestUpstreamsWithoutEDNS(t *testing.T) {
	old := func(rcode int, change func(*miekg.Msg)) func(*miekg.Msg, string) *miekg.Msg {
		return func(q *miekg.Msg, network string) *miekg.Msg {
			if q.IsEdns0() == nil {
				return good(q, network)
			}
			m := new(miekg.Msg).SetRcode(q, rcode)
			change(m)
			return m
		}
	}
	whole := func(*miekg.Msg) {}
	headerOnly := func(m *miekg.Msg) { m.Question = nil }
	never := func(rcode int) func(*miekg.Msg, string) *miekg.Msg {
		return func(q *miekg.Msg, _ string) *miekg.Msg { return new(miekg.Msg).SetRcode(q, rcode) }
	}
	for _, c := range []struct {
		name     string
		upstream func(*miekg.Msg, string) *miekg.Msg
		want     string
		asked    int64 // by two names
	}{
		{"FORMERR", old(miekg.RcodeFormatError, whole), "NOERROR 192.0.2.7", 4},
		{"FORMERR without the question", old(miekg.RcodeFormatError, headerOnly), "NOERROR 192.0.2.7", 4},
		{"NOTIMP", old(miekg.RcodeNotImplemented, whole), "NOERROR 192.0.2.7", 4},
		{"NOTIMP without the question", old(miekg.RcodeNotImplemented, headerOnly), "NOERROR 192.0.2.7", 4},
		{"whatever is asked", never(miekg.RcodeFormatError), "FORMERR", 4},
		{"cut off then", func(q *miekg.Msg, network string) *miekg.Msg {
			if network == "tcp" && q.IsEdns0() != nil {
				return new(miekg.Msg).SetRcode(q, miekg.RcodeFormatError)
			}
			m := old(miekg.RcodeFormatError, headerOnly)(q, network)
			m.Truncated = network == "udp" && q.IsEdns0() == nil
			return m
		}, "NOERROR 192.0.2.7", 6},
		{"another error", never(miekg.RcodeServerFailure), "SERVFAIL", 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			up := newStub(t, c.upstream)
			r := newRig(t, Config{TryTimeout: 10 * time.Second, Timeout: 10 * time.Second}, map[netip.AddrPort]*stub{ns1: up})
			for _, name := range []string{"example.com.", "example.net."} {
				r.want("udp", name, c.want)
			}
			if n := up.asked.Load(); n != c.asked {
				t.Errorf("asked %d times for two names, want %d", n, c.asked)
			}
		})
	}
}

// TestNoQuestionNoAnswer: only a server that could not read the question may leave it out.
func TestNoQuestionNoAnswer(t *testing.T) {
	q := new(miekg.Msg).SetQuestion("example.com.", miekg.TypeA)
	for rcode := range 16 {
		m := new(miekg.Msg).SetRcode(q, rcode)
		m.Question = nil
		if want := rcode == miekg.RcodeFormatError || rcode == miekg.RcodeNotImplemented; fits(q, m) != want {
			t.Errorf("%s without a question fits: %v", miekg.RcodeToString[rcode], !want)
		}
		m.Id++
		if fits(q, m) {
			t.Errorf("%s with another id fits", miekg.RcodeToString[rcode])
		}
	}
}
