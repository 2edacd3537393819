package gossip

import (
	"bytes"
	"log"
	"log/slog"
)

// serfLogger is a logger for serf and memberlist that hands their lines on to
// l. What they call info is news of members, which we tell ourselves, and their
// errors are mostly one peer's trouble; so everything is one level lower here.
func serfLogger(l *slog.Logger) *log.Logger { return log.New(levelWriter{l}, "", 0) }

type levelWriter struct{ log *slog.Logger }

// Write takes one line such as "[WARN] memberlist: …".
func (w levelWriter) Write(line []byte) (int, error) {
	text, tell := bytes.TrimSpace(line), w.log.Debug
	if rest, ok := bytes.CutPrefix(text, []byte("[")); ok {
		if name, tail, ok := bytes.Cut(rest, []byte("] ")); ok {
			text = tail
			switch string(name) {
			case "ERR":
				tell = w.log.Warn
			case "WARN":
				tell = w.log.Info
			}
		}
	}
	tell("membership library", "text", string(text))
	return len(line), nil
}
