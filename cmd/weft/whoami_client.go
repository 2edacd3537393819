package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// maxAnswer bounds what `get` prints, in bytes.
const maxAnswer = 1 << 20

func newWhoamiGet() *cobra.Command {
	var timeout time.Duration
	c := &cobra.Command{
		Use:     "get URL",
		Short:   "Ask a whoami server: http://HOST/PATH, tcp://HOST:7 or udp://HOST:7",
		Args:    cobra.ExactArgs(1),
		Example: "  weft whoami get http://web/\n  weft whoami get udp://web:7",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			answer, err := get(ctx, args[0])
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(answer)
			return err
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "give up after this time")
	return c
}

// get asks once, on a connection of its own: balancers choose per connection.
func get(ctx context.Context, raw string) ([]byte, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("get %q: %w", raw, err)
	}
	switch u.Scheme {
	case "http":
		return getHTTP(ctx, u)
	case "tcp", "udp":
		return getEcho(ctx, u.Scheme, u.Host)
	}
	return nil, fmt.Errorf("get %q: want http://, tcp:// or udp://", raw)
}

func getHTTP(ctx context.Context, u *url.URL) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", u, err)
	}
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // and no proxy
	r, err := c.Do(req)
	if err != nil {
		return nil, err // names method and URL
	}
	defer r.Body.Close()
	b, err := io.ReadAll(io.LimitReader(r.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", u, err)
	}
	if r.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("get %s: %s: %.200s", u, r.Status, b)
	}
	return b, nil
}

// getEcho sends one line and reads the identity and the echo.
func getEcho(ctx context.Context, network, host string) ([]byte, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, network, host)
	if err != nil {
		return nil, err // names network and address
	}
	defer c.Close()
	if t, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(t); err != nil {
			return nil, err
		}
	}
	if _, err := io.WriteString(c, "ping\n"); err != nil {
		return nil, err
	}
	if network == "udp" {
		buf := make([]byte, maxDatagram)
		n, err := c.Read(buf)
		return buf[:n], err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(c, maxAnswer))
}

func newWhoamiLookup() *cobra.Command {
	var timeout time.Duration
	c := &cobra.Command{
		Use: "lookup NAME", Short: "Print the addresses of a name, one per line", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", args[0])
			if err != nil {
				return err
			}
			for i := range addrs {
				addrs[i] = addrs[i].Unmap()
			}
			slices.SortFunc(addrs, netip.Addr.Compare)
			for _, a := range slices.Compact(addrs) {
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), a); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "give up after this time")
	return c
}

func newWhoamiPing() *cobra.Command {
	var timeout time.Duration
	var count uint16
	c := &cobra.Command{
		Use: "ping HOST", Short: "Send ICMP echo requests, one after the other; fails if one has no reply", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if count < 1 {
				return errors.New("--count 0: want at least 1")
			}
			addrs, err := net.DefaultResolver.LookupNetIP(cmd.Context(), "ip", args[0])
			if err != nil {
				return err
			}
			to := firstOf(addrs)
			p, err := openPinger(to.Is6())
			if err != nil {
				return err
			}
			defer p.conn.Close()
			for seq := uint16(1); seq <= count; seq++ {
				took, err := p.ping(to, seq, timeout)
				if err != nil {
					return fmt.Errorf("ping %s: request %d of %d: %w", to, seq, count, err)
				}
				fmt.Fprintf(cmd.OutOrStdout(), "reply from %s: seq=%d time=%.3f ms\n", to, seq, float64(took.Microseconds())/1000)
			}
			return nil
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 2*time.Second, "wait this long for each reply")
	c.Flags().Uint16Var(&count, "count", 1, "number of requests")
	return c
}

// firstOf is the first IPv4 address, else the first one.
func firstOf(addrs []netip.Addr) netip.Addr {
	for _, a := range addrs {
		if a.Unmap().Is4() {
			return a.Unmap()
		}
	}
	return addrs[0]
}

// ICMP (RFC 792) and ICMPv6 (RFC 4443 section 4).
const (
	icmpEchoReply    = 0
	icmpEchoRequest  = 8
	icmp6EchoRequest = 128
	icmp6EchoReply   = 129
	icmpHeaderBytes  = 8
)

// pinger holds an ICMP socket: the kernel's ping socket where the group of this
// process may have one (net.ipv4.ping_group_range), else a raw one, which needs
// CAP_NET_RAW, as containers have it.
type pinger struct {
	conn net.PacketConn
	raw  bool
	is6  bool
	id   uint16
}

func openPinger(is6 bool) (*pinger, error) {
	p := &pinger{id: uint16(os.Getpid()), is6: is6}
	family, proto, network, all := unix.AF_INET, unix.IPPROTO_ICMP, "ip4:icmp", "0.0.0.0"
	if is6 {
		family, proto, network, all = unix.AF_INET6, unix.IPPROTO_ICMPV6, "ip6:ipv6-icmp", "::"
	}
	fd, pingErr := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if pingErr == nil {
		f := os.NewFile(uintptr(fd), "ping")
		defer f.Close() // FilePacketConn duplicates it
		var err error
		if p.conn, err = net.FilePacketConn(f); err != nil {
			return nil, fmt.Errorf("open ping socket: %w", err)
		}
		return p, nil
	}
	var err error
	if p.conn, err = net.ListenPacket(network, all); err != nil {
		return nil, errors.Join(fmt.Errorf("open ping socket: %w", pingErr), fmt.Errorf("open raw socket: %w", err))
	}
	p.raw = true
	return p, nil
}

// ping sends one request and waits for its reply.
func (p *pinger) ping(to netip.Addr, seq uint16, timeout time.Duration) (time.Duration, error) {
	var dst net.Addr = &net.UDPAddr{IP: to.AsSlice()}
	if p.raw {
		dst = &net.IPAddr{IP: to.AsSlice()}
	}
	start := time.Now()
	if err := p.conn.SetDeadline(start.Add(timeout)); err != nil {
		return 0, err
	}
	if _, err := p.conn.WriteTo(echoRequest(p.is6, p.id, seq), dst); err != nil {
		return 0, err
	}
	buf := make([]byte, 1500)
	for {
		n, _, err := p.conn.ReadFrom(buf)
		if err != nil {
			return 0, err
		}
		// A ping socket only gets its own replies, with an id of its own.
		if id, got, ok := parseEchoReply(p.is6, buf[:n]); ok && got == seq && (!p.raw || id == p.id) {
			return time.Since(start), nil
		}
	}
}

// echoRequest is an echo request with a fixed payload. Over IPv6 the kernel puts
// the checksum in the place of this one: it covers addresses, too.
func echoRequest(is6 bool, id, seq uint16) []byte {
	b := make([]byte, icmpHeaderBytes, icmpHeaderBytes+32)
	if b[0] = icmpEchoRequest; is6 {
		b[0] = icmp6EchoRequest
	}
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], seq)
	b = append(b, "weft whoami ping 0123456789abcdef"...)
	binary.BigEndian.PutUint16(b[2:], checksum(b))
	return b
}

func parseEchoReply(is6 bool, b []byte) (id, seq uint16, ok bool) {
	reply := byte(icmpEchoReply)
	if is6 {
		reply = icmp6EchoReply
	}
	if len(b) < icmpHeaderBytes || b[0] != reply || b[1] != 0 {
		return 0, 0, false
	}
	return binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:]), true
}

// checksum of the internet (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
