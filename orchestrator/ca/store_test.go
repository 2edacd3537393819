package ca

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/weftnet/weft"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestSaveLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs")
	if _, err := Load(dir); !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("load from nowhere: %v", err)
	}
	root := newRoot(t)
	id := Identity{weft.NewID(), weft.RoleManager, weft.NewID()}
	for range 2 { // the second replaces the first
		b := signed(t, root, id, testNow)
		if err := Save(dir, b); err != nil {
			t.Fatal(err)
		}
		got, err := Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, b) {
			t.Fatal("what was loaded is not what was saved")
		}
	}
	for path, mode := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, identityFile): 0o600} {
		st, err := os.Stat(path)
		if err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, want %v, %v", path, st.Mode().Perm(), mode, err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%v is left in the folder, %v", entries, err)
	}
	if err := errors.Join(Forget(dir), Forget(dir), Forget(filepath.Join(dir, "missing"))); err != nil {
		t.Errorf("forget: %v", err)
	}
	if _, err := Load(dir); !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("load after forget: %v", err)
	}
}

// TestSaveSurvivesCrash: a half-written new file, as a crash leaves it, harms
// neither loading nor the next save, and does not keep lax permissions.
func TestSaveSurvivesCrash(t *testing.T) {
	dir := t.TempDir()
	b := signed(t, newRoot(t), Identity{weft.NewID(), 0, weft.NewID()}, testNow)
	if err := Save(dir, b); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "."+identityFile+".new"), []byte("weft node id"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := Load(dir); err != nil || !reflect.DeepEqual(got, b) {
		t.Fatalf("load beside a half-written file: %v", err)
	}
	if err := Save(dir, b); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(dir, identityFile)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestLoadRefuses(t *testing.T) {
	b := signed(t, newRoot(t), Identity{weft.NewID(), 0, weft.NewID()}, testNow)
	join := func(p ...[]byte) []byte { return bytes.Join(p, nil) }
	head := []byte(identityHeader)
	for name, content := range map[string][]byte{
		"empty":         {},
		"no header":     join(b.Cert, b.CA, b.Key),
		"other version": join([]byte("weft node identity, version 2\n"), b.Cert, b.CA, b.Key),
		"cut":           join(head, b.Cert, b.CA, b.Key[:len(b.Key)/2]),
		"no key":        join(head, b.Cert, b.CA),
		"no root":       join(head, b.Cert, b.Key),
		"three certs":   join(head, b.Cert, b.CA, b.CA, b.Key),
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, identityFile), content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Save(t.TempDir(), Bundle{Cert: b.Cert, Key: b.Key}); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("save without root: %v", err)
	}
}

// TestGolden: a file of version 1 is read for ever.
func TestGolden(t *testing.T) {
	dir := filepath.Join("testdata", "v1")
	if *update {
		if err := Save(dir, signed(t, newRoot(t), Identity{"0123456789abcdefghijklmno", weft.RoleManager, "ponmlkjihgfedcba987654321"}, testNow)); err != nil {
			t.Fatal(err)
		}
	}
	b, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewCredentials(b, at(testNow.Add(time.Hour)))
	if err != nil {
		t.Fatal(err)
	}
	if want := (Identity{"0123456789abcdefghijklmno", weft.RoleManager, "ponmlkjihgfedcba987654321"}); c.Identity() != want {
		t.Errorf("identity %+v", c.Identity())
	}
	if !bytes.Equal(c.CA(), b.CA) {
		t.Error("CA does not answer the root")
	}
}
