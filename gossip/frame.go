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

	"github.com/weftnet/weft"
)

// A frame carries one message, encrypted and authenticated:
//
//	0      1       2              27           43             51
//	┌──────┬───────┬──────────────┬────────────┬──────────────┬───────────────────┐
//	│ 0xF7 │ 1     │ sender (25)  │ salt (16)  │ counter (8)  │ ciphertext + tag  │
//	└──────┴───────┴──────────────┴────────────┴──────────────┴───────────────────┘
//
// The cipher is AES-256-GCM, its key HKDF-SHA256(cluster key, salt, "weft
// gossip 1 " + sender), its nonce the counter, its additional data the header.
// The salt is random for each start of a sender, so that no pair of key and
// nonce comes twice, whatever clocks and disks do. The sender's name is part of
// its key: a frame cannot be passed off as another node's.
const (
	// frameMagic keeps frames apart from memberlist's packets, whose first
	// byte is a message type (0 to 13, 244) or an encryption version (0, 1),
	// and from a TLS handshake (0x16).
	frameMagic   byte = 0xF7
	frameVersion byte = 1
	// memberlistHasLabel is the greatest of its message types (memberlist,
	// net.go, hasLabelMsg).
	memberlistHasLabel byte = 244

	senderBytes   = 25 // of weft.ID
	saltBytes     = 16
	headerBytes   = 2 + senderBytes + saltBytes + 8
	tagBytes      = 16
	frameOverhead = headerBytes + tagBytes

	// KeyBytes is the length of the cluster key.
	KeyBytes = 32
)

// Why a frame is dropped.
var (
	errShort       = errors.New("frame is too short")
	errForeign     = errors.New("frame is none of ours")
	errUnauthentic = errors.New("frame is not authentic")
)

func frameCipher(key, salt []byte, sender weft.ID) (cipher.AEAD, error) {
	sub, err := hkdf.Key(sha256.New, key, salt, "weft gossip 1 "+string(sender), KeyBytes)
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
	header  [headerBytes]byte // its counter is of the last frame
	counter uint64
	aead    cipher.AEAD
}

func newSealer(key []byte, sender weft.ID) (*sealer, error) {
	salt := make([]byte, saltBytes)
	if _, err := rand.Read(salt); err != nil {
		return nil, fmt.Errorf("draw frame salt: %w", err)
	}
	return newSaltedSealer(key, salt, sender)
}

func newSaltedSealer(key, salt []byte, sender weft.ID) (*sealer, error) {
	aead, err := frameCipher(key, salt, sender)
	if err != nil {
		return nil, err
	}
	s := &sealer{aead: aead}
	s.header[0], s.header[1] = frameMagic, frameVersion
	copy(s.header[2:], sender)
	copy(s.header[2+senderBytes:], salt)
	return s, nil
}

func nonceOf(header []byte) []byte {
	nonce := make([]byte, 12)
	copy(nonce[4:], header[headerBytes-8:headerBytes])
	return nonce
}

func (s *sealer) seal(m message) []byte {
	s.counter++
	binary.BigEndian.PutUint64(s.header[headerBytes-8:], s.counter)
	plain := encode(nil, m)
	out := make([]byte, 0, frameOverhead+len(plain))
	out = append(out, s.header[:]...)
	return s.aead.Seal(out, nonceOf(s.header[:]), plain, s.header[:])
}

// maxCiphers bounds an opener's memory: about 1 KiB each.
const maxCiphers = 4096

// opener reads frames. It is not safe for concurrent use.
type opener struct {
	key     []byte
	ciphers map[[senderBytes + saltBytes]byte]cipher.AEAD // of senders proven once
}

func newOpener(key []byte) *opener {
	return &opener{key: key, ciphers: map[[senderBytes + saltBytes]byte]cipher.AEAD{}}
}

// open returns the message in a frame and its sender. The error wraps errShort,
// errForeign or errUnauthentic, or is the decoder's: then a node that knows the
// key speaks nonsense.
func (o *opener) open(frame []byte) (weft.ID, message, error) {
	if len(frame) < frameOverhead+1 {
		return "", nil, errShort
	}
	header := frame[:headerBytes]
	sender := weft.ID(header[2 : 2+senderBytes])
	if header[0] != frameMagic || header[1] != frameVersion || !sender.Valid() {
		return "", nil, errForeign
	}
	who := [senderBytes + saltBytes]byte(header[2 : 2+senderBytes+saltBytes])
	aead, proven := o.ciphers[who]
	if !proven {
		var err error
		if aead, err = frameCipher(o.key, who[senderBytes:], sender); err != nil {
			return "", nil, err
		}
	}
	plain, err := aead.Open(nil, nonceOf(header), frame[headerBytes:], header)
	if err != nil {
		return "", nil, errUnauthentic
	}
	if !proven {
		if len(o.ciphers) >= maxCiphers {
			clear(o.ciphers) // derived again on demand
		}
		o.ciphers[who] = aead
	}
	m, err := decode(plain)
	if err != nil {
		return "", nil, fmt.Errorf("frame of %s: %w", sender, err)
	}
	return sender, m, nil
}
