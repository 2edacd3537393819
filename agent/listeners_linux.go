package agent

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/sandbox"
)

// Socket states of /proc/net/{tcp,udp} (include/net/tcp_states.h). An
// unconnected UDP socket stands as TCP_CLOSE.
const (
	tcpListen = "0A"
	tcpClose  = "07"
)

// Fields of a line of /proc/net/{tcp,udp} (Documentation/networking/proc_net_tcp.rst):
// "sl local_address rem_address st tx:rx tr:tm retrnsmt uid timeout inode …".
const (
	fieldLocal = 1
	fieldState = 3
	fieldInode = 9
	minFields  = 10
)

// Fields of a line of /proc/net/sctp/eps (net/sctp/proc.c, sctp_eps_seq_show):
// "ENDPT SOCK STY SST HBKT LPORT UID INODE LADDRS…", and the state that it has in
// common with TCP.
const (
	sctpState     = 3
	sctpPort      = 5
	sctpInode     = 7
	sctpAddrs     = 8
	sctpListening = "10"
)

// HostListeners reads which ports other programs hold in the host's network
// namespace, and on which addresses: listening TCP and SCTP sockets and unconnected
// UDP sockets.
// The calling process's own sockets are left out: what weft itself needs is
// known to the cluster. The result is sorted and never nil, so that "none" is
// not taken for "not known".
func HostListeners() ([]weft.Listener, error) {
	own, err := ownSockets()
	if err != nil {
		return nil, err
	}
	out := []weft.Listener{}
	for _, f := range []struct {
		proto weft.Protocol
		read  func() ([]socket, error)
	}{
		{weft.TCP, func() ([]socket, error) { return tcpSockets(unix.AF_INET, "tcp") }},
		{weft.TCP, func() ([]socket, error) { return tcpSockets(unix.AF_INET6, "tcp6") }},
		{weft.UDP, func() ([]socket, error) { return readSockets("udp", tcpClose) }},
		{weft.UDP, func() ([]socket, error) { return readSockets("udp6", tcpClose) }},
	} {
		sockets, err := f.read()
		if err != nil {
			return nil, err
		}
		for _, s := range sockets {
			if !own[s.inode] {
				out = append(out, weft.Listener{Protocol: f.proto, Port: s.port, Addr: s.addr})
			}
		}
	}
	b, err := os.ReadFile("/proc/self/net/sctp/eps")
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // without the module there is none
		return nil, fmt.Errorf("read sockets: %w", err)
	}
	sockets, err := parseSCTP(b)
	if err != nil {
		return nil, fmt.Errorf("parse /proc/self/net/sctp/eps: %w", err)
	}
	for _, s := range sockets {
		if !own[s.inode] {
			out = append(out, weft.Listener{Protocol: weft.SCTP, Port: s.port, Addr: s.addr})
		}
	}
	slices.SortFunc(out, func(a, b weft.Listener) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port), a.Addr.Compare(b.Addr))
	})
	return slices.Compact(out), nil
}

// tcpSockets are those that listen: asked for alone, where the kernel can do that.
func tcpSockets(family uint8, name string) ([]socket, error) {
	asked, err := sandbox.Listening(family)
	if err != nil {
		return readSockets(name, tcpListen)
	}
	out := make([]socket, len(asked))
	for i, l := range asked {
		out[i] = socket{l.Addr.Addr(), l.Addr.Port(), l.Inode}
	}
	return out, nil
}

// readSockets reads one of the files of the namespace, of which IPv6's may be missing.
func readSockets(name, state string) ([]socket, error) {
	b, err := os.ReadFile("/proc/self/net/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read sockets: %w", err)
	}
	out, err := parseSockets(b, state)
	if err != nil {
		return nil, fmt.Errorf("parse /proc/self/net/%s: %w", name, err)
	}
	return out, nil
}

// ownSockets are the inodes of this process's sockets.
func ownSockets() (map[uint64]bool, error) {
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list own sockets: %w", err)
	}
	out := map[uint64]bool{}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read own descriptor: %w", err)
		}
		if inode, ok := socketInode(target); ok {
			out[inode] = true
		}
	}
	return out, nil
}

// socketInode reads "socket:[4026]", the name of a socket in /proc/PID/fd.
func socketInode(target string) (uint64, bool) {
	digits, ok := strings.CutPrefix(target, "socket:[")
	if !ok {
		return 0, false
	}
	if digits, ok = strings.CutSuffix(digits, "]"); !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, err == nil
}

// socket is one line of /proc/net/tcp or its kin.
type socket struct {
	addr  netip.Addr
	port  uint16
	inode uint64
}

// parseSockets returns the sockets in one state from the text of /proc/net/tcp
// and its kin. A socket without a port is unbound and left out.
func parseSockets(b []byte, state string) ([]socket, error) {
	var out []socket
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Scan() // heading
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < minFields {
			return nil, fmt.Errorf("line %q has %d fields", sc.Text(), len(f))
		}
		if f[fieldState] != state {
			continue
		}
		text, digits, ok := strings.Cut(f[fieldLocal], ":")
		port, err := strconv.ParseUint(digits, 16, 16)
		if !ok || err != nil || len(digits) != 4 {
			return nil, fmt.Errorf("local address %q has no port", f[fieldLocal])
		}
		addr, ok := hexAddr(text)
		if !ok {
			return nil, fmt.Errorf("local address %q is none", f[fieldLocal])
		}
		inode, err := strconv.ParseUint(f[fieldInode], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("inode %q is no number", f[fieldInode])
		}
		if port != 0 {
			out = append(out, socket{addr, uint16(port), inode})
		}
	}
	if err := sc.Err(); err != nil {
		return nil, err
	}
	return out, nil
}

// hexAddr reads an address of /proc/net/tcp and its kin: words of 32 bits, each as
// the machine holds it.
func hexAddr(text string) (netip.Addr, bool) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b)%4 != 0 {
		return netip.Addr{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	a, ok := netip.AddrFromSlice(b)
	return a.Unmap(), ok
}

// parseSCTP returns the listening sockets of /proc/net/sctp/eps, one for each
// address.
func parseSCTP(b []byte) ([]socket, error) {
	var out []socket
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Scan() // heading
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < sctpAddrs {
			return nil, fmt.Errorf("line %q has %d fields", sc.Text(), len(f))
		}
		if f[sctpState] != sctpListening {
			continue
		}
		port, err := strconv.ParseUint(f[sctpPort], 10, 16)
		if err != nil {
			return nil, fmt.Errorf("port %q is no number", f[sctpPort])
		}
		inode, err := strconv.ParseUint(f[sctpInode], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("inode %q is no number", f[sctpInode])
		}
		addrs := f[sctpAddrs:]
		if len(addrs) == 0 {
			addrs = []string{netip.IPv4Unspecified().String()}
		}
		for _, text := range addrs {
			a, err := netip.ParseAddr(strings.TrimPrefix(text, "*")) // the primary one
			if err != nil {
				return nil, fmt.Errorf("local address %q is none", text)
			}
			if port != 0 {
				out = append(out, socket{a.Unmap().WithZone(""), uint16(port), inode})
			}
		}
	}
	return out, sc.Err()
}
