package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime"
)

// Logs implements runtime.Logs. A task that never had a log on this node:
// weft.ErrNotFound. Following ends when the container has ended; while the
// server restarts it goes on, since the log does not depend on it.
func (d *Driver) Logs(ctx context.Context, task weft.ID, o weft.LogOptions, f func(weft.LogRecord) error) error {
	if err := checkTask(task); err != nil {
		return err
	}
	if _, err := os.Stat(d.logDir(task)); err != nil {
		return fmt.Errorf("log of task %s: %w", task, weft.ErrNotFound)
	}
	read := runtime.LogRead{LogOptions: o, Task: task, Node: d.cfg.Node}
	if o.Follow {
		wctx, cancel := context.WithCancel(ctx)
		ended, waited := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(waited)
			if _, err := d.Wait(wctx, task); err == nil || errors.Is(err, weft.ErrNotFound) {
				close(ended)
			}
		}()
		defer func() { cancel(); <-waited }()
		read.Ended = ended
	}
	return runtime.ReadLog(ctx, d.logDir(task), read, f)
}

// RemoveLogs implements runtime.Logs.
func (d *Driver) RemoveLogs(ctx context.Context, task weft.ID) error {
	if err := checkTask(task); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := os.RemoveAll(d.logDir(task)); err != nil {
		return fmt.Errorf("remove log of task %s: %w", task, err)
	}
	if err := os.Remove(d.dataDir("tasks", string(task))); err != nil && !errors.Is(err, os.ErrNotExist) && !isNotEmpty(err) {
		return fmt.Errorf("remove log of task %s: %w", task, err)
	}
	return nil
}

func isNotEmpty(err error) bool { return errors.Is(err, syscall.ENOTEMPTY) }
