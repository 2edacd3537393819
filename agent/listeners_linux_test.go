package agent

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// Lines as Linux 6 prints them: a listener on loopback and one on all
// addresses, an established connection, one in TIME_WAIT (inode 0).
const procTCP = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 24511 1 0000000000000000 100 0 0 10 0
   1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 24512 1 0000000000000000 100 0 0 10 0
   2: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 24513 1 0000000000000000 20 4 30 10 -1
   3: 0100007F:1F90 0100007F:C351 06 00000000:00000000 03:00000A1B 00000000     0        0 0 3 0000000000000000
`

const procTCP6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18071 1 0000000000000000 100 0 0 10 0
   1: 00000000000000000000000001000000:7530 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18072 1 0000000000000000 100 0 0 10 0
`

const procUDP = `   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops             
  373: 00000000:12B5 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 31337 2 0000000000000000 0        
  412: 3500007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000   102        0 31338 2 0000000000000000 0        
  500: 0100007F:9C40 0100007F:0035 01 00000000:00000000 00:00000000 00000000     0        0 31339 2 0000000000000000 0        
`

// As Linux 6 prints it: two that listen, one of them on two addresses, and one that
// does not.
const procSCTP = ` ENDPT     SOCK   STY SST HBKT LPORT   UID INODE LADDRS
ffff8880 ffff8881 2   10  29   9200      0 40001 10.99.0.1 *10.99.0.2 
ffff8882 ffff8883 2   10  30   9201      0 40002 0000:0000:0000:0000:0000:0000:0000:0000 
ffff8884 ffff8885 2   7   31   9202      0 40003 10.99.0.1 
`

func TestParseSCTP(t *testing.T) {
	got, err := parseSCTP([]byte(procSCTP))
	want := []socket{{netip.MustParseAddr("10.99.0.1"), 9200, 40001}, {netip.MustParseAddr("10.99.0.2"), 9200, 40001}, {netip.IPv6Unspecified(), 9201, 40002}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if got, err := parseSCTP(nil); got != nil || err != nil {
		t.Errorf("without SCTP: %v, %v", got, err)
	}
	for name, line := range map[string]string{
		"cut off": "a b 2 10 29 9200 0", "odd port": "a b 2 10 29 x 0 1 10.0.0.1", "odd inode": "a b 2 10 29 1 0 x 10.0.0.1", "odd address": "a b 2 10 29 1 0 1 here",
	} {
		if got, err := parseSCTP([]byte("heading\n" + line + "\n")); err == nil {
			t.Errorf("%s: read as %v", name, got)
		}
	}
}

var localhost = netip.MustParseAddr("127.0.0.1")

func TestParseSockets(t *testing.T) {
	for _, tc := range []struct {
		name, text, state string
		want              []socket
	}{
		{"tcp", procTCP, tcpListen, []socket{{localhost, 80, 24511}, {netip.IPv4Unspecified(), 8080, 24512}}},
		{"tcp6", procTCP6, tcpListen, []socket{{netip.IPv6Unspecified(), 22, 18071}, {netip.IPv6Loopback(), 30000, 18072}}},
		{"udp", procUDP, tcpClose, []socket{{netip.IPv4Unspecified(), 4789, 31337}, {netip.MustParseAddr("127.0.0.53"), 53, 31338}}},
		{"heading only", "  sl  local_address\n", tcpListen, nil},
		{"empty", "", tcpListen, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parseSockets([]byte(tc.text), tc.state)
			if err != nil || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %v, %v, want %v", got, err, tc.want)
			}
		})
	}
	for name, line := range map[string]string{
		"cut off":    "   0: 0100007F:0050 00000000:0000 0A 0",
		"no port":    "   0: 0100007F 00000000:0000 0A 0:0 00:0 0 0 0 24511 1",
		"long port":  "   0: 0100007F:00050 00000000:0000 0A 0:0 00:0 0 0 0 24511 1",
		"no hex":     "   0: 0100007F:00G0 00000000:0000 0A 0:0 00:0 0 0 0 24511 1",
		"no address": "   0: 01007F:0050 00000000:0000 0A 0:0 00:0 0 0 0 24511 1",
		"odd inode":  "   0: 0100007F:0050 00000000:0000 0A 0:0 00:0 0 0 0 x 1",
		"empty line": "",
	} {
		if got, err := parseSockets([]byte("heading\n"+line+"\n"), tcpListen); err == nil {
			t.Errorf("%s: read as %v", name, got)
		}
	}
}

func FuzzParseSockets(f *testing.F) {
	for _, s := range []string{procTCP, procTCP6, procUDP, "", "\n\n", "x\n : : : :"} {
		f.Add([]byte(s))
	}
	f.Add([]byte(procSCTP))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := parseSCTP(b); err == nil && slices.ContainsFunc(got, func(s socket) bool { return s.port == 0 || !s.addr.IsValid() }) {
			t.Errorf("%v", got)
		}
		got, err := parseSockets(b, tcpListen)
		if err != nil && got != nil {
			t.Errorf("sockets %v beside error %v", got, err)
		}
		for _, s := range got {
			if s.port == 0 {
				t.Errorf("port 0 in %v", got)
			}
		}
	})
}

func TestSocketInode(t *testing.T) {
	for target, want := range map[string]uint64{"socket:[4026]": 4026, "socket:[]": 0, "socket:[x]": 0, "pipe:[4026]": 0, "/dev/null": 0, "socket:[4": 0} {
		if got, ok := socketInode(target); got != want || ok != (want != 0) {
			t.Errorf("%s: %d, %v", target, got, ok)
		}
	}
}

// TestHostListenersLeavesOwnOut: this process's own sockets are no surprise to
// weft; everybody else's would be in the list.
func TestHostListenersLeavesOwnOut(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	pc, err := net.ListenPacket("udp6", "[::1]:0")
	if err != nil {
		t.Log("no IPv6 here:", err)
		if pc, err = net.ListenPacket("udp4", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	defer pc.Close()
	at := func(p weft.Protocol, a netip.AddrPort) weft.Listener {
		return weft.Listener{Protocol: p, Port: a.Port(), Addr: a.Addr().Unmap()}
	}
	tcp := at(weft.TCP, ln.Addr().(*net.TCPAddr).AddrPort())
	udp := at(weft.UDP, pc.LocalAddr().(*net.UDPAddr).AddrPort())
	own, err := ownSockets()
	if err != nil {
		t.Fatal(err)
	}
	if len(own) < 2 {
		t.Errorf("own sockets %v, want at least the two of this test", own)
	}
	got, err := HostListeners()
	if err != nil {
		t.Fatal(err)
	}
	if got == nil || slices.Contains(got, tcp) || slices.Contains(got, udp) {
		t.Errorf("listeners %v: nil, or with this test's own %v and %v", got, tcp, udp)
	}
}

// TestHostListenersSeesOthers: a socket that only another process holds is told.
func TestHostListenersSeesOthers(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	want := weft.Listener{Protocol: weft.TCP, Port: uint16(ln.Addr().(*net.TCPAddr).Port), Addr: localhost}
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	holder := exec.Command("cat") // until its input ends
	holder.ExtraFiles = []*os.File{f}
	stdin, err := holder.StdinPipe()
	if err == nil {
		err = holder.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(stdin.Close(), holder.Wait()); err != nil {
			t.Error(err)
		}
	}()
	if err := errors.Join(f.Close(), ln.Close()); err != nil {
		t.Fatal(err)
	}
	got, err := HostListeners()
	if err != nil || !slices.Contains(got, want) {
		t.Errorf("listeners %v, %v, want %v among them", got, err, want)
	}
	if !slices.IsSortedFunc(got, func(a, b weft.Listener) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	}) {
		t.Errorf("listeners %v are not sorted", got)
	}
}

func TestListenersAreReported(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		web, overlay := weft.Listener{Protocol: weft.TCP, Port: 80}, weft.Listener{Protocol: weft.UDP, Port: 4789}
		r.setListeners([]weft.Listener{web, overlay}, nil)
		var told [][]weft.Listener
		r.leader.onReport(func(_ context.Context, rep wire.Report) error {
			if rep.Listeners != nil {
				told = append(told, rep.Listeners)
			}
			return nil
		})
		kill, _ := r.running()
		settle(10 * time.Second)
		r.setListeners(nil, errors.New("proc is gone"))
		settle(10 * time.Second)
		r.setListeners([]weft.Listener{}, nil)
		settle(10 * time.Second)
		kill()
		// The first may precede the leader's word on the overlay's port.
		if want := [][]weft.Listener{{web, overlay}, {web}, {}}; !reflect.DeepEqual(told, want) && !reflect.DeepEqual(told, want[1:]) {
			t.Errorf("told %v, want %v, each once", told, want)
		}
	})
}

// TestListening: what the kernel says when asked is what its file says, for both
// families.
func TestListening(t *testing.T) {
	for family, f := range map[uint8]struct{ network, addr, file string }{
		unix.AF_INET: {"tcp4", "127.0.0.1:0", "tcp"}, unix.AF_INET6: {"tcp6", "[::1]:0", "tcp6"},
	} {
		l, err := net.Listen(f.network, f.addr)
		if err != nil {
			t.Logf("no %s here: %v", f.network, err)
			continue
		}
		defer l.Close()
		conn, err := net.Dial(f.network, l.Addr().String()) // one that does not listen
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		of := l.Addr().(*net.TCPAddr).AddrPort()
		only := func(all []socket, err error) []socket {
			if err != nil {
				t.Fatal(err)
			}
			return slices.DeleteFunc(all, func(s socket) bool { return s.port != of.Port() })
		}
		asked, read := only(tcpSockets(family, "no file")), only(readSockets(f.file, tcpListen))
		if !slices.Equal(asked, read) || len(asked) != 1 || asked[0].addr != of.Addr() {
			t.Errorf("the kernel says %v, its file %v, want one on %v", asked, read, of)
		}
	}
}
