package containerd

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft"
)

// TestNotesOfOneExit: several see a task's exit at once, and one of them removes
// the task. All say the same of it, nobody fails, and no file is left.
func TestNotesOfOneExit(t *testing.T) {
	const rounds, readers = 200, 8
	s := &notes{dir: t.TempDir()}
	for range rounds {
		task := weft.NewID()
		if err := s.begin(task, note{StartedAt: time.Unix(1, 0), PID: 7}); err != nil {
			t.Fatal(err)
		}
		var g errgroup.Group
		for i := range readers {
			g.Go(func() error {
				_, err := s.end(task, exitNote{Code: 3, At: time.Unix(int64(i), 0)})
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		n, ok := s.read(task)
		if !ok || n.Exit == nil || n.PID != 7 {
			t.Fatalf("the note says %+v, %v", n, ok)
		}
		if e, err := s.end(task, exitNote{Code: 4}); err != nil || !e.At.Equal(n.Exit.At) || e.Code != 3 {
			t.Fatalf("a second exit is %+v, %v; the first was %+v", e, err, *n.Exit)
		}
		g.Go(func() error { return s.forget(task) })
		g.Go(func() error { _, err := s.end(task, exitNote{Code: 3}); return err })
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	left, err := os.ReadDir(s.dir)
	if err != nil || len(left) != 0 {
		t.Fatalf("left of tasks that are removed: %v, %v", left, err)
	}
}
