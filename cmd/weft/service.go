package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

func newServiceCommand(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "service", Short: "Run services on the cluster"}
	cmd.AddCommand(serviceCreate(c), serviceLs(c), servicePs(c), serviceInspect(c), serviceScale(c), serviceUpdate(c), serviceRollback(c), serviceRm(c), serviceLogs(c))
	return cmd
}

func serviceCreate(c *connection) *cobra.Command {
	var s serviceFlags
	cmd := &cobra.Command{
		Use: "create [OPTIONS] IMAGE [ARG...]", Short: "Create a service", Args: cobra.MinimumNArgs(1),
		Long: "Create a service.\n\nPorts published with --publish answer on every host of the cluster, whether it\n" +
			"runs a task or not, and tasks see the client's own address. A port may be bound to\n" +
			"an address or interface of the hosts, and limited to clients:\n" +
			"  --publish 127.0.0.1:8080:80\n" +
			"  --publish published=8080,target=80,interface=eth0,allow=10.0.0.0/8\n" +
			"  --label weft.source=snat   hides clients behind the host that they asked",
	}
	s.install(cmd)
	cmd.Flags().SetInterspersed(false)
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		spec, err := s.spec(cmd, args)
		if err != nil {
			return err
		}
		res, err := api.ServiceCreate(cmd.Context(), client.ServiceCreateOptions{Spec: spec})
		if err != nil {
			return err
		}
		for _, w := range res.Warnings {
			fmt.Fprintln(cmd.ErrOrStderr(), "warning:", w)
		}
		fmt.Fprintln(cmd.OutOrStdout(), res.ID)
		if s.detach {
			return nil
		}
		return waitConverged(cmd, api, res.ID, waiting{quiet: s.quiet})
	})
	return cmd
}

func serviceLs(c *connection) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List the services", Args: cobra.NoArgs}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
		list, err := api.ServiceList(cmd.Context(), client.ServiceListOptions{Status: true})
		if err != nil {
			return err
		}
		rows := [][]string{{"ID", "NAME", "MODE", "REPLICAS", "IMAGE", "PORTS"}}
		for _, s := range list.Items {
			if quiet {
				fmt.Fprintln(cmd.OutOrStdout(), s.ID)
				continue
			}
			mode, status := "replicated", swarm.ServiceStatus{}
			if s.Spec.Mode.Global != nil {
				mode = "global"
			}
			if s.ServiceStatus != nil {
				status = *s.ServiceStatus
			}
			rows = append(rows, []string{short(s.ID), s.Spec.Name, mode, fmt.Sprintf("%d/%d", status.RunningTasks, status.DesiredTasks),
				imageName(s.Spec.TaskTemplate.ContainerSpec.Image), portList(inMesh(s.Endpoint.Ports), s.Spec.Labels)})
		}
		if quiet {
			return nil
		}
		return table(cmd.OutOrStdout(), rows)
	})
	return cmd
}

func servicePs(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "ps SERVICE...", Short: "List the tasks of services", Args: cobra.MinimumNArgs(1)}
	noTrunc := cmd.Flags().Bool("no-trunc", false, "do not cut ids and messages")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		filters := client.Filters{}
		for _, ref := range args {
			s, err := api.ServiceInspect(cmd.Context(), ref, client.ServiceInspectOptions{})
			if err != nil {
				return err
			}
			filters.Add("service", s.Service.ID)
		}
		return printTasks(cmd, api, filters, *noTrunc)
	})
	return cmd
}

// printTasks lists tasks, the newest of each slot first and its forerunners
// below it.
func printTasks(cmd *cobra.Command, api *client.Client, filters client.Filters, noTrunc bool) error {
	list, err := api.TaskList(cmd.Context(), client.TaskListOptions{Filters: filters})
	if err != nil {
		return err
	}
	names, err := clusterNames(cmd, api)
	if err != nil {
		return err
	}
	tasks := list.Items
	slices.SortFunc(tasks, func(a, b swarm.Task) int {
		if a.ServiceID != b.ServiceID {
			return strings.Compare(names[a.ServiceID], names[b.ServiceID])
		}
		if a.Slot != b.Slot {
			return a.Slot - b.Slot
		}
		if a.Slot == 0 && a.NodeID != b.NodeID {
			return strings.Compare(names[a.NodeID], names[b.NodeID])
		}
		return b.CreatedAt.Compare(a.CreatedAt)
	})
	rows := [][]string{{"ID", "NAME", "IMAGE", "NODE", "DESIRED STATE", "CURRENT STATE", "ERROR", "PORTS"}}
	last := ""
	for _, t := range tasks {
		name := fmt.Sprintf("%s.%d", names[t.ServiceID], t.Slot)
		if t.Slot == 0 {
			name = names[t.ServiceID] + "." + t.NodeID
		}
		shown := name
		if name == last {
			shown = ` \_ ` + name
		}
		last = name
		id, image, why := t.ID, t.Spec.ContainerSpec.Image, t.Status.Err
		if !noTrunc {
			id, image = short(id), imageName(image)
			if len(why) > 70 {
				why = why[:69] + "…"
			}
		}
		rows = append(rows, []string{id, shown, image, names[t.NodeID], title(string(t.DesiredState)),
			title(string(t.Status.State)) + " " + ago(t.Status.Timestamp), why, portList(t.Status.PortStatus.Ports, nil)})
	}
	return table(cmd.OutOrStdout(), rows)
}

// clusterNames maps the ids of services and nodes to their names.
func clusterNames(cmd *cobra.Command, api *client.Client) (map[string]string, error) {
	names := map[string]string{}
	services, err := api.ServiceList(cmd.Context(), client.ServiceListOptions{})
	if err != nil {
		return nil, err
	}
	for _, s := range services.Items {
		names[s.ID] = s.Spec.Name
	}
	nodes, err := api.NodeList(cmd.Context(), client.NodeListOptions{})
	if err != nil {
		return nil, err
	}
	for _, n := range nodes.Items {
		names[n.ID] = n.Description.Hostname
	}
	return names, nil
}

func serviceInspect(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "inspect SERVICE...", Short: "Print services as JSON", Args: cobra.MinimumNArgs(1)}
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		return inspect(cmd, args, func(ref string) (json.RawMessage, error) {
			s, err := api.ServiceInspect(cmd.Context(), ref, client.ServiceInspectOptions{InsertDefaults: true})
			return s.Raw, err
		})
	})
	return cmd
}

func serviceScale(c *connection) *cobra.Command {
	var detach bool
	cmd := &cobra.Command{Use: "scale SERVICE=REPLICAS...", Short: "Change the number of tasks", Args: cobra.MinimumNArgs(1)}
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "do not wait until the tasks run")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		return each(cmd, args, func(arg string) error {
			ref, count, ok := strings.Cut(arg, "=")
			n, err := strconv.ParseUint(count, 10, 64)
			if !ok || err != nil {
				return fmt.Errorf("%q is not of the form SERVICE=REPLICAS with a whole number from 0", arg)
			}
			return updateService(cmd, api, ref, detach, func(spec *swarm.ServiceSpec) error {
				if spec.Mode.Replicated == nil {
					return fmt.Errorf("service %s is global: it has no number of replicas", ref)
				}
				spec.Mode.Replicated.Replicas = &n
				return nil
			})
		})
	})
	return cmd
}

func serviceUpdate(c *connection) *cobra.Command {
	var image string
	var replicas uint64
	var envAdd []string
	var force, detach bool
	cmd := &cobra.Command{Use: "update [OPTIONS] SERVICE", Short: "Change a service; its tasks are replaced one by one", Args: cobra.ExactArgs(1)}
	f := cmd.Flags()
	f.StringVar(&image, "image", "", "new image")
	f.Uint64Var(&replicas, "replicas", 0, "number of tasks")
	f.StringArrayVar(&envAdd, "env-add", nil, "add or change KEY=VALUE")
	f.BoolVar(&force, "force", false, "replace the tasks even if nothing changed")
	f.BoolVarP(&detach, "detach", "d", false, "do not wait until the update is done")
	var p policies
	p.install(cmd)
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		return updateService(cmd, api, args[0], detach, func(spec *swarm.ServiceSpec) error {
			t := spec.TaskTemplate.ContainerSpec
			if image != "" {
				t.Image = image
			}
			if f.Changed("replicas") {
				if spec.Mode.Replicated == nil {
					return fmt.Errorf("--replicas does not go with a global service")
				}
				spec.Mode.Replicated.Replicas = &replicas
			}
			for _, kv := range envAdd {
				k, _, _ := strings.Cut(kv, "=")
				t.Env = append(slices.DeleteFunc(t.Env, func(e string) bool { return e == k || strings.HasPrefix(e, k+"=") }), kv)
			}
			if force {
				spec.TaskTemplate.ForceUpdate++
			}
			return p.change(cmd, spec)
		})
	})
	return cmd
}

func updateService(cmd *cobra.Command, api *client.Client, ref string, detach bool, change func(*swarm.ServiceSpec) error) error {
	s, err := api.ServiceInspect(cmd.Context(), ref, client.ServiceInspectOptions{})
	if err != nil {
		return err
	}
	spec := s.Service.Spec
	if err := change(&spec); err != nil {
		return err
	}
	if _, err := api.ServiceUpdate(cmd.Context(), s.Service.ID, client.ServiceUpdateOptions{Version: s.Service.Version, Spec: spec}); err != nil {
		return err
	}
	fmt.Fprintln(cmd.OutOrStdout(), ref)
	if detach {
		return nil
	}
	return waitConverged(cmd, api, s.Service.ID, waiting{})
}

func serviceRm(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "rm SERVICE...", Aliases: []string{"remove"}, Short: "Remove services and their tasks", Args: cobra.MinimumNArgs(1)}
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		return each(cmd, args, func(ref string) error {
			if _, err := api.ServiceRemove(cmd.Context(), ref, client.ServiceRemoveOptions{}); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), ref)
			return nil
		})
	})
	return cmd
}

func serviceLogs(c *connection) *cobra.Command {
	o := client.ServiceLogsOptions{ShowStdout: true, ShowStderr: true, Details: true}
	raw := false
	cmd := &cobra.Command{Use: "logs [OPTIONS] SERVICE", Short: "Print what the tasks of a service wrote", Args: cobra.ExactArgs(1)}
	installLogFlags(cmd, &o.Follow, &o.Timestamps, &o.Tail, &o.Since)
	cmd.Flags().BoolVar(&raw, "raw", false, "do not say which task wrote a line")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		o.Details = !raw
		r, err := api.ServiceLogs(cmd.Context(), args[0], o)
		if err != nil {
			return err
		}
		defer r.Close()
		if raw {
			_, err = stdcopy.StdCopy(cmd.OutOrStdout(), cmd.ErrOrStderr(), r)
			return endOfStream(cmd, err)
		}
		names := &taskNames{cmd: cmd, api: api, known: map[string]string{}}
		out := &taggedLines{out: cmd.OutOrStdout(), names: names, timestamps: o.Timestamps}
		errOut := &taggedLines{out: cmd.ErrOrStderr(), names: names, timestamps: o.Timestamps}
		_, err = stdcopy.StdCopy(out, errOut, r)
		return errors.Join(endOfStream(cmd, err), out.flush(), errOut.flush())
	})
	return cmd
}
