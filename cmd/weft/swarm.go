package main

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func newSwarmCommand(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "swarm", Short: "Form, join and leave a cluster"}
	cmd.AddCommand(swarmInit(c), swarmJoin(c), swarmJoinToken(c), swarmRotateKeys(c), swarmLeave(c))
	return cmd
}

func swarmInit(c *connection) *cobra.Command {
	var o client.SwarmInitOptions
	var pools []string
	var availability string
	cmd := &cobra.Command{Use: "init", Short: "Start a cluster with this host as its first manager", Args: cobra.NoArgs}
	f := cmd.Flags()
	f.StringVar(&o.ListenAddr, "listen-addr", "0.0.0.0:2377", "address:port the cluster port listens on")
	f.StringVar(&o.AdvertiseAddr, "advertise-addr", "", "address[:port] other hosts dial (default the host's only address)")
	f.StringVar(&o.DataPathAddr, "data-path-addr", "", "address of the overlay traffic (default the advertised one)")
	f.Uint32Var(&o.DataPathPort, "data-path-port", 0, "UDP port of the overlay traffic (default 4789)")
	f.StringSliceVar(&pools, "default-addr-pool", nil, "ranges that networks are cut from")
	f.Uint32Var(&o.SubnetSize, "default-addr-pool-mask-length", 0, "prefix length of such a network (default 20)")
	f.StringVar(&availability, "availability", "active", `whether tasks may run here: "active", "pause", "drain"`)
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
		for _, p := range pools {
			prefix, err := netip.ParsePrefix(p)
			if err != nil {
				return fmt.Errorf("--default-addr-pool %q is no range like 10.20.0.0/16", p)
			}
			o.DefaultAddrPool = append(o.DefaultAddrPool, prefix)
		}
		o.Availability = swarm.NodeAvailability(availability)
		res, err := api.SwarmInit(cmd.Context(), o)
		if err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Swarm initialized: current node (%s) is now a manager.\n\n", res.NodeID)
		return printJoin(cmd, api, "worker", false)
	})
	return cmd
}

func swarmJoin(c *connection) *cobra.Command {
	var o client.SwarmJoinOptions
	var availability string
	cmd := &cobra.Command{Use: "join [OPTIONS] HOST:PORT", Short: "Make this host a member of a cluster", Args: cobra.MinimumNArgs(1)}
	f := cmd.Flags()
	f.StringVar(&o.JoinToken, "token", "", "join token, from 'weft swarm join-token' on a manager")
	f.StringVar(&o.ListenAddr, "listen-addr", "0.0.0.0:2377", "address:port the cluster port listens on")
	f.StringVar(&o.AdvertiseAddr, "advertise-addr", "", "address[:port] other hosts dial")
	f.StringVar(&o.DataPathAddr, "data-path-addr", "", "address of the overlay traffic")
	f.StringVar(&availability, "availability", "active", `whether tasks may run here: "active", "pause", "drain"`)
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		o.RemoteAddrs, o.Availability = args, swarm.NodeAvailability(availability)
		if _, err := api.SwarmJoin(cmd.Context(), o); err != nil {
			return err
		}
		info, err := api.Info(cmd.Context(), client.InfoOptions{})
		if err != nil {
			return err
		}
		role := "worker"
		if info.Info.Swarm.ControlAvailable {
			role = "manager"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "This node joined a swarm as a %s.\n", role)
		return nil
	})
	return cmd
}

func swarmJoinToken(c *connection) *cobra.Command {
	var rotate, quiet bool
	cmd := &cobra.Command{
		Use: "join-token [OPTIONS] worker|manager", Short: "Show or rotate a join token",
		Args: cobra.ExactArgs(1), ValidArgs: []string{"worker", "manager"},
	}
	cmd.Flags().BoolVar(&rotate, "rotate", false, "make a new token; the old one admits nobody any more")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print the token only")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		if args[0] != "worker" && args[0] != "manager" {
			return fmt.Errorf("unknown role %q: use worker or manager", args[0])
		}
		if rotate {
			s, err := api.SwarmInspect(cmd.Context(), client.SwarmInspectOptions{})
			if err != nil {
				return err
			}
			_, err = api.SwarmUpdate(cmd.Context(), client.SwarmUpdateOptions{
				Version: s.Swarm.Version, Spec: s.Swarm.Spec,
				RotateWorkerToken: args[0] == "worker", RotateManagerToken: args[0] == "manager",
			})
			if err != nil {
				return err
			}
		}
		return printJoin(cmd, api, args[0], quiet)
	})
	return cmd
}

// printJoin prints the command that admits a host.
func printJoin(cmd *cobra.Command, api *client.Client, role string, quiet bool) error {
	s, err := api.SwarmInspect(cmd.Context(), client.SwarmInspectOptions{})
	if err != nil {
		return err
	}
	token := s.Swarm.JoinTokens.Worker
	if role == "manager" {
		token = s.Swarm.JoinTokens.Manager
	}
	if quiet {
		fmt.Fprintln(cmd.OutOrStdout(), token)
		return nil
	}
	info, err := api.Info(cmd.Context(), client.InfoOptions{})
	if err != nil {
		return err
	}
	addr, err := managerAddr(info.Info.Swarm)
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "To add a %s to this swarm, run the following command:\n\n    weft swarm join --token %s %s\n\n", role, token, addr)
	return nil
}

// managerAddr is the cluster port of a manager: of this node if it is one, for
// it has just answered.
func managerAddr(s swarm.Info) (string, error) {
	if len(s.RemoteManagers) == 0 {
		return "", errors.New("this node knows no manager's address: ask a manager")
	}
	for _, m := range s.RemoteManagers {
		if m.NodeID == s.NodeID {
			return m.Addr, nil
		}
	}
	return s.RemoteManagers[0].Addr, nil
}

func swarmLeave(c *connection) *cobra.Command {
	var force bool
	cmd := &cobra.Command{Use: "leave", Short: "Give up membership; the host's tasks end", Args: cobra.NoArgs}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "leave even as a manager")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
		if _, err := api.SwarmLeave(cmd.Context(), client.SwarmLeaveOptions{Force: force}); err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), "Node left the swarm.")
		return nil
	})
	return cmd
}
