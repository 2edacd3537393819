package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/lab"
)

// demoPort is where web is published on every host.
const demoPort = 8080

func (d *demo) formCluster(ctx context.Context) (string, error) {
	var err error
	if d.self, err = os.Executable(); err != nil {
		return "", fmt.Errorf("find own executable: %w", err)
	}
	if err := d.lab.Up(ctx, lab.Spec{Hosts: 3, Managers: 1, OverlayEngine: d.overlay, ServiceEngine: d.service}); err != nil {
		return "", err
	}
	if d.hosts, err = d.lab.Hosts(); err != nil {
		return "", err
	}
	d.api = map[string]*client.Client{}
	d.nodes, d.names = map[string]weft.ID{}, map[weft.ID]string{}
	for _, h := range d.hosts {
		if d.api[h.Name], err = dialHost(h.Paths.Socket); err != nil {
			return "", err
		}
	}
	err = await(ctx, func() error { return d.awaitReady(ctx, len(d.hosts)) })
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d hosts ready: %s", len(d.nodes), d.hostAddrs()), nil
}

// awaitReady succeeds when n nodes are ready, and notes who they are.
func (d *demo) awaitReady(ctx context.Context, n int) error {
	r, err := d.manager().NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return err
	}
	ready := 0
	for _, node := range r.Items {
		host, id := node.Description.Hostname, weft.ID(node.ID)
		d.nodes[host], d.names[id] = id, host
		if node.Status.State == swarm.NodeStateReady {
			ready++
		}
	}
	if ready != n || len(r.Items) != len(d.hosts) {
		return fmt.Errorf("%d of %d nodes are ready, %d expected", ready, len(r.Items), n)
	}
	return nil
}

func (d *demo) hostAddrs() string {
	var s []string
	for _, h := range d.hosts {
		s = append(s, fmt.Sprintf("%s %s", h.Name, h.Addr))
	}
	return strings.Join(s, ", ")
}

func (d *demo) createNetworks(ctx context.Context) (string, error) {
	var err error
	if d.front, err = d.createNetwork(ctx, "front"); err != nil {
		return "", err
	}
	if d.back, err = d.createNetwork(ctx, "back"); err != nil {
		return "", err
	}
	return fmt.Sprintf("front %s (VNI %d), back %s (VNI %d)", d.front.subnet, d.front.vni, d.back.subnet, d.back.vni), nil
}

func (d *demo) createWeb(ctx context.Context) (string, error) {
	_, err := d.manager().ServiceCreate(ctx, client.ServiceCreateOptions{Spec: demoService("web", d.front.id, 3, demoPort)})
	if err != nil {
		return "", err
	}
	d.web, err = d.awaitTasks(ctx, "web", func(ts []demoTask) error { return onHosts(ts, "h1", "h2", "h3") })
	if err != nil {
		return "", err
	}
	return "one task on each of " + hostsOf(d.web), nil
}

// onHosts wants exactly one task on each host.
func onHosts(ts []demoTask, hosts ...string) error {
	if got := hostsOf(ts); got != strings.Join(hosts, ", ") {
		return fmt.Errorf("tasks run on [%s], one each wanted on [%s]", got, strings.Join(hosts, ", "))
	}
	return nil
}

func hostsOf(ts []demoTask) string {
	var s []string
	for _, t := range ts {
		s = append(s, t.host)
	}
	return strings.Join(s, ", ")
}

func (d *demo) createCaller(ctx context.Context) (string, error) {
	_, err := d.manager().ServiceCreate(ctx, client.ServiceCreateOptions{Spec: demoService("caller", d.front.id, 3, 0)})
	if err != nil {
		return "", err
	}
	d.callers, err = d.awaitTasks(ctx, "caller", func(ts []demoTask) error { return onHosts(ts, "h1", "h2", "h3") })
	if err != nil {
		return "", err
	}
	return "one task on each of " + hostsOf(d.callers) + ", to call web by name", nil
}

func (d *demo) createLone(ctx context.Context) (string, error) {
	_, err := d.manager().ServiceCreate(ctx, client.ServiceCreateOptions{Spec: demoService("lone", d.back.id, 1, 0)})
	if err != nil {
		return "", err
	}
	d.lone, err = d.awaitTasks(ctx, "lone", func(ts []demoTask) error {
		if len(ts) != 1 {
			return fmt.Errorf("%d tasks run, 1 wanted", len(ts))
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("on %s, only on network back", d.lone[0].host), nil
}

// pairs calls f for every two tasks of web on different hosts, both ways.
func (d *demo) pairs(f func(from, to demoTask) error) (int, error) {
	n := 0
	for _, a := range d.web {
		for _, b := range d.web {
			if a.id == b.id {
				continue
			}
			if !b.addrs["front"].IsValid() {
				return n, fmt.Errorf("the API shows no address of the task on %s on network front", b.host)
			}
			if err := f(a, b); err != nil {
				return n, err
			}
			n++
		}
	}
	return n, nil
}

func (d *demo) pingPairs(ctx context.Context) (string, error) {
	n, err := d.pairs(func(from, to demoTask) error {
		_, err := d.inTask(ctx, from, "ping", "--count", "3", to.addrs["front"].String())
		return err
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d directions, 3 of 3 replies each", n), nil
}

func (d *demo) tcpByAddress(ctx context.Context) (string, error) {
	n, err := d.pairs(func(from, to demoTask) error {
		out, err := d.inTask(ctx, from, "get", "http://"+to.addrs["front"].String()+"/")
		if err != nil {
			return err
		}
		by, err := answeredBy(d.web, out)
		if err == nil && by.id != to.id {
			err = fmt.Errorf("from %s to %s: answered by the task on %s", from.host, to.host, by.host)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d directions, each answered by the task asked for", n), nil
}

// tcpByName asks by the service's name from every host until each task has
// answered: so every pair has spoken by name.
func (d *demo) tcpByName(ctx context.Context) (string, error) {
	for _, from := range d.callers {
		if _, err := d.reachAll(ctx, func() (string, error) { return d.inTask(ctx, from, "get", "http://web/") }); err != nil {
			return "", fmt.Errorf("http://web/ from the caller on %s: %w", from.host, err)
		}
	}
	// A task that calls its own service is balanced like everyone.
	if _, err := d.reachAll(ctx, func() (string, error) { return d.inTask(ctx, d.web[0], "get", "http://web/") }); err != nil {
		return "", fmt.Errorf("http://web/ from web's own task on %s: %w", d.web[0].host, err)
	}
	return "from every host, http://web/ reaches the tasks on " + hostsOf(d.web), nil
}

// reachAll asks until every task of web has answered, at most 40 times: with a
// random choice among three, fewer would fail once in a thousand runs.
func (d *demo) reachAll(ctx context.Context, ask func() (string, error)) (int, error) {
	seen := map[weft.ID]bool{}
	const most = 40
	for n := 1; n <= most; n++ {
		out, err := ask()
		if err != nil {
			return n, err
		}
		t, err := answeredBy(d.web, out)
		if err != nil {
			return n, err
		}
		if seen[t.id] = true; len(seen) == len(d.web) {
			return n, nil
		}
		if err := ctx.Err(); err != nil {
			return n, err
		}
	}
	return most, fmt.Errorf("only %d of %d tasks answered in %d requests", len(seen), len(d.web), most)
}

func (d *demo) vxlanCounters(ctx context.Context) (string, error) {
	before, err := d.vxlan(d.front)
	if err != nil {
		return "", err
	}
	const echoes = 10
	if _, err := d.inTask(ctx, d.web[0], "ping", "--count", fmt.Sprint(echoes), d.web[1].addrs["front"].String()); err != nil {
		return "", err
	}
	after, err := d.vxlan(d.front)
	if err != nil {
		return "", err
	}
	a, b := d.web[0].host, d.web[1].host
	sent, got := after[a].TxPackets-before[a].TxPackets, after[b].RxPackets-before[b].RxPackets
	if sent < echoes || got < echoes {
		return "", fmt.Errorf("%d echoes from %s to %s, but %s sent %d and %s received %d packets on %s", echoes, a, b, a, sent, b, got, after[a].Link)
	}
	return fmt.Sprintf("%d echoes: %s sent %d, %s received %d on %s", echoes, a, sent, b, got, after[a].Link), nil
}

func (d *demo) networksApart(ctx context.Context) (string, error) {
	web, lone := d.web[0], d.lone[0]
	if _, err := d.inTask(ctx, lone, "get", "http://"+lone.addrs["back"].String()+"/"); err != nil {
		return "", fmt.Errorf("lone does not answer itself, so silence would prove nothing: %w", err)
	}
	for _, try := range []struct {
		from demoTask
		args []string
	}{
		{web, []string{"ping", "--count", "1", "--timeout", "1s", lone.addrs["back"].String()}},
		{web, []string{"get", "--timeout", "1s", "http://" + lone.addrs["back"].String() + "/"}},
		{web, []string{"lookup", "lone"}},
		{lone, []string{"ping", "--count", "1", "--timeout", "1s", web.addrs["front"].String()}},
		{lone, []string{"lookup", "web"}},
	} {
		// A failure to run the command at all must not pass for "no way".
		_, err := d.inTask(ctx, try.from, try.args...)
		if err == nil {
			return "", fmt.Errorf("%s from the task on %s succeeded across networks", strings.Join(try.args, " "), try.from.host)
		}
		if !strings.Contains(err.Error(), "exit code 1:") {
			return "", err
		}
	}
	return "web and lone reach each other neither by address nor by name", nil
}

func (d *demo) serviceAddress(ctx context.Context) (string, error) {
	r, err := d.manager().ServiceInspect(ctx, "web", client.ServiceInspectOptions{})
	if err != nil {
		return "", err
	}
	for _, v := range r.Service.Endpoint.VirtualIPs {
		if v.NetworkID == d.front.id {
			d.vip = v.Addr.Addr().String()
		}
	}
	if d.vip == "" {
		return "", errors.New("service web has no address on network front")
	}
	out, err := d.inTask(ctx, d.web[0], "lookup", "web")
	if err != nil {
		return "", err
	}
	if got := strings.Fields(out); !slices.Equal(got, []string{d.vip}) {
		return "", fmt.Errorf("name web resolves to %v, its service address is %s", got, d.vip)
	}
	n, err := d.reachAll(ctx, func() (string, error) { return d.inTask(ctx, d.callers[0], "get", "http://"+d.vip+"/") })
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("web = %s, all 3 tasks answered within %d requests", d.vip, n), nil
}

func (d *demo) taskNames(ctx context.Context) (string, error) {
	var want []string
	for _, t := range d.web {
		want = append(want, t.addrs["front"].String())
	}
	slices.Sort(want)
	for _, t := range d.web {
		out, err := d.inTask(ctx, t, "lookup", "tasks.web")
		if err != nil {
			return "", err
		}
		got := strings.Fields(out)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			return "", fmt.Errorf("tasks.web on %s resolves to %v, the tasks have %v", t.host, got, want)
		}
	}
	return "tasks.web = " + strings.Join(want, ", "), nil
}

func (d *demo) publishedPort(ctx context.Context) (string, error) {
	for _, h := range d.hosts {
		if err := await(ctx, func() error { return d.answers(ctx, h) }); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%s, outside the cluster, is answered on port %d of %d hosts", lab.ClientAddr, demoPort, len(d.hosts)), nil
}

// answers asks the published port of a host from outside.
func (d *demo) answers(ctx context.Context, h lab.Host) error {
	out, err := d.outside(ctx, "get", "--timeout", "2s", fmt.Sprintf("http://%s:%d/", h.Addr, demoPort))
	if err != nil {
		return err
	}
	_, err = answeredBy(d.web, out)
	return err
}

func (d *demo) killContainer(ctx context.Context) (string, error) {
	victim := d.web[len(d.web)-1]
	if _, err := d.api[victim.host].ContainerKill(ctx, victim.container, client.ContainerKillOptions{Signal: "SIGKILL"}); err != nil {
		return "", fmt.Errorf("kill the container on %s: %w", victim.host, err)
	}
	ts, err := d.awaitTasks(ctx, "web", func(ts []demoTask) error { return replaced(ts, victim, 3) })
	if err != nil {
		return "", err
	}
	d.web = ts
	if err := d.allAnswer(ctx, d.hosts); err != nil {
		return "", err
	}
	return fmt.Sprintf("task on %s killed, replaced after the usual %s; tasks on %s; all hosts answer", victim.host, weft.DefaultRestartDelay, hostsOf(ts)), nil
}

// replaced wants n running tasks, victim not among them.
func replaced(ts []demoTask, victim demoTask, n int) error {
	if slices.ContainsFunc(ts, func(t demoTask) bool { return t.id == victim.id }) {
		return fmt.Errorf("task %s still counts as running", victim.id.Short())
	}
	if len(ts) != n {
		return fmt.Errorf("%d tasks run, %d wanted", len(ts), n)
	}
	return nil
}

// allAnswer waits until every given host answers on the published port and
// every task takes part.
func (d *demo) allAnswer(ctx context.Context, hosts []lab.Host) error {
	for _, h := range hosts {
		err := await(ctx, func() error {
			_, err := d.reachAll(ctx, func() (string, error) {
				return d.outside(ctx, "get", "--timeout", "2s", fmt.Sprintf("http://%s:%d/", h.Addr, demoPort))
			})
			return err
		})
		if err != nil {
			return fmt.Errorf("published port of %s: %w", h.Name, err)
		}
	}
	return nil
}

func (d *demo) killHost(ctx context.Context) (string, error) {
	if err := d.lab.Kill(ctx, "h3"); err != nil {
		return "", err
	}
	ts, err := d.awaitTasks(ctx, "web", func(ts []demoTask) error {
		if len(ts) != 3 || slices.ContainsFunc(ts, func(t demoTask) bool { return t.host == "h3" }) {
			return fmt.Errorf("tasks run on [%s], 3 wanted on h1 and h2", hostsOf(ts))
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	d.web = ts
	if err := d.allAnswer(ctx, d.hosts[:2]); err != nil {
		return "", err
	}
	return fmt.Sprintf("power of h3 cut; tasks on %s; h1 and h2 answer", hostsOf(ts)), nil
}

func (d *demo) restartHost(ctx context.Context) (string, error) {
	if err := d.lab.Start(ctx, "h3", lab.HostEngines{}); err != nil {
		return "", err
	}
	if err := await(ctx, func() error { return d.awaitReady(ctx, len(d.hosts)) }); err != nil {
		return "", err
	}
	if err := d.allAnswer(ctx, d.hosts); err != nil {
		return "", err
	}
	return "h3 is ready again and answers, without a task of its own", nil
}

func (d *demo) removeServices(ctx context.Context) (string, error) {
	for _, s := range []string{"web", "caller", "lone"} {
		if _, err := d.manager().ServiceRemove(ctx, s, client.ServiceRemoveOptions{}); err != nil {
			return "", fmt.Errorf("remove service %s: %w", s, err)
		}
	}
	for _, n := range []demoNetwork{d.front, d.back} {
		// The network is in use until the last task of it is gone.
		err := await(ctx, func() error {
			_, err := d.manager().NetworkRemove(ctx, n.id, client.NetworkRemoveOptions{})
			return err
		})
		if err != nil {
			return "", fmt.Errorf("remove network %s: %w", n.name, err)
		}
	}
	return "3 services and 2 networks", nil
}

func (d *demo) removeAll(ctx context.Context) (string, error) {
	if err := removeLab(ctx, d.lab); err != nil {
		return "", err
	}
	return "no process, namespace, link, mount, cgroup or file is left", nil
}
