package ca

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/weftnet/weft"
)

// One file holds certificate, root and key: a renewal replaces key and
// certificate, and two files could not be replaced at once.
const (
	identityFile = "identity.pem"
	// identityHeader is the version of the file's form. Text before the first
	// block is legal in PEM (RFC 7468 section 2).
	identityHeader = "weft node identity, version 1\n"
)

// Save writes b to dir/identity.pem (0600), making dir (0700) when it is
// missing. The file is replaced as a whole or not at all, and is on disk when
// Save returns.
func Save(dir string, b Bundle) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("save node identity: %w", err)
	}
	content := bytes.Join([][]byte{[]byte(identityHeader), b.Cert, b.CA, b.Key}, nil)
	if _, err := decodeBundle(content); err != nil {
		return fmt.Errorf("save node identity: %w", err)
	}
	if err := replaceFile(dir, identityFile, content); err != nil {
		return fmt.Errorf("save node identity: %w", err)
	}
	return nil
}

// Load reads what Save wrote. A missing file is weft.ErrNotFound: this node
// is in no cluster. The certificate is not judged here; see NewCredentials.
func Load(dir string) (Bundle, error) {
	path := filepath.Join(dir, identityFile)
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Bundle{}, fmt.Errorf("load node identity: %s: %w", path, weft.ErrNotFound)
	}
	if err != nil {
		return Bundle{}, fmt.Errorf("load node identity: %w", err)
	}
	b, err := decodeBundle(content)
	if err != nil {
		return Bundle{}, fmt.Errorf("load node identity %s: %w", path, err)
	}
	return b, nil
}

// Forget removes the identity of a node that left. A missing file is no error.
func Forget(dir string) error {
	if err := os.Remove(filepath.Join(dir, identityFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove node identity: %w", err)
	}
	if err := syncDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove node identity: %w", err)
	}
	return nil
}

func decodeBundle(content []byte) (Bundle, error) {
	rest, ok := bytes.CutPrefix(content, []byte(identityHeader))
	if !ok {
		return Bundle{}, fmt.Errorf("it does not begin with %q: %w", identityHeader, weft.ErrInvalid)
	}
	certs := certBlocks(rest)
	if len(certs) != 2 {
		return Bundle{}, fmt.Errorf("it must hold the node's certificate and the root, it holds %d certificates: %w", len(certs), weft.ErrInvalid)
	}
	b := Bundle{Cert: certs[0], CA: certs[1]}
	for {
		var blk *pem.Block
		if blk, rest = pem.Decode(rest); blk == nil {
			return Bundle{}, fmt.Errorf("it holds no private key: %w", weft.ErrInvalid)
		}
		if blk.Type == blockKey {
			b.Key = encodeBlock(blockKey, blk.Bytes)
			return b, nil
		}
	}
}

// replaceFile writes a new file beside the old one, makes it durable and
// renames it over the old one; then the name is made durable too.
func replaceFile(dir, name string, content []byte) error {
	// One fixed name, so that crashes do not pile up copies of the key.
	tmp := filepath.Join(dir, "."+name+".new")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Chmod(0o600), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, filepath.Join(dir, name)); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
