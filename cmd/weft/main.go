// Command weft is the whole program: the daemon, its command line, the
// container supervisor that is linked in, the demonstration image's server and
// the lab. It reads flags, composes the packages and turns errors into exit
// codes; it decides nothing that a package could decide.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/agent/runtime/containerd"
	"github.com/weftnet/weft/vxlan/wg"
)

func main() {
	// One binary is several programs: the name by which it was called tells
	// the supervisor, its shim and its logger from the command line.
	if handled, code := containerd.Main(context.Background(), os.Args); handled {
		os.Exit(code)
	}
	if handled, code := wg.Main(os.Args); handled {
		os.Exit(code)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// exitError ends the program with a code of its own; its text, if any, was
// printed already.
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

// run executes one command line and returns the exit code: 0, 1 for an error,
// or the code of the command that was carried out in a container.
func run(ctx context.Context, args []string) int {
	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var exit exitError
	if code, ok := labExitCode(err); ok {
		return code
	}
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.code
	default:
		fmt.Fprintln(os.Stderr, "weft:", errorText(err))
		return 1
	}
}

func newRoot() *cobra.Command {
	c := &connection{}
	root := &cobra.Command{
		Use:           "weft",
		Short:         "One network and one scheduler over many Linux hosts",
		Version:       weft.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
		// Flags stand for the word that they follow: `weft -H DAEMON service create
		// --host NAME:ADDRESS`, whose --host is another.
		TraverseChildren: true,
	}
	root.PersistentFlags().StringVarP(&c.host, "host", "H", "", "daemon socket (default $DOCKER_HOST, else unix://"+defaultSocket+")")
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	root.AddCommand(
		newDaemonCommand(),
		newSwarmCommand(c), newNodeCommand(c), newNetworkCommand(c), newServiceCommand(c),
		newImageCommand(c), newPsCommand(c), newExecCommand(c), newLogsCommand(c),
		newNetCommand(c), newInfoCommand(c), newVersionCommand(c),
		newLabCommand(log), newWhoamiCommand(),
	)
	refuseUnknown(root)
	return root
}

// refuseUnknown makes an error of a word that no command below c has; cobra
// itself would print the help and succeed.
func refuseUnknown(c *cobra.Command) {
	if c.HasSubCommands() && !c.Runnable() {
		c.Args = cobra.NoArgs
		c.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	}
	for _, sub := range c.Commands() {
		refuseUnknown(sub)
	}
}
