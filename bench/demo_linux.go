package main

import (
	"context"
	"time"
)

// demoBench: how long the README's first command takes once it has been run.
func demoBench() benchmark {
	const (
		took     = "time"
		upDown   = "weft lab up and down"
		demoCase = "weft lab demo"
	)
	return benchmark{
		Name:  "demo",
		About: "weft lab demo, the whole story with every step checked, against making and removing a lab of three hosts",
		Prepare: func(ctx context.Context, r *rig) (plan, error) {
			f, err := r.field("")
			if err != nil {
				return plan{}, err
			}
			timed := func(ctx context.Context, commands ...[]string) (sample, error) {
				t0 := time.Now()
				for _, args := range commands {
					if _, err := f.cmd(ctx, args...); err != nil {
						// A demo that failed leaves its lab to be looked at.
						return nil, err
					}
				}
				return sample{took: time.Since(t0).Seconds()}, nil
			}
			demo := []string{"lab", "demo", "--name", f.name}
			// The first run reads the binary from disk; people see later ones.
			err = f.guarded(ctx, func() error {
				_, err := timed(ctx, demo)
				return err
			})
			if err != nil {
				return plan{}, err
			}
			return plan{
				Metrics: []metric{{took, "s", true}},
				Baseline: variant{upDown, func(ctx context.Context) (sample, error) {
					return timed(ctx, []string{"lab", "up", "--name", f.name}, []string{"lab", "down", "--name", f.name})
				}},
				Cases:  []variant{{demoCase, func(ctx context.Context) (sample, error) { return timed(ctx, demo) }}},
				Limits: []limit{{Case: demoCase, Metric: took, Most: 60}},
				Close:  f.down,
			}, nil
		},
	}
}
