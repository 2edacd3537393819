package dns

import (
	"bytes"
	"sync"
	"time"

	miekg "github.com/miekg/dns"
)

const (
	// maxCacheTTL bounds how long an external answer is kept.
	maxCacheTTL = 5 * time.Minute
	// maxCacheSize bounds an answer that is kept, in bytes: a few hundred are
	// usual, and thousands of answers of 64 KiB would fill the memory. With
	// the default of Config.CacheEntries all of them have 16 MiB at most.
	maxCacheSize = 4096
)

// question is what makes two forwarded questions the same.
type question struct {
	name    string // folded
	qtype   uint16
	do, cd  bool
	rd      bool
	servers string // nameservers.key
}

func questionOf(req *miekg.Msg) question {
	q := req.Question[0]
	k := question{name: fold(q.Name), qtype: q.Qtype, cd: req.CheckingDisabled, rd: req.RecursionDesired}
	if opt := req.IsEdns0(); opt != nil {
		k.do = opt.Do()
	}
	return k
}

// cache keeps external answers until they expire, as packets: of those the size is
// known, where 4 KiB of small records are 30 KiB and more as a message.
type cache struct {
	max int

	// mu guards entries and gen.
	mu      sync.Mutex
	entries map[question]cached
	gen     uint64 // of the upstreams that answered
}

type cached struct {
	packet  []byte
	stored  time.Time
	expires time.Time
}

// get returns a stored answer, for the caller to write to, and its age.
func (c *cache) get(k question, now time.Time, gen uint64) (*miekg.Msg, time.Duration, bool) {
	e, ok := c.entry(k, now, gen)
	if !ok {
		return nil, 0, false
	}
	msg := new(miekg.Msg)
	if err := msg.Unpack(e.packet); err != nil {
		return nil, 0, false
	}
	return msg, now.Sub(e.stored), true
}

func (c *cache) entry(k question, now time.Time, gen uint64) (cached, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if gen != c.gen { // other resolvers may tell another truth
		clear(c.entries)
		c.gen = gen
	}
	e, ok := c.entries[k]
	if ok && !now.Before(e.expires) {
		delete(c.entries, k)
		return cached{}, false
	}
	return e, ok
}

// put keeps msg for as long as it may be, if it may.
func (c *cache) put(k question, msg *miekg.Msg, now time.Time, gen uint64) {
	ttl, ok := cacheTTL(msg)
	if !ok {
		return
	}
	short := *msg
	short.Compress = true
	packet, err := short.Pack()
	if err != nil { // nor can it be told to the client
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if gen != c.gen {
		return
	}
	for old := range c.entries { // map order is random enough a victim
		if len(c.entries) < c.max {
			break
		}
		delete(c.entries, old)
	}
	c.entries[k] = cached{packet: bytes.Clone(packet), stored: now, expires: now.Add(ttl)}
}

// cacheTTL says how long msg may be kept, if at all: a name that exists by its
// smallest TTL, one that does not by its SOA (RFC 2308 section 5).
func cacheTTL(msg *miekg.Msg) (time.Duration, bool) {
	if msg.Truncated || msg.Len() > maxCacheSize || (msg.Rcode != miekg.RcodeSuccess && msg.Rcode != miekg.RcodeNameError) {
		return 0, false
	}
	ttl, found := uint32(maxCacheTTL/time.Second), false
	for _, rr := range msg.Answer {
		ttl, found = min(ttl, rr.Header().Ttl), true
	}
	if !found || msg.Rcode == miekg.RcodeNameError {
		soa := false
		for _, rr := range msg.Ns {
			if s, ok := rr.(*miekg.SOA); ok {
				ttl, soa = min(ttl, s.Hdr.Ttl, s.Minttl), true
			}
		}
		if !soa {
			return 0, false
		}
	}
	return time.Duration(ttl) * time.Second, ttl > 0
}
