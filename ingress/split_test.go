package ingress_test

import (
	"context"
	"testing"

	"github.com/weftnet/weft/ingress"
	"github.com/weftnet/weft/ingress/ingresstest"
)

// sockets is an engine that balances connections where they are made, or does not.
type sockets struct {
	ingress.Engine
	does bool
}

func (s sockets) BalancesSockets() bool { return s.does }

// got keeps the table that it was given.
type got struct {
	ingress.Engine
	table *ingress.Table
}

func (g got) Apply(ctx context.Context, t ingress.Table) error {
	*g.table = t
	return g.Engine.Apply(ctx, t)
}

// The backend's end is told how connections come, and the wish stays as it was.
func TestSplitTellsHowConnectionsCome(t *testing.T) {
	for _, does := range []bool{false, true} {
		wish := ingress.Table{Ends: []ingress.End{{Task: "web1"}, {Task: "web2"}}}
		var seen ingress.Table
		s := ingress.Split{Services: sockets{ingresstest.New(), does}, Published: got{ingresstest.New(), &seen}}
		if err := s.Apply(t.Context(), wish); err != nil {
			t.Fatal(err)
		}
		for i := range wish.Ends {
			if wish.Ends[i].Direct || seen.Ends[i].Direct != does {
				t.Errorf("sockets balanced %t: the wish says %+v, the end is told %+v", does, wish.Ends[i], seen.Ends[i])
			}
		}
	}
}

// leaves is an engine that leaves out all ports.
type leaves struct{ ingress.Engine }

func (leaves) Unanswered(t ingress.Table) (out []ingress.Unanswered) {
	for _, p := range t.Published {
		out = append(out, ingress.Unanswered{Published: p})
	}
	return out
}

// What is not answered is the second engine's to say.
func TestSplitTellsWhatIsNotAnswered(t *testing.T) {
	table := ingress.Table{Published: []ingress.Published{{Port: 80}}}
	for _, second := range []bool{false, true} {
		s := ingress.Split{Services: leaves{ingresstest.New()}, Published: ingresstest.New()}
		if second {
			s.Services, s.Published = s.Published, s.Services
		}
		if got := ingress.UnansweredBy(s, table); (len(got) == 1 && got[0].Port == 80) != second {
			t.Errorf("the second engine leaves out the port: %t, and Split tells %+v", second, got)
		}
	}
}
