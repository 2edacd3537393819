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

// TestPartOfAnAnswer: what of an answer was not cut off is given, and said to be a part, where
// no nameserver tells the rest.
func TestPartOfAnAnswer(t *testing.T) {
	cut := func(tcp func(*miekg.Msg, string) *miekg.Msg) func(*miekg.Msg, string) *miekg.Msg {
		return func(q *miekg.Msg, network string) *miekg.Msg {
			if network == "tcp" {
				return tcp(q, network)
			}
			m := good(q, network)
			m.Truncated = true
			return m
		}
	}
	refuses := func(q *miekg.Msg, _ string) *miekg.Msg { return new(miekg.Msg).SetRcode(q, miekg.RcodeRefused) }
	for _, c := range []struct {
		name          string
		first, second func(*miekg.Msg, string) *miekg.Msg // nil = there is none
		timeout       time.Duration                       // 0 = the first has no TCP
		want          string
		isPart        bool
	}{
		{"nobody else", cut(silent), nil, 0, "NOERROR 192.0.2.7", true},
		{"the next refuses", cut(silent), refuses, 0, "NOERROR 192.0.2.7", true},
		{"the next is not asked in time", cut(silent), good, time.Second, "NOERROR 192.0.2.7", true},
		{"the next knows all", cut(silent), says(9, false), 0, "NOERROR 192.0.2.9", false},
		{"refused on TCP", cut(refuses), nil, 10 * time.Second, "REFUSED", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			first := newStub(t, c.first)
			stubs := map[netip.AddrPort]*stub{ns1: first}
			if c.second != nil {
				stubs[ns2] = newStub(t, c.second)
			}
			if c.timeout == 0 {
				first.tcp.Close()
			}
			r := newRig(t, Config{Timeout: c.timeout, TryTimeout: time.Minute}, stubs)
			for _, network := range []string{"udp", "tcp"} {
				m := r.ask(network, network+".example.com.")
				if got := show(m, false); got != c.want || m.Truncated != c.isPart {
					t.Errorf("%s: %q, a part: %v, want %q, %v", network, got, m.Truncated, c.want, c.isPart)
				}
			}
			r.s.fwd.cache.mu.Lock()
			defer r.s.fwd.cache.mu.Unlock()
			if n := len(r.s.fwd.cache.entries); c.isPart && n != 0 {
				t.Errorf("%d parts are kept", n)
			}
		})
	}
}
