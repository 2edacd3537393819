package linux

import (
	"encoding/binary"
	"errors"
	"net"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// TestBatchAnswersInOrder: more messages than go into one system call, of which
// some fail, and each has its own answer.
func TestBatchAnswersInOrder(t *testing.T) {
	h := rig(t, 1)[0]
	var s socket
	must(t, h.ns.Do(func() (err error) { s, err = openSocket(); return err })) // it stays in the namespace
	defer s.shut()
	const many = 3*batchMost + 1
	answers, err := s.ask([]*nl.NetlinkRequest{s.askLink("under0"), s.askLink("nobody")})
	must(t, err)
	under, err := answers[0].link()
	if err != nil || under.index == 0 || !under.isUp || under.master != 0 {
		t.Errorf("under0 is %+v, %v", under, err)
	}
	if _, err := answers[1].link(); !errors.Is(err, unix.ENODEV) {
		t.Errorf("a link that is not there: %v", err)
	}
	ip := func(i int) net.IP { return net.IP{10, 99, 8, byte(i)} }
	mac := func(i int) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0, byte(i)} }
	var all []write
	var reqs []*nl.NetlinkRequest
	for i := range many {
		if i%3 == 0 { // removals of what is not there
			all = append(all, write{netlink.Neigh{LinkIndex: under.index, Family: unix.AF_INET, IP: ip(i)}, true})
		} else {
			all = append(all, write{Neigh: netlink.Neigh{LinkIndex: under.index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: ip(i), HardwareAddr: mac(i)}})
		}
		reqs = append(reqs, s.askNeigh(under.index, ip(i)))
	}
	must(t, s.write(all))
	answers, err = s.ask(reqs)
	must(t, err)
	for i, a := range answers {
		n, err := a.neigh()
		if err != nil || (n == nil) != (i%3 == 0) || n != nil && (!n.IP.Equal(ip(i)) || n.HardwareAddr.String() != mac(i).String()) {
			t.Fatalf("answer %d: %+v, %v", i, n, err)
		}
	}
	// One that fails is told; those after it are made all the same.
	err = s.write([]write{
		{Neigh: netlink.Neigh{LinkIndex: 9999, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: ip(1), HardwareAddr: mac(1)}},
		{Neigh: netlink.Neigh{LinkIndex: under.index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: ip(0), HardwareAddr: mac(0)}},
	})
	if !errors.Is(err, unix.ENODEV) {
		t.Errorf("an entry of no link: %v", err)
	}
	// Answers that nobody took are not those of the next question.
	own := s.raw[unix.NETLINK_ROUTE]
	stale := s.askNeigh(under.index, ip(1))
	stale.Seq = own.Seq
	must(t, unix.Sendto(own.Socket.GetFd(), stale.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	answers, err = s.ask([]*nl.NetlinkRequest{s.askNeigh(under.index, ip(0))})
	must(t, err)
	if n, err := answers[0].neigh(); err != nil || n == nil || !n.IP.Equal(ip(0)) {
		t.Errorf("after the failure, or past a stale answer: %+v, %v", n, err)
	}
}

func TestCutMessage(t *testing.T) {
	msg := func(size uint32, body string) []byte {
		b := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body))
		binary.NativeEndian.PutUint32(b, size)
		binary.NativeEndian.PutUint16(b[4:], unix.RTM_NEWNEIGH)
		binary.NativeEndian.PutUint32(b[8:], 7)
		return append(b, body...)
	}
	for name, b := range map[string][]byte{
		"nothing":            {},
		"half a header":      msg(16, "")[:15],
		"less than a header": msg(15, "abcd"),
		"more than there is": msg(21, "abcd"),
		"far more":           msg(1<<32-1, "abcd"),
		"none":               msg(0, "abcd"),
	} {
		if _, _, err := cutMessage(b); !errors.Is(err, unix.EBADMSG) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The second begins at the next multiple of four; the last needs no filling.
	b := append(append(msg(19, "abc\x00"), msg(17, "d\x00\x00\x00")...), msg(18, "ef")...)
	var got []string
	for len(b) > 0 {
		m, rest, err := cutMessage(b)
		must(t, err)
		if m.typ != unix.RTM_NEWNEIGH || m.seq != 7 {
			t.Errorf("header %+v", m)
		}
		got, b = append(got, string(m.data)), rest
	}
	if len(got) != 3 || got[0] != "abc" || got[1] != "d" || got[2] != "ef" {
		t.Errorf("cut into %q", got)
	}
	if a := (message{typ: unix.NLMSG_ERROR, data: []byte{1}}).answer(); !errors.Is(a.err, unix.EBADMSG) {
		t.Errorf("an error of one byte: %v", a.err)
	}
	// A kernel that cannot tell says so, which is not that there is none.
	if _, err := (answer{err: unix.EOPNOTSUPP}).neigh(); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("a kernel that cannot tell: %v", err)
	}
	short := answer{data: []byte{1, 2, 3}}
	if _, err := short.neigh(); !errors.Is(err, unix.EBADMSG) {
		t.Errorf("an entry of three bytes: %v", err)
	}
	if _, err := short.link(); !errors.Is(err, unix.EBADMSG) {
		t.Errorf("a link of three bytes: %v", err)
	}
}
