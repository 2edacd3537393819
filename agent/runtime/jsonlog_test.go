package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

func readAll(ctx context.Context, dir string, o LogRead) ([]string, error) {
	var out []string
	o.Stdout, o.Stderr = true, true
	err := ReadLog(ctx, dir, o, func(r weft.LogRecord) error { out = append(out, string(r.Line)); return nil })
	return out, err
}

// The lines on disk are Docker's json-file lines.
func TestLogShape(t *testing.T) {
	dir := t.TempDir()
	w, err := OpenLog(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.now = func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC) }
	if err := errors.Join(w.Copy(true, strings.NewReader("a<b\nend")), w.Close()); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(LogFile(dir))
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/json-file.log")
	if err != nil || string(got) != string(want) {
		t.Errorf("wrote %q, want %q (%v)", got, want, err)
	}
}

// What is kept is a suffix of what was written, in order, whatever the sizes;
// nothing is lost before the parts are full; tail is the end of that.
func TestLogRotationProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "log")
		if err != nil {
			rt.Fatal(err)
		}
		limit := rapid.Int64Range(1, 2000).Draw(rt, "limit")
		n := rapid.IntRange(0, 60).Draw(rt, "lines")
		reopen := rapid.IntRange(0, 60).Draw(rt, "reopen")
		w, err := OpenLog(dir, limit)
		if err != nil {
			rt.Fatal(err)
		}
		var model []string
		for i := range n {
			if i == reopen {
				if err := w.Close(); err != nil {
					rt.Fatal(err)
				}
				if w, err = OpenLog(dir, limit); err != nil {
					rt.Fatal(err)
				}
			}
			line := fmt.Sprintf("%d %s\n", i, strings.Repeat("x", rapid.IntRange(0, 100).Draw(rt, "len")))
			if err := w.Write(i%3 == 0, []byte(line)); err != nil {
				rt.Fatal(err)
			}
			model = append(model, line)
		}
		if err := w.Close(); err != nil {
			rt.Fatal(err)
		}
		got, err := readAll(t.Context(), dir, LogRead{LogOptions: weft.LogOptions{Tail: -1}})
		if err != nil {
			rt.Fatal(err)
		}
		if strings.Join(got, "") != strings.Join(model[len(model)-len(got):], "") || n > 0 && len(got) == 0 {
			rt.Fatalf("kept %q of %q", got, model)
		}
		if _, err := os.Stat(logPart(dir, LogParts-1)); errors.Is(err, os.ErrNotExist) && len(got) != len(model) {
			rt.Fatalf("lost lines before the last part was begun")
		}
		tail := rapid.IntRange(0, 70).Draw(rt, "tail")
		last, err := readAll(t.Context(), dir, LogRead{LogOptions: weft.LogOptions{Tail: tail}})
		if err != nil || strings.Join(last, "") != strings.Join(got[max(0, len(got)-tail):], "") {
			rt.Fatalf("tail %d: %q of %q, %v", tail, last, got, err)
		}
	})
}

// A follower beside a rotating writer sees every line once, in order.
func TestLogFollowRotation(t *testing.T) {
	dir := t.TempDir()
	w, err := OpenLog(dir, 4096)
	if err != nil {
		t.Fatal(err)
	}
	const lines = 400
	seen, step := make(chan int, lines), make(chan struct{})
	go func() { // ends with the test's loop below
		defer w.Close()
		for i := range lines {
			if err := w.Write(false, fmt.Appendf(nil, "%d %s\n", i, strings.Repeat("x", i%150))); err != nil {
				t.Error(err)
			}
			if i%25 == 24 { // never more than one part ahead of the reader
				<-step
			}
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	end := errors.New("end")
	err = ReadLog(ctx, dir, LogRead{LogOptions: weft.LogOptions{Stdout: true, Tail: -1, Follow: true}}, func(r weft.LogRecord) error {
		var i int
		if _, err := fmt.Sscanf(string(r.Line), "%d", &i); err != nil || i != len(seen) {
			return fmt.Errorf("line %q after %d lines: %w", r.Line, len(seen), err)
		}
		seen <- i
		if i%25 == 24 {
			step <- struct{}{}
		}
		if i == lines-1 {
			return end
		}
		return nil
	})
	if !errors.Is(err, end) {
		t.Errorf("follow: %v", err)
	}
}

func TestLogDamage(t *testing.T) {
	dir := t.TempDir()
	w, err := OpenLog(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenLog(dir, 0); err == nil {
		t.Error("two writers")
	}
	if err := errors.Join(w.Write(false, []byte("one\n")), w.Close()); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(LogFile(dir), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, `{"log":"torn`)
	f.Close()
	if w, err = OpenLog(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Write(false, []byte("two\n")), w.Close()); err != nil {
		t.Fatal(err)
	}
	got, err := readAll(t.Context(), dir, LogRead{LogOptions: weft.LogOptions{Tail: -1}})
	if err != nil || strings.Join(got, "") != "one\ntwo\n" {
		t.Errorf("read %q, %v", got, err)
	}
	if got, err := readAll(t.Context(), filepath.Join(dir, "none"), LogRead{LogOptions: weft.LogOptions{Tail: -1}}); err != nil || got != nil {
		t.Errorf("log that does not exist: %q, %v", got, err)
	}
}

func FuzzReadLog(f *testing.F) {
	f.Add([]byte(`{"log":"a\n","stream":"stdout","time":"2026-01-02T03:04:05Z"}` + "\n{\"log\":"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(LogFile(dir), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readAll(t.Context(), dir, LogRead{LogOptions: weft.LogOptions{Tail: 3}}); err != nil {
			t.Fatal(err)
		}
	})
}
