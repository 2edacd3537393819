package api_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/api"
	"github.com/weftnet/weft/api/apitest"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// serve runs a server over a fake on a Unix socket until the test ends.
func serve(t *testing.T, c *apitest.Cluster) (socket string) {
	t.Helper()
	cfg := c.Config()
	cfg.Log = slog.New(slog.DiscardHandler)
	s, err := api.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return socket
}

// dockerCLI is the stock docker command against a server of ours.
type dockerCLI struct {
	t      *testing.T
	socket string
	config string
}

func newDocker(t *testing.T, c *apitest.Cluster) *dockerCLI {
	t.Helper()
	if _, err := exec.LookPath("docker"); err != nil {
		netnstest.Missing(t, "docker", err)
	}
	return &dockerCLI{t, serve(t, c), t.TempDir()}
}

// run gives stdout, stderr and the exit code of one command line.
func (d *dockerCLI) run(stdin string, args ...string) (stdout, stderr string, code int) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", append([]string{"-H", "unix://" + d.socket}, args...)...)
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+d.config, "DOCKER_CLI_HINTS=false")
	cmd.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		d.t.Fatalf("docker %q: %v", args, err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// ok runs a command that must succeed and print what the pattern matches.
func (d *dockerCLI) ok(pattern string, args ...string) string {
	d.t.Helper()
	out, errOut, code := d.run("", args...)
	if code != 0 {
		d.t.Fatalf("docker %s: exit %d\n%s%s", strings.Join(args, " "), code, out, errOut)
	}
	if !regexp.MustCompile(pattern).MatchString(out) {
		d.t.Errorf("docker %s: %q not in\n%s%s", strings.Join(args, " "), pattern, out, errOut)
	}
	return out
}

// bad runs a command that must fail with a text.
func (d *dockerCLI) bad(pattern string, args ...string) {
	d.t.Helper()
	out, errOut, code := d.run("", args...)
	if code == 0 || !regexp.MustCompile(pattern).MatchString(errOut) {
		d.t.Errorf("docker %s: exit %d, %q not in\n%s%s", strings.Join(args, " "), code, pattern, out, errOut)
	}
}

func TestDockerSwarm(t *testing.T) {
	d := newDocker(t, apitest.New())
	d.bad("This node is not a swarm manager", "node", "ls")
	d.bad("This node is not a swarm manager", "service", "ls")
	d.ok(`API version: +1\.51`, "version")
	d.ok("Swarm: inactive", "info")
	d.ok(`docker swarm join --token SWMTKN-1-ca-worker0 10.99.0.1:2377`, "swarm", "init")
	d.bad("already part of a swarm", "swarm", "init")
	d.ok(`Swarm: active[^$]*Managers: 1[^$]*Nodes: 1`, "info")
	d.ok("SWMTKN-1-ca-manager0", "swarm", "join-token", "manager")
	d.ok("SWMTKN-1-ca-worker[1-9]", "swarm", "join-token", "--rotate", "-q", "worker")
	d.ok(`\* +h1 +Ready +Active +Leader +0\.0-test`, "node", "ls")
	d.ok(`Hostname:\s+h1`, "node", "inspect", "--pretty", "self")
	d.ok("h1|", "node", "update", "--availability", "drain", "h1")
	d.ok("drain", "node", "inspect", "-f", "{{.Spec.Availability}}", "h1")
	d.ok("", "node", "update", "--label-add", "disk=ssd", "--availability", "active", "h1")
	d.ok("disk:ssd", "node", "inspect", "-f", "{{.Spec.Labels}}", "h1")
	d.ok("NAME|ID", "node", "ps")
	d.bad("not down", "node", "rm", "h1")
	d.bad("EncryptionConfig.AutoLockManagers is not supported yet", "swarm", "update", "--autolock")
	d.bad("last manager", "swarm", "leave")
	d.ok("left the swarm", "swarm", "leave", "--force")
	d.bad("token is not valid", "swarm", "join", "--token", "x", "10.99.0.2:2377")
	d.ok("joined a swarm as a manager", "swarm", "join", "--token", "SWMTKN-1-a-b", "10.99.0.2:2377")
}

func TestDockerNetworksOfTwoFamilies(t *testing.T) {
	d := newDocker(t, apitest.New())
	d.ok("", "swarm", "init")
	d.ok("", "network", "create", "-d", "overlay", "--ipv6", "--subnet", "fd00:5::/64", "--gateway", "fd00:5::ffff", "--subnet", "10.5.0.0/24", "n")
	d.ok("true true ", "network", "inspect", "-f", "{{.EnableIPv4}} {{.EnableIPv6}} {{range .IPAM.Config}}{{.Subnet}} {{end}}", "n")
	// The docker command sends subnets in the order of a map.
	d.ok("fd00:5::/64 fd00:5::ffff 10.5.0.0/24 10.5.0.1|10.5.0.0/24 10.5.0.1 fd00:5::/64 fd00:5::ffff", "network", "inspect", "-f", "{{range .IPAM.Config}}{{.Subnet}} {{.Gateway}} {{end}}", "n")
	d.ok("", "service", "create", "--name", "s", "--network", "n", "-d", "busybox")
	d.ok("10.5.0.2/24 fd00:5::2/64", "service", "inspect", "-f", "{{range .Endpoint.VirtualIPs}}{{.Addr}} {{end}}", "s")
	task := strings.Fields(d.ok("", "service", "ps", "-q", "s"))[0]
	d.ok(`\[10\.5\.0\.\d+/24 fd00:5::[0-9a-f]+/64\]`, "inspect", "-f", "{{range .NetworksAttachments}}{{.Addresses}}{{end}}", task)
	ct := strings.Fields(d.ok("", "ps", "-q", "--no-trunc"))[0]
	d.ok(`10\.5\.0\.\d+/24 fd00:5::[0-9a-f]+/64`, "inspect", "-f",
		"{{with index .NetworkSettings.Networks \"n\"}}{{.IPAddress}}/{{.IPPrefixLen}} {{.GlobalIPv6Address}}/{{.GlobalIPv6PrefixLen}}{{end}}", ct)
	d.ok(`10\.5\.0\.\d+/24 fd00:5::[0-9a-f]+/64`, "network", "inspect", "-f", "{{range .Containers}}{{.IPv4Address}} {{.IPv6Address}}{{end}}", "n")
}

func TestDockerNetworks(t *testing.T) {
	d := newDocker(t, apitest.New())
	d.bad("not a swarm manager", "network", "create", "-d", "overlay", "n")
	d.ok("", "swarm", "init")
	d.bad("use --driver overlay", "network", "create", "n")
	d.bad("fd00::/64 is of IPv6, .*EnableIPv6", "network", "create", "-d", "overlay", "--subnet", "fd00::/64", "n")
	d.bad("fd00::/126 must be /16 to /125", "network", "create", "-d", "overlay", "--ipv6", "--subnet", "fd00::/126", "n")
	d.bad("fd00::1/64 has host bits set: it should be fd00::/64", "network", "create", "-d", "overlay", "--ipv6", "--subnet", "fd00::1/64", "n")
	d.bad(`Options\["color"\]: .*no such option`, "network", "create", "-d", "overlay", "-o", "color=red", "n")
	d.bad(`Options\["com.docker.network.driver.mtu"\]: .*65536`, "network", "create", "-d", "overlay", "-o", "com.docker.network.driver.mtu=65536", "n")
	d.ok("", "network", "create", "-d", "overlay", "-o", "com.docker.network.driver.mtu=1400", "m")
	d.bad(`Options\["encrypted"\]: "false"`, "network", "create", "-d", "overlay", "-o", "encrypted=false", "n")
	d.ok("", "network", "create", "-d", "overlay", "-o", "encrypted", "e")
	d.ok("^map\\[.*encrypted:", "network", "inspect", "-f", "{{.Options}}", "e")
	d.ok("^e\n$", "network", "rm", "e")
	d.ok("^1400\n$", "network", "inspect", "-f", `{{index .Options "com.docker.network.driver.mtu"}}`, "m")
	d.ok("^m\n$", "network", "rm", "m")
	d.bad(`Name: "m\."`, "network", "create", "-d", "overlay", "m.")
	d.bad(`Name: "m\.\.n"`, "network", "create", "-d", "overlay", "m..n")
	d.ok("", "network", "create", "-d", "overlay", "My.Stack_default")
	d.ok("^My.Stack_default\n$", "network", "rm", "My.Stack_default")
	d.bad("IPRange", "network", "create", "-d", "overlay", "--subnet", "10.5.0.0/24", "--ip-range", "10.5.0.0/25", "n")
	id := strings.TrimSpace(d.ok("^[0-9a-z]{25}\n$", "network", "create", "-d", "overlay", "--attachable",
		"--subnet", "10.5.0.0/24", "--gateway", "10.5.0.1", "--label", "a=b", "n"))
	d.bad("already exists", "network", "create", "-d", "overlay", "n")
	d.ok(`ingress +overlay +swarm\n.* n +overlay +swarm`, "network", "ls")
	d.ok("^"+id[:12]+"\n$", "network", "ls", "-q", "-f", "name=n", "-f", "label=a")
	d.ok("10.5.0.0/24 10.5.0.1", "network", "inspect", "-f", "{{range .IPAM.Config}}{{.Subnet}} {{.Gateway}}{{end}}", id[:8])
	d.ok("", "service", "create", "--name", "s", "--network", "n", "-d", "busybox")
	d.ok(`"VIP": "10.5.0.2"`, "network", "inspect", "-v", "n")
	d.ok(`"h1"`, "network", "inspect", "n")
	d.bad("in use by service s", "network", "rm", "n")
	d.ok("", "service", "rm", "s")
	d.ok("n\n", "network", "rm", "n")
	d.bad("network n not found|No such network: n", "network", "inspect", "n") // older clients say it themselves
	d.bad("not supported yet", "network", "prune", "-f")
}

func TestDockerServices(t *testing.T) {
	d := newDocker(t, apitest.New())
	d.ok("", "swarm", "init")
	d.ok("", "network", "create", "-d", "overlay", "n")
	// With the progress bar: five seconds of monitoring after it converged.
	out := d.ok("converged", "service", "create", "--name", "web", "--replicas", "2", "--network", "n",
		"--publish", "8080:80", "--publish", "81/udp", "--env", "A=b", "--label", "l=m", "--constraint", "node.hostname==h1",
		"--mount", "type=bind,src=/a,dst=/b,readonly", "--mount", "type=volume,src=vol,dst=/c", "--mount", "type=tmpfs,dst=/d,tmpfs-size=1048576",
		"--user", "u", "--workdir", "/w", "--hostname", "h", "--limit-cpu", "0.5", "--limit-memory", "64m",
		"--restart-condition", "on-failure", "--stop-grace-period", "3s", "--endpoint-mode", "vip", "busybox", "sleep", "9")
	id := out[:25]
	d.bad("name conflicts", "service", "create", "-d", "--name", "web", "busybox")
	d.bad("TaskTemplate.ContainerSpec.Healthcheck.StartInterval: 1µs: write at least 1ms", "service", "create", "-d", "--health-cmd", "x", "--health-start-interval", "1us", "busybox")
	d.ok("", "service", "create", "-d", "--name", "checked", "--health-cmd", "true", "--health-interval", "7s", "--health-timeout", "2s",
		"--health-start-period", "20s", "--health-start-interval", "1s", "--health-retries", "4", "busybox")
	d.ok(`{"Test":\["CMD-SHELL","true"\],"Interval":7000000000,"Timeout":2000000000,"StartPeriod":20000000000,"StartInterval":1000000000,"Retries":4}`,
		"service", "inspect", "--format", "{{json .Spec.TaskTemplate.ContainerSpec.Healthcheck}}", "checked")
	d.ok("", "service", "update", "-d", "--update-parallelism", "0", "--update-delay", "1m", "--update-order", "start-first", "--update-monitor", "9s",
		"--update-failure-action", "continue", "--update-max-failure-ratio", "0.1", "checked")
	d.ok(`^{"Parallelism":0,"Delay":60000000000,"FailureAction":"continue","Monitor":9000000000,"MaxFailureRatio":0.1,"Order":"start-first"}`,
		"service", "inspect", "--format", "{{json .Spec.UpdateConfig}}", "checked")
	d.ok("", "service", "update", "-d", "--no-healthcheck", "checked")
	d.ok(`^{"Test":\["NONE"\]}`, "service", "inspect", "--format", "{{json .Spec.TaskTemplate.ContainerSpec.Healthcheck}}", "checked")
	d.ok("", "service", "rm", "checked")
	for flag, path := range map[string]string{
		"--container-label a=b": `ContainerSpec.Labels\["a"\]`, "--entrypoint sh": "ContainerSpec.Command", "--tty": "ContainerSpec.TTY",
		"--read-only": "ContainerSpec.ReadOnly", "--stop-signal SIGINT": "ContainerSpec.StopSignal",
		"--reserve-cpu 1": "Resources.Reservations.NanoCPUs", "--reserve-memory 8m": "Resources.Reservations.MemoryBytes",
		"--restart-delay 1s": "RestartPolicy.Delay 1s", "--restart-max-attempts 3": "RestartPolicy.MaxAttempts 3", "--restart-window 1s": "RestartPolicy.Window 1s",
	} {
		d.bad(`TaskTemplate\.`+path+" is not supported yet", slices.Concat([]string{"service", "create", "-d"}, strings.Fields(flag), []string{"busybox"})...)
	}
	d.bad("TaskTemplate.LogDriver", "service", "create", "-d", "--log-driver", "syslog", "busybox")
	d.bad("network nope not found|No such network: nope", "service", "create", "-d", "--network", "nope", "busybox")
	d.ok("web +replicated +2/2 +busybox:latest +.*8080->80/tcp", "service", "ls")
	d.ok(`web\.1 +busybox:latest +h1 +Running +Running`, "service", "ps", "web")
	d.ok(`Replicas:\s+2[^$]*Constraints:\s+\[node.hostname==h1\][^$]*PublishedPort = 8080`, "service", "inspect", "--pretty", "web")
	d.ok("^"+id+"\n$", "service", "inspect", "-f", "{{.ID}}", id[:6])
	d.ok("converged", "service", "scale", "web=3") // the two tasks that stay count as up to date
	d.ok("3/3", "service", "ls", "-f", "name=we")
	d.ok("", "service", "update", "-d", "--image", "other:1", "--env-add", "C=d", "--force", "web")
	d.ok(`other:1 \[(A=b C=d|C=d A=b)\] 1`, "service", "inspect", "-f",
		"{{.Spec.TaskTemplate.ContainerSpec.Image}} {{.Spec.TaskTemplate.ContainerSpec.Env}} {{.Spec.TaskTemplate.ForceUpdate}}", "web")
	d.ok("", "service", "update", "-d", "--restart-condition", "any", "web") // the client sends Docker's other defaults along
	d.bad(`ContainerSpec\.StopSignal is not supported yet`, "service", "update", "-d", "--stop-signal", "SIGINT", "web")
	d.bad(`RestartPolicy\.Delay 1s is not supported yet \(only 5s\)`, "service", "update", "-d", "--restart-delay", "1s", "web")
	d.ok("web", "service", "update", "--replicas", "1", "web") // an update that is complete is not monitored
	d.ok(`web\.1\.[0-9a-z]+@h1 +\| out of`, "service", "logs", "web")
	d.ok(`web\.1`, "node", "ps", "self")
	d.ok("replicated", "service", "ls", "-f", "mode=replicated")
	d.bad("Invalid filter", "service", "ls", "-f", "nope=1")
	d.ok("web", "service", "rm", "web")
	d.bad("no such service: web", "service", "inspect", "web")
	d.ok("converged", "service", "create", "--mode", "global", "--name", "g", "busybox")
	d.ok("g +global +1/1", "service", "ls")
}

func TestDockerRollback(t *testing.T) {
	d := newDocker(t, apitest.New())
	d.ok("", "swarm", "init")
	d.ok("", "service", "create", "-d", "--name", "web", "--update-failure-action", "rollback", "--rollback-parallelism", "3", "--rollback-delay", "2s",
		"--rollback-monitor", "8s", "--rollback-order", "start-first", "--rollback-failure-action", "continue", "--rollback-max-failure-ratio", "0.25", "busybox:1")
	policy := `{"Parallelism":3,"Delay":2000000000,"FailureAction":"continue","Monitor":8000000000,"MaxFailureRatio":0.25,"Order":"start-first"}`
	d.ok("^"+policy, "service", "inspect", "-f", "{{json .Spec.RollbackConfig}}", "web")
	d.ok("^rollback", "service", "inspect", "-f", "{{.Spec.UpdateConfig.FailureAction}}", "web")
	d.bad("rpc error: code = FailedPrecondition desc = service [0-9a-z]{25} does not have a previous spec", "service", "rollback", "-d", "web")
	d.ok("", "service", "update", "-d", "--image", "busybox:2", "web")
	d.ok("^"+policy, "service", "inspect", "-f", "{{json .Spec.RollbackConfig}}", "web") // it is sent back
	d.ok("rollback completed", "service", "rollback", "web")                             // with the progress bar
	d.ok("^busybox:1", "service", "inspect", "-f", "{{.Spec.TaskTemplate.ContainerSpec.Image}}", "web")
	for _, want := range []string{"2", "1"} {
		d.ok("web", "service", "rollback", "-d", "web")
		d.ok("^busybox:"+want+" rollback_completed rollback completed", "service", "inspect", "-f", "{{.Spec.TaskTemplate.ContainerSpec.Image}} {{.UpdateStatus.State}} {{.UpdateStatus.Message}}", "web")
	}
	d.ok(`(?s)UpdateStatus:.*State:\s+rollback_completed.*UpdateConfig:.*On failure:\s+rollback.*RollbackConfig:.*Parallelism:\s+3.*On failure:\s+continue.*Max failure ratio: 0.25.*Rollback order:\s+start-first`, "service", "inspect", "--pretty", "web")
	d.ok("web", "service", "update", "-d", "--rollback", "web")
	d.bad(`RollbackConfig.FailureAction "rollback" is not supported yet`, "service", "update", "-d", "--rollback-failure-action", "rollback", "web")
	d.bad("RollbackConfig.Delay: .*negative", "service", "update", "-d", "--rollback-delay", "-1s", "web")
	d.bad("RollbackConfig.MaxFailureRatio: ", "service", "update", "-d", "--rollback-max-failure-ratio", "1.5", "web")
	d.bad("nope", "service", "rollback", "nope")
}

func TestDockerPublish(t *testing.T) {
	d := newDocker(t, apitest.New())
	d.ok("", "swarm", "init")
	ports := func(of string) string {
		return strings.TrimSpace(d.ok("", "service", "inspect", "-f", "{{range ."+of+"}}{{.Protocol}}:{{.PublishedPort}}:{{.TargetPort}}:{{.PublishMode}} {{end}}", "s"))
	}
	// Ranges: sent as single ports in the order of a map, shown as Docker shows them.
	d.ok("", "service", "create", "-d", "--name", "s", "--publish", "10000-20000:10000-20000/udp", "--publish", "9999:80/sctp", "busybox")
	if got := strings.Fields(ports("Endpoint.Ports")); len(got) != 10002 || !slices.Contains(got, "udp:20000:20000:ingress") || !slices.Contains(got, "sctp:9999:80:ingress") {
		t.Errorf("%d ports, first %v", len(got), got[:min(3, len(got))])
	}
	d.ok(`\*:10000-20000->10000-20000/udp`, "service", "ls")
	d.ok("", "service", "update", "-d", "--publish-rm", "15000/udp", "--publish-rm", "80/sctp", "s")
	d.ok(`\*:10000-14999->10000-14999/udp.*\*:15001-20000->15001-20000/udp`, "service", "ls")
	d.ok("", "service", "update", "-d", "--publish-add", "15000:15000/udp", "--label-add", "weft.publish.10000-20000.allow=10.0.0.0/8", "s")
	if got := len(strings.Fields(ports("Spec.EndpointSpec.Ports"))); got != 10001 {
		t.Errorf("%d ports after one was given back", got)
	}
	if _, errOut, code := d.run("", "service", "update", "-d", "--label-add", "weft.publish.10000.ip=10.0.0.1", "s"); code != 0 || !strings.Contains(errOut, "weft.publish.10000-20000.ip would speak of all") {
		t.Errorf("a label of the first port of a range: exit %d, %s", code, errOut)
	}
	d.ok("10.0.0.0/8", "service", "inspect", "-f", `{{index .Spec.Labels "weft.publish.10000-20000.allow"}}`, "s")
	d.ok("", "service", "rm", "s")

	// Mode host: what a task has is shown with it, the service's own shows the wish.
	d.ok("", "service", "create", "-d", "--name", "s", "--publish", "mode=host,target=80,published=8080,protocol=udp", "--publish", "mode=host,target=81", "busybox")
	if got := ports("Endpoint.Ports"); got != "udp:8080:80:host tcp:0:81:host" && got != "tcp:0:81:host udp:8080:80:host" {
		t.Errorf("mode host: %s", got)
	}
	d.ok(`\*:8080->80/udp`, "service", "ps", "s")
	d.ok(`\*:32767->81/tcp`, "service", "ps", "s")
	ct := strings.Fields(d.ok(`0\.0\.0\.0:8080->80/udp`, "ps", "--format", "{{.ID}} {{.Ports}}"))[0]
	d.ok(`(?s)80/udp -> 0\.0\.0\.0:8080.*81/tcp -> 0\.0\.0\.0:32767|81/tcp -> 0\.0\.0\.0:32767.*80/udp -> 0\.0\.0\.0:8080`, "port", ct)
	d.ok("", "service", "update", "-d", "--publish-rm", "mode=host,target=80,protocol=udp,published=8080", "--publish-add", "8081:80", "s")
	if got := ports("Spec.EndpointSpec.Ports"); got != "tcp:0:81:host tcp:8081:80:ingress" {
		t.Errorf("after an update: %s", got)
	}
	d.ok("", "service", "create", "-d", "--name", "rr", "--endpoint-mode", "dnsrr", "--publish", "mode=host,target=80", "busybox")
	d.bad("dnsrr mode", "service", "create", "-d", "--endpoint-mode", "dnsrr", "--publish", "80", "busybox")

	// Labels.
	create := func(args ...string) []string {
		return slices.Concat([]string{"service", "create", "-d", "--publish", "8090:80"}, args, []string{"busybox"})
	}
	d.bad(`Labels\["weft.publish.80.ip"\]: the service does not publish port 80`, create("--label", "weft.publish.80.ip=10.0.0.1")...)
	d.bad(`Labels\["weft.publish.8090.ip"\]: "here" is no address`, create("--label", "weft.publish.8090.ip=here")...)
	d.bad(`Labels\["weft.publish.8090.allow"\]: 10.0.0.1/8 has host bits set: use 10.0.0.0/8`, create("--label", "weft.publish.8090.allow=10.0.0.1/8")...)
	d.bad(`Labels\["weft.publish.8090.interface"\]`, create("--label", "weft.publish.8090.interface=")...)
	d.bad(`Labels\["weft.source"\]: "on": write client or snat`, create("--label", "weft.source=on")...)
	d.bad(`Labels\["weft.drain"\]: "soon": write a duration`, create("--label", "weft.drain=soon")...)
	d.bad(`Labels\["weft.what"\]: unknown label; .* weft knows weft.drain, weft.publish.PORT.allow`, create("--label", "weft.what=1")...)
	d.ok("", create("--label", "weft.publish.8090.ip=127.0.0.1", "--label", "weft.source=snat", "--label", "weft.drain=25s", "--name", "l")...)
	d.ok("weft.source:snat", "service", "inspect", "-f", "{{.Spec.Labels}}", "l")
	d.bad(`Labels\["weft.publish.8090.ip"\]: the service does not publish`, "service", "update", "-d", "--publish-rm", "80", "l")
	d.ok("", "service", "update", "-d", "--publish-rm", "80", "--label-rm", "weft.publish.8090.ip", "--label-rm", "weft.source", "l")
}

func TestDockerContainers(t *testing.T) {
	d := newDocker(t, apitest.New())
	d.ok("^$", "ps", "-q")
	d.ok("", "swarm", "init")
	d.ok("", "service", "create", "-d", "--name", "web", "busybox", "sleep", "9")
	d.ok(`busybox:latest +"sleep 9" .* Up .*web\.1\.`, "ps")
	id := strings.TrimSpace(d.ok("^[0-9a-f]{64}\n$", "ps", "-q", "--no-trunc"))
	d.ok("^running /web.1.*4*", "inspect", "-f", "{{.State.Status}} {{.Name}}", id[:10])
	d.ok("^web$|web", "inspect", "-f", "{{.Spec.Name}}", "web") // a service, after containers, images, networks and volumes
	d.bad("No such container", "logs", "nope")
	d.ok("out of", "logs", id)
	d.ok("^hello\n$", "exec", id, "echo", "hello")
	out, errOut, code := d.run("to the cat", "exec", "-i", id, "cat")
	if out != "to the cat" || code != 0 {
		t.Errorf("exec -i cat: %q %q %d", out, errOut, code)
	}
	if out, errOut, _ := d.run("", "exec", id, "warn", "w"); out != "" || errOut != "w\n" {
		t.Errorf("exec warn: stdout %q stderr %q", out, errOut)
	}
	if _, _, code := d.run("", "exec", id, "exit", "7"); code != 7 {
		t.Errorf("exec exit 7: exit %d", code)
	}
	if out, errOut, code := d.run("", "exec", id, "nope"); code != 127 || !strings.Contains(out+errOut, "executable file not found") {
		t.Errorf("exec of a missing program: %q %q exit %d", out, errOut, code)
	}
	d.ok("", "exec", "-d", id, "echo", "x")
	d.bad("service create", "run", "busybox")
	d.bad("not supported", "stats", "--no-stream", id)
	d.bad("container is running", "rm", id)
	d.ok("", "kill", id)
	d.bad("not running", "kill", id)
	d.ok("^137\n$", "wait", id)
	d.ok(`Exited \(137\)`, "ps", "-a", "-f", "status=exited")
	d.bad("is not running", "exec", id, "echo")
	d.ok("", "rm", id)
	d.ok("^$", "ps", "-aq")
}

func TestDockerImages(t *testing.T) {
	d := newDocker(t, apitest.New())
	d.ok("REPOSITORY", "images")
	d.ok("Status: Image is up to date for busybox:1", "pull", "busybox:1")
	d.bad("manifest unknown", "pull", "missing:1")
	d.ok("busybox +1 ", "images")
	d.ok("", "tag", "busybox:1", "mine:2")
	d.ok("mine +2 ", "images")
	out, errOut, code := d.run("tar", "load")
	if code != 0 || !strings.Contains(out, "Loaded image: loaded:latest") {
		t.Errorf("load: %q %q %d", out, errOut, code)
	}
	if _, errOut, code := d.run("broken", "load"); code == 0 || !strings.Contains(errOut, "not a tar") {
		t.Errorf("load of a broken archive: %q exit %d", errOut, code)
	}
	d.ok("amd64", "image", "inspect", "-f", "{{.Architecture}}", "loaded")
	d.ok("Untagged: loaded:latest", "rmi", "loaded:latest")
	d.bad("No such image: loaded", "image", "inspect", "loaded")
	d.ok("", "volume", "ls")
	d.bad("not supported", "push", "busybox:1")
	d.ok("", "swarm", "init")
	d.ok("", "service", "create", "-q", "-d", "--name", "pinned", "busybox:1")
	d.ok("^busybox:1@sha256:[0-9a-f]{64}\n$", "service", "inspect", "-f", "{{.Spec.TaskTemplate.ContainerSpec.Image}}", "pinned")
}
