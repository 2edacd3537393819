package ingress

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Split is an engine of two: one has the service addresses, the other the
// published ports and the gateway. It has the name of the first. It starts
// nothing and keeps nothing; its methods may be called as those of both may.
type Split struct {
	Services  Engine
	Published Engine
}

var _ Engine = Split{}

// Note is what both engines say of this host.
func (s Split) Note() string {
	var notes []string
	for _, e := range []Engine{s.Services, s.Published} {
		if n, ok := e.(interface{ Note() string }); ok && n.Note() != "" {
			notes = append(notes, n.Note())
		}
	}
	return strings.Join(notes, "; ")
}

// Unanswered are the published ports that the second engine does not answer.
func (s Split) Unanswered(t Table) []Unanswered { return UnansweredBy(s.Published, t) }

// Name implements Engine.
func (s Split) Name() string { return s.Services.Name() }

// Probe implements Engine: both must work.
func (s Split) Probe(ctx context.Context) error {
	return errors.Join(s.Services.Probe(ctx), s.Published.Probe(ctx))
}

// Apply implements Engine. An error of one does not hold up the other.
func (s Split) Apply(ctx context.Context, t Table) error {
	published := t
	published.Networks = nil
	if e, ok := s.Services.(interface{ BalancesSockets() bool }); ok && e.BalancesSockets() {
		published.Ends = slices.Clone(t.Ends)
		for i := range published.Ends {
			published.Ends[i].Direct = true
		}
	}
	return errors.Join(s.Services.Apply(ctx, Table{Networks: t.Networks}), s.Published.Apply(ctx, published))
}

// Stats implements Engine: published ports are the second engine's to count.
func (s Split) Stats(ctx context.Context) (Stats, error) {
	stats, err := s.Published.Stats(ctx)
	if err != nil {
		return stats, fmt.Errorf("engine %s: %w", s.Published.Name(), err)
	}
	return stats, nil
}

// Close implements Engine.
func (s Split) Close(ctx context.Context) error {
	return errors.Join(s.Services.Close(ctx), s.Published.Close(ctx))
}
