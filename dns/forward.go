package dns

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft"
)

// errBusy: too many external questions are under way.
var errBusy = errors.New("too many external questions under way")

// forwarder asks the host's resolvers. Its methods are safe for concurrent
// use and start no goroutine.
type forwarder struct {
	cfg   Config
	up    upstreams
	cache cache
	slots chan struct{} // one token per question under way
	stats *counters
	noted quiet // that external names fail

	// mu guards flights.
	mu      sync.Mutex
	flights map[question]*flight
}

// flight is one question that several askers wait for. done is closed by the
// asker that runs it, after msg and err are set.
type flight struct {
	done chan struct{}
	msg  *miekg.Msg
	err  error
}

func newForwarder(cfg Config, stats *counters) *forwarder {
	return &forwarder{
		cfg:     cfg,
		up:      upstreams{path: cfg.ResolvConf, exclude: cfg.Exclude, failed: map[upstream]time.Time{}},
		cache:   cache{max: cfg.CacheEntries, entries: map[question]cached{}},
		slots:   make(chan struct{}, cfg.MaxForwards),
		stats:   stats,
		flights: map[question]*flight{},
	}
}

// forward answers req from the cache or an upstream of the host, or of the task's
// own; SERVFAIL when none answers within Config.Timeout. It never fails to return
// an answer.
func (f *forwarder) forward(ctx context.Context, own nameservers, req *miekg.Msg) *miekg.Msg {
	f.stats.forwarded.Add(1)
	ctx, cancel := context.WithTimeout(ctx, f.cfg.Timeout)
	defer cancel()
	now := time.Now()
	k := questionOf(req)
	k.servers = own.key
	servers, gen, err := f.up.current(now, own)
	if err == nil {
		if msg, age, hit := f.cache.get(k, now, gen); hit {
			f.stats.cacheHits.Add(1)
			return adapt(req, msg, age)
		}
	}
	var msg *miekg.Msg
	if err == nil {
		msg, err = f.share(ctx, k, func() (*miekg.Msg, error) { return f.ask(ctx, k, req, f.ways(own, servers), gen) })
	}
	if err != nil {
		f.note(ctx, err)
		f.stats.servFail.Add(1)
		resp := reply(req)
		resp.Rcode = miekg.RcodeServerFailure
		return resp
	}
	return adapt(req, msg.Copy(), 0)
}

// note logs that external names fail, without a line per question.
func (f *forwarder) note(ctx context.Context, err error) {
	if !errors.Is(ctx.Err(), context.Canceled) && f.noted.due(time.Now()) {
		f.cfg.Log.Warn("external names cannot be resolved", weft.KeyErr, err)
	}
}

// share runs fn once for all askers of k at the same time. When the asker that
// runs it is cancelled (its task ended), another one takes over.
func (f *forwarder) share(ctx context.Context, k question, fn func() (*miekg.Msg, error)) (*miekg.Msg, error) {
	for {
		f.mu.Lock()
		fl, running := f.flights[k]
		if !running {
			fl = &flight{done: make(chan struct{})}
			f.flights[k] = fl
		}
		f.mu.Unlock()
		if !running {
			fl.msg, fl.err = fn()
			f.mu.Lock()
			delete(f.flights, k)
			f.mu.Unlock()
			close(fl.done)
			return fl.msg, fl.err
		}
		select {
		case <-fl.done:
			if !errors.Is(fl.err, context.Canceled) {
				return fl.msg, fl.err
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// way is how an upstream is asked.
type way struct {
	upstream
	dial Dial
}

// ways are how the servers are asked for a task: near ones from where it is.
func (f *forwarder) ways(own nameservers, servers []upstream) []way {
	out := make([]way, len(servers))
	for i, s := range servers {
		out[i] = way{s, f.cfg.Dial}
		if s.isNear() {
			out[i].dial = own.dial
		}
	}
	return out
}

// ask tries the servers in turn until one gives a usable answer.
func (f *forwarder) ask(ctx context.Context, k question, req *miekg.Msg, servers []way, gen uint64) (*miekg.Msg, error) {
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	default:
		f.stats.refused.Add(1)
		return nil, errBusy
	}
	var last, part *miekg.Msg // what to give for want of better
	var errs []error
	for _, s := range servers {
		msg, err := f.try(ctx, k, req, s)
		isAnswer := msg != nil && (msg.Rcode == miekg.RcodeSuccess || msg.Rcode == miekg.RcodeNameError)
		if err == nil && isAnswer {
			f.up.succeed(s.upstream)
			f.cache.put(k, msg, time.Now(), gen)
			return msg, nil
		}
		if isAnswer && part == nil {
			part = msg // the next may be able to tell the rest
		}
		if ctx.Err() != nil && err != nil {
			if part != nil && !errors.Is(ctx.Err(), context.Canceled) {
				return part, nil
			}
			return nil, errors.Join(append(errs, err, ctx.Err())...)
		}
		f.stats.upstream.Add(1)
		if err != nil {
			f.up.fail(s.upstream, time.Now())
			errs = append(errs, err)
		} else {
			last = msg // an honest SERVFAIL or REFUSED; the next may know better
		}
	}
	switch {
	case part != nil:
		return part, nil
	case last != nil:
		return last, nil
	}
	return nil, errors.Join(errs...)
}

// try asks one server, by UDP and, if the answer is cut off, by TCP. One that does not
// know EDNS says so by an error (RFC 6891 section 7) and is asked once more without. With
// an error comes the part of the answer that was not cut off, if there is one.
func (f *forwarder) try(ctx context.Context, k question, req *miekg.Msg, server way) (*miekg.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, f.cfg.TryTimeout)
	defer cancel()
	q := new(miekg.Msg)
	q.SetQuestion(req.Question[0].Name, req.Question[0].Qtype)
	q.RecursionDesired, q.CheckingDisabled, q.AuthenticatedData = k.rd, k.cd, req.AuthenticatedData
	q.SetEdns0(ednsSize, k.do)
	msg, err := exchange(ctx, "udp", server, q)
	if err == nil && refusesEDNS(msg) {
		q.Id, q.Extra = miekg.Id(), nil
		msg, err = exchange(ctx, "udp", server, q)
	}
	if err == nil && msg.Truncated {
		part := msg
		if msg, err = exchange(ctx, "tcp", server, q); err != nil {
			msg = part
		}
	}
	if err != nil {
		return msg, fmt.Errorf("ask nameserver %v for %s: %w", server.addr, q.Question[0].Name, err)
	}
	return msg, nil
}

// exchange sends q on a socket of its own, so that every question has a fresh
// source port, and waits for the answer that fits it. Others that arrive on
// the socket are forged or late and are passed over, however short.
func exchange(ctx context.Context, network string, server way, q *miekg.Msg) (*miekg.Msg, error) {
	raw, err := server.dial(ctx, network, server.addr.String())
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	unhook := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	defer unhook()
	conn := &miekg.Conn{Conn: raw, UDPSize: ednsSize}
	if err := conn.WriteMsg(q); err != nil {
		return nil, err
	}
	for {
		msg, err := conn.ReadMsg()
		if err == nil {
			err = wantData(msg)
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			// A datagram shorter than a header is bytes that are bad, too; with no
			// message otherwise the socket failed.
			if network == "tcp" || msg == nil && !errors.Is(err, miekg.ErrShortRead) {
				return nil, err
			}
			continue
		}
		if fits(q, msg) {
			return msg, nil
		}
		if network == "tcp" {
			return nil, errors.New("the answer does not fit the question")
		}
	}
}

// wantData refuses records without data. miekg takes them for those of an update (RFC 2136
// section 2.5), and writes a known type's fields all the same, as far as they go: the
// client would get a message that it cannot read. A list of prefixes (APL, RFC 3123) may be
// empty.
func wantData(msg *miekg.Msg) error {
	for _, section := range [][]miekg.RR{msg.Answer, msg.Ns, msg.Extra} {
		for _, rr := range section {
			switch rr.(type) {
			case *miekg.OPT, *miekg.APL, *miekg.NULL, *miekg.RFC3597:
				continue
			}
			if h := rr.Header(); h.Rdlength == 0 {
				return fmt.Errorf("record %s of %s has no data", miekg.TypeToString[h.Rrtype], h.Name)
			}
		}
	}
	return nil
}

// refusesEDNS reports whether msg may be what a server says that has never heard of OPT.
func refusesEDNS(msg *miekg.Msg) bool {
	return msg.Rcode == miekg.RcodeFormatError || msg.Rcode == miekg.RcodeNotImplemented
}

// fits reports whether msg answers q. A server that could not read the question may leave
// it out.
func fits(q, msg *miekg.Msg) bool {
	if !msg.Response || msg.Id != q.Id {
		return false
	}
	if len(msg.Question) == 0 && refusesEDNS(msg) {
		return true
	}
	if len(msg.Question) != 1 {
		return false
	}
	a, b := q.Question[0], msg.Question[0]
	return fold(a.Name) == fold(b.Name) && a.Qtype == b.Qtype && a.Qclass == b.Qclass
}

// adapt makes the answer to req of what an upstream said to another: own id, the asker's
// spelling of the name, our EDNS, and TTLs less age.
func adapt(req, resp *miekg.Msg, age time.Duration) *miekg.Msg {
	resp.Id, resp.Question = req.Id, req.Question
	resp.RecursionDesired, resp.RecursionAvailable = req.RecursionDesired, true
	resp.Authoritative, resp.Compress = false, true
	extra := resp.Extra[:0]
	for _, rr := range resp.Extra {
		if rr.Header().Rrtype != miekg.TypeOPT {
			extra = append(extra, rr)
		}
	}
	resp.Extra = extra
	if opt := req.IsEdns0(); opt != nil {
		resp.SetEdns0(maxUDPAnswer, opt.Do())
	}
	for _, section := range [][]miekg.RR{resp.Answer, resp.Ns, resp.Extra} {
		for _, rr := range section {
			if h := rr.Header(); h.Rrtype != miekg.TypeOPT {
				h.Ttl -= min(h.Ttl, uint32(age/time.Second))
			}
		}
	}
	return resp
}
