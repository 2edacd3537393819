package main

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/moby/moby/client"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/lab"
)

// labCluster forms the cluster of a lab over the daemons' Docker API. It holds
// no connection: each call dials the socket it is given.
type labCluster struct{}

var _ lab.Cluster = labCluster{}

// dialHost makes a client of the daemon on socket. It does no I/O.
func dialHost(socket string) (*client.Client, error) {
	c, err := client.New(client.WithHost("unix://" + socket))
	if err != nil {
		return nil, fmt.Errorf("make API client of %s: %w", socket, err)
	}
	return c, nil
}

func (labCluster) with(socket string, f func(*client.Client) error) error {
	c, err := dialHost(socket)
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}

func (l labCluster) Ping(ctx context.Context, socket string) error {
	return l.with(socket, func(c *client.Client) error {
		_, err := c.Ping(ctx, client.PingOptions{})
		return err
	})
}

func (l labCluster) Info(ctx context.Context, socket string) (lab.NodeInfo, error) {
	var n lab.NodeInfo
	err := l.with(socket, func(c *client.Client) error {
		r, err := c.Info(ctx, client.InfoOptions{})
		if err != nil {
			return err
		}
		s := r.Info.Swarm
		n = lab.NodeInfo{Node: weft.ID(s.NodeID), State: weft.LocalState(s.LocalNodeState), Manager: s.ControlAvailable}
		if n.State == "" {
			n.State = weft.LocalInactive
		}
		return nil
	})
	return n, err
}

func (l labCluster) Init(ctx context.Context, socket string, advertise netip.Addr) error {
	return l.with(socket, func(c *client.Client) error {
		_, err := c.SwarmInit(ctx, client.SwarmInitOptions{ListenAddr: labListen(), AdvertiseAddr: advertise.String()})
		return err
	})
}

func (l labCluster) Tokens(ctx context.Context, socket string) (weft.JoinTokens, error) {
	var t weft.JoinTokens
	err := l.with(socket, func(c *client.Client) error {
		r, err := c.SwarmInspect(ctx, client.SwarmInspectOptions{})
		t = weft.JoinTokens{Worker: r.Swarm.JoinTokens.Worker, Manager: r.Swarm.JoinTokens.Manager}
		return err
	})
	return t, err
}

func (l labCluster) Join(ctx context.Context, socket string, j lab.Join) error {
	return l.with(socket, func(c *client.Client) error {
		_, err := c.SwarmJoin(ctx, client.SwarmJoinOptions{
			ListenAddr: labListen(), AdvertiseAddr: j.Advertise.String(), JoinToken: j.Token,
			RemoteAddrs: []string{netip.AddrPortFrom(j.Remote, weft.ClusterPort).String()},
		})
		return err
	})
}

// labListen is Docker's default listen address.
func labListen() string { return fmt.Sprintf("0.0.0.0:%d", weft.ClusterPort) }
