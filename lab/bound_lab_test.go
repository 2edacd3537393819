//go:build lab

package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Ports that this test publishes.
const boundShared, boundAllowed, boundOthers, boundHidden = 8151, 8152, 8153, 8154

// TestLabPublishedToSome: what a service says of where its port is asked, and by whom,
// holds on every node: on one address, also where two services have one port on
// different ones, for local clients only, and for some networks; and a client is hidden
// on request.
func TestLabPublishedToSome(t *testing.T) {
	r := newRig(t, "t-bound")
	h2 := r.host("h2").Addr
	made := func(name string, port int, labels ...string) {
		t.Helper()
		args := r.on("h1", "service", "create", "-d", "--name", name, "--constraint", "node.hostname==h3", "--hostname", name, "--publish", fmt.Sprintf("%d:80", port))
		for _, l := range labels {
			args = append(args, "--label", l)
		}
		r.must(append(args, "weft/whoami")...)
	}
	made("near", boundShared, fmt.Sprintf("weft.publish.%d.ip=127.0.0.1", boundShared))
	made("one", boundShared, fmt.Sprintf("weft.publish.%d.ip=%s", boundShared, h2))
	made("allowed", boundAllowed, fmt.Sprintf("weft.publish.%d.allow=198.51.100.0/24", boundAllowed))
	made("others", boundOthers, fmt.Sprintf("weft.publish.%d.allow=203.0.113.0/24", boundOthers))
	made("hidden", boundHidden, "weft.source=snat")

	local := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	type want struct {
		ns   string
		to   netip.AddrPort
		by   string // the service that answers; "" = it is refused
		seen netip.Addr
	}
	var wanted []want
	for _, name := range three {
		h := r.host(name)
		outside := func(port uint16, by string, seen netip.Addr) {
			wanted = append(wanted, want{r.clientNS(), netip.AddrPortFrom(h.Addr, port), by, seen})
		}
		one := ""
		if name == "h2" {
			one = "one"
		}
		outside(boundShared, one, ClientAddr)
		wanted = append(wanted, want{h.Paths.NetNS, netip.AddrPortFrom(local, boundShared), "near", netip.Addr{}})
		outside(boundAllowed, "allowed", ClientAddr)
		outside(boundOthers, "", netip.Addr{})
		outside(boundHidden, "hidden", netip.Addr{})
	}
	holds := func(w want) error {
		who, seen, err := whoAnswers(w.ns, w.to)
		switch {
		case w.by == "" && errors.Is(err, syscall.ECONNREFUSED):
			return nil
		case w.by == "" || err != nil || who != w.by:
			return fmt.Errorf("%s answers by %q, %v, want %q", w.to, who, err, w.by)
		case w.seen.IsValid() && seen != w.seen:
			return fmt.Errorf("%s: %q sees %s, want %s", w.to, who, seen, w.seen)
		case w.by == "hidden" && seen == ClientAddr:
			return fmt.Errorf("%s: %q sees the client %s", w.to, who, seen)
		}
		return nil
	}
	for _, w := range wanted {
		r.eventually(w.to.String(), func() error { return holds(w) })
	}
	// All of them once more, as nothing changes now.
	for _, w := range wanted {
		if err := holds(w); err != nil {
			t.Error(err)
		}
	}

	// What is narrowed is so at once, and what goes leaves the other where it is.
	r.must(r.on("h1", "service", "update", "-d", "--label-add", fmt.Sprintf("weft.publish.%d.allow=203.0.113.0/24", boundAllowed), "allowed")...)
	r.must(r.on("h1", "service", "rm", "one")...)
	for i := range wanted {
		if w := &wanted[i]; w.by == "allowed" || w.by == "one" {
			w.by = ""
		}
	}
	for _, w := range wanted {
		r.eventually(w.to.String()+" after the change", func() error { return holds(w) })
	}
}

// whoAnswers asks a whoami task: its host name, and the client as it sees it.
func whoAnswers(ns string, to netip.AddrPort) (name string, client netip.Addr, err error) {
	var body string
	if err := within(ns, func() (err error) { body, err = getOnce(to); return err }); err != nil {
		return "", netip.Addr{}, err
	}
	var who struct{ Host, Client string }
	if err := json.Unmarshal([]byte(body), &who); err != nil {
		return "", netip.Addr{}, fmt.Errorf("answer %q: %w", body, err)
	}
	host, _, err := net.SplitHostPort(who.Client)
	if err != nil {
		return "", netip.Addr{}, fmt.Errorf("answer %q: %w", body, err)
	}
	client, err = netip.ParseAddr(strings.TrimPrefix(host, "::ffff:"))
	return who.Host, client, err
}

// getOnce is the body of one answer by HTTP.
func getOnce(to netip.AddrPort) (string, error) {
	c, err := net.DialTimeout("tcp", to.String(), askLimit)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(askLimit)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return "", err
	}
	_, body, ok := strings.Cut(string(b), "\r\n\r\n")
	if !ok {
		return "", fmt.Errorf("answer %q", b)
	}
	return body, nil
}
