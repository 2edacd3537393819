package orchestrator

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// raftLogger hands the lines of hashicorp/raft to slog. Raft's
// info is our debug: elections are logged by the manager itself, in its words.
type raftLogger struct {
	// ctx is the manager's: hclog has none to pass, slog reads only values.
	ctx  context.Context
	l    *slog.Logger
	name string
	args []any
}

func newRaftLogger(ctx context.Context, l *slog.Logger, name string) hclog.Logger {
	return &raftLogger{ctx: ctx, l: l.With("part", name), name: name}
}

func (r *raftLogger) level(l hclog.Level) slog.Level {
	switch l {
	case hclog.Error:
		return slog.LevelError
	case hclog.Warn:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Log implements hclog.Logger.
func (r *raftLogger) Log(level hclog.Level, msg string, args ...any) {

	if !r.l.Enabled(r.ctx, r.level(level)) {
		return
	}
	for i, a := range args {
		// hclog's own wrapper for printf-like values.
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
	}
	r.l.Log(r.ctx, r.level(level), msg, args...)
}

func (r *raftLogger) Trace(string, ...any)             {}
func (r *raftLogger) Debug(msg string, args ...any)    { r.Log(hclog.Debug, msg, args...) }
func (r *raftLogger) Info(msg string, args ...any)     { r.Log(hclog.Info, msg, args...) }
func (r *raftLogger) Warn(msg string, args ...any)     { r.Log(hclog.Warn, msg, args...) }
func (r *raftLogger) Error(msg string, args ...any)    { r.Log(hclog.Error, msg, args...) }
func (r *raftLogger) IsTrace() bool                    { return false }
func (r *raftLogger) IsDebug() bool                    { return true }
func (r *raftLogger) IsInfo() bool                     { return true }
func (r *raftLogger) IsWarn() bool                     { return true }
func (r *raftLogger) IsError() bool                    { return true }
func (r *raftLogger) ImpliedArgs() []any               { return r.args }
func (r *raftLogger) Name() string                     { return r.name }
func (r *raftLogger) SetLevel(hclog.Level)             {} // slog's handler decides
func (r *raftLogger) GetLevel() hclog.Level            { return hclog.Debug }
func (r *raftLogger) ResetNamed(n string) hclog.Logger { return newRaftLogger(r.ctx, r.l, n) }
func (r *raftLogger) Named(n string) hclog.Logger {
	return &raftLogger{ctx: r.ctx, l: r.l, name: r.name + "." + n, args: r.args}
}

func (r *raftLogger) With(args ...any) hclog.Logger {
	return &raftLogger{ctx: r.ctx, l: r.l.With(args...), name: r.name, args: append(append([]any(nil), r.args...), args...)}
}

func (r *raftLogger) StandardLogger(o *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(r.StandardWriter(o), "", 0)
}

func (r *raftLogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer {
	return lineWriter{r}
}

type lineWriter struct{ r *raftLogger }

func (w lineWriter) Write(p []byte) (int, error) {
	w.r.Info(string(p))
	return len(p), nil
}
