package pmtu

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/weftnet/weft"
)

// A frame is a datagram between two nodes:
//
//	0      1     2      3   4      6      8       16     32
//	┌──────┬─────┬──────┬───┬──────┬──────┬───────┬──────┬──────────┐
//	│ 0xF8 │ 1   │ kind │ 0 │ size │ 0    │ id    │ MAC  │ padding  │
//	└──────┴─────┴──────┴───┴──────┴──────┴───────┴──────┴──────────┘
//
// A probe fills an IP packet of size bytes; the answer to it repeats id and size
// and is 32 bytes long, so that nobody is hit with more than was sent in its
// name. The MAC is the first half of HMAC-SHA256 over the 16 bytes before it, by a
// key that only members have. The padding carries nothing. A repeated probe costs
// one answer, and a repeated answer finds no probe that waits for it.
const (
	// Magic is the first byte of every frame. Gossip, whose port this shares,
	// uses others (gossip, frame.go).
	Magic   byte = 0xF8
	version byte = 1

	headerBytes = 32
	signedBytes = 16
)

type kind byte

const (
	// kindProbe asks for an answer.
	kindProbe kind = iota + 1
	kindAnswer
	// kindAgain tells that the sender's link has changed: search again.
	kindAgain
)

type frame struct {
	kind kind
	size int // of the probe's IP packet in bytes; 0 of kindAgain
	id   uint64
}

// signer makes frames by the first key and checks them by all. It may be used by
// several goroutines.
type signer struct{ keys [][]byte }

func newSigner(r weft.GossipRing) (signer, error) {
	var s signer
	for _, k := range r.Keys() {
		key, err := hkdf.Key(sha256.New, k.Key, nil, "weft path probe 1", sha256.Size)
		if err != nil {
			return signer{}, fmt.Errorf("derive key of path probes: %w", err)
		}
		s.keys = append(s.keys, key)
	}
	return s, nil
}

func mac(key, signed []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(signed)
	return h.Sum(nil)[:headerBytes-signedBytes]
}

// marshal makes a datagram of n bytes, at least the header's.
func (s signer) marshal(f frame, n int) []byte {
	b := make([]byte, max(n, headerBytes))
	b[0], b[1], b[2] = Magic, version, byte(f.kind)
	binary.BigEndian.PutUint16(b[4:], uint16(f.size))
	binary.BigEndian.PutUint64(b[8:], f.id)
	copy(b[signedBytes:], mac(s.keys[0], b[:signedBytes]))
	return b
}

// parse reads a datagram; false for one that no member has made, or of another
// version.
func (s signer) parse(b []byte) (frame, bool) {
	if len(b) < headerBytes || b[0] != Magic || b[1] != version || b[3] != 0 || b[6] != 0 || b[7] != 0 {
		return frame{}, false
	}
	f := frame{kind: kind(b[2]), size: int(binary.BigEndian.Uint16(b[4:])), id: binary.BigEndian.Uint64(b[8:])}
	if f.kind < kindProbe || f.kind > kindAgain {
		return frame{}, false
	}
	return f, slices.ContainsFunc(s.keys, func(key []byte) bool {
		return hmac.Equal(b[signedBytes:headerBytes], mac(key, b[:signedBytes]))
	})
}
