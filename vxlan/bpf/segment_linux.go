package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/linux"
)

// Segment sends probes of native ways as tasks' packets would go, and reads which
// were sent back (c/native.h). It belongs to one goroutine, whose thread is in
// the host's namespace. Close it.
type Segment struct {
	e    *Engine
	fd   int   // sends, and receives nothing
	host *host // as it was at read; nil = not looked at yet
	read time.Time
}

// reread is how long links and routes are believed, our own choice: reading
// them costs a host of 1,000 tasks some milliseconds. What has changed within it
// costs an echo at most; the entries of packets themselves follow routes.
const reread = 5 * time.Second

// OpenSegment opens the socket for probes.
func (e *Engine) OpenSegment() (*Segment, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket for native probes: %w", err)
	}
	return &Segment{e: e, fd: fd}, nil
}

// Close closes the socket.
func (s *Segment) Close() error {
	if s.host != nil {
		s.host.close()
	}
	return unix.Close(s.fd)
}

// Ask sends probes. It returns why one could not be sent, by its way: that the
// way leads by a router, or the other node's hardware address is not known yet.
func (s *Segment) Ask(probes []vxlan.NativeProbe) map[vxlan.NativeWay]error {
	failed := map[vxlan.NativeWay]error{}
	nets, err := s.nets()
	if err = errors.Join(err, s.look()); err != nil {
		for _, p := range probes {
			failed[p.NativeWay] = err
		}
		return failed
	}
	near := map[int]map[netip.Addr]vxlan.MAC{}
	for _, p := range probes {
		if err := s.ask(nets[p.VNI], near, p); err != nil {
			failed[p.NativeWay] = err
		}
	}
	return failed
}

func (s *Segment) nets() (map[uint32]netValue, error) {
	m, err := ebpf.LoadPinnedMap(s.e.path(overlayMapNets), nil)
	if isAbsent(err) {
		return nil, nil // nothing was made yet
	}
	if err != nil {
		return nil, fmt.Errorf("open map %s: %w", overlayMapNets, err)
	}
	defer m.Close()
	return dump[uint32, netValue](m)
}

// look reads links and routes anew when it is time.
func (s *Segment) look() error {
	if s.host != nil && time.Since(s.read) < reread {
		return nil
	}
	h, err := lookAtHost()
	if err != nil {
		return err
	}
	if s.host != nil {
		s.host.close()
	}
	s.host, s.read = h, time.Now()
	return nil
}

func (s *Segment) ask(n netValue, near map[int]map[netip.Addr]vxlan.MAC, p vxlan.NativeProbe) error {
	if !n.isNative() {
		return fmt.Errorf("network %d is not set up: %w", p.VNI, weft.ErrUnavailable)
	}
	vtep := p.VTEP.Unmap()
	hop := s.host.hop(n.VTEP.Addr(), vtep)
	if !hop.direct || hop.via != vtep {
		return fmt.Errorf("%s is not on a segment of this host: %w", vtep, weft.ErrUnavailable)
	}
	if near[hop.ifindex] == nil {
		var err error
		if near[hop.ifindex], err = s.host.neighbours(hop.ifindex); err != nil {
			return err
		}
	}
	mac, ok := near[hop.ifindex][vtep]
	if !ok {
		return fmt.Errorf("the hardware address of %s is not known: %w", vtep, weft.ErrUnavailable)
	}
	to := &unix.SockaddrLinklayer{Ifindex: hop.ifindex, Halen: uint8(len(mac)), Protocol: networkOrder(unix.ETH_P_IP)}
	if p.To.Is6() {
		to.Protocol = networkOrder(unix.ETH_P_IPV6)
	}
	copy(to.Addr[:], mac[:])
	if err := unix.Sendto(s.fd, marshalProbe(p), 0, to); err != nil {
		return fmt.Errorf("send native probe to %s: %w", vtep, err)
	}
	return nil
}

// networkOrder is v as a number whose bytes are in network order.
func networkOrder(v uint16) uint16 { b := be(v); return binary.NativeEndian.Uint16(b[:]) }

// neighbours are the hardware addresses that the kernel has resolved on a link.
func (h *host) neighbours(link int) (map[netip.Addr]vxlan.MAC, error) {
	all, err := linux.Complete(func() ([]netlink.Neigh, error) { return h.conn.NeighList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	out := make(map[netip.Addr]vxlan.MAC, len(all))
	for _, n := range all {
		a, ok := netip.AddrFromSlice(n.IP)
		if ok && n.State&(unix.NUD_FAILED|unix.NUD_INCOMPLETE) == 0 && len(n.HardwareAddr) == len(vxlan.MAC{}) {
			out[a.Unmap()] = vxlan.MACOf(n.HardwareAddr)
		}
	}
	return out, nil
}

// Numbers of c/native.h.
const (
	protoProbe = 253 // RFC 3692
	probeMagic = 0x77656674
	probeAsk   = 1
	probeBytes = 16
)

// marshalProbe is the probe's IP packet. No router lets it pass (a hop limit of
// one): what a proxy would carry on is no segment.
func marshalProbe(p vxlan.NativeProbe) []byte {
	from, to := p.From.Unmap(), p.To.Unmap()
	var b []byte
	if to.Is4() {
		b = make([]byte, 20, 20+probeBytes)
		b[0], b[8], b[9] = 0x45, 1, protoProbe
		binary.BigEndian.PutUint16(b[2:], 20+probeBytes)
		copy(b[12:], from.AsSlice())
		copy(b[16:], to.AsSlice())
		sum := uint32(0)
		for i := 0; i < 20; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		sum = sum&0xffff + sum>>16
		binary.BigEndian.PutUint16(b[10:], ^uint16(sum&0xffff+sum>>16))
	} else {
		b = make([]byte, 40, 40+probeBytes)
		b[0], b[6], b[7] = 0x60, protoProbe, 1
		binary.BigEndian.PutUint16(b[4:], probeBytes)
		copy(b[8:], from.AsSlice())
		copy(b[24:], to.AsSlice())
	}
	b = binary.BigEndian.AppendUint32(b, probeMagic)
	b = append(b, probeAsk, 0, 0, 0)
	return binary.NativeEndian.AppendUint64(b, p.ID) // read back by this host alone
}

// Echoed reports whether a probe was sent back, and forgets that it was. Asked
// again, or of an earlier probe of the way and family, it says no.
func (s *Segment) Echoed(p vxlan.NativeProbe) (bool, error) {
	m, err := ebpf.LoadPinnedMap(s.e.path(overlayMapEchoes), nil)
	if isAbsent(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open map %s: %w", overlayMapEchoes, err)
	}
	defer m.Close()
	key := echoKey{VNI: p.VNI, Family: unix.AF_INET, VTEP: addrOf(p.VTEP)}
	if p.To.Unmap().Is6() {
		key.Family = unix.AF_INET6
	}
	var id uint64
	if err := m.LookupAndDelete(key, &id); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return false, nil
		}
		return false, fmt.Errorf("read map %s: %w", overlayMapEchoes, err)
	}
	return id == p.ID, nil
}
