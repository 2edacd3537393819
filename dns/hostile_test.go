package dns

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft"
)

// hostile is a socket to a nameserver that answers each question with the same bytes,
// under the id of the question: without it they would be passed over as forged.
type hostile struct {
	net.PacketConn // nil: that there is one tells miekg of datagrams
	reply          []byte
	id             [2]byte
	has            bool // an answer waits
}

func (h *hostile) Write(b []byte) (int, error) {
	h.has = copy(h.id[:], b) == 2
	var q miekg.Msg
	if len(h.reply) > ednsSize && q.Unpack(b) == nil { // has to be asked for on TCP
		m := new(miekg.Msg).SetReply(&q)
		m.Truncated = true
		h.reply, _ = m.Pack()
	}
	return len(b), nil
}

func (h *hostile) Read(b []byte) (int, error) {
	if !h.has {
		return 0, io.EOF
	}
	h.has = false
	n := copy(b, h.reply)
	copy(b[:n], h.id[:])
	return n, nil
}

func (h *hostile) Close() error                     { return nil }
func (h *hostile) LocalAddr() net.Addr              { return nil }
func (h *hostile) RemoteAddr() net.Addr             { return nil }
func (h *hostile) SetDeadline(time.Time) error      { return nil }
func (h *hostile) SetReadDeadline(time.Time) error  { return nil }
func (h *hostile) SetWriteDeadline(time.Time) error { return nil }

// hostileTCP is the same with the length of each message before it.
type hostileTCP struct {
	net.Conn
	inner *hostile
	out   bytes.Buffer
}

func (h *hostileTCP) Write(b []byte) (int, error) {
	if len(b) > 2 {
		reply := slices.Clone(h.inner.reply)
		copy(reply, b[2:4])
		binary.Write(&h.out, binary.BigEndian, uint16(len(reply)))
		h.out.Write(reply)
	}
	return len(b), nil
}

func (h *hostileTCP) Read(b []byte) (int, error)      { return h.out.Read(b) }
func (h *hostileTCP) Close() error                    { return nil }
func (h *hostileTCP) SetDeadline(time.Time) error     { return nil }
func (h *hostileTCP) SetReadDeadline(time.Time) error { return nil }

// hostileSeeds are what bad nameservers say, and good ones.
func hostileSeeds(f *testing.F, name string) (out [][]byte) {
	q := new(miekg.Msg)
	q.SetQuestion(name, miekg.TypeA)
	add := func(change func(m *miekg.Msg)) {
		m := good(q, "")
		change(m)
		b, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		out = append(out, b)
	}
	rr := func(text string) miekg.RR {
		r, err := miekg.NewRR(text)
		if err != nil {
			f.Fatal(err)
		}
		return r
	}
	add(func(*miekg.Msg) {})
	add(func(m *miekg.Msg) { m.Truncated = true })
	add(func(m *miekg.Msg) { m.Question[0].Name = strings.ToLower(name) })
	add(func(m *miekg.Msg) { m.Rcode = miekg.RcodeRefused })
	add(func(m *miekg.Msg) { m.Answer = []miekg.RR{rr(name + " 60 CNAME " + name)} })
	add(func(m *miekg.Msg) {
		m.Rcode, m.Answer = miekg.RcodeNameError, nil
		m.Ns = []miekg.RR{rr("com. 4294967295 SOA a. b. 1 2 3 4 4294967295")}
	})
	add(func(m *miekg.Msg) {
		m.SetEdns0(65535, true)
		m.Extra = append(m.Extra, m.Extra[0], rr("x. 1 A 192.0.2.1"))
		m.Answer = append(m.Answer, m.Extra[0])
	})
	add(func(m *miekg.Msg) {
		for range 70 {
			m.Answer = append(m.Answer, rr(name+" 0 TXT "+strings.Repeat("x", 250)))
		}
	})
	add(func(m *miekg.Msg) {
		for range 4 {
			m.Answer = append(m.Answer, rr(name+" 9 TXT "+strings.Repeat("x", 250)))
		}
	})
	add(func(m *miekg.Msg) {
		m.Extra = []miekg.RR{rr("x. 4294967295 HTTPS 1 . alpn=h2"), rr("x. 1 NSEC y. A TYPE65534")}
	})
	loop := slices.Clone(out[0])
	loop[headerLen] = 0xc0 // the name is a pointer to itself
	loop[headerLen+1] = headerLen
	q.Response = true
	empty, err := q.Pack()
	if err != nil {
		f.Fatal(err)
	}
	empty[9] = 1 // a record of authority: an SOA of the name asked for, without data
	empty = append(empty, 0xc0, headerLen, 0, byte(miekg.TypeSOA), 0, miekg.ClassINET, 0, 0, 0, 0, 0, 0)
	return append(out, empty, loop, out[0][:len(out[0])-3], append(slices.Clone(out[0]), 1, 2, 3), nil, []byte{1, 2, 3})
}

// FuzzUpstream: whatever a nameserver says, the client has an answer that can be read,
// is of its question, and is not bigger than it takes; also from the cache.
func FuzzUpstream(f *testing.F) {
	const name = "ExAmple.cOm."
	for i, b := range hostileSeeds(f, name) {
		for _, size := range []uint16{0, 512, 4096} {
			f.Add(b, size, i%2 == 0)
		}
	}
	server := netip.MustParseAddr("198.51.100.1")
	f.Fuzz(func(t *testing.T, reply []byte, size uint16, do bool) {
		if len(reply) > miekg.MaxMsgSize {
			return
		}
		s, err := New(Config{Log: slog.New(slog.DiscardHandler), ResolvConf: "/dev/null", Dial: func(_ context.Context, network, _ string) (net.Conn, error) {
			h := &hostile{reply: reply}
			if network == "tcp" {
				return &hostileTCP{inner: h}, nil
			}
			return h, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		ss := &session{s: s, view: compile(&View{Nameservers: []netip.Addr{server}}), slots: make(chan struct{}, 1)}
		req := new(miekg.Msg)
		req.SetQuestion(name, miekg.TypeA)
		if size > 0 {
			req.SetEdns0(size, do)
		}
		packet, err := req.Pack()
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second may be from the cache
			var got []byte
			if now := ss.answerPacket(t.Context(), packet, make([]byte, ednsSize), func(b []byte) { got = b }); now != nil {
				t.Fatal("not asked outside")
			}
			ss.wg.Wait()
			wantAnswer(t, req, got, max(min(int(size), maxUDPAnswer), minUDPSize))
			wantAnswer(t, req, ss.pack(req, s.fwd.forward(t.Context(), ss.view.servers, req), miekg.MaxMsgSize, nil), miekg.MaxMsgSize)
		}
		for _, e := range s.fwd.cache.entries {
			if keep := e.expires.Sub(e.stored); keep <= 0 || keep > maxCacheTTL || len(e.packet) > maxCacheSize || cap(e.packet) > 2*len(e.packet) {
				t.Errorf("%d bytes are kept in %d for %v", len(e.packet), cap(e.packet), keep)
			}
		}
	})
}

func wantAnswer(t *testing.T, req *miekg.Msg, b []byte, limit int) {
	t.Helper()
	var m miekg.Msg
	if err := m.Unpack(b); err != nil || len(b) > limit {
		t.Fatalf("answer of %d bytes, limit %d: %v", len(b), limit, err)
	}
	if m.Id != req.Id || !m.Response || len(m.Question) != 1 || m.Question[0] != req.Question[0] {
		t.Fatalf("the answer is of another question: %v", &m)
	}
	if (m.IsEdns0() != nil) != (req.IsEdns0() != nil) {
		t.Fatalf("EDNS that was not asked for, or none: %v", &m)
	}
}

// FuzzRespond feeds the whole packet path with bytes from the network.
func FuzzRespond(f *testing.F) {
	for _, name := range []string{
		"web.", "tasks.web.", "4.web.", "example.com.", "2.0.1.10.in-addr.arpa.", "1.1.10.in-addr.arpa.",
		"1.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.D.F.ip6.arpa.", "1.0.0.0.0.0.d.f.ip6.arpa.", "10.+1.fg.ip6.arpa.",
		"2.0.0.0.1.0.a.0.f.f.f.f.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.ip6.arpa.",
		"_http._tcp.web.", "_80._tcp.shared.blue.", "_80._tcp.1.web.", "_tcp.web.", "__._._.web.",
	} {
		for _, qtype := range []uint16{miekg.TypeA, miekg.TypePTR, miekg.TypeSRV, miekg.TypeANY} {
			m := new(miekg.Msg)
			m.SetQuestion(name, qtype)
			m.SetEdns0(1232, true)
			b, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
			f.Add(b[:len(b)-3])
		}
	}
	asks := func(name ...byte) []byte { // a question whose name is these bytes
		return append(append([]byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, name...), 0, 1, 0, 1)
	}
	f.Add(asks(0xc0, headerLen))                           // a name that is itself
	f.Add(asks(1, 'a', 0xc0, headerLen))                   // and goes on for ever
	f.Add(asks(0xc0, headerLen+2, 0xc0, headerLen))        // two that are each other
	f.Add(asks(0xc0, 0xff))                                // past the end
	f.Add(asks(3, 'w', 'e', 'b', 0xc0, headerLen+4, 0xc0)) // half a pointer
	snap := NewSnapshot(testRecords())
	s := &session{s: &Server{}}
	f.Fuzz(func(t *testing.T, b []byte) {
		req, ok := parse(b)
		if !ok {
			return
		}
		resp, forward := respond(snap, compile(&View{Networks: []weft.ID{blue}}), req, 3)
		if forward {
			questionOf(req)
			resp = adapt(req, reply(req), 0)
		}
		out := s.pack(req, resp, udpLimit(req), make([]byte, maxUDPAnswer))
		if len(out) == 0 || len(out) > udpLimit(req) {
			t.Fatalf("answer of %d bytes, limit %d", len(out), udpLimit(req))
		}
		var back miekg.Msg
		if err := back.Unpack(out); err != nil || back.Id != req.Id || !back.Response {
			t.Fatalf("answer cannot be read: %v", err)
		}
	})
}

// FuzzResolvConf: of any file come few nameservers, none twice and none that is
// excluded, and domains that are some; written again they are the same.
func FuzzResolvConf(f *testing.F) {
	f.Add("nameserver 127.0.0.11\nnameserver ::1\nnameserver fe80::1%eth0\nnameserver ::ffff:10.0.0.1\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nsearch Lan example.com. .\noptions ndots:1")
	f.Add("domain a b\nsearch\nsearch x..y -z\nnameserver 1.1.1.1 ; two\r\nnameserver\t8.8.8.8\n#nameserver 9.9.9.9\nnameserver 1\nnameserver ::ffff:127.0.0.11")
	f.Add(strings.Repeat("x", bufio.MaxScanTokenSize+1))
	exclude := addrs("127.0.0.11")
	f.Fuzz(func(t *testing.T, in string) {
		list, search, err := parseResolvConf(strings.NewReader(in), exclude)
		if err != nil && !errors.Is(err, bufio.ErrTooLong) {
			t.Fatal(err)
		}
		var again strings.Builder
		seen := map[netip.Addr]bool{}
		for _, u := range list {
			a := u.addr.Addr()
			if !a.IsValid() || a.Is4In6() || u.addr.Port() != 53 || u.isNear() || slices.Contains(exclude, a) || seen[a] {
				t.Errorf("nameserver %v of %q", u, in)
			}
			seen[a] = true
			again.WriteString("nameserver " + a.String() + "\n")
		}
		if len(list) > maxUpstreams {
			t.Errorf("%d nameservers", len(list))
		}
		for i, d := range search {
			if weft.CheckDomain(d) != nil || slices.Contains(search[:i], d) {
				t.Errorf("search domain %q of %q", d, in)
			}
		}
		again.WriteString("search " + strings.Join(search, " ") + "\n")
		list2, search2, err := parseResolvConf(strings.NewReader(again.String()), nil)
		if err != nil || !slices.Equal(list, list2) || !slices.Equal(search, search2) {
			t.Errorf("%q is %v, %q, written again %v, %q, %v", in, list, search, list2, search2, err)
		}
	})
}

// TestSpellingIsKept: who asks in letters of any case finds them in the answer (RFC
// 4343 section 4.1, and clients that guard against forgers by them).
func TestSpellingIsKept(t *testing.T) {
	snap, v := NewSnapshot(testRecords()), testView()
	up := newStub(t, good)
	r := newRig(t, Config{}, map[netip.AddrPort]*stub{ns1: up})
	ways := map[string]func(packet []byte) []byte{
		"quick": func(p []byte) []byte { return quick(snap, v, p, 0) },
		"thorough": func(p []byte) []byte {
			_, out := thorough(snap, v, p, 0)
			return out
		},
		"served": func(p []byte) []byte {
			c, err := net.Dial("udp", r.udp)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			out := make([]byte, maxUDPAnswer)
			c.Write(p)
			n, err := c.Read(out)
			if err != nil {
				t.Fatal(err)
			}
			return out[:n]
		},
	}
	for _, c := range []struct {
		name, ways string
		qtype      uint16
	}{
		{"wEb.", "quick thorough served", miekg.TypeA},
		{"TASKS.Web.bLUE.", "quick thorough served", miekg.TypeA},
		{"NoNsense.", "quick thorough served", miekg.TypeAAAA},
		{"tYpo.Front.", "quick thorough", miekg.TypeA},
		{"_hTTP._tCp.Web.", "thorough served", miekg.TypeSRV},
		{"wEb.", "thorough served", miekg.TypeANY},
		{"2.0.1.10.iN-aDDr.aRpa.", "thorough served", miekg.TypePTR},
		{"eXample.Com.", "served", miekg.TypeA},
		{"ExaMPLE.cOM.", "served", miekg.TypeA}, // from the cache
	} {
		m := new(miekg.Msg)
		m.SetQuestion(c.name, c.qtype)
		packet, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		for _, way := range strings.Fields(c.ways) {
			got := ways[way](packet)
			if len(got) < len(packet) || !bytes.Equal(got[headerLen:len(packet)], packet[headerLen:]) {
				t.Errorf("%s, %s: the question is %q, comes back as %q", c.name, way, packet[headerLen:], got[min(headerLen, len(got)):min(len(packet), len(got))])
			}
		}
	}
	if n := up.asked.Load(); n != 1 {
		t.Errorf("upstream was asked %d times, want once", n)
	}
}

// TestCacheIsBounded: more names than it holds push others out, and the last are there.
func TestCacheIsBounded(t *testing.T) {
	const room, names = 8, 50
	up := newStub(t, good)
	r := newRig(t, Config{CacheEntries: room, TryTimeout: 10 * time.Second, Timeout: 10 * time.Second}, map[netip.AddrPort]*stub{ns1: up})
	last := ""
	for i := range names {
		last = string(rune('a'+i/26)) + string(rune('a'+i%26)) + ".example.com."
		r.want("udp", last, "NOERROR 192.0.2.7")
		c := &r.s.fwd.cache
		c.mu.Lock()
		n := len(c.entries)
		c.mu.Unlock()
		if n != min(i+1, room) {
			t.Fatalf("%d answers are kept after %d names, want %d", n, i+1, min(i+1, room))
		}
	}
	r.want("udp", last, "NOERROR 192.0.2.7")
	if n := up.asked.Load(); n != names {
		t.Errorf("upstream was asked %d times, want %d", n, names)
	}
}

// FuzzFrames: of any stream come the messages that are in it, whole, however it is cut, and
// nothing once it is out of step.
func FuzzFrames(f *testing.F) {
	f.Add([]byte("\x00\x02ab\x00\x00\x00\x01c"))
	f.Add([]byte{0, 5, 'h', 'e', 'l'})
	f.Add([]byte{0})
	f.Add(binary.BigEndian.AppendUint16(nil, maxTCPQuery+1))
	f.Add(append(binary.BigEndian.AppendUint16(nil, maxTCPQuery), make([]byte, maxTCPQuery)...))
	f.Fuzz(func(t *testing.T, in []byte) {
		whole, cut := bytes.NewReader(in), bufio.NewReaderSize(iotest.OneByteReader(bytes.NewReader(in)), 16)
		for rest := in; ; {
			got, err := readFrame(whole)
			again, errAgain := readFrame(cut)
			if err != errAgain || !bytes.Equal(got, again) {
				t.Fatalf("%x, %v, byte by byte %x, %v", got, err, again, errAgain)
			}
			want := error(nil)
			n := 0
			switch {
			case len(rest) == 0:
				want = io.EOF
			case len(rest) == 1:
				want = io.ErrUnexpectedEOF
			default:
				n = int(rest[0])<<8 | int(rest[1])
				switch {
				case n > maxTCPQuery:
					want = errLongFrame
				case n > 0 && len(rest) == 2:
					want = io.EOF
				case n > len(rest)-2:
					want = io.ErrUnexpectedEOF
				}
			}
			if err != want {
				t.Fatalf("%x: %v, want %v", rest, err, want)
			}
			if err != nil {
				return
			}
			if !bytes.Equal(got, rest[2:2+n]) {
				t.Fatalf("%x of %x", got, rest)
			}
			rest = rest[2+n:]
		}
	})
}

// TestCacheIsSmall: answers of many small records take the room that they have as packets.
func TestCacheIsSmall(t *testing.T) {
	s, err := New(Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	c := &s.fwd.cache
	m := new(miekg.Msg).SetQuestion("a.", miekg.TypeA)
	for m.Len() < maxCacheSize-17 {
		m.Answer = append(m.Answer, &miekg.A{Hdr: header("a.", miekg.TypeA, 60), A: []byte{192, 0, 2, 1}})
	}
	packet, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	heap := func() uint64 {
		runtime.GC()
		runtime.GC() // what finalizers held
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, now := heap(), time.Now()
	const names = 1000
	for i := range names {
		msg := new(miekg.Msg) // as one that has just come
		if err := msg.Unpack(packet); err != nil {
			t.Fatal(err)
		}
		c.put(question{name: fmt.Sprintf("n%d", i)}, msg, now, 0)
	}
	after := heap()
	if got, _, ok := c.get(question{name: "n7"}, now, 0); !ok || len(got.Answer) != len(m.Answer) || len(c.entries) != names {
		t.Fatalf("%d answers are kept, %v", len(c.entries), ok)
	}
	if each := int(after-before) / names; after < before || each > maxCacheSize+512 {
		t.Errorf("an answer of %d records takes %d bytes, want no more than %d", len(m.Answer), each, maxCacheSize+512)
	}
}
