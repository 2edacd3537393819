package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/lab/vm"
	"github.com/weftnet/weft/vxlan/netns"
)

// pathDocker is from container to container across two nodes, on an overlay network
// of Docker Engine in swarm mode.
const pathDocker = "docker"

// To the same network's address of a service with one task, on the other node; and
// from a client outside to a published port of it, by the node without a task.
const (
	dockerVIP  = "docker-vip"
	dockerMesh = "docker-mesh"
)

// Of Docker's network in the guest.
const (
	dockerSubnet  = "10.50.0.0/24"
	dockerServer  = "10.50.0.100"
	dockerImage   = "bench:1"
	dockerService = "served"
)

// dockerLimits: weft takes at most 0.65 of Docker's time for a request, and makes 1.7
// times as many connections; to a service address, and by a node without a task, it takes
// at most 0.6.
var dockerLimits = []limit{
	{Case: pathEBPF, Metric: string(rr), Over: pathDocker, Least: 1 / 0.65},
	{Case: pathEBPF, Metric: string(crr), Over: pathDocker, Least: 1.7},
	{Case: vipEBPF, Metric: string(rr), Over: dockerVIP, Least: 1 / 0.6},
	{Case: vipIPVS, Metric: string(rr), Over: dockerVIP, Least: 1 / 0.6},
	{Case: vipNFT, Metric: string(rr), Over: dockerVIP, Least: 1 / 0.6},
	{Case: meshEBPF, Metric: string(rr), Over: dockerMesh, Least: 1 / 0.6},
	{Case: meshIPVS, Metric: string(rr), Over: dockerMesh, Least: 1 / 0.6},
	{Case: meshBridge, Metric: string(rr), Over: dockerMesh, Least: 1 / 0.6},
}

// dockerPairs compare what does the same.
var dockerPairs = []pair{{vipEBPF, dockerVIP}, {vipIPVS, dockerVIP}, {vipNFT, dockerVIP}, {meshEBPF, dockerMesh}, {meshIPVS, dockerMesh}, {meshBridge, dockerMesh}, {dockerVIP, pathDocker}, {dockerMesh, pathDocker}}

// dockersOwn are the cases that need Docker Engine's service.
var dockersOwn = []string{dockerVIP, dockerMesh}

// dockerBench: weft's overlay beside Docker's, in one boot.
func dockerBench() benchmark {
	c := trafficChoices([]string{pathHand, pathBridge, pathEBPF, vipEBPF, vipIPVS, vipNFT, meshEBPF, meshIPVS, meshBridge, dockerVIP, dockerMesh})
	// Datagrams of connected sockets do not come back from a service address yet
	// (ingress/bpf/DESIGN.md): name UDP together with the cases that have none.
	c.UsualMetrics = []string{string(rr), string(crr), string(bulk)}
	c.Cases = slices.Concat(c.Cases, []string{vipEBPF, vipIPVS, vipNFT, meshEBPF, meshIPVS, meshBridge}, dockersOwn)
	return benchmark{
		Name:    "docker",
		About:   "what overlays cost in instructions: operations per 10^9 of them between two tasks on weft's engines and host to host, against two containers on the overlay network of Docker Engine (swarm mode, two nodes), in one boot of a guest whose clock counts them",
		Choices: c,
		Linked:  true,
		Away: func(ctx context.Context, o options) (away, error) {
			top, err := output(ctx, "git", "rev-parse", "--show-toplevel")
			if err != nil {
				return away{}, fmt.Errorf("run it in a checkout: %w", err)
			}
			if _, err := output(ctx, filepath.Join(top, "bench/peers/docker-root.sh")); err != nil {
				return away{}, fmt.Errorf("fetch Docker Engine: %w", err)
			}
			version, err := output(ctx, "cat", filepath.Join(top, "bin/cache/docker-root/etc/docker-version"))
			if err != nil {
				return away{}, fmt.Errorf("tell Docker Engine's version: %w", err)
			}
			// Engine asks for modules by programs that the guest has no index for.
			s, kernel, err := inGuest(ctx, o, vm.Config{MemoryMiB: 4096, DiskMiB: 4096, Base: filepath.Join(top, "bin/cache/docker-root")},
				`for m in veth vxlan bridge br_netfilter overlay sch_ingress cls_bpf ip_vs ip_vs_rr nf_conntrack nf_nat nf_tables nft_compat nft_chain_nat nft_masq \
  xt_conntrack xt_addrtype xt_MASQUERADE xt_nat xt_REDIRECT xt_mark xt_ipvs xt_comment xt_set xt_tcpudp xt_bpf xt_policy iptable_nat iptable_filter iptable_mangle \
  ip6_tables ip6table_nat ip6table_filter; do busybox modprobe $m; done
sysctl -qw net.ipv4.ip_forward=1
ulimit -n 1048576
`+guestCommand(o, "-docker"))
			if err != nil {
				return away{}, err
			}
			return away{
				Series: s, Guest: "Linux " + kernel + " and Docker Engine " + version + " on one processor, whose clock counts instructions",
				Limits: limitsOn(slices.Concat(dockerLimits, meshLimits), pathDocker, o.cases, o.metrics),
			}, nil
		},
	}
}

//go:embed peers/docker-node.sh
var dockerNodeScript string

// docker starts two nodes of Docker Engine on hosts of their own, makes a swarm and
// an overlay network of them, and gives the path between a container on each. They
// end with the guest.
func (g *ground) docker(ctx context.Context, cases []string) ([]opener, error) {
	h, err := g.hosts(pathDocker)
	if err != nil {
		return nil, err
	}
	outside, err := g.client(pathDocker, h[0])
	if err != nil {
		return nil, err
	}
	script := filepath.Join(g.dir, "docker-node.sh")
	if err := os.WriteFile(script, []byte(dockerNodeScript), 0o755); err != nil {
		return nil, fmt.Errorf("write node script: %w", err)
	}
	for i, ns := range h {
		cmd := exec.Command("/bin/sh", script, strconv.Itoa(i))
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID}
		if err := netns.Do(ns, cmd.Start); err != nil {
			return nil, fmt.Errorf("start node %d of Docker Engine: %w", i, err)
		}
	}
	if err := dockerSwarm(ctx); err != nil {
		return nil, fmt.Errorf("set up Docker Engine: %w", err)
	}
	out := []opener{{pathDocker, func(ctx context.Context) (*way, error) { return dockerWay(ctx) }}}
	if !slices.ContainsFunc(dockersOwn, func(n string) bool { return slices.Contains(cases, n) }) {
		return out, nil
	}
	vip, err := dockerServe(ctx)
	if err != nil {
		return nil, fmt.Errorf("run a service on Docker Engine: %w\n%s", err, dockerLog(0))
	}
	if slices.Contains(cases, dockerVIP) {
		out = append(out, opener{dockerVIP, func(ctx context.Context) (*way, error) {
			client, err := dockerRun(ctx, 0, nil, "ask", vip)
			return &way{name: dockerVIP, client: client}, err
		}})
	}
	if slices.Contains(cases, dockerMesh) {
		out = append(out, opener{dockerMesh, func(ctx context.Context) (*way, error) {
			client, err := generator(ctx, outside, g.core, "ask", outsideOf(0).String())
			return &way{name: dockerMesh, client: client}, err
		}})
	}
	return out, nil
}

// dockerServe makes a service with one task on node 1, on the network and with
// published ports, and gives its address on the network.
func dockerServe(ctx context.Context) (string, error) {
	words := []string{"service", "create", "-d", "--name", dockerService, "--network", "bench", "--constraint", "node.hostname==node1", "-e", trafficEnv}
	for _, p := range []string{fmt.Sprint(answerPort), fmt.Sprint(drainPort), fmt.Sprintf("%d/udp", windowPort)} {
		number, _, _ := strings.Cut(p, "/")
		words = append(words, "--publish", number+":"+p)
	}
	if _, err := docker(ctx, 0, append(words, dockerImage, "/bench", trafficWord, "stay", "0.0.0.0")...); err != nil {
		return "", err
	}
	starting, cancel := context.WithTimeout(ctx, dockerStart)
	defer cancel()
	err := await(starting, func() error {
		state, err := docker(starting, 0, "service", "ps", "--format", "{{.CurrentState}} {{.Error}}", dockerService)
		if err == nil && !strings.HasPrefix(state, "Running") {
			err = fmt.Errorf("its task is %s", state)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	id, err := docker(ctx, 0, "network", "inspect", "-f", "{{.ID}}", "bench")
	if err != nil {
		return "", err
	}
	vip, err := docker(ctx, 0, "service", "inspect", "-f", `{{range .Endpoint.VirtualIPs}}{{if eq .NetworkID "`+id+`"}}{{.Addr}}{{end}}{{end}}`, dockerService)
	addr, _, _ := strings.Cut(vip, "/")
	return addr, err
}

// dockerCmd is a docker command line at node i.
func dockerCmd(ctx context.Context, i int, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "docker", append([]string{"-H", fmt.Sprintf("unix:///var/lib/node/%d/docker.sock", i)}, args...)...)
}

// docker runs a command line at node i and gives its standard output.
func docker(ctx context.Context, i int, args ...string) (string, error) {
	cmd := dockerCmd(ctx, i, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	fmt.Fprintf(os.Stderr, "%sdocker %s at node %d\n", guestSays, args[0], i)
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}

// dockerStart bounds the start of the daemons, in the guest's time.
const dockerStart = 5 * time.Minute

func dockerSwarm(ctx context.Context) error {
	starting, cancel := context.WithTimeout(ctx, dockerStart)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for i := range 2 {
		err := await(starting, func() error {
			_, err := os.Stat(fmt.Sprintf("/var/lib/node/%d/docker.sock", i))
			return err
		})
		if err != nil {
			return fmt.Errorf("node %d has no socket: %w\n%s", i, err, dockerLog(i))
		}
		if _, err := docker(starting, i, "version"); err != nil {
			return fmt.Errorf("%w\n%s", err, dockerLog(i))
		}
		if err := dockerImport(ctx, i, self); err != nil {
			return err
		}
	}
	if _, err := docker(ctx, 0, "swarm", "init", "--advertise-addr", vtep(0).String()); err != nil {
		return err
	}
	token, err := docker(ctx, 0, "swarm", "join-token", "-q", "worker")
	if err != nil {
		return err
	}
	if _, err := docker(ctx, 1, "swarm", "join", "--token", token, vtep(0).String()+":2377"); err != nil {
		return err
	}
	_, err = docker(ctx, 0, "network", "create", "-d", "overlay", "--attachable", "--subnet", dockerSubnet, "bench")
	return err
}

// dockerLog is the end of what a node's daemons have said.
func dockerLog(i int) string {
	var out []string
	for _, name := range []string{"containerd", "docker"} {
		b, err := os.ReadFile(fmt.Sprintf("/var/lib/node/%d/%s.log", i, name))
		if err != nil {
			b = []byte(err.Error())
		}
		out = append(out, lastLines(strings.TrimSpace(string(b)), 8))
	}
	return strings.Join(out, "\n")
}

// dockerImport makes an image that holds this program and nothing else.
func dockerImport(ctx context.Context, i int, self string) error {
	tar := exec.CommandContext(ctx, "tar", "-c", "-C", filepath.Dir(self), filepath.Base(self))
	cmd := dockerCmd(ctx, i, "import", "-", dockerImage)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	var err error
	if cmd.Stdin, err = tar.StdoutPipe(); err != nil {
		return err
	}
	if err := tar.Start(); err != nil {
		return err
	}
	if err := errors.Join(cmd.Run(), tar.Wait()); err != nil {
		return fmt.Errorf("docker import: %w: %s", err, stderr.Bytes())
	}
	return nil
}

// dockerRun starts the generator in a container of node i. Engine's filter of system
// calls is off, as it is for the processes in weft's namespaces, and
// /proc/timer_list is to be read.
func dockerRun(ctx context.Context, i int, options []string, args ...string) (*station, error) {
	line := append([]string{"run", "-i", "--rm", "--network", "bench", "-e", trafficEnv,
		"--security-opt", "seccomp=unconfined", "--security-opt", "systempaths=unconfined"}, options...)
	line = append(append(line, dockerImage, "/bench", trafficWord), args...)
	cmd := dockerCmd(ctx, i, line...)
	cmd.Stderr = os.Stderr
	fmt.Fprintf(os.Stderr, "%sdocker run at node %d\n", guestSays, i)
	s, err := start(cmd)
	if err != nil {
		return nil, fmt.Errorf("docker run at node %d: %w\n%s", i, err, dockerLog(i))
	}
	return s, nil
}

// dockerWay is from container to container.
func dockerWay(ctx context.Context) (*way, error) {
	server, err := dockerRun(ctx, 1, []string{"--ip", dockerServer}, "serve", "0.0.0.0")
	if err != nil {
		return nil, err
	}
	client, err := dockerRun(ctx, 0, nil, "ask", dockerServer)
	if err != nil {
		return nil, errors.Join(err, server.close())
	}
	return &way{name: pathDocker, server: server, client: client}, nil
}
