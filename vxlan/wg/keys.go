package wg

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/weftnet/weft"
)

// privateKey is a clamped Curve25519 scalar (RFC 7748 section 5). The zero
// value is no key. It is never logged: its String hides it.
type privateKey [32]byte

// String hides the key.
func (privateKey) String() string { return "(private key)" }

func (k privateKey) public() (weft.PublicKey, error) {
	p, err := ecdh.X25519().NewPrivateKey(k[:])
	if err != nil {
		return weft.PublicKey{}, fmt.Errorf("compute public key: %w", err)
	}
	return weft.PublicKey(p.PublicKey().Bytes()), nil
}

func newPrivateKey() (privateKey, error) {
	var k privateKey
	if _, err := rand.Read(k[:]); err != nil {
		return k, fmt.Errorf("draw private key: %w", err)
	}
	k[0] &= 248
	k[31] = k[31]&127 | 64
	return k, nil
}

// slotKey is the key of one slot.
type slotKey struct {
	Epoch   uint64
	Private privateKey
}

// keyring is a node's keys by slot; nil where it has none yet.
type keyring [weft.KeySlots]*slotKey

// keyFile is the stored form, version 1.
type keyFile struct {
	Version int
	Keys    []storedKey
}

type storedKey struct {
	Epoch   uint64
	Private []byte
}

const keyFileVersion = 1

// keys keeps the node's private keys in a file that only root reads. Its
// methods may be called from several goroutines.
type keys struct {
	path string

	// mu guards: ring, loaded.
	mu     sync.Mutex
	ring   keyring
	loaded bool
}

// ensure returns the ring with a key of the epoch in it. The key of the slot's
// earlier epoch, two before, goes: nobody has used it since the last change.
// An epoch that is older than what the ring holds draws nothing: a leader that
// lost its log must not take a slot from under the traffic.
func (k *keys) ensure(epoch uint64) (keyring, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.loaded {
		ring, err := loadKeys(k.path)
		if err != nil {
			return ring, err
		}
		k.ring, k.loaded = ring, true
	}
	slot := epoch % weft.KeySlots
	if old := k.ring[slot]; old != nil && old.Epoch >= epoch {
		return k.ring, nil
	}
	private, err := newPrivateKey()
	if err != nil {
		return k.ring, err
	}
	next := k.ring
	next[slot] = &slotKey{Epoch: epoch, Private: private}
	if err := next.save(k.path); err != nil {
		return k.ring, err
	}
	k.ring = next
	return next, nil
}

// public is what others may know, by epoch; port is that of slot 0.
func (r keyring) public(port uint16) ([]weft.NodeKey, error) {
	var out []weft.NodeKey
	for _, k := range r {
		if k == nil {
			continue
		}
		p, err := k.Private.public()
		if err != nil {
			return nil, err
		}
		n := weft.NodeKey{Epoch: k.Epoch, Public: p}
		n.Port = port + uint16(n.Slot())
		out = append(out, n)
	}
	if len(out) == weft.KeySlots && out[0].Epoch > out[1].Epoch {
		out[0], out[1] = out[1], out[0]
	}
	return out, nil
}

func loadKeys(path string) (keyring, error) {
	var ring keyring
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return ring, nil
	}
	if err != nil {
		return ring, fmt.Errorf("read WireGuard keys: %w", err)
	}
	var f keyFile
	if err := json.Unmarshal(b, &f); err != nil {
		return ring, fmt.Errorf("read WireGuard keys %s: %w; remove the file and new keys are made", path, err)
	}
	if f.Version != keyFileVersion {
		return ring, fmt.Errorf("read WireGuard keys %s: version %d is not known to this build (it knows %d): %w", path, f.Version, keyFileVersion, weft.ErrUnsupported)
	}
	for _, s := range f.Keys {
		if len(s.Private) != len(privateKey{}) {
			return ring, fmt.Errorf("read WireGuard keys %s: a key of %d bytes; remove the file and new keys are made: %w", path, len(s.Private), weft.ErrInvalid)
		}
		ring[s.Epoch%weft.KeySlots] = &slotKey{Epoch: s.Epoch, Private: privateKey(s.Private)}
	}
	return ring, nil
}

// save replaces the file; after a crash it is the old or the new one.
func (r keyring) save(path string) error {
	f := keyFile{Version: keyFileVersion}
	for _, k := range r {
		if k != nil {
			f.Keys = append(f.Keys, storedKey{Epoch: k.Epoch, Private: k.Private[:]})
		}
	}
	b, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("encode WireGuard keys: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("store WireGuard keys: %w", err)
	}
	tmp, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("store WireGuard keys: %w", err)
	}
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("store WireGuard keys: %w", err)
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return fmt.Errorf("store WireGuard keys: %w", err)
	}
	return nil
}
