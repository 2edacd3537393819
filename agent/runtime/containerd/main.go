package containerd

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	"github.com/containerd/containerd/v2/cmd/containerd/command"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"github.com/weftnet/weft/agent/runtime"
)

// Names by which weft's executable is started as something else. They are hard
// links (or copies) in a private directory: a shim finds itself again by
// os.Executable, and a symbolic link would lose the name there.
const (
	serverName = "weft-containerd"
	loggerName = "weft-logger"
	// shimName is what containerd looks for in PATH for the runtime
	// io.containerd.runc.v2 (containerd pkg/shim BinaryName).
	shimName = "containerd-shim-runc-v2"
)

// Main runs the containerd server, its shim or its logger when args[0] (os.Args
// as a whole is given) has the base name of one of them, and reports the exit
// code; handled is false for every other name. cmd/weft calls it first thing in
// main, before it looks at a flag. It blocks as long as the process shall live;
// the shim may end the process itself.
func Main(ctx context.Context, args []string) (handled bool, code int) {
	if len(args) == 0 {
		return false, 0
	}
	var err error
	switch filepath.Base(args[0]) {
	case serverName:
		err = command.App().Run(ctx, args)
	case shimName:
		shimMain(ctx)
	case loggerName:
		err = loggerMain(args[1:])
	default:
		return false, 0
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", filepath.Base(args[0]), err)
		return true, 1
	}
	return true, 0
}

// shimMain is containerd-shim-runc-v2's main. The shim starts every plugin of
// the global registry, where this executable has the server's: they are taken
// out and the one of the shim is put in.
func shimMain(ctx context.Context) {
	registry.Reset()
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			pp, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			ss, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			publisher, ok := pp.(shim.Publisher)
			if !ok {
				return nil, fmt.Errorf("shim publisher has type %T", pp)
			}
			down, ok := ss.(shutdown.Service)
			if !ok {
				return nil, fmt.Errorf("shim shutdown service has type %T", ss)
			}
			return task.NewTaskService(ic.Context, publisher, down)
		},
	})
	shim.RunShim(ctx, manager.NewShimManager(runtimeName))
}

// loggerMain is the other end of a container's output: stdout on descriptor 3,
// stderr on 4; a byte on 5 tells the shim that it may start the container
// (containerd core/runtime/v2/logging). It ends when both are closed, and
// outlives daemon and server: it ignores what would stop those.
func loggerMain(args []string) error {
	// The URI's query arrives as key, value, …
	if len(args) != 2 || args[0] != "dir" {
		return fmt.Errorf("usage: %s dir LOGDIR (started by the shim, never by hand)", loggerName)
	}
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	w, err := runtime.OpenLog(args[1], 0)
	if err != nil {
		return err
	}
	defer w.Close()
	ready := os.NewFile(5, "ready")
	if _, err := ready.Write([]byte{0}); err != nil {
		return fmt.Errorf("tell the shim that the logger is ready: %w", err)
	}
	if err := ready.Close(); err != nil {
		return fmt.Errorf("tell the shim that the logger is ready: %w", err)
	}
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, r := range []io.Reader{os.NewFile(3, "stdout"), os.NewFile(4, "stderr")} {
		wg.Go(func() { errs[i] = w.Copy(i == 1, r) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
