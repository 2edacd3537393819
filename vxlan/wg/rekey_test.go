package wg

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/conn/bindtest"
	wgdevice "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/weftnet/weft"
)

// inProcess is a device of wireguard-go without a child around it.
type inProcess struct {
	t *testing.T
	d *wgdevice.Device
}

func newInProcess(t *testing.T, b conn.Bind) inProcess {
	d := wgdevice.NewDevice(tuntest.NewChannelTUN().TUN(), b, wgdevice.NewLogger(wgdevice.LogLevelSilent, ""))
	must(t, d.Up())
	// One that hangs cannot be closed, either.
	t.Cleanup(func() {
		if !t.Failed() {
			d.Close()
		}
	})
	return inProcess{t, d}
}

// become makes the device into another, as a daemon does.
func (p inProcess) become(private privateKey, peers map[weft.PublicKey]peer) {
	p.t.Helper()
	done := make(chan error, 1)
	go func() {
		s, err := p.d.IpcGet()
		if err != nil {
			done <- err
			return
		}
		have, err := decode(strings.NewReader(s + "\n"))
		if err == nil {
			c := diff(have, device{private: private, port: have.port, peers: peers}, time.Now())
			err = p.d.IpcSet(strings.TrimPrefix(c.encode(), "set=1\n"))
		}
		done <- err
	}()
	select {
	case err := <-done:
		must(p.t, err)
	case <-time.After(20 * time.Second):
		p.t.Fatal("the device hangs")
	}
}

// spoiled sends each answer to a handshake many times, none of them right, but
// all of them so that the receiver has to compute to find out.
type spoiled struct {
	conn.Bind
	to   weft.PublicKey
	sent chan struct{} // one value for each answer
}

// Send implements conn.Bind. The offsets are of WireGuard's paper, section 5.4.3.
func (s *spoiled) Send(bufs [][]byte, ep conn.Endpoint) error {
	const size, tag, mac1, mac2 = 92, 44, 60, 76
	// Fewer than make the receiver ask for cookies.
	const copies = 64
	for _, b := range bufs {
		if len(b) != size || b[0] != wgdevice.MessageResponseType {
			continue
		}
		b[tag] ^= 1
		key := blake2s.Sum256(append([]byte(wgdevice.WGLabelMAC1), s.to[:]...))
		h, err := blake2s.New128(key[:])
		if err != nil {
			return err
		}
		h.Write(b[:mac1])
		h.Sum(b[mac1:mac1:mac2])
		for range copies {
			if err := s.Bind.Send([][]byte{b}, ep); err != nil {
				return err
			}
		}
		s.sent <- struct{}{}
	}
	return nil
}

// TestRekeyDuringHandshakes gives a device new keys while answers to its
// handshakes come in. wireguard-go waits for itself for ever when one comes in
// while a device that has its peer gets another private key: who reads the
// answer holds the handshake and waits for the private key, of which the writer
// waits for the handshake.
func TestRekeyDuringHandshakes(t *testing.T) {
	binds := bindtest.NewChannelBinds()
	answers := &spoiled{Bind: binds[1], sent: make(chan struct{}, 1)}
	a, b := newInProcess(t, binds[0]), newInProcess(t, answers)
	fresh := func() (privateKey, weft.PublicKey) {
		k, err := newPrivateKey()
		must(t, err)
		p, err := k.public()
		must(t, err)
		return k, p
	}
	bPrivate, bPublic := fresh()
	peers := map[weft.PublicKey]peer{bPublic: {endpoint: netip.MustParseAddrPort("127.0.0.1:1")}}
	for i := range 20 {
		private, public := fresh()
		answers.to = public
		b.become(bPrivate, map[weft.PublicKey]peer{public: {}})
		a.become(private, peers) // begins a handshake
		select {
		case <-answers.sent:
		case <-time.After(20 * time.Second):
			t.Fatalf("no answer to handshake %d", i)
		}
	}
}
