package main

import (
	"context"
	"time"

	"github.com/weftnet/weft/lab"
)

// labupBench: how long a person waits for a cluster.
func labupBench() benchmark {
	const (
		up, ready     = "up", "all nodes ready"
		bare, cluster = "daemons, no cluster", "weft lab up"
	)
	return benchmark{
		Name:  "labup",
		About: "weft lab up of three hosts until all have joined (up), against the same hosts and daemons without a cluster until each of them lists its containers",
		Prepare: func(_ context.Context, r *rig) (plan, error) {
			f, err := r.field("")
			if err != nil {
				return plan{}, err
			}
			return plan{
				Metrics: []metric{{up, "s", true}, {ready, "s", false}},
				Baseline: variant{bare, func(ctx context.Context) (sample, error) {
					out := sample{}
					err := f.once(ctx, func() error {
						t0 := time.Now()
						err := f.lab.Up(ctx, lab.Spec{Hosts: hosts})
						if err == nil {
							err = f.awaitContainers(ctx, 0)
						}
						out[up] = time.Since(t0).Seconds()
						return err
					}, func() error { return nil })
					return out, err
				}},
				Cases: []variant{{cluster, func(ctx context.Context) (sample, error) {
					out := sample{}
					t0 := time.Now()
					err := f.once(ctx, func() error {
						err := f.up(ctx, hosts)
						out[up] = time.Since(t0).Seconds()
						return err
					}, func() error {
						err := f.awaitReady(ctx, hosts)
						out[ready] = time.Since(t0).Seconds()
						return err
					})
					return out, err
				}}},
				Limits: []limit{{Case: cluster, Metric: up, Most: 5}},
			}, nil
		},
	}
}
