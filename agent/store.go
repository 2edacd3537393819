package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/weftnet/weft"
)

// errDamaged marks a file that is no complete JSON document, as a power cut
// leaves it.
var errDamaged = errors.New("file is damaged")

// saveFile writes v so that a crash of the daemon leaves the old file or the
// new one. It does not wait for the disk: after a power cut no container runs
// that the files could describe, and the leader sends everything again.
func saveFile(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	return writeFile(path, b)
}

// writeFile is saveFile for what is encoded already.
func writeFile(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make folder of %s: %w", path, err)
	}
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// loadFile reads what saveFile wrote; found is false when there is no file. A
// file of another version than the wanted one is weft.ErrUnsupported: it is
// never guessed at.
func loadFile(path string, version int, v any) (found bool, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read %s: %w", path, err)
	}
	var head struct{ Version int }
	if err := json.Unmarshal(b, &head); err != nil {
		return false, fmt.Errorf("%w: parse %s: %w", errDamaged, path, err)
	}
	if head.Version != version {
		return false, fmt.Errorf("%w: %s has version %d, this build reads %d", weft.ErrUnsupported, path, head.Version, version)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return false, fmt.Errorf("%w: parse %s: %w", errDamaged, path, err)
	}
	return true, nil
}
