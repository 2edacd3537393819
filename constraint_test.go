package weft

import (
	"errors"
	"strings"
	"testing"
)

func TestConstraintMatches(t *testing.T) {
	n := &Node{ID: "n1", Spec: NodeSpec{Role: RoleManager, Labels: map[string]string{"disk": "SSD", "Zone.a": "1"}},
		Description: NodeDescription{Hostname: "h1", OS: "linux", Arch: "x86_64"}}
	for _, c := range []struct {
		s    string
		want bool
	}{
		{"node.id==n1", true}, {"node.id!=n1", false}, {"node.hostname == H1", true}, {"node.role==Manager", true}, {"node.role!=worker", true},
		{"node.platform.os==linux", true}, {"node.platform.arch==amd64", true}, {"node.platform.arch!=x86_64", false}, {"node.platform.arch==aarch64", false},
		{"node.labels.disk==ssd", true}, {"node.labels.disk!=hdd", true}, {"node.labels.Zone.a==1", true}, {"node.labels.zone.a==1", false},
		{"node.labels.none==x", false}, {"node.labels.none!=x", true},
	} {
		p, err := ParseConstraint(c.s)
		if err != nil {
			t.Errorf("%s: %v", c.s, err)
			continue
		}
		if got := p.Matches(n); got != c.want {
			t.Errorf("%s: got %v", c.s, got)
		}
		if q, err := ParseConstraint(p.String()); err != nil || q != p {
			t.Errorf("%s: reads back as %v, %v", c.s, q, err)
		}
	}
	both, err := ParseConstraints([]string{"node.id==n1", "node.role==worker"})
	if err != nil || both.Match(n) || !both[:1].Match(n) || !(Constraints{}).Match(n) {
		t.Errorf("all must hold: %v, %v", both, err)
	}
}

func TestConstraintErrors(t *testing.T) {
	for s, want := range map[string]string{
		"":                            "write KEY==VALUE",
		"node.id":                     "write KEY==VALUE",
		"node.id=x":                   "write KEY==VALUE",
		"node.id==":                   "value is missing",
		"node.id==a==b":               `contains "="`,
		"node.labels.==x":             "not a label name",
		"node.labels.a b==x":          "not a label name",
		"node.role==boss":             "manager or worker",
		"engine.labels.os==x":         "use node.labels.NAME",
		"node.ip==10.0.0.1":           `unknown key "node.ip"`,
		"==x":                         `unknown key ""`,
		"node.id!":                    "write KEY==VALUE",
		"node.hostname==\x00" + "abc": "contains",
	} {
		_, err := ParseConstraint(s)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", s, err, want)
		}
	}
}

func FuzzParseConstraint(f *testing.F) {
	for _, s := range []string{"node.id==a", "node.labels.x != y", "a=b", "!="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := ParseConstraint(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if d, err := ParseConstraint(c.String()); err != nil || c != d {
			t.Fatalf("%q: %+v reads back as %+v, %v", s, c, d, err)
		}
		inverse := c
		inverse.Not = !c.Not
		n := &Node{ID: "a", Spec: NodeSpec{Labels: map[string]string{"x": "y"}}}
		if c.Matches(n) == inverse.Matches(n) {
			t.Fatalf("%q: == and != agree", s)
		}
	})
}
