package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

func newPsCommand(c *connection) *cobra.Command {
	var all, quiet, noTrunc bool
	cmd := &cobra.Command{Use: "ps", Short: "List the containers of this host", Args: cobra.NoArgs}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "ended ones too")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "do not cut")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
		list, err := api.ContainerList(cmd.Context(), client.ContainerListOptions{All: all})
		if err != nil {
			return err
		}
		rows := [][]string{{"CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "NAMES"}}
		for _, k := range list.Items {
			id, image, command := short(k.ID), imageName(k.Image), k.Command
			if noTrunc {
				id, image = k.ID, k.Image
			} else if len(command) > 20 {
				command = command[:19] + "…"
			}
			if quiet {
				fmt.Fprintln(cmd.OutOrStdout(), id)
				continue
			}
			rows = append(rows, []string{id, image, `"` + command + `"`, ago(time.Unix(k.Created, 0)), k.Status, strings.TrimPrefix(strings.Join(k.Names, ","), "/")})
		}
		if quiet {
			return nil
		}
		return table(cmd.OutOrStdout(), rows)
	})
	return cmd
}

func newLogsCommand(c *connection) *cobra.Command {
	o := client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true}
	cmd := &cobra.Command{Use: "logs [OPTIONS] CONTAINER", Short: "Print what a container of this host wrote", Args: cobra.ExactArgs(1)}
	installLogFlags(cmd, &o.Follow, &o.Timestamps, &o.Tail, &o.Since)
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		k, err := api.ContainerInspect(cmd.Context(), args[0], client.ContainerInspectOptions{})
		if err != nil {
			return err
		}
		r, err := api.ContainerLogs(cmd.Context(), k.Container.ID, o)
		if err != nil {
			return err
		}
		defer r.Close()
		if k.Container.Config != nil && k.Container.Config.Tty {
			_, err = io.Copy(cmd.OutOrStdout(), r)
		} else {
			_, err = stdcopy.StdCopy(cmd.OutOrStdout(), cmd.ErrOrStderr(), r)
		}
		return endOfStream(cmd, err)
	})
	return cmd
}

func installLogFlags(cmd *cobra.Command, follow, timestamps *bool, tail, since *string) {
	f := cmd.Flags()
	f.BoolVarP(follow, "follow", "f", false, "go on with what comes")
	f.BoolVarP(timestamps, "timestamps", "t", false, "print the time of each line")
	f.StringVarP(tail, "tail", "n", "all", "number of lines from the end")
	f.StringVar(since, "since", "", "lines since a time or a duration ago (42m)")
}

// endOfStream is the error of a stream, but nil when it ended because the user
// interrupted it.
func endOfStream(cmd *cobra.Command, err error) error {
	if cmd.Context().Err() != nil || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func newExecCommand(c *connection) *cobra.Command {
	var o client.ExecCreateOptions
	var interactive bool
	cmd := &cobra.Command{Use: "exec [OPTIONS] CONTAINER COMMAND [ARG...]", Short: "Run a command in a container of this host", Args: cobra.MinimumNArgs(2)}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&interactive, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&o.TTY, "tty", "t", false, "give it a terminal")
	f.StringVarP(&o.User, "user", "u", "", "user or uid[:gid]")
	f.StringVarP(&o.WorkingDir, "workdir", "w", "", "working directory")
	f.StringArrayVarP(&o.Env, "env", "e", nil, "environment variable KEY=VALUE")
	f.BoolVar(&o.Privileged, "privileged", false, "all capabilities")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		o.Cmd, o.AttachStdin, o.AttachStdout, o.AttachStderr = args[1:], interactive, true, true
		if ws, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ); o.TTY && err == nil {
			o.ConsoleSize = client.ConsoleSize{Height: uint(ws.Row), Width: uint(ws.Col)}
		}
		created, err := api.ExecCreate(cmd.Context(), args[0], o)
		if err != nil {
			return err
		}
		if err := attachExec(cmd, api, created.ID, o); err != nil {
			return err
		}
		res, err := api.ExecInspect(cmd.Context(), created.ID, client.ExecInspectOptions{})
		if err != nil {
			return err
		}
		if res.ExitCode != 0 {
			return exitError{res.ExitCode}
		}
		return nil
	})
	return cmd
}

// attachExec joins our streams with the process's until its output ends.
func attachExec(cmd *cobra.Command, api *client.Client, id string, o client.ExecCreateOptions) error {
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	res, err := api.ExecAttach(ctx, id, client.ExecAttachOptions{TTY: o.TTY})
	if err != nil {
		return err
	}
	defer res.Close()
	if o.TTY {
		restore, err := rawTerminal(int(os.Stdin.Fd()))
		if err != nil {
			return err
		}
		defer restore()
	}
	var g errgroup.Group
	if o.TTY {
		g.Go(func() error { return followSize(ctx, api, id) })
	}
	if o.AttachStdin {
		// Not waited for: a read of the terminal cannot be interrupted, and
		// it ends with the process.
		go func() {
			io.Copy(res.Conn, cmd.InOrStdin())
			res.CloseWrite()
		}()
	}
	if o.TTY {
		_, err = io.Copy(cmd.OutOrStdout(), res.Reader)
	} else {
		_, err = stdcopy.StdCopy(cmd.OutOrStdout(), cmd.ErrOrStderr(), res.Reader)
	}
	cancel()
	if gerr := g.Wait(); err == nil {
		err = gerr
	}
	return err
}

// followSize tells the process the size of the terminal, now and at each
// change.
func followSize(ctx context.Context, api *client.Client, id string) error {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	defer signal.Stop(changed)
	for {
		if ws, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ); err == nil {
			_, err := api.ExecResize(ctx, id, client.ExecResizeOptions{Height: uint(ws.Row), Width: uint(ws.Col)})
			if err != nil && ctx.Err() == nil {
				return fmt.Errorf("resize terminal: %w", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// rawTerminal puts a terminal into raw mode (termios(3), cfmakeraw) and
// returns what puts it back. Standard input that is no terminal is refused, as
// Docker does.
func rawTerminal(fd int) (restore func(), err error) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, errors.New("the input device is not a terminal: leave out -t")
	}
	raw := *old
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag &^= unix.CSIZE | unix.PARENB
	raw.Cflag |= unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("set terminal to raw mode: %w", err)
	}
	return func() { unix.IoctlSetTermios(fd, unix.TCSETS, old) }, nil
}
