package main

import (
	"strings"
	"testing"
)

type fixedNames map[string]string

func (f fixedNames) name(task string) string { return f[task] }

func TestTaggedLines(t *testing.T) {
	const details = "com.docker.swarm.node.id=n1,com.docker.swarm.service.id=s1,com.docker.swarm.task.id=t1"
	for _, c := range []struct {
		name       string
		timestamps bool
		in         []string
		want       string
	}{
		{"one line", false, []string{details + " hello world\n"}, "web.1@h1                 | hello world\n"},
		{"in pieces", false, []string{details + " he", "llo\n" + details, " again\n"}, "web.1@h1                 | hello\nweb.1@h1                 | again\n"},
		{"with a time", true, []string{"2026-01-02T03:04:05Z " + details + " hello\n"}, "2026-01-02T03:04:05Z web.1@h1                 | hello\n"},
		{"without an end", false, []string{details + " prompt> "}, "web.1@h1                 | prompt> "},
		{"without details", false, []string{"plain line\n"}, "plain line\n"},
	} {
		var out strings.Builder
		w := &taggedLines{out: &out, names: fixedNames{"t1": "web.1@h1"}, timestamps: c.timestamps}
		for _, piece := range c.in {
			if n, err := w.Write([]byte(piece)); err != nil || n != len(piece) {
				t.Fatalf("%s: write %d, %v", c.name, n, err)
			}
		}
		if err := w.flush(); err != nil {
			t.Fatal(err)
		}
		if out.String() != c.want {
			t.Errorf("%s: %q, want %q", c.name, out.String(), c.want)
		}
	}
}
