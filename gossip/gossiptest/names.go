package gossiptest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"strings"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
)

// ID is the n-th identifier of a kind, as weft.NewID makes them: 25 digits in base
// 36 of 128 bits.
func ID(kind string, n int) weft.ID {
	r := rand.New(rand.NewPCG(uint64(n), uint64(len(kind))<<32|uint64(kind[0])))
	b := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, r.Uint64()), r.Uint64())
	s := new(big.Int).SetBytes(b).Text(36)
	return weft.ID(strings.Repeat("0", 25-len(s)) + s)
}

// Network is the one that a Sim's nodes take part in.
func Network() weft.ID { return ID("network", 0) }

// Endpoint is that of a task on Network; ten make a service.
func Endpoint(task int) weft.Endpoint {
	return weft.Endpoint{
		Network: Network(), Task: ID("task", task), Service: ID("service", task/10),
		Slot: uint64(1 + task%10), State: weft.EndpointReady,
		Addr: netip.AddrFrom4([4]byte{10, byte(task >> 16), byte(task >> 8), byte(task)}),
	}
}

// Endpoints are n of them, from a task on.
func Endpoints(first, n int) []weft.Endpoint {
	out := make([]weft.Endpoint, n)
	for i := range out {
		out[i] = Endpoint(first + i)
	}
	return out
}

// Sworn is a Prover of a node whose proofs cost nothing: its certificate is its
// name.
func Sworn(node weft.ID) gossip.Prover { return sworn(node) }

type sworn weft.ID

// errNotSworn is a certificate of somebody else.
var errNotSworn = errors.New("the certificate is another node's")

func (s sworn) Certificate() []byte { return []byte(s) }

func (s sworn) Sign(digest [32]byte) []byte {
	p := make([]byte, 64)
	copy(p, digest[:])
	copy(p[32:], s)
	return p
}

func (sworn) Trust(owner weft.ID, cert []byte) (gossip.Checker, error) {
	if string(cert) != string(owner) {
		return nil, errNotSworn
	}
	return func(digest [32]byte, proof []byte) bool {
		return string(proof) == string(sworn(owner).Sign(digest))
	}, nil
}

// longSworn is sworn with certificates of a length.
type longSworn struct {
	sworn
	length int
}

func (s longSworn) Certificate() []byte {
	b := s.sworn.Certificate()
	return append(b, make([]byte, max(0, s.length-len(b)))...)
}

func (s longSworn) Trust(owner weft.ID, cert []byte) (gossip.Checker, error) {
	return s.sworn.Trust(owner, bytes.TrimRight(cert, "\x00"))
}
