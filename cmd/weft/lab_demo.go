package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/lab"
)

// demoStepTimeout bounds each step. It is generous: under emulation, with a
// slow disk, a step takes many times what it takes on a plain machine.
const demoStepTimeout = 2 * time.Minute

// demo is the state that the steps hand on.
type demo struct {
	lab  *lab.Lab
	self string // own executable, for the outside client
	// overlay and service are forced engines, "" = the daemons' choice.
	overlay, service string
	hosts            []lab.Host
	api              map[string]*client.Client // by host name
	// nodes: host name to node id, and back.
	nodes map[string]weft.ID
	names map[weft.ID]string
	front demoNetwork
	back  demoNetwork
	web   []demoTask
	// callers run beside web on front, one per host: a task's calls to its
	// own service's address would prove nothing about the others.
	callers []demoTask
	lone    []demoTask
	vip     string // of web on front
}

// demoStep is one line of the table. run says what was seen.
type demoStep struct {
	title string
	run   func(*demo, context.Context) (string, error)
	look  string // what to look at when it fails
}

// demoSteps is the story of the README, in its order.
func demoSteps() []demoStep {
	const (
		logs  = "the daemons' logs: /var/lib/weft/lab/NAME/h*.log"
		tasks = "eval $(weft lab env --name NAME h1); weft service ps web"
	)
	return []demoStep{
		{"cluster formed", (*demo).formCluster, logs},
		{"two overlay networks", (*demo).createNetworks, "weft network ls"},
		{"service web 3/3", (*demo).createWeb, tasks},
		{"service caller 3/3", (*demo).createCaller, "weft service ps caller"},
		{"service lone 1/1", (*demo).createLone, "weft service ps lone"},
		{"ping between all pairs", (*demo).pingPairs, "weft lab exec --name NAME h1 -- ip -s link"},
		{"TCP by address", (*demo).tcpByAddress, tasks},
		{"TCP by name", (*demo).tcpByName, tasks},
		{"packets crossed VXLAN", (*demo).vxlanCounters, "the hidden namespaces: /run/weft/lab/NAME/h1/netns/"},
		{"networks are apart", (*demo).networksApart, "weft network inspect front back"},
		{"service address (VIP)", (*demo).serviceAddress, "weft service inspect web"},
		{"names of all tasks", (*demo).taskNames, logs},
		{"published port", (*demo).publishedPort, "weft lab client --name NAME -- weft whoami get http://HOST:8080/"},
		{"container killed", (*demo).killContainer, tasks},
		{"host killed", (*demo).killHost, tasks},
		{"host is back", (*demo).restartHost, "weft lab ls --name NAME"},
		{"services removed", (*demo).removeServices, "weft service ls; weft network ls"},
		{"gone without a trace", (*demo).removeAll, "weft lab down --name NAME"},
	}
}

func labDemo(f *labFlags, log *slog.Logger) *cobra.Command {
	d := &demo{}
	c := &cobra.Command{
		Use: "demo", Short: "Show and check the whole story, step by step", Args: cobra.NoArgs,
		Long: `Makes a lab of three hosts, runs services on it, checks each promise, breaks
things, and removes everything. The exit code is 0 only if every step held. After
a failure the lab is left as it is, to be looked at.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := f.open(log)
			if err != nil {
				return err
			}
			if _, err := l.Hosts(); !errors.Is(err, weft.ErrNotFound) {
				if err != nil {
					return err
				}
				return fmt.Errorf("lab %s exists; the demo makes its own: remove it with 'weft lab down --name %s' or give another --name: %w", f.name, f.name, weft.ErrConflict)
			}
			d.lab = l
			return runDemo(cmd.Context(), cmd.OutOrStdout(), d, f.name)
		},
	}
	c.Flags().StringVar(&d.overlay, "overlay-engine", "", "force the overlay engine of all hosts")
	c.Flags().StringVar(&d.service, "service-engine", "", "force the service engine of all hosts")
	return c
}

func runDemo(ctx context.Context, out io.Writer, d *demo, name string) error {
	defer d.close()
	steps := demoSteps()
	start := time.Now()
	fmt.Fprintf(out, "Three hosts on one machine, in a lab named %q.\n\n%-3s %-24s %8s   %s\n", name, "", "STEP", "TIME", "WHAT WAS SEEN")
	for i, s := range steps {
		t0 := time.Now()
		seen, err := runStep(ctx, d, s)
		took := time.Since(t0).Seconds()
		if err != nil {
			fmt.Fprintf(out, "%2d. %-24s %7.2fs   FAILED: %v\n", i+1, s.title, took, err)
			fmt.Fprintf(out, "\nThe lab is left standing. Look at: %s\nRemove it with: weft lab down --name %s\n", strings.ReplaceAll(s.look, "NAME", name), name)
			return fmt.Errorf("demo failed at step %d of %d (%s)", i+1, len(steps), s.title)
		}
		fmt.Fprintf(out, "%2d. %-24s %7.2fs   %s\n", i+1, s.title, took, seen)
	}
	fmt.Fprintf(out, "\nAll %d steps held, in %.1f s.\n", len(steps), time.Since(start).Seconds())
	return nil
}

func runStep(ctx context.Context, d *demo, s demoStep) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, demoStepTimeout)
	defer cancel()
	return s.run(d, ctx)
}

// close ends the connections to the daemons.
func (d *demo) close() {
	for _, c := range d.api {
		c.Close() // nothing is in flight: there is nothing to lose
	}
}
