package ca

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// authority is a leader that signs for one node, in virtual time.
type authority struct {
	t    testing.TB
	root Root
	id   Identity

	// mu guards: the rest.
	mu    sync.Mutex
	asked []time.Time // when
	fail  int         // so many requests are refused from now on
	hang  bool        // requests are not answered at all
	sign  func(csr []byte) ([]byte, error)
	skew  time.Duration // of the node's wall clock
}

// now is the node's wall clock; timers do not follow its skew.
func (a *authority) now() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return time.Now().Add(a.skew)
}

// set changes how it answers from now on.
func (a *authority) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
}

// times are the moments of the requests.
func (a *authority) times() []time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.asked)
}

// pauses are the distances between the requests.
func (a *authority) pauses() []time.Duration {
	var out []time.Duration
	at := a.times()
	for i := 1; i < len(at); i++ {
		out = append(out, at[i].Sub(at[i-1]))
	}
	return out
}

var errNoLeader = errors.New("no leader")

func (a *authority) Sign(ctx context.Context, csr []byte) ([]byte, error) {
	a.mu.Lock()
	a.asked = append(a.asked, time.Now())
	hang, refuse, sign := a.hang, a.fail > 0, a.sign
	if refuse && !hang {
		a.fail--
	}
	a.mu.Unlock()
	switch {
	case hang:
		<-ctx.Done()
		return nil, ctx.Err()
	case refuse:
		return nil, errNoLeader
	}
	return sign(csr)
}

// journal is a log that can be read while it is written.
type journal struct {
	// mu guards: text.
	mu   sync.Mutex
	text strings.Builder
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// renewal is a running Renewal of a node whose certificate was signed at the
// beginning of its bubble's time.
type renewal struct {
	*authority
	creds *Credentials
	dir   string
	log   journal
	run   *Renewal
	end   func() error // stops Run and gives its result
}

// start begins Run and lets its first look happen.
func (r *renewal) start() {
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan error, 1) // the one result of Run
	go func() { done <- r.run.Run(ctx) }()
	r.end = sync.OnceValue(func() error { cancel(); return <-done })
	synctest.Wait()
}

// inBubble makes a Renewal for f, which starts it; age is that of the certificate.
func inBubble(t *testing.T, jitter, age time.Duration, f func(t *testing.T, r *renewal)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		root, err := NewRoot("test", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		r := &renewal{dir: filepath.Join(t.TempDir(), "pki")}
		r.authority = &authority{t: t, root: root, id: Identity{weft.NewID(), weft.RoleWorker, weft.NewID()}}
		r.sign = func(csr []byte) ([]byte, error) { return Sign(r.root, csr, r.id, r.now()) }
		first := signed(t, root, r.id, time.Now().Add(-age))
		if r.creds, err = NewCredentials(first, r.now); err != nil {
			t.Fatal(err)
		}
		if err := Save(r.dir, first); err != nil {
			t.Fatal(err)
		}
		r.run, err = NewRenewal(RenewalConfig{
			Credentials: r.creds, Dir: r.dir, Sign: r.Sign, Log: slog.New(slog.NewTextHandler(&r.log, nil)),
			Jitter: func() float64 { return float64(jitter) / float64((Lifetime+backdate)/10) },
		})
		if err != nil {
			t.Fatal(err)
		}
		f(t, r)
		if err := r.end(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// serial tells certificates apart.
func (r *renewal) serial() *big.Int { return r.creds.current.Load().Leaf.SerialNumber }

// onDisk is the serial of the certificate that the next start would use.
func (r *renewal) onDisk() *big.Int {
	r.t.Helper()
	b, err := Load(r.dir)
	if err != nil {
		r.t.Fatal(err)
	}
	c, err := NewCredentials(b, time.Now)
	if err != nil {
		r.t.Fatal(err)
	}
	return c.current.Load().Leaf.SerialNumber
}

// after lets everything happen that is due within d.
func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

const day = 24 * time.Hour

// TestRenewalMoment: at half of the certificate's life, moved by the jitter of
// each certificate, not a moment sooner or later, and for every certificate anew.
func TestRenewalMoment(t *testing.T) {
	const life = Lifetime + backdate
	for _, jitter := range []time.Duration{0, 3 * day, 8 * day} {
		inBubble(t, jitter, 0, func(t *testing.T, r *renewal) {
			begin, first := time.Now(), r.serial()
			r.start()
			due := life*9/20 + jitter - backdate
			after(due - 3*time.Second)
			if len(r.times()) != 0 {
				t.Fatalf("asked after %s, half of its life is at %s", r.times()[0].Sub(begin), due)
			}
			after(4 * time.Second)
			if len(r.times()) != 1 || !near(r.times()[0].Sub(begin), due) {
				t.Fatalf("asked %v, want once, after %s", r.times(), due)
			}
			second := r.serial()
			if second.Cmp(first) == 0 || r.onDisk().Cmp(second) != 0 {
				t.Error("the new certificate is not in use and on disk")
			}
			if _, end := r.creds.Validity(); !near(time.Until(end), Lifetime) {
				t.Errorf("the new certificate lives for %s", time.Until(end))
			}
			after(due + time.Hour)
			if p := r.pauses(); len(p) != 1 || !near(p[0], due) {
				t.Errorf("the next certificate was renewed after %v, want %s", p, due)
			}
			if r.serial().Cmp(second) == 0 {
				t.Error("the second renewal changed nothing")
			}
		})
	}
}

// near allows for the second that a test goes beyond a moment, and for the rounding
// of a certificate's times to seconds and of a jitter to a float.
func near(a, b time.Duration) bool { return (a - b).Abs() <= 2*time.Second }

// TestRenewalAtStart: a node that was off for long asks as soon as it starts, and
// then waits for half of the life of what it got.
func TestRenewalAtStart(t *testing.T) {
	inBubble(t, 0, 60*day, func(t *testing.T, r *renewal) {
		r.start()
		if len(r.times()) != 1 || !r.times()[0].Equal(time.Now()) || r.creds.Expired() != nil {
			t.Fatalf("asked %v, now it is %s", r.times(), time.Now())
		}
		after(30 * day)
		if len(r.times()) != 1 {
			t.Errorf("asked again after %v", r.pauses())
		}
	})
}

// TestRenewalBackoff: failures are repeated at growing pauses, and a success makes
// the next failure a first one again.
func TestRenewalBackoff(t *testing.T) {
	inBubble(t, 0, 60*day, func(t *testing.T, r *renewal) {
		first := r.serial()
		r.fail = 11
		r.start()
		want := []time.Duration{10 * time.Second, 20 * time.Second, 40 * time.Second, 80 * time.Second, 160 * time.Second, 320 * time.Second,
			640 * time.Second, 1280 * time.Second, 30 * time.Minute, 30 * time.Minute, 30 * time.Minute}
		after(2 * time.Hour)
		if r.serial().Cmp(first) != 0 || r.onDisk().Cmp(first) != 0 {
			t.Error("a failed renewal changed the certificate")
		}
		after(time.Hour)
		if got := r.pauses(); !slices.Equal(got, want) {
			t.Errorf("pauses %v, want %v", got, want)
		}
		if r.serial().Cmp(first) == 0 {
			t.Fatal("the twelfth try should have worked")
		}
		r.set(func() { r.asked, r.fail = nil, 2 })
		after(50 * day)
		if got := r.pauses(); !slices.Equal(got, want[:2]) {
			t.Errorf("after a success: pauses %v, want %v", got, want[:2])
		}
		if err := r.end(); err != nil {
			t.Error(err)
		}
		text := r.log.String()
		if n := strings.Count(text, "renew certificate"); n != 13 || !strings.Contains(text, "no leader") || !strings.Contains(text, "next_try=20s") {
			t.Errorf("13 failures, the log tells of %d:\n%s", n, text)
		}
		if n := strings.Count(text, "certificate renewed"); n != 2 {
			t.Errorf("2 renewals, the log tells of %d", n)
		}
	})
}

// TestRetryPause: pauses only grow and stay within their bounds.
func TestRetryPause(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 1<<30).Draw(t, "failures")
		a, b := retryPause(n), retryPause(n+1)
		if a < renewRetryMin || b > renewRetryMax || b < a || b > 2*a {
			t.Fatalf("%d failures: %s, then %s", n, a, b)
		}
	})
}

// TestRenewalIsUsed: connections that begin after a renewal show the new
// certificate, in both directions; one that stands keeps its own.
func TestRenewalIsUsed(t *testing.T) {
	inBubble(t, 0, 0, func(t *testing.T, r *renewal) {
		peerID := Identity{weft.NewID(), weft.RoleManager, r.id.Cluster}
		peer, err := NewCredentials(signed(t, r.root, peerID, time.Now()), time.Now)
		if err != nil {
			t.Fatal(err)
		}
		// The configurations that a daemon makes once.
		dial, serve := r.creds.ClientConfig(ProtoGRPC, Peer{Manager: true}), r.creds.ServerConfig()
		shown := func() (client, server *big.Int, c *tls.Conn) {
			t.Helper()
			_, seen := connect(t, peer.ServerConfig(), dial)
			c, _ = connect(t, serve, peer.ClientConfig(ProtoGRPC, Peer{Node: r.id.Node}))
			return peerSerial(seen), peerSerial(c), seen
		}
		r.start()
		first := r.serial()
		c, s, standing := shown()
		if c.Cmp(first) != 0 || s.Cmp(first) != 0 {
			t.Fatal("the first certificate is not in use")
		}
		after(50 * day)
		second := r.serial()
		if second.Cmp(first) == 0 {
			t.Fatal("no renewal within 50 days")
		}
		if c, s, _ := shown(); c.Cmp(second) != 0 || s.Cmp(second) != 0 {
			t.Errorf("connections show %v as client, %v as server, want %v", c, s, second)
		}
		if peerSerial(standing).Cmp(first) != 0 {
			t.Error("a connection changed its certificate")
		}
	})
}

func peerSerial(c *tls.Conn) *big.Int {
	return c.ConnectionState().PeerCertificates[0].SerialNumber
}

// connect runs a handshake over a pipe and gives both ends; the test's end closes
// them.
func connect(t *testing.T, server, client *tls.Config) (c, s *tls.Conn) {
	t.Helper()
	a, b := net.Pipe()
	c, s = tls.Client(a, client), tls.Server(b, server)
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	if err := errors.Join(c.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return c, s
}

// TestRenewalIsSavedFirst: what a crash would lose is not used.
func TestRenewalIsSavedFirst(t *testing.T) {
	inBubble(t, 0, 60*day, func(t *testing.T, r *renewal) {
		// A folder that cannot be written.
		if err := errors.Join(os.Rename(r.dir, r.dir+".away"), os.WriteFile(r.dir, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		first := r.serial()
		r.start()
		if len(r.times()) != 1 || r.serial().Cmp(first) != 0 {
			t.Errorf("asked %d times; a certificate that was not saved is in use: %v", len(r.times()), r.serial().Cmp(first) != 0)
		}
		if err := errors.Join(os.Remove(r.dir), os.Rename(r.dir+".away", r.dir)); err != nil {
			t.Fatal(err)
		}
		after(renewRetryMin)
		if r.serial().Cmp(first) == 0 || r.onDisk().Cmp(r.serial()) != 0 {
			t.Error("the second try should have been saved and used")
		}
	})
}

// TestRenewalRefusesForeignCertificates: an answer that is not this node's changes
// nothing, in memory and on disk.
func TestRenewalRefusesForeignCertificates(t *testing.T) {
	for name, sign := range map[string]func(r *renewal, csr []byte) ([]byte, error){
		"another node": func(r *renewal, csr []byte) ([]byte, error) {
			return Sign(r.root, csr, Identity{weft.NewID(), r.id.Role, r.id.Cluster}, time.Now())
		},
		"another role": func(r *renewal, csr []byte) ([]byte, error) {
			return Sign(r.root, csr, Identity{r.id.Node, weft.RoleManager, r.id.Cluster}, time.Now())
		},
		"another key":       func(r *renewal, _ []byte) ([]byte, error) { return signed(r.t, r.root, r.id, time.Now()).Cert, nil },
		"another authority": func(r *renewal, csr []byte) ([]byte, error) { return Sign(newRoot(r.t), csr, r.id, testNow) },
		"nothing":           func(*renewal, []byte) ([]byte, error) { return nil, nil },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, 0, 60*day, func(t *testing.T, r *renewal) {
				good := r.sign
				r.sign = func(csr []byte) ([]byte, error) { return sign(r, csr) }
				first := r.serial()
				r.start()
				if len(r.times()) != 1 || r.serial().Cmp(first) != 0 || r.onDisk().Cmp(first) != 0 {
					t.Fatalf("asked %d times; in use %v, on disk %v, want %v", len(r.times()), r.serial(), r.onDisk(), first)
				}
				r.set(func() { r.sign = good })
				after(renewRetryMin)
				if r.serial().Cmp(first) == 0 {
					t.Error("the next answer was not taken")
				}
			})
		})
	}
}

// TestRenewalEndsWithItsContext: while it waits, while it is asking, and without
// a word of failure.
func TestRenewalEndsWithItsContext(t *testing.T) {
	for name, age := range map[string]time.Duration{"waiting": 0, "asking": 60 * day} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, 0, age, func(t *testing.T, r *renewal) {
				r.hang = true
				r.start()
				if want := age > 0; (len(r.times()) == 1) != want {
					t.Fatalf("asked %d times", len(r.times()))
				}
				begin := time.Now()
				if err := r.end(); err != nil || !time.Now().Equal(begin) {
					t.Errorf("Run ended with %v after %s", err, time.Since(begin))
				}
				if text := r.log.String(); text != "" {
					t.Errorf("the end was logged: %s", text)
				}
				asked := len(r.times())
				after(100 * day)
				if len(r.times()) != asked {
					t.Error("it asked after its end")
				}
			})
		})
	}
}

// TestRenewalIsNotHeldUp by a leader that does not answer.
func TestRenewalIsNotHeldUp(t *testing.T) {
	inBubble(t, 0, 60*day, func(t *testing.T, r *renewal) {
		r.hang = true
		first := r.serial()
		r.start()
		r.set(func() { r.hang = false })
		after(renewTimeout + renewRetryMin)
		if p := r.pauses(); !slices.Equal(p, []time.Duration{renewTimeout + renewRetryMin}) || r.serial().Cmp(first) == 0 {
			t.Errorf("pauses %v, renewed %v", p, r.serial().Cmp(first) != 0)
		}
	})
}

// TestExpiredCertificate: it is said at once, with the date and what to do, and
// again with each try; a leader that signs all the same ends it.
func TestExpiredCertificate(t *testing.T) {
	inBubble(t, 0, 100*day, func(t *testing.T, r *renewal) {
		r.fail = 3
		r.start()
		err := r.creds.Expired()
		_, end := r.creds.Validity()
		if !errors.Is(err, weft.ErrUnavailable) {
			t.Fatalf("an expired certificate is %v", err)
		}
		for _, want := range []string{"expired on " + end.UTC().Format("2006-01-02 15:04:05 UTC"), "swarm leave --force", "clock"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not say %q", err, want)
			}
		}
		after(renewRetryMin)
		text := r.log.String()
		if n := strings.Count(text, "level=ERROR msg=\"the node's certificate has expired\""); n != 2 || !strings.Contains(text, "swarm leave --force") || !strings.Contains(text, "no leader") {
			t.Errorf("2 tries, the log tells of %d:\n%s", n, text)
		}
		after(time.Hour)
		if err := r.creds.Expired(); err != nil || !strings.Contains(r.log.String(), "certificate renewed") {
			t.Errorf("after the fourth try: %v", err)
		}
	})
	// The last second counts.
	now := testNow
	c, err := NewCredentials(signed(t, newRoot(t), Identity{weft.NewID(), weft.RoleWorker, weft.NewID()}, testNow), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []struct {
		after time.Duration
		want  bool
	}{{0, false}, {Lifetime, false}, {Lifetime + time.Second, true}} {
		now = testNow.Add(k.after)
		if err := c.Expired(); (err != nil) != k.want {
			t.Errorf("%s after its signing: %v", k.after, err)
		}
	}
}

// TestRenewalSeesTheClockJump: a host that slept finds out within an hour, though
// no timer ran meanwhile.
func TestRenewalSeesTheClockJump(t *testing.T) {
	inBubble(t, 0, 0, func(t *testing.T, r *renewal) {
		r.start()
		after(90 * time.Minute)
		r.set(func() { r.skew = 60 * day })
		after(renewLook)
		if len(r.times()) != 1 {
			t.Fatalf("asked %d times within %s of the jump", len(r.times()), renewLook)
		}
		if _, end := r.creds.Validity(); end.Sub(r.now()) < Lifetime-renewLook {
			t.Errorf("the new certificate ends %s", end)
		}
	})
}

// TestRenewalNearTheAuthoritysEnd: certificates grow short there and are due when
// they come; the leader is not asked without a pause.
func TestRenewalNearTheAuthoritysEnd(t *testing.T) {
	inBubble(t, 0, 60*day, func(t *testing.T, r *renewal) {
		r.start()
		r.set(func() { r.asked, r.skew = nil, rootLifetime-12*time.Hour })
		after(11 * time.Hour)
		if n := len(r.times()); n < 2 || n > 12 || slices.Min(r.pauses()) < renewLook {
			t.Errorf("asked %d times in 11 hours, pauses %v", n, r.pauses())
		}
		if err := r.creds.Expired(); err != nil {
			t.Error(err)
		}
	})
}

func TestRenewalConfig(t *testing.T) {
	root := newRoot(t)
	c := credentials(t, root, Identity{weft.NewID(), weft.RoleWorker, weft.NewID()}, testNow, testNow)
	good := RenewalConfig{Credentials: c, Dir: "pki", Sign: (&authority{}).Sign, Log: slog.New(slog.DiscardHandler)}
	if _, err := NewRenewal(good); err != nil {
		t.Errorf("a whole configuration: %v", err)
	}
	for name, drop := range map[string]func(*RenewalConfig){
		"Credentials": func(c *RenewalConfig) { c.Credentials = nil }, "Dir": func(c *RenewalConfig) { c.Dir = "" },
		"Sign": func(c *RenewalConfig) { c.Sign = nil }, "Log": func(c *RenewalConfig) { c.Log = nil },
	} {
		cfg := good
		drop(&cfg)
		if _, err := NewRenewal(cfg); !errors.Is(err, weft.ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: %v", name, err)
		}
	}
}
