package dns

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/weftnet/weft"
)

// TestBurstsLoseNothing: however many questions come together, plain ones and others,
// from one asker and from several, each is answered as it would be alone. One that
// came while the server was about to wait would never be.
func TestBurstsLoseNothing(t *testing.T) {
	r := newRig(t, Config{}, nil)
	snap, v := NewSnapshot(testRecords()), compile(&View{Networks: []weft.ID{blue}})
	var asked, want [][]byte
	for _, name := range []string{"web.", "TASKS.down.", "nope.", "web.1.aaa.blue.", "_80._tcp.down.", "2.0.1.10.in-addr.arpa."} {
		for _, qtype := range []uint16{miekg.TypeA, miekg.TypeAAAA, miekg.TypeSRV} {
			m := new(miekg.Msg)
			m.SetQuestion(name, qtype)
			m.SetEdns0(1232, qtype == miekg.TypeA)
			packet, err := m.Pack()
			if err != nil {
				t.Fatal(err)
			}
			_, answer := thorough(snap, v, packet, 0)
			if answer == nil {
				t.Fatalf("%s is nothing of ours", name)
			}
			asked, want = append(asked, packet), append(want, answer)
		}
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			c, err := net.Dial("udp", r.udp)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			buf := make([]byte, ednsSize)
			for round := range 300 {
				size := []int{1, 2, 5, burstSize - 1, burstSize, burstSize + 1, 1}[round%7]
				of := make([]int, size) // the id is the place in it
				for id := range of {
					of[id] = rand.IntN(len(asked))
					packet := bytes.Clone(asked[of[id]])
					binary.BigEndian.PutUint16(packet, uint16(id))
					if _, err := c.Write(packet); err != nil {
						t.Error(err)
						return
					}
				}
				c.SetReadDeadline(time.Now().Add(20 * time.Second))
				for range of {
					n, err := c.Read(buf)
					if err != nil {
						t.Errorf("one of %d questions has no answer: %v", size, err)
						return
					}
					id := int(binary.BigEndian.Uint16(buf))
					if id >= size || of[id] < 0 || !bytes.Equal(buf[2:n], want[of[id]][2:]) {
						t.Errorf("question %d of %d is answered %x", id, size, buf[:n])
						return
					}
					of[id] = -1
				}
			}
		})
	}
	wg.Wait()
	if s := r.s.Stats(); !t.Failed() && (s.Queries != s.Local || s.Queries == 0 || s.Malformed > 0) {
		t.Errorf("stats %+v", s)
	}
}
