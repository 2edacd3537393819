//go:build lab

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/agent/runtime/imagetest"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Tier 2: every word of services, networks, nodes, containers and images that
// weft serves, by the stock docker command in one lab of three hosts. Published ports are 8101 and
// up; networks "front", "back" and "closed".

// words drives one lab; each subtest has a copy with its own t.
type words struct {
	*rig
	plan plan
}

var allHosts = [...]string{"h1", "h2", "h3"}

// at gives the rig to a subtest.
func (w *words) at(t *testing.T) *words {
	r := *w.rig
	r.t = t
	return &words{&r, w.plan}
}

// d runs docker on a host; it must succeed.
func (w *words) d(host string, args ...string) string {
	w.t.Helper()
	return w.must(w.on(host, args...)...)
}

// refused runs docker on a host; it must fail with a code and say what the
// pattern matches.
func (w *words) refused(host string, code int, pattern string, args ...string) {
	w.t.Helper()
	out, err := w.run(w.t.Context(), w.on(host, args...)...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != code || !regexp.MustCompile(pattern).MatchString(err.Error()) {
		w.t.Errorf("docker %s on %s: %v\n%s; want exit code %d and %q", strings.Join(args, " "), host, err, out, code, pattern)
	}
}

// says runs docker until its output matches.
func (w *words) says(host, pattern string, args ...string) string {
	w.t.Helper()
	re, last := regexp.MustCompile(pattern), ""
	w.eventually(fmt.Sprintf("docker %s on %s says %q", strings.Join(args, " "), host, pattern), func() error {
		out, err := w.run(w.t.Context(), w.on(host, args...)...)
		if last = strings.TrimSpace(out); err == nil && !re.MatchString(last) {
			err = fmt.Errorf("it says %q", last)
		}
		return err
	})
	return last
}

// create makes a service without waiting; the subtest's end removes it.
func (w *words) create(name string, args ...string) {
	w.t.Helper()
	w.d("h1", append([]string{"service", "create", "-d", "--name", name}, args...)...)
	w.t.Cleanup(func() {
		if out, err := exec.Command(w.docker, w.on("h1", "service", "rm", name)[1:]...).CombinedOutput(); err != nil && !strings.Contains(string(out), "not found") && !strings.Contains(string(out), "No such service") {
			w.t.Errorf("service rm %s: %v: %s", name, err, out)
		}
	})
}

// runs waits until a service has its tasks.
func (w *words) runs(name, replicas string) {
	w.t.Helper()
	w.says("h1", "(?m)^"+name+" "+replicas+"$", "service", "ls", "--format", "{{.Name}} {{.Replicas}}")
}

// tasks prints one field of the tasks of a service, newest first in each slot.
func (w *words) tasks(name, field string) []string {
	w.t.Helper()
	return strings.Split(w.d("h1", "service", "ps", "--no-trunc", "--format", "{{."+field+"}}", name), "\n")
}

// sh runs a script in the one container of a service on a host.
func (w *words) sh(host, service, script string) string {
	w.t.Helper()
	c := w.containers(host, service)
	if len(c) != 1 {
		w.t.Fatalf("%d containers of %s on %s", len(c), service, host)
	}
	return w.d(host, "exec", c[0], "sh", "-c", script)
}

// forever is a shell that ends at once when it is told to.
const forever = `trap "echo bye; exit 0" TERM; while :; do sleep 0.2; done`

func TestLabWords(t *testing.T) {
	w := &words{rig: besideRig(t, "e2e-words")}
	var err error
	if w.plan, err = newPlan(w.name, DefaultConfig().RunDir, DefaultConfig().DataDir); err != nil {
		t.Fatal(err)
	}
	w.loadImages()
	for _, n := range []string{"front", "back"} {
		w.d("h1", "network", "create", "--driver", "overlay", "--attachable", "--label", "n="+n, n)
	}
	w.create("shell", "--mode", "global", "--network", "front", "busybox", "sh", "-c", "echo hello from $HOSTNAME; echo oops >&2; "+forever)
	w.runs("shell", "3/3")
	for _, s := range []struct {
		name string
		f    func(*words)
	}{
		{"system", wordsSystem}, {"networks", wordsNetworks}, {"service", wordsService}, {"names", wordsNames}, {"container", wordsContainer},
		{"exec", wordsExec}, {"mounts", wordsMounts}, {"ends", wordsEnds}, {"ports", wordsPorts}, {"logs", wordsLogs}, {"images", wordsImages},
		{"bad services", badServices}, {"bad networks", badNetworks}, {"bad requests", badRequests}, {"bad images", badImages}, {"host port", badHostPort}, {"bad daemons", badDaemons},
		{"drain", wordsDrain}, {"bad joins", badJoins}, {"no leader", badNoLeader},
	} {
		start := time.Now()
		if !t.Run(s.name, func(t *testing.T) { s.f(w.at(t)) }) && t.Context().Err() != nil {
			return
		}
		t.Logf("%s: %.1f s", s.name, time.Since(start).Seconds())
	}
}

// loadImages puts busybox on every host.
func (w *words) loadImages() {
	w.t.Helper()
	archive := w.busyboxTar()
	for _, h := range allHosts {
		if out := w.d(h, "image", "load", "-i", archive); out != "Loaded image: busybox:latest" {
			w.t.Errorf("load on %s: %s", h, out)
		}
	}
}

// busyboxTar writes the archive of the busybox image.
func (w *words) busyboxTar() string {
	w.t.Helper()
	f, err := os.Create(filepath.Join(w.t.TempDir(), "busybox.tar"))
	if err != nil {
		w.t.Fatal(err)
	}
	if err := errors.Join(imagetest.Busybox(f), f.Close()); err != nil {
		netnstest.Missing(w.t, "root", err)
	}
	return f.Name()
}

func wordsSystem(w *words) {
	w.says("h1", `API version: +1\.51 \(minimum version 1\.24\)`, "version")
	info := w.d("h2", "info")
	for _, want := range []string{"Swarm: active", "Is Manager: false", "overlay engine ebpf: chosen", "service engine ebpf: chosen", "Logging Driver: json-file"} {
		if !strings.Contains(info, want) {
			w.t.Errorf("info lacks %q:\n%s", want, info)
		}
	}
	// A worker shows the cluster as a manager does.
	for _, h := range allHosts {
		if out := w.d(h, "node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.Availability}} {{.ManagerStatus}}"); !sameLines(out, "h1 Ready Active Leader h2 Ready Active h3 Ready Active") {
			w.t.Errorf("node ls on %s:\n%s", h, out)
		}
	}
	if out := w.d("h2", "node", "inspect", "self", "-f", "{{.Description.Hostname}} {{.Spec.Role}} {{.Status.State}}"); out != "h2 worker ready" {
		w.t.Errorf("node inspect self: %s", out)
	}
	w.says("h1", `Hostname:\s+h3(.|\n)*State:\s+Ready`, "node", "inspect", "--pretty", "h3")
	w.says("h1", `shell\.\w+ h2 Running`, "node", "ps", "h2", "--format", "{{.Name}} {{.Node}} {{.DesiredState}}")
	for _, role := range []string{"worker", "manager"} {
		w.says("h1", `SWMTKN-1-[0-9a-z]{50}-[0-9a-z]{25} 10\.99\.\d+\.1:2377`, "swarm", "join-token", role)
	}
}

func wordsNetworks(w *words) {
	w.d("h1", "network", "create", "-d", "overlay", "--internal", "--subnet", "10.77.0.0/24", "--gateway", "10.77.0.9", "closed")
	if out := w.d("h3", "network", "inspect", "closed", "-f", "{{.Driver}} {{.Scope}} {{.Internal}} {{range .IPAM.Config}}{{.Subnet}} {{.Gateway}}{{end}}"); out != "overlay swarm true 10.77.0.0/24 10.77.0.9" {
		w.t.Errorf("inspect: %s", out)
	}
	if out := w.d("h2", "network", "ls", "--filter", "label=n=back", "--format", "{{.Name}}"); out != "back" {
		w.t.Errorf("ls by label: %s", out)
	}
	w.create("inmate", "--network", "closed", "--constraint", "node.hostname==h2", "busybox", "sh", "-c", forever)
	w.create("stranger", "--network", "back", "--constraint", "node.hostname==h2", "busybox", "sh", "-c", forever)
	w.runs("inmate", "1/1")
	w.runs("stranger", "1/1")
	if out := w.sh("h2", "inmate", "ip route"); strings.Contains(out, "default") {
		w.t.Errorf("a task of an internal network has a way out:\n%s", out)
	}
	if out := w.sh("h2", "stranger", "ip route"); !strings.Contains(out, "default via 172.31.240.1") {
		w.t.Errorf("a task has no way out:\n%s", out)
	}
	inmate := w.sh("h2", "inmate", "hostname -i")
	if out := w.sh("h2", "stranger", "ping -c 1 -W 1 "+inmate+" >/dev/null || echo silence"); out != "silence" {
		w.t.Errorf("the networks reach each other: %s", out)
	}
	w.refused("h1", 1, "network closed is in use by service inmate", "network", "rm", "closed")
	w.d("h1", "service", "rm", "inmate", "stranger")
	w.says("h1", "^closed$", "network", "rm", "closed")
}

func wordsService(w *words) {
	w.create("web", "--replicas", "2", "--network", "front", "--env", "A=b", "--label", "l=m", "weft/whoami")
	w.runs("web", "2/2")
	w.says("h1", `Name:\s+web(.|\n)*Replicas:\s+2(.|\n)*Env:\s+A=b(.|\n)*Networks: front`, "service", "inspect", "--pretty", "web")
	if out := w.d("h2", "service", "ls", "--filter", "label=l=m", "--format", "{{.Name}} {{.Mode}} {{.Image}}"); out != "web replicated weft/whoami:latest" {
		w.t.Errorf("service ls: %s", out)
	}
	// With its progress bar and five seconds of watching.
	if out := w.d("h1", "service", "scale", "web=3"); !strings.Contains(out, "converged") {
		w.t.Errorf("scale: %s", out)
	}
	w.d("h1", "service", "update", "-d", "--env-add", "C=d", "--image", "weft/whoami:latest", "web")
	w.updated("web")
	if out := w.d("h1", "service", "inspect", "web", "-f", "{{.Spec.TaskTemplate.ContainerSpec.Env}}"); out != "[A=b C=d]" && out != "[C=d A=b]" {
		w.t.Errorf("environment after the update: %s", out)
	}
	if n := len(w.tasks("web", "ID")); n != 6 {
		w.t.Errorf("%d tasks after an update of three, want each with its forerunner", n)
	}
	before := w.d("h1", "service", "ps", "-q", "--filter", "desired-state=running", "web")
	w.d("h1", "service", "update", "-d", "--force", "--replicas", "2", "web")
	w.updated("web")
	w.runs("web", "2/2")
	for id := range strings.FieldsSeq(w.d("h1", "service", "ps", "-q", "--filter", "desired-state=running", "web")) {
		if strings.Contains(before, id) {
			w.t.Errorf("task %s has outlived a forced update", id)
		}
	}
	if out := w.d("h1", "service", "rm", "web"); out != "web" {
		w.t.Errorf("rm: %s", out)
	}
	w.refused("h1", 1, "no such service: web|service web not found", "service", "inspect", "web")
	for _, h := range allHosts {
		w.says(h, "^$", "ps", "-aq", "--filter", named("web"))
	}
}

// updated waits for the end of a rolling update.
func (w *words) updated(name string) {
	w.t.Helper()
	w.says("h1", "^completed", "service", "inspect", name, "-f", "{{.UpdateStatus.State}}")
}

func wordsNames(w *words) {
	w.create("site", "--network", "front", "--constraint", "node.hostname==h2", "busybox", "sh", "-c",
		"mkdir /w; echo page of $HOSTNAME >/w/index.html; httpd -p 80 -h /w; "+forever)
	w.create("crowd", "--network", "front", "--replicas", "3", "--endpoint-mode", "dnsrr", "busybox", "sh", "-c", forever)
	w.runs("site", "1/1")
	w.runs("crowd", "3/3")
	page := w.containers("h2", "site")[0][:12]
	for _, h := range allHosts {
		w.eventually("site from "+h, func() error {
			c := w.containers(h, "shell")[0]
			out, err := w.run(w.t.Context(), w.on(h, "exec", c, "sh", "-c", "wget -q -O - http://site/ && ping -c 1 -W 2 tasks.site >/dev/null && ping -c 1 -W 2 site >/dev/null")...)
			if err == nil && strings.TrimSpace(out) != "page of "+page {
				err = fmt.Errorf("got %q", out)
			}
			return err
		})
		for name, want := range map[string]int{"site": 1, "tasks.site": 1, "crowd": 3, "tasks.crowd": 3, "tasks.shell": 3} {
			w.eventually(name+" from "+h, func() error {
				out := w.sh(h, "shell", "nslookup "+name+" | tail -n +3")
				if n := strings.Count(out, "Address: 10."); n != want {
					return fmt.Errorf("%d addresses, want %d:\n%s", n, want, out)
				}
				return nil
			})
		}
	}
	if out := w.sh("h1", "shell", "nslookup ghost.front >/dev/null 2>&1 || echo no such name"); out != "no such name" {
		w.t.Errorf("lookup of nothing: %s", out)
	}
}

func wordsContainer(w *words) {
	w.create("full", "--network", "front", "--constraint", "node.hostname==h2", "--user", "app", "--workdir", "/tmp", "--hostname", "myhost",
		"--env", "X=y", "--limit-cpu", "0.5", "--limit-memory", "64m", "--stop-grace-period", "1s", "busybox", "sleep", "1000000")
	w.runs("full", "1/1")
	if out := w.sh("h2", "full", "id -un; id -Gn; pwd; hostname; echo $X $FROM_IMAGE"); out != "app\napp extra\n/tmp\nmyhost\ny yes" {
		w.t.Errorf("inside: %q", out)
	}
	if out := w.sh("h2", "full", "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || find /sys/fs/cgroup -name memory.max | head -1 | xargs cat"); out == "" {
		w.t.Error("no memory limit to be read inside")
	}
	task := w.tasks("full", "ID")[0]
	w.cgroupHas(task, "memory.limit_in_bytes", "memory.max", "67108864")
	w.cgroupHas(task, "cpu.cfs_quota_us", "cpu.max", "50000")
	if out := w.d("h2", "ps", "--filter", named("full"), "--format", "{{.Image}} {{.Command}} {{.Status}}"); !strings.HasPrefix(out, `busybox:latest "sleep 1000000" Up `) {
		w.t.Errorf("ps: %s", out)
	}
	if out := w.d("h2", "inspect", "--format", "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}}", w.containers("h2", "full")[0]); out != "67108864 500000000" {
		w.t.Errorf("limits in inspect: %s", out)
	}
	// The command that the image brings is shown, too.
	w.create("plain", "--constraint", "node.hostname==h2", "weft/whoami")
	w.runs("plain", "1/1")
	if out := w.d("h2", "ps", "--filter", named("plain"), "--format", "{{.Command}}"); out != `"/weft whoami"` {
		w.t.Errorf("ps of an image's own command: %s", out)
	}
	// sleep as the first process does not hear SIGTERM: the grace period of
	// one second ends it, not Docker's ten.
	start := time.Now()
	w.d("h1", "service", "rm", "full")
	w.says("h2", "^$", "ps", "-q", "--filter", named("full"))
	if took := time.Since(start); took < time.Second || took > 6*time.Second {
		w.t.Errorf("the container ended after %s, want about a second", took)
	}
}

// cgroupHas looks for a value in the task's cgroup: in the hierarchy of the
// controller (version 1) or in the one tree (version 2).
func (w *words) cgroupHas(task, v1, v2, want string) {
	w.t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/*/weft/*/" + task + "/" + v1, "/sys/fs/cgroup/weft/*/" + task + "/" + v2} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if got := string(bytes.Fields(b)[0]); err != nil || got != want {
				w.t.Errorf("%s holds %q (%v), want %s", f, got, err, want)
			}
			return
		}
	}
	w.t.Errorf("task %s has neither %s nor %s", task, v1, v2)
}

func wordsExec(w *words) {
	c := w.containers("h1", "shell")[0]
	w.refused("h1", 7, "exit status 7", "exec", c, "sh", "-c", "exit 7")
	w.refused("h1", 127, "executable file not found", "exec", c, "nosuch")
	w.refused("h1", 1, "No such container: ghost", "exec", "ghost", "true")
	if out := w.d("h1", "exec", "-u", "app", "-w", "/tmp", "-e", "A=b", c, "sh", "-c", "id -un; pwd; echo $A"); out != "app\n/tmp\nb" {
		w.t.Errorf("exec -u -w -e: %q", out)
	}
	for _, in := range []string{"a line\n", "", strings.Repeat("0123456789abcdef", 1<<16)} {
		args := w.on("h1", "exec", "-i", c, "md5sum")
		cmd := exec.CommandContext(w.t.Context(), args[0], args[1:]...)
		cmd.Stdin = strings.NewReader(in)
		out, err := cmd.Output()
		if want := md5Of(in); err != nil || !strings.HasPrefix(string(out), want) {
			w.t.Errorf("exec -i with %d bytes: %q %v, want %s", len(in), out, err, want)
		}
	}
	// 12 is CAP_NET_ADMIN, which containers do not have by default.
	const netAdmin = `echo $(( (0x$(sed -n "s/CapEff:\t//p" /proc/self/status) >> 12) & 1 ))`
	if plain, all := w.d("h1", "exec", c, "sh", "-c", netAdmin), w.d("h1", "exec", "--privileged", c, "sh", "-c", netAdmin); plain != "0" || all != "1" {
		w.t.Errorf("exec has CAP_NET_ADMIN: %q, with --privileged %q; want 0 and 1", plain, all)
	}
	w.d("h1", "exec", "-d", c, "sh", "-c", "echo done >/tmp/detached")
	w.says("h1", "^done$", "exec", c, "cat", "/tmp/detached")
	out, err := w.onTerminal("echo $((6*7)); stty size; exit 3\n", w.on("h1", "exec", "-it", c, "sh")...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(out, "42") || !strings.Contains(out, "33 99") {
		w.t.Errorf("exec -it: %v %q", err, out)
	}
}

// onTerminal runs a command on a terminal of 33 lines and 99 columns and types
// what in says.
func (w *words) onTerminal(in string, args ...string) (string, error) {
	w.t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	defer master.Close()
	fd := int(master.Fd())
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	err = errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0), unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 99}))
	if err != nil {
		w.t.Fatal(err)
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(int(n)), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.CommandContext(w.t.Context(), args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := errors.Join(cmd.Start(), slave.Close()); err != nil {
		w.t.Fatal(err)
	}
	read := make(chan string)
	go func() { // ends with the terminal's last user
		var b bytes.Buffer
		_, _ = b.ReadFrom(master) // EIO is the end of a terminal (pty(7))
		read <- b.String()
	}()
	if _, err := master.WriteString(in); err != nil {
		w.t.Fatal(err)
	}
	err = cmd.Wait()
	return <-read, err
}

func wordsMounts(w *words) {
	host := w.t.TempDir()
	if err := os.Chmod(host, 0o777); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(host, "note"), []byte("from the host"), 0o644); err != nil {
		w.t.Fatal(err)
	}
	w.create("mounts", "--constraint", "node.hostname==h3",
		"--mount", "type=bind,src="+host+",dst=/ro,readonly", "--mount", "type=bind,src="+host+",dst=/rw",
		"--mount", "type=volume,src=e2e-kept,dst=/data", "--mount", "type=volume,dst=/anonymous", "--mount", "type=tmpfs,dst=/t,tmpfs-size=1m",
		"busybox", "sh", "-c", forever)
	w.runs("mounts", "1/1")
	out := w.sh("h3", "mounts", "cat /ro/note; echo; touch /ro/x 2>/dev/null || echo read-only; echo back >/rw/answer; cat /data/seed; echo mine >/data/seed; touch /anonymous/x; df -k /t | tail -1 | awk '{print $1, $2}'")
	if out != "from the host\nread-only\nfrom the image\ntmpfs 1024" {
		w.t.Errorf("inside: %q", out)
	}
	if b, err := os.ReadFile(filepath.Join(host, "answer")); err != nil || string(b) != "back\n" {
		w.t.Errorf("written to the host: %q, %v", b, err)
	}
	w.d("h1", "service", "update", "-d", "--force", "mounts")
	w.updated("mounts")
	w.runs("mounts", "1/1")
	if out := w.sh("h3", "mounts", "cat /data/seed; ls /anonymous"); out != "mine" {
		w.t.Errorf("the next task finds %q, want the volume kept and the anonymous one fresh", out)
	}
	w.create("nomount", "--mount", "type=bind,src=/no/such/folder,dst=/x", "busybox", "true")
	w.says("h1", `Rejected.*bind source path does not exist: /no/such/folder`, "service", "ps", "--no-trunc", "--format", "{{.CurrentState}} {{.Error}}", "nomount")
}

// wordsEnds: restart conditions, and tasks that cannot run say why.
func wordsEnds(w *words) {
	w.create("never", "--restart-condition", "none", "busybox", "sh", "-c", "exit 3")
	w.create("failing", "--restart-condition", "on-failure", "busybox", "sh", "-c", "exit 4")
	w.create("fine", "--restart-condition", "on-failure", "busybox", "true")
	w.create("again", "--restart-condition", "any", "busybox", "true")
	w.create("homeless", "--constraint", "node.hostname==h9", "busybox", "true")
	w.create("noimage", "--no-resolve-image", w.plan.gateway().String()+":5000/no/image:1")
	w.create("nofile", "busybox", "/no/such/program")
	w.create("nouser", "--user", "ghost", "busybox", "true")
	for name, want := range map[string]string{
		"never":    `^Shutdown Failed .*non-zero exit \(3\)`,
		"failing":  `Failed .*non-zero exit \(4\)(.|\n)*Failed .*non-zero exit \(4\)`,
		"fine":     `^Shutdown Complete`,
		"again":    `Complete(.|\n)*Complete`,
		"homeless": `^Running Pending .*no suitable node \(scheduling constraints not satisfied on 3 nodes\)`,
		"noimage":  `Rejected .*No such image: .*5000/no/image:1 .*registry cannot be reached`,
		"nofile":   `Failed .*exec: "/no/such/program".*no such file or directory`,
		"nouser":   `Rejected .*user "?ghost"?`,
	} {
		out := w.says("h1", want, "service", "ps", "--no-trunc", "--format", "{{.DesiredState}} {{.CurrentState}} {{.Error}}", name)
		if strings.Contains(out, "invalid argument") {
			w.t.Errorf("%s: the reason ends in a class for programs: %s", name, out)
		}
	}
	for _, name := range []string{"never", "fine"} {
		if n := len(w.tasks(name, "ID")); n != 1 {
			w.t.Errorf("%s has %d tasks, want the one that ended", name, n)
		}
	}
}

func wordsPorts(w *words) {
	w.create("ports", "--replicas", "1", "--publish", "8101:80", "--publish", "80", "--publish", "8101:7/udp", "--publish", "7", "weft/whoami")
	w.runs("ports", "1/1")
	chosen := strings.Fields(w.d("h1", "service", "inspect", "ports", "-f", "{{range .Endpoint.Ports}}{{.TargetPort}}/{{.Protocol}}:{{.PublishedPort}} {{end}}"))
	auto := 0
	for _, p := range chosen {
		if target, port, _ := strings.Cut(p, ":"); target == "80/tcp" && port != "8101" {
			auto, _ = strconv.Atoi(port)
		}
	}
	if auto < 30000 || auto > 32767 {
		w.t.Fatalf("ports %v, want one chosen from 30000-32767", chosen)
	}
	for i, h := range allHosts {
		for _, port := range []int{8101, auto} {
			w.eventually(fmt.Sprintf("port %d of %s", port, h), func() error { _, err := w.get(w.t.Context(), h, port); return err })
		}
		w.eventually("UDP port of "+h, func() error { return w.echoUDP(fmt.Sprintf("%s:8101", w.plan.host(i+1).Addr)) })
	}
	w.d("h1", "service", "rm", "ports")
	w.eventually("the ports are closed", func() error {
		if out, err := w.get(w.t.Context(), "h2", 8101); err == nil {
			return fmt.Errorf("port 8101 answers %q", out)
		}
		return nil
	})
}

// echoUDP asks from outside the cluster.
func (w *words) echoUDP(addr string) error {
	return netns.Do(w.plan.netnsFile(clientName), func() error {
		return askUDP(addr, "weft?\n", 2*time.Second)
	})
}

func wordsLogs(w *words) {
	w.create("clock", "--replicas", "2", "busybox", "sh", "-c", "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.2; done")
	w.runs("clock", "2/2")
	w.says("h1", `(?m)^clock\.1\.\w+@h\d +\| tick 1$(.|\n)*^clock\.2\.\w+@h\d +\| tick 1$|^clock\.2\.\w+@h\d +\| tick 1$(.|\n)*clock\.1\.\w+@h\d +\| tick 1$`, "service", "logs", "clock")
	if out := w.d("h1", "service", "logs", "--raw", "--tail", "1", "clock"); strings.Count(out, "tick") != 2 {
		w.t.Errorf("the last line of two tasks: %q", out)
	}
	args := w.on("h1", "service", "logs", "-f", "--raw", "--since", "1s", "clock")
	cmd := exec.CommandContext(w.t.Context(), args[0], args[1:]...)
	out := &lineWatch{want: 20, enough: make(chan struct{})}
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	select {
	case <-out.enough:
	case <-time.After(settle):
		w.t.Error("following gave fewer than 20 lines")
	}
	_ = cmd.Process.Kill() // it follows until somebody ends it
	_ = cmd.Wait()
	c := w.containers("h2", "shell")[0]
	if out := w.d("h2", "logs", c); out != "hello from "+c[:12] {
		w.t.Errorf("logs of a container: %q", out)
	}
	w.says("h2", `^\d{4}-\d\d-\d\dT[0-9:.]+Z hello from`, "logs", "-t", "--tail", "2", c)
}

// lineWatch counts lines.
type lineWatch struct {
	n, want int
	enough  chan struct{} // closed by Write at the last line wanted
}

func (l *lineWatch) Write(p []byte) (int, error) {
	before := l.n
	l.n += bytes.Count(p, []byte("\n"))
	if before < l.want && l.n >= l.want {
		close(l.enough)
	}
	return len(p), nil
}

func wordsImages(w *words) {
	w.says("h1", `(?m)^busybox:latest$`, "images", "--format", "{{.Repository}}:{{.Tag}}")
	w.says("h1", `(?m)^weft/whoami:latest$`, "images", "--format", "{{.Repository}}:{{.Tag}}")
	w.d("h1", "tag", "busybox:latest", "mine:2")
	if out := w.d("h1", "image", "rm", "mine:2"); out != "Untagged: mine:2" {
		w.t.Errorf("rm of a second name: %s", out)
	}
	w.refused("h1", 1, "image is being used by running container", "image", "rm", "busybox")
	w.refused("h1", 1, "No such image: ghost$", "image", "rm", "ghost")
	w.refused("h1", 1, "registry cannot be reached", "pull", w.plan.gateway().String()+":5000/no/image:1")
}

// wordsDrain comes late: it moves everybody else's tasks.
func wordsDrain(w *words) {
	w.create("mover", "--replicas", "3", "--network", "front", "busybox", "sh", "-c", forever)
	w.runs("mover", "3/3")
	w.d("h1", "node", "update", "--availability", "drain", "h2")
	w.says("h2", "^$", "ps", "-q")
	w.says("h1", "h2 Drain", "node", "ls", "--format", "{{.Hostname}} {{.Availability}}")
	w.runs("mover", "3/3")
	w.says("h1", `(?m)^shell 2/2$`, "service", "ls", "--format", "{{.Name}} {{.Replicas}}")
	w.refused("h1", 1, "not down", "node", "rm", "h2")
	w.d("h1", "node", "update", "--availability", "active", "h2")
	w.runs("shell", "3/3")
	w.d("h1", "service", "rm", "mover")
}
