package main

import (
	"encoding/json"
	"fmt"
	"maps"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func newNodeCommand(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "Show and change the members of the cluster"}
	cmd.AddCommand(nodeLs(c), nodeInspect(c), nodePs(c), nodeRm(c), nodeUpdate(c))
	return cmd
}

func nodeLs(c *connection) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List the nodes", Args: cobra.NoArgs}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
		nodes, err := api.NodeList(cmd.Context(), client.NodeListOptions{})
		if err != nil {
			return err
		}
		info, err := api.Info(cmd.Context(), client.InfoOptions{})
		if err != nil {
			return err
		}
		rows := [][]string{{"ID", "HOSTNAME", "STATUS", "AVAILABILITY", "MANAGER STATUS", "ADDRESS", "VERSION"}}
		for _, n := range nodes.Items {
			if quiet {
				fmt.Fprintln(cmd.OutOrStdout(), n.ID)
				continue
			}
			id, manager := n.ID, ""
			if n.ID == info.Info.Swarm.NodeID {
				id += " *"
			}
			if m := n.ManagerStatus; m != nil {
				if manager = title(string(m.Reachability)); m.Leader {
					manager = "Leader"
				}
			}
			rows = append(rows, []string{id, n.Description.Hostname, title(string(n.Status.State)), title(string(n.Spec.Availability)),
				manager, n.Status.Addr, n.Description.Engine.EngineVersion})
		}
		if quiet {
			return nil
		}
		return table(cmd.OutOrStdout(), rows)
	})
	return cmd
}

func title(s string) string {
	if s == "" {
		return ""
	}
	return string(s[0]-'a'+'A') + s[1:]
}

// nodeRef turns the word self into this node's id.
func nodeRef(cmd *cobra.Command, api *client.Client, ref string) (string, error) {
	if ref != "self" {
		return ref, nil
	}
	info, err := api.Info(cmd.Context(), client.InfoOptions{})
	if err != nil {
		return "", err
	}
	return info.Info.Swarm.NodeID, nil
}

func nodeInspect(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "inspect self|NODE...", Short: "Print nodes as JSON", Args: cobra.MinimumNArgs(1)}
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		return inspect(cmd, args, func(ref string) (json.RawMessage, error) {
			id, err := nodeRef(cmd, api, ref)
			if err != nil {
				return nil, err
			}
			n, err := api.NodeInspect(cmd.Context(), id, client.NodeInspectOptions{})
			return n.Raw, err
		})
	})
	return cmd
}

func nodePs(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "ps [NODE...]", Short: "List the tasks on nodes (default: this one)"}
	noTrunc := cmd.Flags().Bool("no-trunc", false, "do not cut ids and messages")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		if len(args) == 0 {
			args = []string{"self"}
		}
		filters := client.Filters{}
		for _, ref := range args {
			id, err := nodeRef(cmd, api, ref)
			if err != nil {
				return err
			}
			n, err := api.NodeInspect(cmd.Context(), id, client.NodeInspectOptions{})
			if err != nil {
				return err
			}
			filters.Add("node", n.Node.ID)
		}
		return printTasks(cmd, api, filters, *noTrunc)
	})
	return cmd
}

func nodeRm(c *connection) *cobra.Command {
	var force bool
	cmd := &cobra.Command{Use: "rm NODE...", Aliases: []string{"remove"}, Short: "Remove nodes that are down", Args: cobra.MinimumNArgs(1)}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "remove a node that is not down, too")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		return each(cmd, args, func(ref string) error {
			if _, err := api.NodeRemove(cmd.Context(), ref, client.NodeRemoveOptions{Force: force}); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), ref)
			return nil
		})
	})
	return cmd
}

func nodeUpdate(c *connection) *cobra.Command {
	var availability string
	var labelAdd, labelRm []string
	cmd := &cobra.Command{Use: "update NODE", Short: "Change a node", Args: cobra.ExactArgs(1)}
	cmd.Flags().StringVar(&availability, "availability", "", `"active", "pause" or "drain"`)
	cmd.Flags().StringArrayVar(&labelAdd, "label-add", nil, "add or change a label KEY=VALUE")
	cmd.Flags().StringArrayVar(&labelRm, "label-rm", nil, "remove a label")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		id, err := nodeRef(cmd, api, args[0])
		if err != nil {
			return err
		}
		n, err := api.NodeInspect(cmd.Context(), id, client.NodeInspectOptions{})
		if err != nil {
			return err
		}
		spec := n.Node.Spec
		if availability != "" {
			spec.Availability = swarm.NodeAvailability(availability)
		}
		add, err := keyValues("label-add", labelAdd)
		if err != nil {
			return err
		}
		if spec.Labels == nil {
			spec.Labels = map[string]string{}
		}
		maps.Copy(spec.Labels, add)
		for _, k := range labelRm {
			delete(spec.Labels, k)
		}
		if _, err := api.NodeUpdate(cmd.Context(), n.Node.ID, client.NodeUpdateOptions{Version: n.Node.Version, Spec: spec}); err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), args[0])
		return nil
	})
	return cmd
}
