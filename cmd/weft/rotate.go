package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"github.com/weftnet/weft/api"
)

func swarmRotateKeys(c *connection) *cobra.Command {
	return &cobra.Command{
		Use: "rotate-keys", Short: "Change the keys of encrypted networks and of gossip", Args: cobra.NoArgs,
		Long: `Give every node a new key for encrypted networks, and the cluster a new key for
gossip. Nodes change to them one by one, as they hear of each other's, and
nothing is lost. It happens by itself: once a day, and every 12 hours for gossip.`,
		RunE: c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
			s, err := api.SwarmInspect(cmd.Context(), client.SwarmInspectOptions{})
			if err != nil {
				return err
			}
			return rotateKeys(cmd.Context(), api, s.Swarm)
		})}
}

// rotateKeys is client.SwarmUpdate with a parameter that Docker does not have.
func rotateKeys(ctx context.Context, c *client.Client, s swarm.Swarm) error {
	body, err := json.Marshal(s.Spec)
	if err != nil {
		return fmt.Errorf("encode the cluster's settings: %w", err)
	}
	dial := c.Dialer()
	h := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}}
	q := url.Values{"version": {strconv.FormatUint(s.Version.Index, 10)}, api.RotateKeys: {"true"}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://weft/swarm/update?"+q.Encode(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := h.Do(req)
	if err != nil {
		return fmt.Errorf("ask the daemon for new keys: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusOK {
		return nil
	}
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	var e struct{ Message string }
	if json.Unmarshal(answer, &e) != nil || e.Message == "" {
		e.Message = res.Status
	}
	return fmt.Errorf("%s", e.Message)
}
