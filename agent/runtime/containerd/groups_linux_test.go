package containerd

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestRemoveGroups: what is empty goes, from every hierarchy, and what is in use stays.
func TestRemoveGroups(t *testing.T) {
	if os.Geteuid() != 0 {
		netnstest.Missing(t, "root", errors.New("not root"))
	}
	roots, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	idle, busy := weft.NewID(), weft.NewID()
	made := 0
	for _, root := range roots {
		for _, node := range []weft.ID{idle, busy} {
			dir := filepath.Join(root, "weft", string(node))
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Logf("%s: %v", dir, err) // a tree that is not ours to write
				continue
			}
			made++
			t.Cleanup(func() { os.Remove(dir); os.Remove(filepath.Dir(dir)) })
		}
	}
	if made == 0 {
		netnstest.Missing(t, "root", errors.New("no cgroup can be made"))
	}
	in := filepath.Join(roots[len(roots)-1], "weft", string(busy))
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if err := os.WriteFile(filepath.Join(in, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	for _, node := range []weft.ID{idle, busy, weft.NewID()} {
		if err := RemoveGroups(node); err != nil {
			t.Error(err)
		}
	}
	for _, root := range roots {
		for _, node := range []weft.ID{idle, busy} {
			dir := filepath.Join(root, "weft", string(node))
			_, err := os.Stat(dir)
			if isThere := !errors.Is(err, fs.ErrNotExist); isThere != (dir == in) {
				t.Errorf("%s is there: %v", dir, isThere)
			}
		}
	}
}
