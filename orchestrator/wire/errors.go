package wire

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/weftnet/weft"
)

// NotLeader is what Control, Dispatcher and Membership answer on a manager
// that does not lead. Nothing of the call was carried out. The caller's Client
// follows it.
type NotLeader struct {
	Leader netip.AddrPort // cluster port of the leader; invalid = unknown
}

func (e NotLeader) Error() string {
	if !e.Leader.IsValid() {
		return "this manager is not the leader and knows of none"
	}
	return "this manager is not the leader; it is " + e.Leader.String()
}

// Unwrap makes it weft.ErrUnavailable for those who do not follow it.
func (e NotLeader) Unwrap() error { return weft.ErrUnavailable }

// asNotLeader finds a NotLeader in err, returned by value or by pointer.
func asNotLeader(err error) (NotLeader, bool) {
	var p *NotLeader
	if errors.As(err, &p) {
		return *p, true
	}
	var v NotLeader
	ok := errors.As(err, &v)
	return v, ok
}

// errorTrailer carries a wireError beside gRPC's own status. Its presence also
// tells an answer of the called method from a failure of the transport, which
// gRPC's codes cannot.
const errorTrailer = "weft-error-bin"

// maxErrorText bounds an error's text, which travels in HTTP/2 headers.
const maxErrorText = 8 << 10

// wireError is an error on the wire.
type wireError struct {
	Text      string
	Sentinels []string // names of sentinels, those of sentinels()
	NotLeader bool
	Leader    netip.AddrPort // with NotLeader
}

type sentinel struct {
	name string // on the wire: never changed
	err  error
	code codes.Code // for gRPC's own tools; nothing here reads it
}

// sentinels in order of precedence of their codes.
func sentinels() []sentinel {
	return []sentinel{
		{"not-found", weft.ErrNotFound, codes.NotFound},
		{"conflict", weft.ErrConflict, codes.AlreadyExists},
		{"out-of-sequence", weft.ErrOutOfSequence, codes.Aborted},
		{"invalid", weft.ErrInvalid, codes.InvalidArgument},
		{"forbidden", weft.ErrForbidden, codes.PermissionDenied},
		{"unsupported", weft.ErrUnsupported, codes.Unimplemented},
		{"unavailable", weft.ErrUnavailable, codes.Unavailable},
		{"canceled", context.Canceled, codes.Canceled},
		{"deadline", context.DeadlineExceeded, codes.DeadlineExceeded},
	}
}

// remoteError is an error that came over the wire: the far side's text, and
// errors.Is for its sentinels.
type remoteError struct {
	text string
	is   []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.is }

// textError is an error whose text does not repeat its sentinels'.
func textError(text string, is ...error) error { return &remoteError{text: text, is: is} }

func toWire(err error) (wireError, codes.Code) {
	w, code := wireError{Text: err.Error()}, codes.Unknown
	if len(w.Text) > maxErrorText {
		w.Text = w.Text[:maxErrorText] + "…"
	}
	if nl, ok := asNotLeader(err); ok {
		w.NotLeader, w.Leader = true, nl.Leader
	}
	for _, s := range slices.Backward(sentinels()) {
		if errors.Is(err, s.err) {
			w.Sentinels, code = append(w.Sentinels, s.name), s.code
		}
	}
	slices.Reverse(w.Sentinels)
	return w, code
}

func fromWire(w wireError) error {
	if w.NotLeader {
		return NotLeader{Leader: w.Leader}
	}
	e := &remoteError{text: w.Text}
	for _, s := range sentinels() {
		if slices.Contains(w.Sentinels, s.name) {
			e.is = append(e.is, s.err)
		}
	}
	return e
}

// fromTrailer is the far side's error, or nil when the trailer has none: then
// the transport failed.
func fromTrailer(md metadata.MD) error {
	v := md.Get(errorTrailer)
	if len(v) != 1 {
		return nil
	}
	var w wireError
	if decode([]byte(v[0]), &w) != nil {
		return nil
	}
	return fromWire(w)
}
