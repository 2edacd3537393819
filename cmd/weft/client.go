package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"github.com/weftnet/weft"
)

// defaultSocket is where a daemon listens that was given no other place.
const defaultSocket = "/run/weft/weft.sock"

// connection is how the command line reaches a daemon.
type connection struct {
	host string // --host
}

// dial opens a client of the API. The first call on it finds out whether
// anybody is there.
func (c *connection) dial() (*client.Client, error) {
	host := c.host
	if host == "" {
		host = os.Getenv("DOCKER_HOST")
	}
	if host == "" {
		host = "unix://" + defaultSocket
	}
	if strings.HasPrefix(host, "/") {
		host = "unix://" + host
	}
	api, err := client.New(client.WithHost(host))
	if err != nil {
		return nil, fmt.Errorf("use daemon socket %q: %w", host, err)
	}
	return api, nil
}

// action makes a cobra handler of a function that needs the daemon.
func (c *connection) action(f func(cmd *cobra.Command, api *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		defer api.Close()
		return f(cmd, api, args)
	}
}

// errorText is an error as people read it: what the daemon said, without the
// client's preamble; and the client's own words speak of this program.
func errorText(err error) string {
	text := weft.Text(err)
	if client.IsErrConnectionFailed(err) {
		text = strings.NewReplacer("the docker API", "the weft daemon", "the Docker daemon", "the weft daemon",
			"the docker daemon", "it").Replace(text)
	}
	return strings.TrimPrefix(text, "Error response from daemon: ")
}

// imageName is an image as tables show it: without the digest that pins it.
func imageName(ref string) string {
	name, _, _ := strings.Cut(ref, "@sha256:")
	return name
}

// each runs f on every argument and goes on past errors, unless nobody is there
// to answer.
func each(cmd *cobra.Command, args []string, f func(string) error) error {
	failed := false
	for _, a := range args {
		if err := f(a); client.IsErrConnectionFailed(err) {
			return err
		} else if err != nil {
			fmt.Fprintln(cmd.ErrOrStderr(), "weft:", errorText(err))
			failed = true
		}
	}
	if failed {
		return exitError{1}
	}
	return nil
}

// table prints rows in aligned columns, the first row as the heading.
func table(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.TrimRight(strings.Join(r, "\t"), " \t"))
	}
	return t.Flush()
}

// printJSON prints objects as Docker's inspect commands do: always a list.
func printJSON(w io.Writer, objects []json.RawMessage) error {
	b, err := json.MarshalIndent(objects, "", "    ")
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	_, err = fmt.Fprintln(w, string(b))
	return err
}

// inspect prints the raw objects that get returns for each name. What was
// found is printed even when another was not.
func inspect(cmd *cobra.Command, names []string, get func(string) (json.RawMessage, error)) error {
	objects := []json.RawMessage{}
	err := each(cmd, names, func(n string) error {
		raw, err := get(n)
		if err == nil {
			objects = append(objects, raw)
		}
		return err
	})
	if perr := printJSON(cmd.OutOrStdout(), objects); perr != nil {
		return perr
	}
	return err
}

func short(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(12, len(id))]
}

func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return units.HumanDuration(time.Since(t)) + " ago"
}

// keyValues parses repeated KEY=VALUE flags; a key alone has an empty value.
func keyValues(flag string, list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, kv := range list {
		k, v, _ := strings.Cut(kv, "=")
		if k == "" {
			return nil, fmt.Errorf("--%s %q has no name before the '='", flag, kv)
		}
		out[k] = v
	}
	return out, nil
}
