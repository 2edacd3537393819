package main

import (
	"fmt"
	"math"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"github.com/weftnet/weft"
)

// healthFlags are the words of `service create` and `update` about health checks,
// Docker's. What is not given leaves what is there.
type healthFlags struct {
	command                                       string
	interval, timeout, startPeriod, startInterval time.Duration
	retries                                       int
	none                                          bool
}

func (h *healthFlags) install(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&h.command, "health-cmd", "", "command line that finds out in the container whether it can serve")
	f.DurationVar(&h.interval, "health-interval", 0, "pause between two runs of it (default 30s)")
	f.DurationVar(&h.timeout, "health-timeout", 0, "longest time of one run (default 30s)")
	f.DurationVar(&h.startPeriod, "health-start-period", 0, "time in which failures do not count until one run has succeeded")
	f.DurationVar(&h.startInterval, "health-start-interval", 0, "pause between two runs in the start period (default 5s)")
	f.IntVar(&h.retries, "health-retries", 0, "failures in a row that make it unhealthy (default 3)")
	f.BoolVar(&h.none, "no-healthcheck", false, "run no check, not even the image's")
}

// change makes what was typed of the check that is there.
func (h *healthFlags) change(cmd *cobra.Command, old *container.HealthConfig) (*container.HealthConfig, error) {
	var typed []string
	for _, name := range []string{"health-cmd", "health-interval", "health-timeout", "health-start-period", "health-start-interval", "health-retries"} {
		if cmd.Flags().Changed(name) {
			typed = append(typed, name)
		}
	}
	switch {
	case h.none && len(typed) > 0:
		return nil, fmt.Errorf("--no-healthcheck does not go with --%s", typed[0])
	case h.none:
		return &container.HealthConfig{Test: []string{weft.HealthNone}}, nil
	case len(typed) == 0:
		return old, nil
	}
	out := &container.HealthConfig{}
	if old != nil {
		*out = *old
	}
	if len(out.Test) > 0 && out.Test[0] == weft.HealthNone {
		out.Test = nil
	}
	for _, name := range typed {
		switch name {
		case "health-cmd":
			out.Test = nil // the image's again
			if h.command != "" {
				out.Test = []string{weft.HealthShell, h.command}
			}
		case "health-interval":
			out.Interval = h.interval
		case "health-timeout":
			out.Timeout = h.timeout
		case "health-start-period":
			out.StartPeriod = h.startPeriod
		case "health-start-interval":
			out.StartInterval = h.startInterval
		case "health-retries":
			out.Retries = h.retries
		}
	}
	return out, nil
}

// policyFlags are the words about an update, or about the way back.
type policyFlags struct {
	of             string // "update" or "rollback"
	parallelism    uint64
	delay, monitor time.Duration
	order, action  string
	ratio          float64
}

func (p *policyFlags) install(cmd *cobra.Command, of, actions string) {
	p.of = of
	f := cmd.Flags()
	f.Uint64Var(&p.parallelism, of+"-parallelism", 1, "tasks replaced at a time in "+p.article()+", 0 = all")
	f.DurationVar(&p.delay, of+"-delay", 0, "time between two groups")
	f.DurationVar(&p.monitor, of+"-monitor", 0, "a new task that ends within this time has failed (default 5s)")
	f.StringVar(&p.order, of+"-order", "", `"stop-first" or "start-first"`)
	f.StringVar(&p.action, of+"-failure-action", "", "what happens when more tasks fail than are tolerated: "+actions)
	f.Float64Var(&p.ratio, of+"-max-failure-ratio", 0, "how many of all may fail, from 0 to 1")
}

func (p *policyFlags) article() string {
	if p.of == "update" {
		return "an update"
	}
	return "a rollback"
}

// change makes what was typed of the policy that is there; nil is the default.
func (p *policyFlags) change(cmd *cobra.Command, old *swarm.UpdateConfig) (*swarm.UpdateConfig, error) {
	out := &swarm.UpdateConfig{Parallelism: weft.DefaultUpdate.Parallelism}
	if old != nil {
		*out = *old
	}
	changed := false
	set := func(name string, f2 func()) {
		if cmd.Flags().Changed(p.of + name) {
			f2()
			changed = true
		}
	}
	set("-parallelism", func() { out.Parallelism = p.parallelism })
	set("-delay", func() { out.Delay = p.delay })
	set("-monitor", func() { out.Monitor = p.monitor })
	set("-order", func() { out.Order = swarm.UpdateOrder(p.order) })
	set("-failure-action", func() { out.FailureAction = swarm.FailureAction(p.action) })
	set("-max-failure-ratio", func() { out.MaxFailureRatio = float32(p.ratio) })
	if !changed {
		return old, nil
	}
	if math.IsNaN(p.ratio) { // JSON has no such number
		return nil, fmt.Errorf("--%s-max-failure-ratio: write a number from 0 to 1", p.of)
	}
	return out, nil
}

// policies are all of these flags.
type policies struct {
	health           healthFlags
	update, rollback policyFlags
}

func (p *policies) install(cmd *cobra.Command) {
	p.health.install(cmd)
	p.update.install(cmd, "update", `"pause", "continue" or "rollback"`)
	p.rollback.install(cmd, "rollback", `"pause" or "continue"`)
}

// change applies them to a service.
func (p *policies) change(cmd *cobra.Command, spec *swarm.ServiceSpec) (err error) {
	c := spec.TaskTemplate.ContainerSpec
	if c.Healthcheck, err = p.health.change(cmd, c.Healthcheck); err != nil {
		return err
	}
	if spec.UpdateConfig, err = p.update.change(cmd, spec.UpdateConfig); err != nil {
		return err
	}
	spec.RollbackConfig, err = p.rollback.change(cmd, spec.RollbackConfig)
	return err
}

func serviceRollback(c *connection) *cobra.Command {
	var w waiting
	var detach bool
	cmd := &cobra.Command{
		Use: "rollback [OPTIONS] SERVICE", Short: "Give a service its previous specification back", Args: cobra.ExactArgs(1),
		Long: "Give a service its previous specification back: the two change places, so that\n" +
			"doing it again brings the newer one back. The --rollback options of the previous\n" +
			"specification say how its tasks are replaced.",
	}
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "do not wait until the rollback is done")
	cmd.Flags().BoolVarP(&w.quiet, "quiet", "q", false, "no progress")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		s, err := api.ServiceInspect(cmd.Context(), args[0], client.ServiceInspectOptions{})
		if err != nil {
			return err
		}
		o := client.ServiceUpdateOptions{Version: s.Service.Version, Spec: s.Service.Spec, Rollback: "previous"}
		if _, err := api.ServiceUpdate(cmd.Context(), s.Service.ID, o); err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), args[0])
		if detach {
			return nil
		}
		w.rollback = true
		return waitConverged(cmd, api, s.Service.ID, w)
	})
	return cmd
}
