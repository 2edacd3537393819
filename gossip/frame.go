package gossip

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/weftnet/weft"
)

// A frame carries one message, encrypted and authenticated:
//
//	0      1     2            6          12           18
//	┌──────┬─────┬────────────┬──────────┬────────────┬───────────────────┐
//	│ 0xF7 │ 2   │ sender (4) │ life (6) │ number (6) │ ciphertext + tag  │
//	└──────┴─────┴────────────┴──────────┴────────────┴───────────────────┘
//
// The cipher is AES-256-GCM, its key HKDF-SHA256(a key of the ring, "weft gossip 2 "
// + sender), its nonce life and number, its additional data the header. The life is
// random for each start of a sender, so that no pair of key and nonce comes
// twice, whatever clocks and disks do: a thousand starts collide once in 2^29. The
// sender is told by a hash of its name, which every member knows; the name is
// part of its key, so a frame cannot be passed off as another node's. Numbers
// that came once are not taken again.
const (
	// frameMagic keeps frames apart from memberlist's packets, whose first
	// byte is a message type (0 to 13, 244) or an encryption version (0, 1),
	// and from a TLS handshake (0x16).
	frameMagic   byte = 0xF7
	frameVersion byte = 2
	// memberlistHasLabel is the greatest of its message types (memberlist,
	// net.go, hasLabelMsg).
	memberlistHasLabel byte = 244

	senderBytes   = 4
	lifeBytes     = 6
	numberBytes   = 6
	headerBytes   = 2 + senderBytes + lifeBytes + numberBytes
	tagBytes      = 16
	frameOverhead = headerBytes + tagBytes
)

// Why a frame is dropped.
var (
	errShort       = errors.New("frame is too short")
	errForeign     = errors.New("frame is none of ours")
	errUnknown     = errors.New("frame is of no member")
	errUnauthentic = errors.New("frame is not authentic")
	errReplayed    = errors.New("frame has come before")
)

type senderHash [senderBytes]byte

func hashSender(id weft.ID) senderHash {
	sum := sha256.Sum256([]byte("weft gossip sender\x00" + id))
	return senderHash(sum[:senderBytes])
}

func frameCipher(key []byte, sender weft.ID) (cipher.AEAD, error) {
	sub, err := hkdf.Key(sha256.New, key, nil, "weft gossip 2 "+string(sender), weft.GossipKeyBytes)
	if err != nil {
		return nil, fmt.Errorf("derive frame key: %w", err)
	}
	block, err := aes.NewCipher(sub)
	if err != nil {
		return nil, fmt.Errorf("make frame cipher: %w", err)
	}
	return cipher.NewGCM(block)
}

// sealer makes one node's frames. It is not safe for concurrent use.
type sealer struct {
	sender weft.ID
	header [headerBytes]byte
	number uint64 // of the last frame
	aead   cipher.AEAD
}

func newSealer(key []byte, sender weft.ID) (*sealer, error) {
	var life [lifeBytes]byte
	if _, err := rand.Read(life[:]); err != nil {
		return nil, fmt.Errorf("draw life of frames: %w", err)
	}
	return newLivedSealer(key, life, sender)
}

func newLivedSealer(key []byte, life [lifeBytes]byte, sender weft.ID) (*sealer, error) {
	s := &sealer{sender: sender}
	if err := s.use(key); err != nil {
		return nil, err
	}
	s.header[0], s.header[1] = frameMagic, frameVersion
	hash := hashSender(sender)
	copy(s.header[2:], hash[:])
	copy(s.header[2+senderBytes:], life[:])
	return s, nil
}

// use has further frames made by another key. Life and numbers go on, so receivers
// go on knowing what has come.
func (s *sealer) use(key []byte) error {
	aead, err := frameCipher(key, s.sender)
	if err != nil {
		return err
	}
	s.aead = aead
	return nil
}

func nonceOf(header []byte) []byte { return header[headerBytes-lifeBytes-numberBytes : headerBytes] }

func (s *sealer) seal(m message) []byte { return s.sealBytes(encode(nil, m)) }

func (s *sealer) sealBytes(plain []byte) []byte {
	s.number++
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], s.number)
	copy(s.header[headerBytes-numberBytes:], b[8-numberBytes:])
	out := make([]byte, 0, frameOverhead+len(plain))
	out = append(out, s.header[:]...)
	return s.aead.Seal(out, nonceOf(s.header[:]), plain, s.header[:])
}

// maxLives of a sender are remembered: the present one, and one that just ended.
const maxLives = 4

// opener reads frames of known members. It is not safe for concurrent use.
type opener struct {
	keys    [][]byte // the one that is most in use first
	senders map[senderHash][]*sender
}

// sender is what an opener knows of a member.
type sender struct {
	id    weft.ID
	aeads []cipher.AEAD // by keys
	lives []*window     // newest last
}

func newOpener(keys ...[]byte) *opener {
	return &opener{keys: keys, senders: map[senderHash][]*sender{}}
}

// use has further frames read by these keys and no others. What has come before
// is not forgotten.
func (o *opener) use(keys ...[]byte) error {
	o.keys = keys
	for _, same := range o.senders {
		for _, s := range same {
			if err := o.derive(s); err != nil {
				return err
			}
		}
	}
	return nil
}

func (o *opener) derive(s *sender) error {
	s.aeads = make([]cipher.AEAD, len(o.keys))
	for i, k := range o.keys {
		var err error
		if s.aeads[i], err = frameCipher(k, s.id); err != nil {
			return err
		}
	}
	return nil
}

// know makes ids, each of them once, the members whose frames are read.
func (o *opener) know(ids []weft.ID) error {
	if o.knows(ids) {
		return nil
	}
	next := make(map[senderHash][]*sender, len(ids))
	for _, id := range ids {
		h := hashSender(id)
		var s *sender
		for _, old := range o.senders[h] {
			if old.id == id {
				s = old
			}
		}
		if s == nil {
			s = &sender{id: id}
			if err := o.derive(s); err != nil {
				return err
			}
		}
		next[h] = append(next[h], s)
	}
	o.senders = next
	return nil
}

// knows reports whether nothing changes by know.
func (o *opener) knows(ids []weft.ID) bool {
	n := 0
	for _, s := range o.senders {
		n += len(s)
	}
	return n == len(ids) && !slices.ContainsFunc(ids, func(id weft.ID) bool {
		return !slices.ContainsFunc(o.senders[hashSender(id)], func(s *sender) bool { return s.id == id })
	})
}

// open returns the message in a frame and its sender. The error wraps one of
// those above, or is the decoder's: then a node that knows the key speaks
// nonsense.
func (o *opener) open(frame []byte) (weft.ID, message, error) {
	if len(frame) < frameOverhead+1 {
		return "", nil, errShort
	}
	header := frame[:headerBytes]
	if header[0] != frameMagic || header[1] != frameVersion {
		return "", nil, errForeign
	}
	known := o.senders[senderHash(header[2:])]
	if len(known) == 0 {
		return "", nil, errUnknown
	}
	for _, s := range known { // hardly ever more than one
		plain, ok := s.decrypt(header, frame[headerBytes:])
		if !ok {
			continue
		}
		nonce := nonceOf(header)
		if !s.first([lifeBytes]byte(nonce), nonce[lifeBytes:]) {
			return "", nil, errReplayed
		}
		m, err := decode(plain)
		if err != nil {
			return "", nil, fmt.Errorf("frame of %s: %w", s.id, err)
		}
		return s.id, m, nil
	}
	return "", nil, errUnauthentic
}

// decrypt tries the keys one after the other: while they change, either is in use.
func (s *sender) decrypt(header, text []byte) ([]byte, bool) {
	for _, aead := range s.aeads {
		if plain, err := aead.Open(nil, nonceOf(header), text, header); err == nil {
			return plain, true
		}
	}
	return nil, false
}

// first reports whether a number has not come before in that life.
func (s *sender) first(life [lifeBytes]byte, number []byte) bool {
	var b [8]byte
	copy(b[8-numberBytes:], number)
	n := binary.BigEndian.Uint64(b[:])
	for _, w := range s.lives {
		if w.life == life {
			return w.first(n)
		}
	}
	if len(s.lives) == maxLives {
		s.lives = append(s.lives[:0], s.lives[1:]...)
	}
	w := &window{life: life}
	s.lives = append(s.lives, w)
	return w.first(n)
}

// windowBits is how far a frame may be behind the newest of its sender: more
// than a burst that is reordered on its way.
const windowBits = 1024

// window remembers which numbers of a life have come (as RFC 6479 does).
type window struct {
	life [lifeBytes]byte
	last uint64
	seen [windowBits/64 + 1]uint64
}

func (w *window) first(n uint64) bool {
	if n+windowBits <= w.last {
		return false // too old to know
	}
	size := uint64(len(w.seen))
	if n > w.last {
		for word := w.last/64 + 1; word <= n/64 && word <= w.last/64+size; word++ {
			w.seen[word%size] = 0
		}
		w.last = n
	}
	bit := uint64(1) << (n % 64)
	if w.seen[n/64%size]&bit != 0 {
		return false
	}
	w.seen[n/64%size] |= bit
	return true
}
