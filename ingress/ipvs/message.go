package ipvs

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Numbers of linux/ip_vs.h (IPVS_GENL_VERSION 1).
const (
	genlVersion = 1

	cmdNewService = 1
	cmdDelService = 3
	cmdNewDest    = 5
	cmdSetDest    = 6
	cmdDelDest    = 7

	attrService = 1
	attrDest    = 2

	attrServiceFamily  = 1
	attrServiceMark    = 5
	attrServiceSched   = 6
	attrServiceFlags   = 7
	attrServiceTimeout = 8
	attrServiceNetmask = 9

	attrDestAddr    = 1
	attrDestPort    = 2
	attrDestForward = 3
	attrDestWeight  = 4
	attrDestUpper   = 5
	attrDestLower   = 6

	forwardDirect = 3 // IP_VS_CONN_F_DROUTE
)

// routeProtocol marks weft's routes: our own number, not in rt_protos.
const routeProtocol = 119

// encoder writes netlink messages one behind the other. Their sequence numbers
// count from 1; the last one asks for an answer.
type encoder struct {
	buf   []byte
	start int // of the open message
	count uint32
	// family is the number of IPVS among the generic netlink families.
	family uint16
	devices
}

// devices are the indices of what leads away: device the balancer's, which leads to
// everybody, and out the tunnel's, 0 without, which leads to who is not near.
type devices struct {
	device, out int
	near        map[netip.Addr]bool
}

// to is the one that leads to an address.
func (d devices) to(a netip.Addr) int {
	if d.out == 0 || a.Is6() || d.near[a] {
		return d.device
	}
	return d.out
}

const (
	headerLen = unix.SizeofNlMsghdr
	attrLen   = unix.SizeofRtAttr
)

func (e *encoder) begin(kind, flags uint16) {
	e.start = len(e.buf)
	e.count++
	e.buf = binary.NativeEndian.AppendUint32(e.buf, 0)
	e.buf = binary.NativeEndian.AppendUint16(e.buf, kind)
	e.buf = binary.NativeEndian.AppendUint16(e.buf, flags|unix.NLM_F_REQUEST)
	e.buf = binary.NativeEndian.AppendUint32(e.buf, e.count)
	e.buf = binary.NativeEndian.AppendUint32(e.buf, 0)
}

// end fills in the length; all we write is a multiple of four bytes.
func (e *encoder) end() {
	binary.NativeEndian.PutUint32(e.buf[e.start:], uint32(len(e.buf)-e.start))
}

// ask makes the open message the one that is answered.
func (e *encoder) ask() {
	flags := binary.NativeEndian.Uint16(e.buf[e.start+6:])
	binary.NativeEndian.PutUint16(e.buf[e.start+6:], flags|unix.NLM_F_ACK)
}

// open begins an attribute that is closed by closeAttr.
func (e *encoder) open(kind uint16) int {
	at := len(e.buf)
	e.buf = binary.NativeEndian.AppendUint16(e.buf, 0)
	e.buf = binary.NativeEndian.AppendUint16(e.buf, kind)
	return at
}

func (e *encoder) closeAttr(at int) {
	binary.NativeEndian.PutUint16(e.buf[at:], uint16(len(e.buf)-at))
	for len(e.buf)%4 != 0 {
		e.buf = append(e.buf, 0)
	}
}

func (e *encoder) bytes(kind uint16, b ...byte) {
	at := e.open(kind)
	e.buf = append(e.buf, b...)
	e.closeAttr(at)
}

func (e *encoder) u16(kind, v uint16) {
	e.bytes(kind, binary.NativeEndian.AppendUint16(nil, v)...)
}

func (e *encoder) u32(kind uint16, v uint32) {
	at := e.open(kind)
	e.buf = binary.NativeEndian.AppendUint32(e.buf, v)
	e.closeAttr(at)
}

// encode writes the message of one change.
func (e *encoder) encode(o op) {
	switch {
	case o.local.IsValid():
		e.route(o, o.local, unix.RT_TABLE_LOCAL, unix.RT_SCOPE_HOST, unix.RTN_LOCAL)
	case o.near.IsValid():
		e.route(o, o.near, unix.RT_TABLE_MAIN, unix.RT_SCOPE_LINK, unix.RTN_UNICAST)
	case o.neigh.IsValid():
		e.neighbour(o)
	default:
		e.service(o)
	}
	e.end()
}

func (e *encoder) service(o op) {
	e.begin(e.family, 0)
	cmd := map[verb]byte{add: cmdNewService, remove: cmdDelService}[o.verb]
	if o.dest.addr.IsValid() {
		cmd = map[verb]byte{add: cmdNewDest, change: cmdSetDest, remove: cmdDelDest}[o.verb]
	}
	e.buf = append(e.buf, cmd, genlVersion, 0, 0)
	at := e.open(attrService | unix.NLA_F_NESTED)
	family, netmask := uint16(unix.AF_INET), uint32(0xffffffff)
	if o.key.is6 {
		family, netmask = unix.AF_INET6, 128
	}
	e.u16(attrServiceFamily, family)
	e.u32(attrServiceMark, o.key.mark)
	if cmd == cmdNewService {
		e.bytes(attrServiceSched, append([]byte(roundRobin), 0)...)
		at := e.open(attrServiceFlags)
		e.buf = binary.NativeEndian.AppendUint32(e.buf, 0)
		e.buf = binary.NativeEndian.AppendUint32(e.buf, 0xffffffff) // all of them
		e.closeAttr(at)
		e.u32(attrServiceTimeout, 0)
		e.u32(attrServiceNetmask, netmask)
	}
	e.closeAttr(at)
	if !o.dest.addr.IsValid() {
		return
	}
	at = e.open(attrDest | unix.NLA_F_NESTED)
	e.bytes(attrDestAddr, o.dest.addr.AsSlice()...)
	e.u16(attrDestPort, 0)
	if cmd != cmdDelDest {
		e.u32(attrDestForward, forwardDirect)
		e.u32(attrDestWeight, uint32(o.dest.weight))
		e.u32(attrDestUpper, 0)
		e.u32(attrDestLower, 0)
	}
	e.closeAttr(at)
}

// familyOf is the kernel's number of an address's family.
func familyOf(a netip.Addr) byte {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// route is one by the balancer's device (struct rtmsg of linux/rtnetlink.h). A local one:
// what is sent to the address arrives, and answers may bear it, without the device having it.
func (e *encoder) route(o op, to netip.Addr, table, scope, kindOf byte) {
	kind, flags := uint16(unix.RTM_NEWROUTE), uint16(unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	if o.verb == remove {
		kind, flags = unix.RTM_DELROUTE, 0
	}
	e.begin(kind, flags)
	e.buf = append(e.buf, familyOf(to), byte(to.BitLen()), 0, 0, table, routeProtocol, scope, kindOf)
	e.buf = binary.NativeEndian.AppendUint32(e.buf, 0)
	e.bytes(unix.RTA_DST, to.AsSlice()...)
	e.u32(unix.RTA_OIF, uint32(e.device))
}

// neighbour is a permanent entry (struct ndmsg of linux/neighbour.h).
func (e *encoder) neighbour(o op) {
	kind, flags := uint16(unix.RTM_NEWNEIGH), uint16(unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	if o.verb == remove {
		kind, flags = unix.RTM_DELNEIGH, 0
	}
	e.begin(kind, flags)
	e.buf = append(e.buf, familyOf(o.neigh), 0, 0, 0)
	e.buf = binary.NativeEndian.AppendUint32(e.buf, uint32(e.to(o.neigh)))
	e.buf = binary.NativeEndian.AppendUint16(e.buf, unix.NUD_PERMANENT)
	e.buf = append(e.buf, 0, 0)
	e.bytes(unix.NDA_DST, o.neigh.AsSlice()...)
	if o.verb != remove {
		e.bytes(unix.NDA_LLADDR, o.mac[:]...)
	}
}
