//go:build lab

package lab

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

// Bad input in a real lab: the message names the thing, exit code and HTTP
// status are right, and nothing is half-made. Part of TestLabWords.

func md5Of(s string) string {
	sum := md5.Sum([]byte(s))
	return hex.EncodeToString(sum[:])
}

func askUDP(addr, question string, limit time.Duration) error {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	if _, err := c.Write([]byte(question)); err != nil {
		return err
	}
	b := make([]byte, 2048)
	n, err := c.Read(b)
	if err == nil && n == 0 {
		err = errors.New("an empty answer")
	}
	return err
}

// unchanged checks at the test's end that a listing is what it was.
func (w *words) unchanged(args ...string) {
	w.t.Helper()
	before := w.d("h1", args...)
	w.t.Cleanup(func() {
		out, err := exec.Command(w.docker, w.on("h1", args...)[1:]...).Output()
		if now := strings.TrimSpace(string(out)); err != nil || now != before {
			w.t.Errorf("docker %s gave %q, gives %q (%v)", strings.Join(args, " "), before, now, err)
		}
	})
}

func badServices(w *words) {
	w.create("taken", "--publish", "8102:80", "weft/whoami")
	w.unchanged("service", "ls", "-q")
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{"--name taken weft/whoami", 1, "service with name taken already exists"},
		{"--name TAKEN weft/whoami", 1, "service with name taken already exists, and TAKEN differs from it in case only"},
		{"--publish 8102:80 weft/whoami", 1, "published port 8102/tcp is already in use by service taken"},
		{"--publish 0 weft/whoami", 1, `EndpointSpec\.Ports\[0\]\.TargetPort: 0 is not a port`},
		{"--publish 70000 weft/whoami", 125, "70000"},
		{"--publish 8103:80 --publish 8103:81 weft/whoami", 1, "8103/tcp is given twice"},
		{"--replicas -1 weft/whoami", 125, `"-1"`},
		{"--network ghost weft/whoami", 1, "network ghost not found|No such network: ghost"},
		{"--constraint disk=ssd weft/whoami", 1, `Constraints\[0\]: "disk=ssd"`},
		{"--endpoint-mode dnsrr --publish 8104:80 weft/whoami", 1, "dnsrr"},
		{"--rollback-failure-action rollback weft/whoami", 1, `RollbackConfig\.FailureAction`},
		{"--cap-add NET_ADMIN weft/whoami", 1, `CapabilityAdd.* is not supported yet`},
		{"--mount type=tmpfs,dst=/t,tmpfs-mode=1777 weft/whoami", 1, `TmpfsOptions\.Mode is not supported yet`},
		{"--publish mode=host,target=80,published=8102 weft/whoami", 1, "published port 8102/tcp is already in use by service taken"},
		{"--publish 8100-8110:8100-8110 weft/whoami", 1, "8100-8110/tcp is already in use by service .*: 810[0-9]/tcp"},
		{"--publish 8103:80 --label weft.publish.8103.ip=192.0.2.77 weft/whoami", 1, `Labels\["weft\.publish\.8103\.ip"\]: no node has the address 192\.0\.2\.77: h1 has 10\.99\.`},
		{"--publish 8103:80 --label weft.publish.8104.ip=127.0.0.1 weft/whoami", 1, `Labels\["weft\.publish\.8104\.ip"\]: the service does not publish port 8104`},
		{"--label weft.unknown=1 weft/whoami", 1, `weft\.unknown`},
		{"--limit-memory 1k weft/whoami", 1, "less than 4 MiB"},
		{"UPPER/Case", 1, "UPPER/Case|must be lowercase"},
	} {
		w.refused("h2", tc.code, tc.want, append([]string{"service", "create", "-d"}, strings.Fields(tc.args)...)...)
	}
	for _, verb := range []string{"inspect", "ps", "rm", "logs"} {
		w.refused("h1", 1, "(?i)no such (task or )?service: ghost|service ghost not found", "service", verb, "ghost")
	}
	w.refused("h1", 1, "service ghost not found|(?i)no such service: ghost", "service", "scale", "-d", "ghost=2")
	w.refused("h1", 1, "service ghost not found|(?i)no such service: ghost", "service", "update", "-d", "--force", "ghost")
	w.refused("h1", 1, "node ghost not found|No such node: ghost", "node", "inspect", "ghost")
	w.refused("h1", 1, "node ghost not found|No such node: ghost", "node", "rm", "ghost")
}

func badNetworks(w *words) {
	w.unchanged("network", "ls", "-q")
	front := w.d("h1", "network", "inspect", "front", "-f", "{{range .IPAM.Config}}{{.Subnet}}{{end}}")
	underlay := w.plan.host(1).Addr
	for _, tc := range []struct {
		args, want string
	}{
		{"front", "network with name front already exists"},
		{"Front", "network with name front already exists, and Front differs from it in case only"},
		{"ingress", "network with name ingress already exists"},
		{"tail.", `Name: "tail\."`},
		{"two..dots", `Name: "two\.\.dots"`},
		{"--subnet " + front + " x", "overlaps .* \\(network front\\)"},
		{fmt.Sprintf("--subnet %s/24 x", underlay.String()[:strings.LastIndexByte(underlay.String(), '.')]+".0"), "a route, address or resolver of node h"},
		{"--subnet 172.31.241.0/24 x", "the gateway bridge of every host"},
		{"--subnet 10.5 x", `IPAM\.Config\[0\]\.Subnet`},
		{"--subnet 10.5.0.1/24 x", "host bits"},
		{"--subnet 10.5.0.0/31 x", "must be /8 to /29"},
		{"--subnet 224.1.0.0/16 x", "which hosts cannot use"},
		{"--opt color=red x", `Options\["color"\]: there is no such option`},
		{"--opt com.docker.network.driver.mtu=1400b x", `Options\["com\.docker\.network\.driver\.mtu"\]: "1400b": write a number of bytes`},
		{"--opt com.docker.network.driver.mtu=575 x", `575: use 576 to 65535 bytes`},
		{"--opt encrypted=false x", `Options\["encrypted"\]: "false": leave the value out`},
		{"--ipv6 --subnet fd00:5::/126 x", "fd00:5::/126 must be /16 to /125"},
		{"--ipv6 --subnet fd00:5::1/64 x", "host bits"},
		{"--ipv6 --subnet fe80::/64 x", "which hosts cannot use"},
		{"--ipv6 --subnet fd00:5:: x", `IPAM\.Config\[0\]\.Subnet: "fd00:5::" has no prefix length: write fd00:5::/64`},
		{"--ipv6 --opt com.docker.network.driver.mtu=1279 x", `Options\["com\.docker\.network\.driver\.mtu"\]: 1279: IPv6 needs 1280 bytes .* or a network without IPv6`},
		{"--subnet fd00:5::/64 x", "EnableIPv6"},
	} {
		w.refused("h3", 1, tc.want, append([]string{"network", "create", "-d", "overlay"}, strings.Fields(tc.args)...)...)
	}
	w.refused("h1", 1, "use --driver overlay", "network", "create", "x")
	w.refused("h1", 1, "network ghost not found|No such network: ghost", "network", "rm", "ghost")
	w.refused("h1", 1, "network front is in use by service shell", "network", "rm", "front")
}

// ask sends one request to a host's socket.
func (w *words) ask(host, method, path, body string) (int, string) {
	w.t.Helper()
	sock := filepath.Join(DefaultConfig().RunDir, w.name, host, "weft.sock")
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", sock)
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(w.t.Context(), method, "http://weft"+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	var m struct{ Message string }
	if err := json.Unmarshal(raw, &m); err != nil {
		m.Message = string(raw)
	}
	return res.StatusCode, m.Message
}

func badRequests(w *words) {
	w.unchanged("service", "ls", "-q")
	w.unchanged("network", "ls", "-q")
	const image = `"TaskTemplate":{"ContainerSpec":{"Image":"weft/whoami"}}`
	for _, tc := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", "/v1.99/info", "", 400, "client version 1.99 is too new. Maximum supported API version is 1.51"},
		{"GET", "/v1.23/info", "", 400, "client version 1.23 is too old. Minimum supported API version is 1.24"},
		{"GET", "/v1.44/ghost", "", 404, "page not found"},
		{"POST", "/networks/create", `{"Name":1}`, 400, "Name is a number: a string is expected"},
		{"POST", "/networks/create", `{"Name":`, 400, "unexpected EOF"},
		{"POST", "/networks/create", `{"Name":"front","Driver":"overlay"}`, 409, "network with name front already exists"},
		{"POST", "/networks/create", `{"Name":"x","Driver":"overlay","Options":{"color":"red"}}`, 501, "color"},
		{"POST", "/services/create", `{"Name":"x",` + image + `,"Mode":{"Replicated":{"Replicas":-1}}}`, 400, "Mode.Replicated.Replicas"},
		{"POST", "/services/create", `{"Name":"x",` + image + `,"EndpointSpec":{"Ports":[{"TargetPort":70000}]}}`, 400, "EndpointSpec.Ports[0].TargetPort: 70000"},
		{"POST", "/services/create", `{"Name":"x",` + image + `,"Bogus":1}`, 400, "Bogus"},
		{"POST", "/services/create", `{"Name":"shell",` + image + `}`, 409, "service with name shell already exists"},
		{"GET", "/services/ghost", "", 404, "service ghost not found"},
		{"GET", "/nodes/ghost", "", 404, "node ghost not found"},
		{"GET", "/networks/ghost", "", 404, "network ghost not found"},
		{"GET", "/images/ghost/json", "", 404, "No such image: ghost"},
		{"DELETE", "/images/ghost", "", 404, "No such image: ghost"},
		{"DELETE", "/networks/front", "", 409, "in use by service shell"},
		{"POST", "/swarm/init", `{"ListenAddr":"0.0.0.0:2377"}`, 503, "already part of a swarm"},
		{"POST", "/swarm/leave", "", 503, "--force"},
	} {
		status, message := w.ask("h1", tc.method, tc.path, tc.body)
		if status != tc.status || !strings.Contains(message, tc.want) {
			w.t.Errorf("%s %s %s: %d %q, want %d and %q", tc.method, tc.path, tc.body, status, message, tc.status, tc.want)
		}
	}
}

func badImages(w *words) {
	w.unchanged("images", "-q")
	dir := w.t.TempDir()
	good, err := os.ReadFile(w.busyboxTar())
	if err != nil {
		w.t.Fatal(err)
	}
	for name, body := range map[string][]byte{
		"empty": nil, "noise": bytes.Repeat([]byte("rubbish"), 1000), "cut": good[:len(good)/2],
		"flipped": append(bytes.Clone(good[:len(good)*2/3]), bytes.Repeat([]byte{0xff}, len(good)-len(good)*2/3)...),
	} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, body, 0o600); err != nil {
			w.t.Fatal(err)
		}
		w.refused("h1", 1, "load image archive: ", "image", "load", "-i", file)
	}
}

// badHostPort: a port that a process of a host holds is refused once the host
// has reported it.
func badHostPort(w *words) {
	var ln net.Listener
	err := netns.Do(w.plan.host(2).Paths.NetNS, func() (err error) {
		ln, err = net.Listen("tcp4", "0.0.0.0:8105")
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	defer ln.Close()
	w.eventually("port 8105 is refused", func() error {
		_, err := w.run(w.t.Context(), w.on("h1", "service", "create", "-d", "--name", "late", "--publish", "8105:80", "weft/whoami")...)
		if err == nil {
			w.d("h1", "service", "rm", "late")
			return errors.New("it was published")
		}
		if !strings.Contains(err.Error(), "8105") || !strings.Contains(err.Error(), "h2") {
			w.t.Errorf("the refusal names neither port nor host: %v", err)
		}
		return nil
	})
}

// badDaemons: what keeps a daemon from starting.
func badDaemons(w *words) {
	h1 := w.plan.host(1)
	dir, err := os.MkdirTemp("/run", "wt") // short: sockets lie below it
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			w.t.Error(err)
		}
	})
	for _, tc := range []struct {
		name string
		cmd  *exec.Cmd
		want string
	}{
		{"second on one data root", exec.Command(w.weft, "daemon", "--data-root", h1.Paths.DataRoot, "--exec-root", dir+"/e"), "another weft daemon .* uses the data root"},
		{"no runc", exec.Command("sh", "-c", `for d in /usr/sbin /usr/local/sbin /sbin /usr/bin /usr/local/bin /bin; do [ -e $d/runc ] && mount --bind /dev/null $d/runc; done; exec "$0" "$@"`,
			w.weft, "daemon", "--data-root", dir+"/d", "--exec-root", dir+"/e"), "apt-get install runc"},
		{"not root", exec.Command(w.publicCopy(), "daemon"), "run it as root"},
		{"not root, lab", exec.Command(w.publicCopy(), "lab", "up", "--name", "e2e-none"), "run it as root"},
	} {
		tc.cmd.SysProcAttr = &syscall.SysProcAttr{}
		switch {
		case strings.HasPrefix(tc.name, "not root"):
			tc.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
			tc.cmd.Dir = "/"
		case tc.name == "no runc":
			tc.cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS | syscall.CLONE_NEWNET
		}
		ended := time.AfterFunc(20*time.Second, func() { _ = tc.cmd.Process.Kill() })
		out, err := tc.cmd.CombinedOutput()
		ended.Stop()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !regexp.MustCompile(tc.want).Match(out) {
			w.t.Errorf("%s: %v\n%s\nwant exit code 1 and %q", tc.name, err, out, tc.want)
		}
	}
}

// publicCopy is the binary where anybody may run it.
func (w *words) publicCopy() string {
	w.t.Helper()
	b, err := os.ReadFile(w.weft)
	if err != nil {
		w.t.Fatal(err)
	}
	path := "/run/weft-public" // a tmpfs of this test
	if err := os.WriteFile(path, b, 0o755); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// foreignToken has the form of a token and another cluster's digest.
const foreignToken = "SWMTKN-1-3pu6hszjas19xyp7ghgosyx9k8atbfcr8p2is99znpy26u2lkl-1awxwuwd3z9j1z3puu7rcgdbx"

// badJoins takes h3 out of the cluster and back in.
func badJoins(w *words) {
	manager := w.plan.host(1).Addr.String() + ":2377"
	old := w.d("h1", "swarm", "join-token", "-q", "worker")
	w.refused("h3", 1, "already part of a swarm", "swarm", "join", "--token", old, manager)
	w.d("h3", "swarm", "leave")
	w.says("h3", "^inactive$", "info", "-f", "{{.Swarm.LocalNodeState}} {{.Swarm.Error}}")
	w.refused("h3", 1, "This node is not a swarm manager", "node", "ls")
	w.refused("h3", 1, "This node is not a swarm manager", "service", "create", "weft/whoami")
	if out := w.d("h3", "ps", "-aq"); out != "" {
		w.t.Errorf("containers after leaving: %s", out)
	}
	token := w.d("h1", "swarm", "join-token", "--rotate", "-q", "worker")
	if token == old {
		w.t.Error("the token was not rotated")
	}
	for _, tc := range []struct{ token, addr, want string }{
		{old, manager, "was rotated or belongs to another cluster"},
		{"nonsense", manager, "not a join token"},
		{foreignToken, manager, "the join token is of another cluster"},
		{token, w.plan.host(1).Addr.String() + ":2999", "no manager could be reached .*:2999"},
		{token, w.plan.addr(77).String() + ":2377", `no manager could be reached .*\.77:2377`},
	} {
		w.refused("h3", 1, tc.want, "swarm", "join", "--token", tc.token, tc.addr)
	}
	for _, port := range []struct {
		network, addr, want string
	}{
		{"tcp4", "0.0.0.0:2377", "TCP 0.0.0.0:2377, needed for the cluster port, is taken"},
		{"tcp4", "0.0.0.0:7946", "TCP 0.0.0.0:7946, needed for gossip, is taken"},
		{"udp4", "0.0.0.0:7946", "UDP 0.0.0.0:7946, needed for gossip, is taken"},
		{"udp4", "0.0.0.0:4789", `UDP 0.0.0.0:4789, needed for overlay traffic \(VXLAN\), is taken`},
	} {
		release := w.hold("h3", port.network, port.addr)
		w.refused("h3", 1, port.want, "swarm", "join", "--token", token, manager)
		release()
	}
	if out := w.d("h3", "info", "-f", "{{.Swarm.LocalNodeState}} {{.Swarm.Error}}"); out != "inactive" {
		w.t.Errorf("after joins that failed: %s", out)
	}
	w.says("h1", "^3$", "info", "-f", "{{.Swarm.Nodes}}") // none of them made a member
	w.d("h3", "swarm", "join", "--token", token, manager)
	w.says("h1", `(?m)^h3 Down\n(.|\n)*h3 Ready|^h3 Ready\n(.|\n)*h3 Down`, "node", "ls", "--format", "{{.Hostname}} {{.Status}}")
	// The host that came back works, although its former self is listed.
	w.runs("shell", "3/3")
	if out := w.sh("h3", "shell", "ping -c 1 -W 2 tasks.shell >/dev/null && echo reached"); out != "reached" {
		w.t.Errorf("from the host that came back: %s", out)
	}
	for line := range strings.Lines(w.d("h1", "node", "ls", "--format", "{{.ID}} {{.Status}}")) {
		if id, state, _ := strings.Cut(strings.TrimSpace(line), " "); state == "Down" {
			w.d("h1", "node", "rm", id)
		}
	}
}

// hold takes a port in a host's network until release.
func (w *words) hold(host, network, addr string) (release func()) {
	w.t.Helper()
	i, err := parseHost(host, MaxHosts)
	if err != nil {
		w.t.Fatal(err)
	}
	var c io.Closer
	w.eventually("hold "+addr, func() error { // what the daemon had may linger
		return netns.Do(w.plan.host(i).Paths.NetNS, func() (err error) {
			if strings.HasPrefix(network, "tcp") {
				c, err = net.Listen(network, addr)
			} else {
				c, err = net.ListenPacket(network, addr)
			}
			return err
		})
	})
	return func() {
		if err := c.Close(); err != nil {
			w.t.Error(err)
		}
	}
}

// badNoLeader makes h2 and h3 managers, then pulls their plugs.
func badNoLeader(w *words) {
	manager := w.plan.host(1).Addr.String() + ":2377"
	token := w.d("h1", "swarm", "join-token", "-q", "manager")
	for _, h := range []string{"h2", "h3"} {
		w.d(h, "swarm", "leave", "--force")
		w.d(h, "swarm", "join", "--token", token, manager)
	}
	w.says("h1", "^3$", "info", "-f", "{{.Swarm.Managers}}")
	w.runs("shell", "3/3")
	networks := w.d("h1", "network", "ls", "-q")
	for _, h := range []string{"h2", "h3"} {
		w.must(w.weft, "lab", "kill", "--name", w.name, h)
	}
	// The old leader steps down by itself.
	w.eventually("no leader", func() error {
		if status, message := w.ask("h1", "GET", "/v1.44/nodes", ""); status != 503 || message != weft.NoLeader {
			return fmt.Errorf("%d %q", status, message)
		}
		return nil
	})
	w.refused("h1", 1, "the cluster has no leader", "network", "create", "-d", "overlay", "lost")
	w.refused("h1", 1, "the cluster has no leader", "service", "create", "-d", "weft/whoami")
	w.refused("h1", 1, "the cluster has no leader", "service", "ls")
	if out, err := w.run(w.t.Context(), w.weft, "-H", w.on("h1")[2], "node", "ls"); err == nil || !strings.Contains(err.Error(), "the cluster has no leader") {
		w.t.Errorf("weft node ls: %s %v", out, err)
	}
	// What runs goes on.
	if len(w.containers("h1", "shell")) != 1 {
		w.t.Error("the container of h1 is gone")
	}
	for _, h := range []string{"h2", "h3"} {
		w.must(w.weft, "lab", "start", "--name", w.name, h)
	}
	w.eventually("a leader again", func() error {
		_, err := w.run(w.t.Context(), w.on("h1", "node", "ls")...)
		return err
	})
	if now := w.d("h1", "network", "ls", "-q"); now != networks {
		w.t.Errorf("networks were %q, are %q", networks, now)
	}
}
