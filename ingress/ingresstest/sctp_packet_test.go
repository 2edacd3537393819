package ingresstest

import (
	"bytes"
	"reflect"
	"testing"

	"pgregory.net/rapid"
)

// TestSCTPPackets: a packet is read as it was written, and one of which a bit was
// changed on its way is not.
func TestSCTPPackets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := sctpPacket{
			from: rapid.Uint16().Draw(t, "from"), to: rapid.Uint16().Draw(t, "to"), tag: rapid.Uint32().Draw(t, "tag"),
			kind: rapid.Byte().Draw(t, "kind"), flags: rapid.Byte().Draw(t, "flags"), value: rapid.SliceOfN(rapid.Byte(), 1, 40).Draw(t, "value"),
		}
		b := p.marshal()
		if got, err := parseSCTP(b); err != nil || !reflect.DeepEqual(got, p) {
			t.Fatalf("%+v was read as %+v, %v", p, got, err)
		}
		b[rapid.IntRange(0, len(b)-1).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if _, err := parseSCTP(b); err == nil {
			t.Fatal("a changed bit is not seen")
		}
	})
	cookie := []byte("12345")
	if got := cookieOf(initValue(7, cookie)); !bytes.Equal(got, cookie) {
		t.Errorf("the cookie is %q", got)
	}
	if got := cookieOf(initValue(7, nil)); got != nil {
		t.Errorf("an INIT has the cookie %q", got)
	}
}

func FuzzSCTPPackets(f *testing.F) {
	p := sctpPacket{from: 1, to: 2, tag: 3, kind: chunkInitAck, value: initValue(7, []byte("12345"))}
	f.Add(p.marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parseSCTP(b); err == nil {
			cookieOf(p.value)
		}
		cookieOf(b)
	})
}
