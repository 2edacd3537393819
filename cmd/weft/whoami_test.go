package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// startWhoami serves on free ports of loopback until the test ends, and fails
// the test if it does not end cleanly.
func startWhoami(t *testing.T) *whoami {
	t.Helper()
	w, err := listenWhoami(t.Context(), whoamiConfig{HTTP: "127.0.0.1:0", Echo: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- w.run(t.Context()) }() // t.Context ends just before Cleanup
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Errorf("whoami ended with %v", err)
		}
	})
	return w
}

func runWhoami(t *testing.T, args ...string) (string, error) {
	t.Helper()
	c := newWhoamiCommand()
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetErr(io.Discard)
	c.SilenceUsage = true
	c.SetArgs(args)
	err := c.ExecuteContext(t.Context())
	return out.String(), err
}

func TestWhoamiAnswersOnEveryPort(t *testing.T) {
	t.Setenv("WEFT_NODE", "h7")
	w := startWhoami(t)
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ url, path, rest string }{
		{"http://" + w.http.Addr().String() + "/a/b?c", "/a/b", ""},
		{"tcp://" + w.echo.Addr().String(), "", "ping\n"},
		{"udp://" + w.udp.LocalAddr().String(), "", "ping\n"},
	} {
		out, err := runWhoami(t, "get", tc.url)
		if err != nil {
			t.Errorf("%s: %v", tc.url, err)
			continue
		}
		id, err := parseIdentity(out)
		if err != nil {
			t.Errorf("%s: %v", tc.url, err)
			continue
		}
		if id.Host != host || id.Node != "h7" || id.Path != tc.path || !strings.HasPrefix(id.Client, "127.0.0.1:") {
			t.Errorf("%s: %+v", tc.url, id)
		}
		if _, rest, _ := strings.Cut(out, "\n"); rest != tc.rest {
			t.Errorf("%s: after the identity %q, want %q", tc.url, rest, tc.rest)
		}
	}
}

func TestWhoamiEndsWithOpenConnections(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w, err := listenWhoami(ctx, whoamiConfig{HTTP: "127.0.0.1:0", Echo: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- w.run(ctx) }()
	c, err := net.Dial("tcp", w.echo.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("ended with %v", err)
	}
	if took := time.Since(start); took > whoamiGrace {
		t.Errorf("an idle connection held it up for %v", took)
	}
	if _, err := net.Dial("tcp", w.http.Addr().String()); err == nil {
		t.Error("still listens")
	}
}

func TestWhoamiPortTaken(t *testing.T) {
	w := startWhoami(t)
	_, err := listenWhoami(t.Context(), whoamiConfig{HTTP: w.http.Addr().String(), Echo: "127.0.0.1:0"})
	if err == nil || !strings.Contains(err.Error(), w.http.Addr().String()) {
		t.Errorf("got %v, want the address that is taken", err)
	}
}

func TestWhoamiClientErrors(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	for _, args := range [][]string{
		{"get", "http://" + closed + "/"},
		{"get", "tcp://" + closed},
		{"get", "ftp://" + closed},
		{"get", "%zz"},
		{"get"},
		{"lookup", "no-such-name.invalid."},
		{"ping", "--count", "0", "127.0.0.1"},
		{"ping", "--count", "-1", "127.0.0.1"},
	} {
		if out, err := runWhoami(t, args...); err == nil {
			t.Errorf("%q succeeded: %s", args, out)
		}
	}
}

func TestWhoamiLookup(t *testing.T) {
	out, err := runWhoami(t, "lookup", "127.0.0.1")
	if err != nil || out != "127.0.0.1\n" {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestWhoamiPing(t *testing.T) {
	for _, to := range []string{"127.0.0.1", "::1"} {
		t.Run(to, func(t *testing.T) {
			p, err := openPinger(to == "::1")
			if err != nil {
				netnstest.Missing(t, "root", err)
			}
			p.conn.Close()
			out, err := runWhoami(t, "ping", "--count", "3", to)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(out, "reply from "+to); n != 3 {
				t.Errorf("%d replies, want 3:\n%s", n, out)
			}
		})
	}
}

func TestParseIdentityRefuses(t *testing.T) {
	for _, in := range []string{"", "\n{}", "{}", "ping", `{"host":"h"}`, "<html>"} {
		if id, err := parseIdentity(in); err == nil {
			t.Errorf("parseIdentity(%q) = %+v", in, id)
		}
	}
}

func TestAnsweredBy(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	ts := []demoTask{{id: "a", addrs: map[string]netip.Addr{"front": a}}, {id: "b", addrs: map[string]netip.Addr{"front": b}}}
	got, err := answeredBy(ts, `{"host":"x","client":"1.2.3.4:5","addresses":["172.31.240.2","10.0.0.3"]}`)
	if err != nil || got.id != "b" {
		t.Errorf("got %q, %v", got.id, err)
	}
	if _, err := answeredBy(ts, `{"host":"x","client":"1.2.3.4:5","addresses":["10.0.0.4"]}`); err == nil {
		t.Error("an unknown task passed")
	}
}

// TestChecksum: a packet with its checksum in place sums to zero (RFC 1071
// section 1), and one changed byte shows.
func TestChecksum(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := echoRequest(false, rapid.Uint16().Draw(t, "id"), rapid.Uint16().Draw(t, "seq"))
		if got := checksum(b); got != 0 {
			t.Fatalf("sum over the whole is %#x", got)
		}
		i := rapid.IntRange(0, len(b)-1).Draw(t, "i")
		b[i] ^= 1
		if checksum(b) == 0 {
			t.Fatalf("a change of byte %d does not show", i)
		}
	})
}

// TestWhoamiBeginsAndEndsSlowly: not ready it refuses everything; when it is
// about to end each answer closes its connection. The clock stands still between
// the steps, so that what is left of an hour is an hour.
func TestWhoamiBeginsAndEndsSlowly(t *testing.T) {
	synctest.Test(t, testBeginsAndEndsSlowly)
	if _, err := listenWhoami(t.Context(), whoamiConfig{HTTP: "127.0.0.1:0", Echo: "127.0.0.1:0", Linger: -1}); err == nil {
		t.Error("a negative time is taken")
	}
}

func testBeginsAndEndsSlowly(t *testing.T) {
	w := &whoami{cfg: whoamiConfig{ReadyAfter: time.Hour}}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		ctx   context.Context
		began time.Time
		path  string
		code  int
		close bool
		body  string
	}{
		{t.Context(), time.Now(), "/healthz", 503, false, "ready in 1h0m0s\n"},
		{t.Context(), time.Now(), "/a", 503, false, "ready in 1h0m0s\n"},
		{t.Context(), time.Now().Add(-time.Hour), "/healthz", 200, false, "ok\n"},
		{ended, time.Now().Add(-time.Hour), "/healthz", 200, true, "ok\n"},
		{t.Context(), time.Time{}, "/slow?bytes=250&for=1ms", 200, false, strings.Repeat(".", 250)},
		{t.Context(), time.Time{}, "/slow?bytes=7&for=0s", 200, false, "......."},
		{t.Context(), time.Time{}, "/slow?bytes=0&for=1s", 400, false, `bytes="0": write a number from 1 to 1073741824` + "\n"},
		{t.Context(), time.Time{}, "/slow?bytes=1&for=2h", 400, false, `for="2h": write a duration up to 1h0m0s` + "\n"},
	} {
		rec := httptest.NewRecorder()
		w.handler(c.ctx, c.began).ServeHTTP(rec, httptest.NewRequest("GET", c.path, nil))
		if rec.Code != c.code || rec.Body.String() != c.body || (rec.Header().Get("Connection") == "close") != c.close {
			t.Errorf("%s: %d %q %v", c.path, rec.Code, rec.Body.String(), rec.Header())
		}
	}
}
