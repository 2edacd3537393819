package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func newNetworkCommand(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "network", Short: "Make and show overlay networks"}
	cmd.AddCommand(networkCreate(c), networkLs(c), networkInspect(c), networkRm(c))
	return cmd
}

func networkCreate(c *connection) *cobra.Command {
	o := client.NetworkCreateOptions{}
	var subnets, gateways, labels, opts []string
	var ipv4, ipv6 bool
	cmd := &cobra.Command{Use: "create [OPTIONS] NETWORK", Short: "Make a network across all hosts", Args: cobra.ExactArgs(1)}
	f := cmd.Flags()
	f.StringVarP(&o.Driver, "driver", "d", "overlay", "network driver")
	f.BoolVar(&o.Attachable, "attachable", false, "allow containers outside services (stored; not yet usable)")
	f.BoolVar(&o.Internal, "internal", false, "no way out for its tasks")
	f.BoolVar(&ipv4, "ipv4", true, "with IPv4 addresses; --ipv4=false needs --ipv6")
	f.BoolVar(&ipv6, "ipv6", false, "with IPv6 addresses")
	f.StringSliceVar(&subnets, "subnet", nil, "range in CIDR form, one of each family (default: cut from the cluster's pools)")
	f.StringSliceVar(&gateways, "gateway", nil, "gateway address in one of the subnets")
	f.StringArrayVar(&labels, "label", nil, "label KEY=VALUE")
	f.StringArrayVarP(&opts, "opt", "o", nil, "driver option KEY=VALUE")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		var err error
		if o.Labels, err = keyValues("label", labels); err != nil {
			return err
		}
		if o.Options, err = keyValues("opt", opts); err != nil {
			return err
		}
		if o.IPAM, err = ipamOf(subnets, gateways); err != nil {
			return err
		}
		o.Scope, o.EnableIPv6 = "swarm", &ipv6
		if !ipv4 {
			o.EnableIPv4 = &ipv4 // only since API 1.48 is there a choice
		}
		res, err := api.NetworkCreate(cmd.Context(), args[0], o)
		if err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), res.ID)
		return nil
	})
	return cmd
}

// ipamOf joins each gateway with the subnet that it is in.
func ipamOf(subnets, gateways []string) (*network.IPAM, error) {
	ipam := &network.IPAM{Driver: "default"}
	for _, s := range subnets {
		p, err := netip.ParsePrefix(s)
		if a, bare := netip.ParseAddr(s); bare == nil {
			length := "24"
			if a.Is6() {
				length = "64"
			}
			return nil, fmt.Errorf("--subnet %q has no prefix length: write %s/%s", s, s, length)
		}
		if err != nil {
			return nil, fmt.Errorf("--subnet %q is no range like 10.20.30.0/24 or fd00:20:30::/64", s)
		}
		ipam.Config = append(ipam.Config, network.IPAMConfig{Subnet: p})
	}
	for _, g := range gateways {
		a, err := netip.ParseAddr(g)
		if err != nil {
			return nil, fmt.Errorf("--gateway %q is no address", g)
		}
		i := slices.IndexFunc(ipam.Config, func(c network.IPAMConfig) bool { return c.Subnet.Masked().Contains(a) })
		switch {
		case i < 0:
			return nil, fmt.Errorf("--gateway %s has no --subnet that it belongs to", g)
		case ipam.Config[i].Gateway.IsValid():
			return nil, fmt.Errorf("--gateway %s: subnet %s has the gateway %s already", g, ipam.Config[i].Subnet, ipam.Config[i].Gateway)
		}
		ipam.Config[i].Gateway = a
	}
	return ipam, nil
}

func networkLs(c *connection) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List the networks", Args: cobra.NoArgs}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
		list, err := api.NetworkList(cmd.Context(), client.NetworkListOptions{})
		if err != nil {
			return err
		}
		rows := [][]string{{"NETWORK ID", "NAME", "DRIVER", "SCOPE", "SUBNET"}}
		for _, n := range list.Items {
			if quiet {
				fmt.Fprintln(cmd.OutOrStdout(), n.ID)
				continue
			}
			var subnets []string
			for _, c := range n.IPAM.Config {
				subnets = append(subnets, c.Subnet.String())
			}
			rows = append(rows, []string{short(n.ID), n.Name, n.Driver, n.Scope, strings.Join(subnets, " ")})
		}
		if quiet {
			return nil
		}
		return table(cmd.OutOrStdout(), rows)
	})
	return cmd
}

func networkInspect(c *connection) *cobra.Command {
	var verbose bool
	cmd := &cobra.Command{Use: "inspect NETWORK...", Short: "Print networks as JSON", Args: cobra.MinimumNArgs(1)}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "with services and tasks")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		return inspect(cmd, args, func(ref string) (json.RawMessage, error) {
			n, err := api.NetworkInspect(cmd.Context(), ref, client.NetworkInspectOptions{Verbose: verbose})
			return n.Raw, err
		})
	})
	return cmd
}

func networkRm(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "rm NETWORK...", Aliases: []string{"remove"}, Short: "Remove networks that no service uses", Args: cobra.MinimumNArgs(1)}
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		return each(cmd, args, func(ref string) error {
			if _, err := api.NetworkRemove(cmd.Context(), ref, client.NetworkRemoveOptions{}); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), ref)
			return nil
		})
	})
	return cmd
}
