package wg

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/weftnet/weft"
)

// The configuration protocol of wireguard-go: lines of key=value, an empty line
// at the end, keys in hexadecimal (wireguard.com/xplatform, "Configuration
// Protocol").

// encode is the "set" request of a change.
func (c change) encode() string {
	var b strings.Builder
	line := func(key, value string) { b.WriteString(key + "=" + value + "\n") }
	line("set", "1")
	if c.isFresh {
		line("replace_peers", "true")
	}
	if c.private != nil {
		line("private_key", hex.EncodeToString(c.private[:]))
	}
	if c.port != nil {
		line("listen_port", strconv.Itoa(int(*c.port)))
	}
	for _, p := range c.peers {
		line("public_key", hex.EncodeToString(p.public[:]))
		if p.remove {
			line("remove", "true")
			continue
		}
		if p.endpoint.IsValid() {
			line("endpoint", p.endpoint.String())
		}
		for _, a := range p.allow {
			line("allowed_ip", netip.PrefixFrom(a, a.BitLen()).String())
		}
		if p.keepalive {
			// Last: it makes the peer speak at once.
			line("persistent_keepalive_interval", strconv.Itoa(int(keepalive/time.Second)))
		}
	}
	b.WriteByte('\n')
	return b.String()
}

// errRefused is an answer, too: the device lives.
var errRefused = errors.New("WireGuard process refused")

// decode reads the answer to "get" or "set".
func decode(r io.Reader) (device, error) {
	d := device{peers: map[weft.PublicKey]peer{}}
	var cur weft.PublicKey
	var p *peer
	var sec, nsec int64
	flush := func() {
		if p != nil {
			if sec != 0 || nsec != 0 {
				p.handshake = time.Unix(sec, nsec)
			}
			d.peers[cur] = *p
		}
		p, sec, nsec = nil, 0, 0
	}
	s := bufio.NewScanner(r)
	for s.Scan() && s.Text() != "" {
		key, value, ok := strings.Cut(s.Text(), "=")
		if !ok {
			return d, fmt.Errorf("read WireGuard device: a line without '='")
		}
		var err error
		switch key {
		case "errno":
			if value != "0" {
				return d, fmt.Errorf("%w: errno %s", errRefused, value)
			}
		case "private_key":
			err = unhex(d.private[:], value)
		case "listen_port":
			var n uint64
			n, err = strconv.ParseUint(value, 10, 16)
			d.port = uint16(n)
		case "public_key":
			flush()
			p = &peer{allowed: map[netip.Addr]bool{}}
			err = unhex(cur[:], value)
		default:
			if p != nil {
				err = p.decodeLine(key, value, &sec, &nsec)
			}
		}
		if err != nil {
			return d, fmt.Errorf("read WireGuard device: %s: %w", key, err)
		}
	}
	flush()
	if err := s.Err(); err != nil {
		return d, fmt.Errorf("read WireGuard device: %w", err)
	}
	return d, nil
}

func (p *peer) decodeLine(key, value string, sec, nsec *int64) (err error) {
	switch key {
	case "endpoint":
		p.endpoint, err = netip.ParseAddrPort(value)
		p.endpoint = netip.AddrPortFrom(p.endpoint.Addr().Unmap(), p.endpoint.Port())
	case "allowed_ip":
		var q netip.Prefix
		if q, err = netip.ParsePrefix(value); err == nil {
			p.allowed[q.Addr()] = true
		}
	case "last_handshake_time_sec":
		*sec, err = strconv.ParseInt(value, 10, 64)
	case "last_handshake_time_nsec":
		*nsec, err = strconv.ParseInt(value, 10, 64)
	}
	return err
}

func unhex(dst []byte, s string) error {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(dst) {
		return fmt.Errorf("a key is %d hexadecimal digits", 2*len(dst))
	}
	copy(dst, b)
	return nil
}
