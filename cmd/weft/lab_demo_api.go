package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/lab"
)

// demoPoll is the gap between two looks at something that takes its time.
const demoPoll = 50 * time.Millisecond

// vniOption is the key under which Docker's API shows a network's VNI.
const vniOption = "com.docker.network.driver.overlay.vxlanid_list"

type demoNetwork struct {
	id     string
	name   string
	subnet string
	vni    uint32
}

// demoTask is a running task as the API shows it.
type demoTask struct {
	id        weft.ID
	host      string
	container string
	addrs     map[string]netip.Addr // by network name
}

// manager is the API of h1, which every step speaks to.
func (d *demo) manager() *client.Client { return d.api["h1"] }

func (d *demo) createNetwork(ctx context.Context, name string) (demoNetwork, error) {
	r, err := d.manager().NetworkCreate(ctx, name, client.NetworkCreateOptions{Driver: weft.DriverOverlay})
	if err != nil {
		return demoNetwork{}, err
	}
	i, err := d.manager().NetworkInspect(ctx, r.ID, client.NetworkInspectOptions{})
	if err != nil {
		return demoNetwork{}, err
	}
	n := demoNetwork{id: r.ID, name: name}
	if c := i.Network.IPAM.Config; len(c) == 1 {
		n.subnet = c[0].Subnet.String()
	}
	vni, err := strconv.ParseUint(i.Network.Options[vniOption], 10, 24)
	if err != nil {
		return demoNetwork{}, fmt.Errorf("network %s shows no VNI in option %s: %w", name, vniOption, err)
	}
	n.vni = uint32(vni)
	return n, nil
}

// demoService is a service of weft/whoami.
func demoService(name, network string, replicas uint64, published uint32) swarm.ServiceSpec {
	s := swarm.ServiceSpec{
		Annotations: swarm.Annotations{Name: name},
		TaskTemplate: swarm.TaskSpec{
			ContainerSpec: &swarm.ContainerSpec{Image: "weft/whoami"},
			Networks:      []swarm.NetworkAttachmentConfig{{Target: network}},
		},
		Mode: swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &replicas}},
	}
	if published != 0 {
		s.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{Protocol: "tcp", TargetPort: 80, PublishedPort: published}}}
	}
	return s
}

// runningTasks lists the tasks of a service that run and shall run, by host.
func (d *demo) runningTasks(ctx context.Context, service string) ([]demoTask, error) {
	r, err := d.manager().TaskList(ctx, client.TaskListOptions{Filters: client.Filters{}.Add("service", service).Add("desired-state", "running")})
	if err != nil {
		return nil, err
	}
	var out []demoTask
	for _, t := range r.Items {
		if t.Status.State != swarm.TaskStateRunning {
			continue
		}
		dt := demoTask{id: weft.ID(t.ID), host: d.names[weft.ID(t.NodeID)], container: weft.ContainerID(weft.ID(t.ID)), addrs: map[string]netip.Addr{}}
		for _, a := range t.NetworksAttachments {
			if len(a.Addresses) > 0 {
				dt.addrs[a.Network.Spec.Name] = a.Addresses[0].Addr()
			}
		}
		out = append(out, dt)
	}
	slices.SortFunc(out, func(a, b demoTask) int { return cmp.Or(cmp.Compare(a.host, b.host), cmp.Compare(a.id, b.id)) })
	return out, nil
}

// awaitTasks waits until the running tasks of a service are as ok says.
func (d *demo) awaitTasks(ctx context.Context, service string, ok func([]demoTask) error) ([]demoTask, error) {
	var ts []demoTask
	err := await(ctx, func() error {
		var err error
		if ts, err = d.runningTasks(ctx, service); err != nil {
			return err
		}
		return ok(ts)
	})
	if err != nil {
		return nil, errors.Join(err, d.whyNot(service))
	}
	return ts, nil
}

// whyNot gives the errors of a service's tasks, for the message of a failure.
func (d *demo) whyNot(service string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second) // the step's own time is over
	defer cancel()
	r, err := d.manager().TaskList(ctx, client.TaskListOptions{Filters: client.Filters{}.Add("service", service)})
	if err != nil {
		return err
	}
	var lines []string
	for _, t := range r.Items {
		lines = append(lines, fmt.Sprintf("task %s on %q: desired %s, is %s: %s %s", weft.ID(t.ID).Short(), d.names[weft.ID(t.NodeID)], t.DesiredState, t.Status.State, t.Status.Message, t.Status.Err))
	}
	return errors.New(strings.Join(lines, "; "))
}

// await repeats f until it succeeds; its last error when the time is over.
func await(ctx context.Context, f func() error) error {
	tick := time.NewTicker(demoPoll)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("gave up waiting: %w", err)
		case <-tick.C:
		}
	}
}

// inTask runs a command in a task's container through the API of its host and
// gives what it wrote. An exit code other than 0 is an error.
func (d *demo) inTask(ctx context.Context, t demoTask, args ...string) (string, error) {
	c := d.api[t.host]
	fail := func(err error) error {
		return fmt.Errorf("on %s: %s: %w", t.host, strings.Join(args, " "), err)
	}
	e, err := c.ExecCreate(ctx, t.container, client.ExecCreateOptions{AttachStdout: true, AttachStderr: true, Cmd: append([]string{"/weft", "whoami"}, args...)})
	if err != nil {
		return "", fail(err)
	}
	a, err := c.ExecAttach(ctx, e.ID, client.ExecAttachOptions{})
	if err != nil {
		return "", fail(err)
	}
	defer a.Close()
	stop := context.AfterFunc(ctx, a.Close) // reading does not know the context
	defer stop()
	var stdout, stderr bytes.Buffer
	if _, err := stdcopy.StdCopy(&stdout, &stderr, a.Reader); err != nil {
		return "", fail(err)
	}
	code := 0
	err = await(ctx, func() error {
		i, err := c.ExecInspect(ctx, e.ID, client.ExecInspectOptions{})
		if err == nil && i.Running {
			err = errors.New("its output has ended but it still runs")
		}
		code = i.ExitCode
		return err
	})
	if err != nil {
		return "", fail(err)
	}
	if code != 0 {
		return "", fail(fmt.Errorf("exit code %d: %s", code, strings.TrimSpace(stderr.String())))
	}
	return stdout.String(), nil
}

// outside runs `weft whoami …` at the outside client.
func (d *demo) outside(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, d.self, append([]string{"whoami"}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := d.lab.RunIn(d.lab.ClientNetNS(), cmd); err != nil {
		return "", fmt.Errorf("outside client: %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// answeredBy is the task among ts that an answer of whoami came from, known by
// the address on one of its networks.
func answeredBy(ts []demoTask, answer string) (demoTask, error) {
	who, err := parseIdentity(answer)
	if err != nil {
		return demoTask{}, err
	}
	for _, t := range ts {
		for _, a := range t.addrs {
			if slices.Contains(who.Addresses, a) {
				return t, nil
			}
		}
	}
	return demoTask{}, fmt.Errorf("answered by %q with addresses %v, which is no running task", who.Host, who.Addresses)
}

// vxlan reads the counters of a network's VXLAN device on every host.
func (d *demo) vxlan(n demoNetwork) (map[string]lab.Counters, error) {
	out := map[string]lab.Counters{}
	for _, h := range d.hosts {
		c, err := h.VXLANCounters(d.nodes[h.Name], n.vni)
		if err != nil {
			return nil, err
		}
		out[h.Name] = c
	}
	return out, nil
}
