package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/weftnet/weft/lab"
)

// labFlags are common to all verbs of `weft lab`.
type labFlags struct {
	name     string
	logLevel string
}

// open makes the Lab of the flags; the hosts run this very executable.
func (f *labFlags) open(log *slog.Logger) (*lab.Lab, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find own executable: %w", err)
	}
	cfg := lab.DefaultConfig()
	cfg.Name, cfg.LogLevel, cfg.Binary, cfg.Cluster, cfg.Log = f.name, f.logLevel, self, labCluster{}, log
	return lab.New(cfg)
}

// newLabCommand is `weft lab`: N hosts on this machine. exec and client return
// the *exec.ExitError of the command they ran: main exits with its code and
// prints nothing.
func newLabCommand(log *slog.Logger) *cobra.Command {
	f := &labFlags{}
	c := &cobra.Command{
		Use:   "lab",
		Short: "Lay several hosts on this machine",
		Long: `Lay several hosts on this machine: each is a network namespace with a daemon,
a data folder and a link of its own. Nothing of the machine's own network is
touched. Two labs with different names live side by side.`,
	}
	c.PersistentFlags().StringVar(&f.name, "name", lab.DefaultName, "name of the lab")
	c.PersistentFlags().StringVar(&f.logLevel, "daemon-log-level", "info", "log level of daemons that are started: debug, info, warn or error")
	c.AddCommand(
		labUp(f, log), labLs(f, log), labDown(f, log), labEnv(f, log), labExec(f, log), labClient(f, log),
		labCut(f, log), labHeal(f, log), labKill(f, log), labStart(f, log), labMTU(f, log), labImpair(f, log), labDemo(f, log),
	)
	return c
}

func labUp(f *labFlags, log *slog.Logger) *cobra.Command {
	var s lab.Spec
	c := &cobra.Command{
		Use:   "up",
		Short: "Make the lab, or bring it back after a reboot",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// A zero of lab.Spec means "as it is"; a zero typed is wrong.
			for name, v := range map[string]int{"hosts": s.Hosts, "managers": s.Managers, "mtu": s.MTU} {
				if cmd.Flags().Changed(name) && v < 1 {
					return fmt.Errorf("--%s %d: want a positive number", name, v)
				}
			}
			l, err := f.open(log)
			if err != nil {
				return err
			}
			t0 := time.Now()
			if err := l.Up(cmd.Context(), s); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "lab %s is up after %.1f s\n", f.name, time.Since(t0).Seconds())
			if err := printLab(cmd.Context(), cmd.OutOrStdout(), l); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "\nTo drive it with docker's or weft's command line:\n  eval $(weft lab env --name %s h1)\n", f.name)
			return nil
		},
	}
	c.Flags().IntVar(&s.Hosts, "hosts", 0, fmt.Sprintf("number of hosts (default %d, or as the lab is)", lab.DefaultHosts))
	c.Flags().IntVar(&s.Managers, "managers", 0, "number of managers: 1, 3, 5 or 7 (default 1, or as the lab is)")
	c.Flags().IntVar(&s.MTU, "mtu", 0, fmt.Sprintf("MTU of all links in bytes (default %d, or as the lab is)", lab.DefaultMTU))
	c.Flags().StringVar(&s.Underlay, "underlay", "", "what the hosts speak to each other: ipv4 (default), or ipv6, with no IPv4 address at all")
	c.Flags().StringVar(&s.OverlayEngine, "overlay-engine", "", "force the overlay engine of all hosts")
	c.Flags().StringVar(&s.ServiceEngine, "service-engine", "", "force the service engine of all hosts")
	c.Flags().StringVar(&s.EncryptionEngine, "encryption-engine", "", "force the engine of encrypted networks of all hosts")
	return c
}

func labLs(f *labFlags, log *slog.Logger) *cobra.Command {
	return &cobra.Command{
		Use: "ls", Short: "Show the hosts of the lab", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			return printLab(cmd.Context(), cmd.OutOrStdout(), l)
		},
	}
}

func printLab(ctx context.Context, out io.Writer, l *lab.Lab) error {
	hosts, cuts, err := l.List(ctx)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, "HOST\tADDRESS\tDAEMON\tCLUSTER\tROLE\tNODE\tMTU")
	for _, h := range hosts {
		daemon, state, role, node, mtu := "not running", "-", "-", "-", "-"
		switch {
		case h.Down:
			daemon = "killed"
		case h.PID != 0:
			daemon = fmt.Sprintf("pid %d", h.PID)
		}
		if h.Info.State != "" {
			state, node, role = string(h.Info.State), h.Info.Node.Short(), "worker"
		}
		if h.Info.Manager {
			role = "manager"
		}
		if h.Err != "" {
			state = h.Err
		}
		if h.MTU != 0 {
			mtu = fmt.Sprint(h.MTU)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", h.Name, h.Addr, daemon, state, role, node, mtu)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, c := range cuts {
		fmt.Fprintf(out, "cut: %s does not reach %s\n", c.From, c.To)
	}
	return nil
}

func labDown(f *labFlags, log *slog.Logger) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Remove the lab and everything on it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			return removeLab(cmd.Context(), l)
		},
	}
}

// removeLab takes the lab down and checks that nothing is left.
func removeLab(ctx context.Context, l *lab.Lab) error {
	trace, err := l.Observe()
	if err != nil {
		return err
	}
	if err := l.Down(ctx); err != nil {
		return err
	}
	left, err := trace.Leftovers()
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("the lab is down but left behind:\n  %s", strings.Join(left, "\n  "))
	}
	return nil
}

func labEnv(f *labFlags, log *slog.Logger) *cobra.Command {
	return &cobra.Command{
		Use: "env HOST", Short: "Print the environment that points docker and weft at a host", Args: cobra.ExactArgs(1),
		Example: "  eval $(weft lab env h1)",
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			h, err := l.Host(args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "export DOCKER_HOST=unix://%s\n", h.Paths.Socket)
			return err
		},
	}
}

func labExec(f *labFlags, log *slog.Logger) *cobra.Command {
	return &cobra.Command{
		Use: "exec HOST -- COMMAND [ARGUMENT...]", Short: "Run a command in a host's network", Args: cobra.MinimumNArgs(2),
		Long: `Run a command in a host's network namespace. Folders and processes are the
machine's own. The exit code is the command's.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			h, err := l.Host(args[0])
			if err != nil {
				return err
			}
			return runAttached(cmd, l, h.Paths.NetNS, args[1:])
		},
	}
}

func labClient(f *labFlags, log *slog.Logger) *cobra.Command {
	return &cobra.Command{
		Use: "client -- COMMAND [ARGUMENT...]", Short: "Run a command outside the cluster, at " + lab.ClientAddr.String(), Args: cobra.MinimumNArgs(1),
		Example: "  weft lab client -- weft whoami get http://10.99.181.1:8080/",
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			return runAttached(cmd, l, l.ClientNetNS(), args)
		},
	}
}

// runAttached runs args with the terminal of cmd.
func runAttached(cmd *cobra.Command, l *lab.Lab, netns string, args []string) error {
	c := exec.CommandContext(cmd.Context(), args[0], args[1:]...)
	c.Stdin, c.Stdout, c.Stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
	return l.RunIn(netns, c)
}

func labCut(f *labFlags, log *slog.Logger) *cobra.Command {
	var oneWay bool
	c := &cobra.Command{
		Use: "cut HOST HOST", Short: "Partition two hosts: their packets vanish", Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			return l.Cut(args[0], args[1], oneWay)
		},
	}
	c.Flags().BoolVar(&oneWay, "one-way", false, "only from the first host to the second")
	return c
}

func labHeal(f *labFlags, log *slog.Logger) *cobra.Command {
	return &cobra.Command{
		Use: "heal", Short: "Undo all cuts", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			return l.Heal()
		},
	}
}

func labKill(f *labFlags, log *slog.Logger) *cobra.Command {
	var containerd bool
	c := &cobra.Command{
		Use: "kill HOST", Short: "Cut the power of a host, which stays down until 'start'", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			if containerd {
				return l.KillContainerd(args[0])
			}
			return l.Kill(cmd.Context(), args[0])
		},
	}
	c.Flags().BoolVar(&containerd, "containerd", false, "kill only the container supervisor of the host")
	return c
}

func labStart(f *labFlags, log *slog.Logger) *cobra.Command {
	var e lab.HostEngines
	c := &cobra.Command{
		Use: "start HOST", Short: "Start a killed host with the state it had", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			return l.Start(cmd.Context(), args[0], e)
		},
	}
	c.Flags().StringVar(&e.Overlay, "overlay-engine", "", "from now on force this overlay engine on the host; "+lab.AnyEngine+" = its daemon chooses")
	c.Flags().StringVar(&e.Service, "service-engine", "", "likewise the service engine")
	return c
}

func labMTU(f *labFlags, log *slog.Logger) *cobra.Command {
	return &cobra.Command{
		Use: "mtu HOST BYTES", Short: "Change the MTU of a host's link", Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			var mtu int
			if _, err := fmt.Sscanf(args[1], "%d", &mtu); err != nil || fmt.Sprint(mtu) != args[1] {
				return fmt.Errorf("mtu %q: want a number of bytes", args[1])
			}
			l, err := f.open(log)
			if err != nil {
				return err
			}
			return l.SetMTU(args[0], mtu)
		},
	}
}

func labImpair(f *labFlags, log *slog.Logger) *cobra.Command {
	var i lab.Impairment
	c := &cobra.Command{
		Use: "impair HOST", Short: "Delay and lose packets that a host sends", Args: cobra.ExactArgs(1),
		Long: `Delay and lose packets that a host sends. Without options its link is whole
again. The kernel needs netem.`,
		Example: "  weft lab impair --delay 100ms --loss 5 h1",
		RunE: func(_ *cobra.Command, args []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			return l.Impair(args[0], i)
		},
	}
	c.Flags().DurationVar(&i.Delay, "delay", 0, "how much later each packet leaves, up to 10s")
	c.Flags().Float64Var(&i.Loss, "loss", 0, "percent of packets that do not leave")
	return c
}

// labExitCode is the code that a command run in the lab ended with; ok is false
// when err is something else.
func labExitCode(err error) (code int, ok bool) {
	var e *exec.ExitError
	if !errors.As(err, &e) {
		return 0, false
	}
	if e.ExitCode() < 0 {
		return 128 + 9, true // killed by a signal, as shells count it
	}
	return e.ExitCode(), true
}
