package ca

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/weftnet/weft"
)

// Times of a renewal; our own choices. Half of a certificate's life, a month and a
// half, is left for it to succeed.
const (
	// renewLook is the longest time between two looks at the clock. A timer
	// does not see that the host slept or that its clock was set, and an hour
	// is nothing to a certificate.
	renewLook = time.Hour
	// renewRetryMin is the pause after a first failure, which is usually an
	// election; it doubles up to renewRetryMax.
	renewRetryMin = 10 * time.Second
	renewRetryMax = 30 * time.Minute
	// renewTimeout bounds one request: the search for the leader takes 3 s.
	renewTimeout = 30 * time.Second
)

// RenewalConfig is what a Renewal stands on. All fields are required but Jitter.
type RenewalConfig struct {
	// Credentials get the new certificate, and their clock is the one that
	// counts.
	Credentials *Credentials
	// Dir is where Save keeps the identity.
	Dir string
	// Sign has the cluster sign a request (PEM) and answers the certificate
	// (PEM). It is called by Run alone and must end with its context.
	Sign func(ctx context.Context, csr []byte) (cert []byte, err error)
	// Jitter draws from [0, 1), once per certificate: see RenewAt. nil = at
	// random.
	Jitter func() float64
	Log    *slog.Logger
}

// Renewal replaces a node's certificate in good time. Make it with NewRenewal and
// run it once.
//
//	      ┌── not due yet: until it is, an hour at most ──┐
//	look ─┼── replaced: an hour ──────────────────────────┼─► look
//	      └── failed: 10 s, doubled up to half an hour ───┘
type Renewal struct {
	cfg      RenewalConfig
	jitter   float64 // of the certificate in use
	failures int     // since the last success
}

// NewRenewal checks the configuration; what is missing is weft.ErrInvalid.
func NewRenewal(cfg RenewalConfig) (*Renewal, error) {
	for _, f := range []struct {
		name    string
		missing bool
	}{
		{"Credentials", cfg.Credentials == nil}, {"Dir", cfg.Dir == ""}, {"Sign", cfg.Sign == nil}, {"Log", cfg.Log == nil},
	} {
		if f.missing {
			return nil, fmt.Errorf("renewal of certificates: %s is missing: %w", f.name, weft.ErrInvalid)
		}
	}
	if cfg.Jitter == nil {
		cfg.Jitter = rand.Float64
	}
	return &Renewal{cfg: cfg}, nil
}

// Run renews until ctx ends and then returns nil. Nothing ends it before: a node
// that cannot renew goes on with what it has, tries again and says so in the log.
func (r *Renewal) Run(ctx context.Context) error {
	r.jitter = r.cfg.Jitter()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		timer.Reset(r.look(ctx))
	}
}

// look renews if it is time and says when to look again.
func (r *Renewal) look(ctx context.Context) time.Duration {
	notBefore, notAfter := r.cfg.Credentials.Validity()
	if left := RenewAt(notBefore, notAfter, r.jitter).Sub(r.cfg.Credentials.now()); left > 0 {
		return min(left, renewLook)
	}
	err := r.renew(ctx)
	if ctx.Err() != nil {
		return 0
	}
	if err != nil {
		r.failures++
		pause := retryPause(r.failures)
		if expired := r.cfg.Credentials.Expired(); expired != nil {
			r.cfg.Log.Error("the node's certificate has expired", "expires", notAfter, "next_try", pause, weft.KeyErr, fmt.Errorf("%w; renewing it failed too: %w", expired, err))
		} else {
			r.cfg.Log.Error("renew certificate", "expires", notAfter, "next_try", pause, weft.KeyErr, err)
		}
		return pause
	}
	r.failures, r.jitter = 0, r.cfg.Jitter()
	_, notAfter = r.cfg.Credentials.Validity()
	r.cfg.Log.Info("certificate renewed", "expires", notAfter)
	// Not sooner, whatever was signed: near the end of the authority's life a
	// new certificate is due as soon as it is there.
	return renewLook
}

// retryPause is the time to the next try after that many failures in a row.
func retryPause(failures int) time.Duration {
	pause := renewRetryMin
	for i := 1; i < failures && pause < renewRetryMax; i++ {
		pause *= 2
	}
	return min(pause, renewRetryMax)
}

// renew gets a certificate for a new key and puts both to use.
func (r *Renewal) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	key, csr, err := NewCSR()
	if err != nil {
		return err
	}
	cert, err := r.cfg.Sign(ctx, csr)
	if err != nil {
		return err
	}
	return r.cfg.Credentials.replace(Bundle{Cert: cert, Key: key, CA: r.cfg.Credentials.CA()}, r.cfg.Dir)
}
