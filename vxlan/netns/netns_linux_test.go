package netns

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/weftnet/weft"
)

func TestLifeOfANamespace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "netns")
	path, err := Create(dir, "a-1")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := Create(dir, "a-1"); err != nil || again != path {
		t.Fatalf("second Create: %s, %v", again, err)
	}
	var l net.Listener
	if err := Do(path, func() (err error) { l, err = net.Listen("tcp", ":7001"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	// The same port is free outside: the socket is in the namespace.
	out, err := net.Listen("tcp", ":7001")
	if err != nil {
		t.Fatalf("Do left its namespace on the thread: %v", err)
	}
	out.Close()
	if err := os.WriteFile(filepath.Join(dir, "a-2"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if names, err := List(dir, "a-"); err != nil || !slices.Equal(names, []string{"a-1", "a-2"}) {
		t.Errorf("List: %v, %v", names, err)
	}
	if _, err := Open(filepath.Join(dir, "a-2")); !errors.Is(err, weft.ErrNotFound) {
		t.Errorf("Open of a plain file: %v", err)
	}
	if _, err := Create(dir, "a-2"); err != nil {
		t.Errorf("Create over the rest of a crash: %v", err)
	}
	for _, p := range []string{path, path, filepath.Join(dir, "a-2")} {
		if err := Remove(p); err != nil {
			t.Errorf("Remove: %v", err)
		}
	}
	for _, bad := range []string{"", ".", "..", "a/b"} {
		if _, err := Create(dir, bad); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("Create(%q): %v", bad, err)
		}
	}
}

func TestManyAtOnceComeBack(t *testing.T) {
	dir := t.TempDir()
	home, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			path, err := Create(dir, string(rune('a'+i)))
			if err != nil {
				t.Error(err)
				return
			}
			defer Remove(path)
			if err := Do(path, func() error {
				if in, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || in == home {
					t.Errorf("Do is not inside: %s %v", in, err)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if main, err := os.Readlink("/proc/self/ns/net"); err != nil || main != home {
		t.Errorf("the first thread is in %s: %v (of %d threads)", main, err, len(tasks))
	}
}
