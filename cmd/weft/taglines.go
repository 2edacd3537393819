package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

// taggedLines turns the details that the API puts in front of each line of a
// service's log ("com.docker.swarm.task.id=…,…") into the name of the task and
// its node, as Docker prints them.
type taggedLines struct {
	out        io.Writer
	names      interface{ name(task string) string }
	timestamps bool   // a time stands in front of the details
	rest       []byte // of the line that has not ended yet
}

// Write implements io.Writer. Lines may come in pieces.
func (t *taggedLines) Write(b []byte) (int, error) {
	t.rest = append(t.rest, b...)
	for {
		i := bytes.IndexByte(t.rest, '\n')
		if i < 0 {
			return len(b), nil
		}
		line := string(t.rest[:i+1])
		t.rest = t.rest[i+1:]
		if _, err := io.WriteString(t.out, t.tag(line)); err != nil {
			return 0, err
		}
	}
}

// flush prints a last line that has no end.
func (t *taggedLines) flush() error {
	if len(t.rest) == 0 {
		return nil
	}
	_, err := io.WriteString(t.out, t.tag(string(t.rest)))
	t.rest = nil
	return err
}

func (t *taggedLines) tag(line string) string {
	stamp := ""
	if t.timestamps {
		before, after, ok := strings.Cut(line, " ")
		if !ok {
			return line
		}
		stamp, line = before+" ", after
	}
	details, text, ok := strings.Cut(line, " ")
	if !ok {
		return stamp + line
	}
	for _, kv := range strings.Split(details, ",") {
		if id, ok := strings.CutPrefix(kv, "com.docker.swarm.task.id="); ok {
			return stamp + fmt.Sprintf("%-24s | ", t.names.name(id)) + text
		}
	}
	return stamp + line
}

// taskNames asks the daemon once per task.
type taskNames struct {
	cmd   *cobra.Command
	api   *client.Client
	known map[string]string // by task id
	names map[string]string // of services and nodes, by id
}

// name is SERVICE.SLOT.ID@NODE with a cut id; a task that is gone by now is
// called by its id alone.
func (n *taskNames) name(task string) string {
	if s, ok := n.known[task]; ok {
		return s
	}
	n.known[task] = short(task)
	res, err := n.api.TaskInspect(n.cmd.Context(), task, client.TaskInspectOptions{})
	if err != nil {
		return n.known[task]
	}
	t := res.Task
	if n.names == nil {
		if n.names, err = clusterNames(n.cmd, n.api); err != nil {
			n.names = map[string]string{}
		}
	}
	service, node := n.names[t.ServiceID], n.names[t.NodeID]
	if service != "" && node != "" {
		n.known[task] = fmt.Sprintf("%s.%d.%s@%s", service, t.Slot, short(task), node)
	}
	return n.known[task]
}
