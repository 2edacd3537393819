package agent

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft/agent/sandbox"
)

// TestSearchDomainsOfTheSandbox: clients append the domain that the host had when their
// sandbox was made, also after the host has another and the daemon was started again:
// names of the cluster with it behind are answered, and nobody outside is asked.
func TestSearchDomainsOfTheSandbox(t *testing.T) {
	for _, c := range []struct {
		name    string
		isOlder bool // the sandbox is of a weft that recorded no domains
		asked   string
		rcode   int
		outside bool
	}{
		{"with its own domain", false, "web.old.example.", miekg.RcodeSuccess, false},
		{"with the host's new one", false, "web.new.example.", miekg.RcodeServerFailure, true},
		{"an older sandbox", true, "web.new.example.", miekg.RcodeSuccess, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				r.resolv = filepath.Join(r.dir, "host-resolv.conf")
				host := func(domain string) {
					if err := os.WriteFile(r.resolv, []byte("nameserver 192.0.2.53\nsearch "+domain+"\n"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				outside := make(chan string, 16)
				r.hostDial = func(_ context.Context, _, address string) (net.Conn, error) {
					outside <- address
					return nil, errors.New("nobody is there")
				}
				host("old.example")
				task := testTask(1, front)
				kill, _ := r.running(task)
				kill()
				if got := r.boxes.made[task.ID].Search; !slices.Equal(got, []string{"old.example"}) {
					t.Fatalf("the sandbox was made with %q", got)
				}
				if c.isOlder {
					b := r.boxes.all[task.ID]
					r.boxes.all[task.ID] = sandbox.Sandbox{Task: b.Task, NetNS: b.NetNS, GatewayAddr: b.GatewayAddr}
				}

				host("new.example")
				q := new(miekg.Msg)
				q.SetQuestion(c.asked, miekg.TypeA)
				var err error
				if r.sockets.query, err = q.Pack(); err != nil {
					t.Fatal(err)
				}
				r.sockets.answers = make(chan []byte, 1)
				r.start()
				settle(5 * time.Second)
				m := new(miekg.Msg)
				if err := m.Unpack(<-r.sockets.answers); err != nil || m.Rcode != c.rcode || (c.rcode == miekg.RcodeSuccess) != (len(m.Answer) == 1) {
					t.Errorf("%s: %v, %v", c.asked, m, err)
				}
				if (len(outside) > 0) != c.outside {
					t.Errorf("%s was asked outside %d times, want some: %v", c.asked, len(outside), c.outside)
				}
			})
		})
	}
}
