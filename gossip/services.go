package gossip

import (
	"bytes"
	"hash/maphash"
	"strings"

	"github.com/weftnet/weft"
)

// serviceID is a service's identifier as it came: as a number, or as text. Of a service
// that is known, the string need not be made again.
type serviceID struct {
	number packed  // zero: text
	text   weft.ID // "", if there is a number
}

func (d *decoder) serviceID() serviceID {
	if len(d.b) > 16 && d.b[0] == idPacked {
		if s := (serviceID{number: packed(d.b[1:17])}); s.number != (packed{}) {
			d.b = d.b[17:]
			return s
		}
	}
	return serviceID{text: d.id()}
}

func (s serviceID) id() weft.ID {
	if s.number != (packed{}) {
		return s.number.id()
	}
	return s.text
}

func (s serviceID) compare(t serviceID) int {
	if s.number != (packed{}) && t.number != (packed{}) {
		return bytes.Compare(s.number[:], t.number[:]) // as that of identifiers
	}
	return strings.Compare(string(s.id()), string(t.id()))
}

// services are those of a network that have a number: an identifier is kept once,
// not in every table that names it. They are only added to, so a copy goes on to be
// good while its origin grows.
type services struct {
	ids     []weft.ID
	numbers []packed // the same, zero if it has no such form
	// bases are what the slot is added to, to foretell an address.
	bases []uint32
}

// appendID appends the identifier of a service as it is on the wire.
func (n *services) appendID(b []byte, number int) []byte {
	if p := &n.numbers[number]; *p != (packed{}) {
		return append(append(b, idPacked), p[:]...)
	}
	return appendID(b, n.ids[number])
}

// dictionary finds the number of a service. Its own table of places takes a fifth
// of what a map takes: with one-task services that is most of a dictionary.
type dictionary struct {
	services
	seed   maphash.Seed
	places []uint32 // number+1 by hash, or at the next free place behind; 0: none
}

func newDictionary() *dictionary { return &dictionary{seed: maphash.MakeSeed()} }

// number is that of a service. A new one gets the next, and base.
func (n *dictionary) number(id serviceID, base uint32) int {
	if 4*len(n.ids) >= 3*len(n.places) {
		n.grow()
	}
	at := n.place(id)
	if n.places[at] == 0 {
		n.ids, n.numbers, n.bases = append(n.ids, id.id()), append(n.numbers, id.number), append(n.bases, base)
		n.places[at] = uint32(len(n.ids))
	}
	return int(n.places[at]) - 1
}

// place is where a service is, or would be.
func (n *dictionary) place(id serviceID) int {
	var hash uint64
	if id.text == "" {
		hash = maphash.Bytes(n.seed, id.number[:])
	} else {
		hash = maphash.String(n.seed, string(id.text))
	}
	mask := len(n.places) - 1
	at := int(hash) & mask
	for n.places[at] != 0 && !n.is(int(n.places[at]-1), id) {
		at = (at + 1) & mask
	}
	return at
}

func (n *dictionary) is(number int, id serviceID) bool {
	return n.numbers[number] == id.number && (id.number != (packed{}) || n.ids[number] == id.text)
}

func (n *dictionary) grow() {
	n.places = make([]uint32, max(8, 2*len(n.places)))
	for i := range n.ids {
		id := serviceID{number: n.numbers[i]}
		if id.number == (packed{}) {
			id.text = n.ids[i]
		}
		n.places[n.place(id)] = uint32(i + 1)
	}
}

// frozen is a copy that the dictionary's growth leaves alone.
func (n *dictionary) frozen() services { return n.services }
