//go:build lab

package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/netns"
)

// Ports of this test; the range is of UDP.
const (
	publishHost, publishSocket, publishMesh = 8140, 8141, 8142
	publishRange                            = "10000-20000"
)

// TestLabPublish: who gets which port, told by the stock docker command. Each node
// has room for one task that wants a port in mode host, sockets of hosts count, and
// what waits or is refused says for whom.
func TestLabPublish(t *testing.T) {
	r := besideRig(t, "t-publish")
	plan, err := newPlan(r.name, DefaultConfig().RunDir, DefaultConfig().DataDir)
	if err != nil {
		t.Fatal(err)
	}
	docker := func(args ...string) string { t.Helper(); return r.must(r.on("h1", args...)...) }
	create := func(name string, args ...string) error {
		_, err := r.run(t.Context(), r.on("h1", slices.Concat([]string{"service", "create", "-d", "--name", name}, args, []string{"weft/whoami"})...)...)
		return err
	}
	made := func(name string, args ...string) {
		t.Helper()
		if err := create(name, args...); err != nil {
			t.Fatal(err)
		}
	}
	tasks := func(name string) []string {
		return strings.Split(docker("service", "ps", "--no-trunc", "-f", "desired-state=running", "--format", "{{.Node}} {{.CurrentState}} {{.Ports}} {{.Error}}", name), "\n")
	}
	// waits until so many tasks run and the others say what they wait for.
	waits := func(name string, running, pending int, port, why string) {
		t.Helper()
		r.eventually(fmt.Sprintf("%d tasks of %s run", running, name), func() error {
			runs, waiting := 0, 0
			list := tasks(name)
			for _, line := range list {
				switch {
				case strings.Contains(line, " Running ") && strings.Contains(line, port):
					runs++
				case strings.Contains(line, "Pending") && regexp.MustCompile(why).MatchString(line):
					waiting++
				}
			}
			if runs != running || waiting != pending {
				return errors.New(strings.Join(list, "\n"))
			}
			return nil
		})
	}

	// A rule of h1's firewall for what the host takes: see the end.
	if err := netns.Do(plan.host(1).Paths.NetNS, func() error { return dropInput(publishMesh) }); err != nil {
		t.Fatal(err)
	}

	// One to a node, shown with its port; the fourth waits and says why.
	made("own", "--replicas", "4", "--publish", fmt.Sprintf("mode=host,target=80,published=%d", publishHost))
	waits("own", 3, 1, fmt.Sprintf("*:%d->80/tcp", publishHost), fmt.Sprintf(`port %d/tcp \(mode host\) is in use on h\d by .*own.*likewise on 2 more`, publishHost))
	wantRefusal(t, "mesh on a port in mode host", create("x", "--publish", fmt.Sprintf("%d:80", publishHost)), fmt.Sprintf("%d/tcp is already in use by service own (mode host)", publishHost))

	// Chosen ports are each task's own: more tasks than nodes have one each.
	made("auto", "--replicas", "5", "--publish", "mode=host,target=80")
	waits("auto", 5, 0, "->80/tcp", "")
	seen := map[string]bool{}
	for _, line := range tasks("auto") {
		f := strings.Fields(line)
		at := f[0] + " " + f[len(f)-1]
		if !regexp.MustCompile(`^h\d \*:3\d{4}->80/tcp$`).MatchString(at) || seen[at] {
			t.Errorf("task %q, others %v", line, seen)
		}
		seen[at] = true
	}

	// A socket of a host keeps the port from tasks there, and from the mesh.
	var held net.Listener
	err = netns.Do(plan.host(2).Paths.NetNS, func() (err error) {
		held, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", publishSocket))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	socket := fmt.Sprintf("the socket 127.0.0.1:%d", publishSocket)
	r.eventually("the socket is known", func() error {
		err := create("x", "--publish", fmt.Sprintf("%d:80", publishSocket))
		if err == nil {
			docker("service", "rm", "x")
			return errors.New("its port was published")
		}
		if want := socket + " of node h2"; !strings.Contains(err.Error(), want) {
			t.Fatalf("refusal %v, want %q", err, want)
		}
		return nil
	})
	made("late", "--mode", "global", "--publish", fmt.Sprintf("mode=host,target=80,published=%d", publishSocket))
	waits("late", 2, 1, fmt.Sprintf("*:%d->80/tcp", publishSocket), `in use on h2 by `+regexp.QuoteMeta(socket))
	// Beside it, on another address, the mesh may have the port; and an address
	// belongs to some node.
	docker("service", "rm", "late")
	r.eventually("the port is free again", func() error {
		return create("beside", "--publish", fmt.Sprintf("%d:80", publishSocket), "--label", fmt.Sprintf("weft.publish.%d.ip=%s", publishSocket, plan.host(2).Addr))
	})
	wantRefusal(t, "address of no node", create("x", "--publish", "8149:80", "--label", "weft.publish.8149.ip=192.0.2.77"), "no node has the address 192.0.2.77")
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}

	// A range is one thing for weft and ten thousand for Docker.
	made("media", "--publish", publishRange+":"+publishRange+"/udp")
	if out := docker("service", "ls", "--filter", "name=media", "--format", "{{.Ports}}"); out != "*:"+publishRange+"->"+publishRange+"/udp" {
		t.Errorf("service ls shows %s", out)
	}
	wantRefusal(t, "inside the range", create("x", "--publish", "15000:80/udp"), "15000/udp is already in use by service media")
	docker("service", "update", "-d", "--publish-rm", "15000/udp", "media")
	made("inside", "--publish", "15000:80/udp")

	// A process that binds a published port later is named by its node.
	made("mesh", "--publish", fmt.Sprintf("%d:80", publishMesh))
	err = netns.Do(plan.host(3).Paths.NetNS, func() (err error) {
		held, err = net.Listen("tcp4", netip.AddrPortFrom(netip.IPv4Unspecified(), publishMesh).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	want := fmt.Sprintf("port %d/tcp of service mesh is also held by the socket 0.0.0.0:%d of the host", publishMesh, publishMesh)
	r.eventually("h3 warns", func() error {
		if out := docker("node", "inspect", "-f", "{{.Status.Message}}", "h3"); out != want {
			return fmt.Errorf("node inspect h3: %q, want %q", out, want)
		}
		return nil
	})
	// The port is answered all the same, and the node says why the rule does not hold.
	r.eventually("the port of h1", func() error { _, err := r.get(t.Context(), "h1", publishMesh); return err })
	want = fmt.Sprintf("port %d/tcp of service mesh is named by a rule of chain INPUT of table inet filter of the host, which published ports do not pass: say who may ask with the label weft.publish.%d.allow", publishMesh, publishMesh)
	r.eventually("h1 tells of its firewall", func() error {
		if out := docker("node", "inspect", "-f", "{{.Status.Message}}", "h1"); out != want {
			return fmt.Errorf("node inspect h1: %q, want %q", out, want)
		}
		return nil
	})
}

// dropInput makes a firewall in the calling thread's namespace that drops what comes for
// a TCP port of the host.
func dropInput(port uint16) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "filter"})
	chain := c.AddChain(&nftables.Chain{Table: table, Name: "INPUT", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	return c.Flush()
}
