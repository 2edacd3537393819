package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"github.com/weftnet/weft"
)

func newImageCommand(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Load, show and remove the images of this host"}
	cmd.AddCommand(imageLoad(c), imageLs(c), imageRm(c), imagePull(c), imageTag(c))
	return cmd
}

func imageLoad(c *connection) *cobra.Command {
	var input string
	cmd := &cobra.Command{Use: "load [-i FILE]", Short: "Load images from a docker save archive", Args: cobra.NoArgs}
	cmd.Flags().StringVarP(&input, "input", "i", "", "archive to read (default standard input)")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
		in := cmd.InOrStdin()
		if input != "" {
			f, err := os.Open(input)
			if err != nil {
				return fmt.Errorf("open archive: %w", err)
			}
			defer f.Close()
			in = f
		}
		res, err := api.ImageLoad(cmd.Context(), in)
		if err != nil {
			return err
		}
		defer res.Close()
		return printStream(cmd.OutOrStdout(), res)
	})
	return cmd
}

// printStream prints the messages of a load or pull; an error message among
// them is the outcome of the command.
func printStream(out io.Writer, in io.Reader) error {
	dec := json.NewDecoder(in)
	for {
		var m struct {
			Stream, Status, ID, Error string
		}
		if err := dec.Decode(&m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read progress: %w", err)
		}
		switch {
		case m.Error != "":
			return errors.New(m.Error)
		case m.Stream != "":
			fmt.Fprint(out, m.Stream)
		case m.ID != "":
			fmt.Fprintf(out, "%s: %s\n", m.ID, m.Status)
		case m.Status != "":
			fmt.Fprintln(out, m.Status)
		}
	}
}

func imageLs(c *connection) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List the images of this host", Args: cobra.NoArgs}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
		list, err := api.ImageList(cmd.Context(), client.ImageListOptions{})
		if err != nil {
			return err
		}
		rows := [][]string{{"IMAGE", "ID", "CREATED", "SIZE"}}
		for _, i := range list.Items {
			if quiet {
				fmt.Fprintln(cmd.OutOrStdout(), short(i.ID))
				continue
			}
			tags := i.RepoTags
			if len(tags) == 0 {
				tags = []string{"<none>"}
			}
			for _, t := range tags {
				rows = append(rows, []string{t, short(i.ID), ago(time.Unix(i.Created, 0)), units.HumanSizeWithPrecision(float64(i.Size), 3)})
			}
		}
		if quiet {
			return nil
		}
		return table(cmd.OutOrStdout(), rows)
	})
	return cmd
}

func imageRm(c *connection) *cobra.Command {
	var force bool
	cmd := &cobra.Command{Use: "rm IMAGE...", Aliases: []string{"remove"}, Short: "Remove images of this host", Args: cobra.MinimumNArgs(1)}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "remove even if a stopped container uses it")
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		return each(cmd, args, func(ref string) error {
			res, err := api.ImageRemove(cmd.Context(), ref, client.ImageRemoveOptions{Force: force})
			if err != nil {
				return err
			}
			for _, d := range res.Items {
				if d.Untagged != "" {
					fmt.Fprintln(cmd.OutOrStdout(), "Untagged:", d.Untagged)
				}
				if d.Deleted != "" {
					fmt.Fprintln(cmd.OutOrStdout(), "Deleted:", d.Deleted)
				}
			}
			return nil
		})
	})
	return cmd
}

func imagePull(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "pull IMAGE", Short: "Fetch an image from its registry", Args: cobra.ExactArgs(1)}
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		res, err := api.ImagePull(cmd.Context(), args[0], client.ImagePullOptions{})
		if err != nil {
			return err
		}
		defer res.Close()
		return printStream(cmd.OutOrStdout(), res)
	})
	return cmd
}

func imageTag(c *connection) *cobra.Command {
	cmd := &cobra.Command{Use: "tag IMAGE NAME", Short: "Give an image a second name", Args: cobra.ExactArgs(2)}
	cmd.RunE = c.action(func(cmd *cobra.Command, api *client.Client, args []string) error {
		_, err := api.ImageTag(cmd.Context(), client.ImageTagOptions{Source: args[0], Target: args[1]})
		return err
	})
	return cmd
}

func newVersionCommand(c *connection) *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Show the versions of command line and daemon", Args: cobra.NoArgs,
		RunE: c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
			fmt.Fprintf(cmd.OutOrStdout(), "Client: weft %s\n", weft.Version)
			v, err := api.ServerVersion(cmd.Context(), client.ServerVersionOptions{})
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Daemon: weft %s, API %s (from %s), %s/%s\n", v.Version, v.APIVersion, v.MinAPIVersion, v.Os, v.Arch)
			return nil
		})}
}

func newInfoCommand(c *connection) *cobra.Command {
	return &cobra.Command{Use: "info", Short: "Show this host's part in the cluster", Args: cobra.NoArgs,
		RunE: c.action(func(cmd *cobra.Command, api *client.Client, _ []string) error {
			res, err := api.Info(cmd.Context(), client.InfoOptions{})
			if err != nil {
				return err
			}
			i := res.Info
			rows := [][]string{
				{"Name:", i.Name}, {"Version:", i.ServerVersion}, {"Kernel:", i.KernelVersion},
				{"Processors:", fmt.Sprint(i.NCPU)}, {"Memory:", units.BytesSize(float64(i.MemTotal))},
				{"Data folder:", i.DockerRootDir},
				{"Containers:", fmt.Sprintf("%d (%d running)", i.Containers, i.ContainersRunning)},
				{"Cluster:", string(i.Swarm.LocalNodeState)},
			}
			if i.Swarm.NodeID != "" {
				rows = append(rows, []string{"Node:", i.Swarm.NodeID}, []string{"Address:", i.Swarm.NodeAddr},
					[]string{"Manager:", fmt.Sprint(i.Swarm.ControlAvailable)})
			}
			if i.Swarm.Error != "" {
				rows = append(rows, []string{"Error:", i.Swarm.Error})
			}
			for _, s := range i.DriverStatus {
				rows = append(rows, []string{s[0] + ":", s[1]})
			}
			return table(cmd.OutOrStdout(), rows)
		})}
}
