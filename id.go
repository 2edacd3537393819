package weft

import (
	"crypto/rand"
	"fmt"
	"math/big"
)

// idLength is the length in characters of an identifier: 128 bits in base 36
// need 25 digits. Docker's swarm objects have the same length, and its clients
// print and cut identifiers by it.
const idLength = 25

// ID names an object of the cluster: 25 characters of [0-9a-z], 128 random
// bits. The zero ID ("") means "none". IDs are never reused.
type ID string

// NewID draws an identifier from the system's random source. It is called on
// the side that proposes a change, never in the replicated state machine. Safe
// for concurrent use.
func NewID() ID {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(fmt.Sprintf("read random bytes: %v", err)) // the kernel's source cannot fail after boot
	}
	s := new(big.Int).SetBytes(b[:]).Text(36)
	for len(s) < idLength {
		s = "0" + s
	}
	return ID(s)
}

// Valid reports whether id has the form that NewID makes.
func (id ID) Valid() bool {
	if len(id) != idLength {
		return false
	}
	for _, c := range id {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return true
}

// Short is the first 12 characters, as people read and type identifiers.
func (id ID) Short() string {
	if len(id) <= 12 {
		return string(id)
	}
	return string(id[:12])
}
