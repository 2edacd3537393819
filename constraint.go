package weft

import (
	"fmt"
	"strings"
)

// Constraint is one placement rule of a service: "node.labels.disk!=ssd".
type Constraint struct {
	Key   string // as written; label names keep their case
	Not   bool   // != instead of ==
	Value string
}

// nodeLabelPrefix starts the keys that name a label of the node.
const nodeLabelPrefix = "node.labels."

// constraintKeys is for error texts.
const constraintKeys = "node.id, node.hostname, node.role, node.platform.os, node.platform.arch or node.labels.NAME"

// ParseConstraint reads "KEY==VALUE" or "KEY!=VALUE"; blanks around each part
// are ignored, as Docker does. Errors wrap ErrInvalid, name the whole text and
// say what would be right.
func ParseConstraint(s string) (Constraint, error) {
	fail := func(format string, args ...any) (Constraint, error) {
		return Constraint{}, fmt.Errorf("%w: constraint %q: %s", ErrInvalid, s, fmt.Sprintf(format, args...))
	}
	i := strings.IndexAny(s, "=!")
	if i < 0 || i+1 >= len(s) || s[i+1] != '=' {
		return fail("write KEY==VALUE or KEY!=VALUE")
	}
	c := Constraint{Key: strings.TrimSpace(s[:i]), Not: s[i] == '!', Value: strings.TrimSpace(s[i+2:])}
	if c.Value == "" {
		return fail("the value is missing")
	}
	if j := strings.IndexFunc(c.Value, badConstraintValue); j >= 0 {
		return fail("the value contains %q", c.Value[j:j+1])
	}
	if label, ok := strings.CutPrefix(c.Key, nodeLabelPrefix); ok {
		if label == "" || strings.ContainsFunc(label, badConstraintLabel) {
			return fail("%q is not a label name", label)
		}
		return c, nil
	}
	switch c.Key {
	case "node.id", "node.hostname", "node.platform.os", "node.platform.arch":
		return c, nil
	case "node.role":
		if !strings.EqualFold(c.Value, "manager") && !strings.EqualFold(c.Value, "worker") {
			return fail("node.role is manager or worker")
		}
		return c, nil
	}
	if strings.HasPrefix(c.Key, "engine.labels.") {
		return fail("engine labels are not supported: label the node and use node.labels.NAME")
	}
	return fail("unknown key %q: use %s", c.Key, constraintKeys)
}

func badConstraintLabel(r rune) bool { return r <= ' ' || r == 0x7f || r == '=' || r == '!' }

// badConstraintValue: "a == b == c" or a stray operator is a mistake, not a value.
func badConstraintValue(r rune) bool { return r < ' ' || r == 0x7f || r == '=' || r == '!' }

// String is the constraint as ParseConstraint reads it.
func (c Constraint) String() string {
	if c.Not {
		return c.Key + "!=" + c.Value
	}
	return c.Key + "==" + c.Value
}

// Matches reports whether the node satisfies the constraint. Values compare
// without regard to case; a label that is not there differs from every value
// (both as Docker does). Go's and uname's words for an architecture are one:
// amd64 is x86_64, arm64 is aarch64.
func (c Constraint) Matches(n *Node) bool {
	var have string
	want := c.Value
	switch c.Key {
	case "node.id":
		have = string(n.ID)
	case "node.hostname":
		have = n.Description.Hostname
	case "node.role":
		have = n.Spec.Role.String()
	case "node.platform.os":
		have = n.Description.OS
	case "node.platform.arch":
		have, want = unameArch(n.Description.Arch), unameArch(want)
	default:
		var ok bool
		if have, ok = n.Spec.Labels[strings.TrimPrefix(c.Key, nodeLabelPrefix)]; !ok {
			return c.Not
		}
	}
	return strings.EqualFold(have, want) != c.Not
}

func unameArch(s string) string {
	switch strings.ToLower(s) {
	case "amd64":
		return "x86_64"
	case "arm64":
		return "aarch64"
	}
	return s
}

// Constraints are rules that must all hold.
type Constraints []Constraint

// ParseConstraints reads all constraints of a service; the first error wins.
func ParseConstraints(list []string) (Constraints, error) {
	out := make(Constraints, 0, len(list))
	for _, s := range list {
		c, err := ParseConstraint(s)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// Match reports whether the node satisfies every constraint.
func (cs Constraints) Match(n *Node) bool {
	for _, c := range cs {
		if !c.Matches(n) {
			return false
		}
	}
	return true
}
