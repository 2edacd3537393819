package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"github.com/weftnet/weft/api"
)

func newNetCommand(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "net", Short: "Look into this host's data plane"}
	cmd.AddCommand(netRepairs(c), netWays(c), netDrains(c))
	return cmd
}

func netRepairs(c *connection) *cobra.Command {
	return &cobra.Command{
		Use: "repairs", Short: "Show what the daemon has put right in the kernel since its start", Args: cobra.NoArgs,
		Long: `Show what the daemon has put right in the kernel since its start, by kind: what
was not as weft had left it, for whatever reason. What weft itself changes is
not counted. Every single repair is in the daemon's log.`,
		RunE: c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
			answer, err := askRepairs(cmd.Context(), api)
			if err != nil {
				return err
			}
			rows := [][]string{{"KIND", "COUNT", "LAST", "OBJECT", "REASON"}}
			for _, r := range answer.Repairs {
				rows = append(rows, []string{r.Kind, fmt.Sprint(r.Count), ago(r.Last), r.Object, r.Reason})
			}
			if len(answer.Repairs) == 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "nothing had to be repaired since %s\n", answer.Since.Format(time.RFC3339))
				return nil
			}
			return table(cmd.OutOrStdout(), rows)
		})}
}

func netWays(c *connection) *cobra.Command {
	return &cobra.Command{
		Use: "ways", Short: "Show how packets of native networks go to other hosts", Args: cobra.NoArgs,
		Long: `Show how this host sends packets of networks made with --opt encap=native, or
auto, to each other host: natively, which is without encapsulation, or by VXLAN,
and why.`,
		RunE: c.action(func(cmd *cobra.Command, client *client.Client, _ []string) error {
			var answer api.WaysAnswer
			if err := askOwn(cmd.Context(), client, api.WaysPath, &answer); err != nil {
				return err
			}
			if len(answer.Ways) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "this host sends everything by VXLAN")
				return nil
			}
			rows := [][]string{{"NETWORK", "HOST", "WAY", "SINCE", "REASON"}}
			for _, w := range answer.Ways {
				way, network := "vxlan", w.Network
				if w.Native {
					way = "native"
				}
				if network == "" {
					network = fmt.Sprint(w.VNI)
				}
				rows = append(rows, []string{network, w.VTEP.String(), way, ago(w.Since), w.Reason})
			}
			return table(cmd.OutOrStdout(), rows)
		})}
}

func netDrains(c *connection) *cobra.Command {
	return &cobra.Command{
		Use: "drains", Short: "Show how tasks of this host came into the balancers of others and left them", Args: cobra.NoArgs,
		Long: `Show how tasks of this host were taken out of the balancers of other hosts
before they were stopped, since the daemon's start: "confirmed" counts tasks of
which every host concerned had confirmed it, "passed" counts hosts that did not
within two seconds and were passed over; requests that they sent on may have
failed. "arrival confirmed" and "arrival passed" are the same of tasks that begin
to serve: they are said to run only then. Each host that was passed over is in
the daemon's log.`,
		RunE: c.action(func(cmd *cobra.Command, client *client.Client, _ []string) error {
			var answer api.DrainsAnswer
			if err := askOwn(cmd.Context(), client, api.DrainsPath, &answer); err != nil {
				return err
			}
			if len(answer.Drains) == 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "no task has come or gone since %s\n", answer.Since.Format(time.RFC3339))
				return nil
			}
			rows := [][]string{{"KIND", "COUNT", "LAST", "OBJECT", "REASON"}}
			for _, d := range answer.Drains {
				rows = append(rows, []string{d.Kind, fmt.Sprint(d.Count), ago(d.Last), d.Object, d.Reason})
			}
			return table(cmd.OutOrStdout(), rows)
		})}
}

func askRepairs(ctx context.Context, c *client.Client) (api.RepairsAnswer, error) {
	var out api.RepairsAnswer
	err := askOwn(ctx, c, api.RepairsPath, &out)
	return out, err
}

// askOwn gets an object of weft's own part of the API, for which Docker's client
// has no call.
func askOwn(ctx context.Context, c *client.Client, path string, out any) error {
	dial := c.Dialer()
	h := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://weft"+path, nil)
	if err != nil {
		return err
	}
	res, err := h.Do(req)
	if err != nil {
		// Its own words for nobody being there are those of every command.
		if _, perr := c.Ping(ctx, client.PingOptions{}); perr != nil {
			return perr
		}
		return fmt.Errorf("ask the daemon for %s: %w", path, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return fmt.Errorf("read the answer to %s: %w", path, err)
	}
	if res.StatusCode == http.StatusNotFound {
		return fmt.Errorf("the daemon does not know %s: it is older than this command, or not weft's", path)
	}
	if res.StatusCode != http.StatusOK {
		var e struct{ Message string }
		if json.Unmarshal(body, &e) != nil || e.Message == "" {
			e.Message = res.Status
		}
		return fmt.Errorf("%s", e.Message)
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("decode the answer to %s: %w", path, err)
	}
	return nil
}
