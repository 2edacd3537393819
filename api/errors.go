package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/moby/moby/api/types/common"

	"github.com/weftnet/weft"
)

// sequenceText is what Docker answers to an update of an object that has
// changed meanwhile; its clients look for "update out of sequence".
const sequenceText = "rpc error: code = Unknown desc = update out of sequence"

// statusOf is the one table from sentinel to HTTP status. 499 is for a client
// that has gone; nobody reads it but the log.
func statusOf(err error) int {
	var tooLarge *http.MaxBytesError
	table := []struct {
		err    error
		status int
	}{
		{weft.ErrOutOfSequence, http.StatusBadRequest},
		{weft.ErrInvalid, http.StatusBadRequest},
		{weft.ErrForbidden, http.StatusForbidden},
		{weft.ErrNotFound, http.StatusNotFound},
		{weft.ErrConflict, http.StatusConflict},
		{weft.ErrUnsupported, http.StatusNotImplemented},
		{weft.ErrUnavailable, http.StatusServiceUnavailable},
		{context.DeadlineExceeded, http.StatusServiceUnavailable},
		{context.Canceled, 499},
	}
	if errors.As(err, &tooLarge) {
		return http.StatusRequestEntityTooLarge
	}
	for _, t := range table {
		if errors.Is(err, t.err) {
			return t.status
		}
	}
	return http.StatusInternalServerError
}

// messageOf is the text a client sees: the error without the bare sentinel
// that gave it its status ("…: invalid argument"), and the fixed sentences of
// package weft exactly, however many calls have wrapped them on the way.
func messageOf(err error) string {
	msg := err.Error()
	switch {
	case errors.Is(err, weft.ErrOutOfSequence):
		return sequenceText
	case errors.Is(err, weft.ErrUnavailable) && strings.Contains(msg, weft.NoLeader):
		return weft.NoLeader
	case errors.Is(err, weft.ErrUnavailable) && strings.Contains(msg, weft.NotInCluster):
		return weft.NotInCluster
	case errors.Is(err, weft.ErrNotFound):
		// "service web: not found" needs its sentinel; Docker's own
		// sentence does not.
		if strings.HasPrefix(msg, "No such ") {
			msg = strings.TrimSuffix(msg, ": "+weft.ErrNotFound.Error())
		}
		return msg
	}
	return weft.Text(err)
}

// writeError answers err. The content type is "application/json" exactly: with
// a charset behind it the docker command prints the raw JSON.
func writeError(w http.ResponseWriter, err error) int {
	status := statusOf(err)
	writeJSON(w, status, common.ErrorResponse{Message: messageOf(err)})
	return status
}

// writeJSON answers v. A value that cannot be encoded is a programmer's
// mistake: every type here is a plain struct of Docker's API.
func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		status = http.StatusInternalServerError
		body, _ = json.Marshal(common.ErrorResponse{Message: "encode answer: " + err.Error()})
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // the client has gone: there is nobody to tell
}

func invalidf(format string, a ...any) error {
	return fmt.Errorf(format+": %w", append(a, weft.ErrInvalid)...)
}

func unsupportedf(format string, a ...any) error {
	return fmt.Errorf(format+": %w", append(a, weft.ErrUnsupported)...)
}

// notFoundError says "no such KIND: REF" as Docker does, without the sentinel's
// text behind it.
type notFoundError struct{ text string }

func (e notFoundError) Error() string { return e.text }
func (notFoundError) Unwrap() error   { return weft.ErrNotFound }

func notFoundf(format string, a ...any) error {
	return notFoundError{fmt.Sprintf(format, a...)}
}

// maxFaults of one request are named: a range of ports can be wrong ten thousand
// times.
const maxFaults = 20

// joined is several faults of one request; all have the same sentinel.
func joined(sentinel error, faults []string) error {
	if len(faults) == 0 {
		return nil
	}
	text := strings.Join(faults[:min(maxFaults, len(faults))], "; ")
	if n := len(faults) - maxFaults; n > 0 {
		text += fmt.Sprintf("; and %d more", n)
	}
	return fmt.Errorf("%s: %w", text, sentinel)
}
