package logstore

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

// history makes calls, and returns the names of the files that are left.
func (r *rig) history() []string {
	r.reopen(nil)
	for range rapid.IntRange(1, 30).Draw(r.t, "calls") {
		o := drawOp(r.t, r.w)
		next, may := r.w.with(o)
		if err := o.do(r.s); (err == nil) != may {
			r.t.Fatalf("%v: %v", o, err)
		}
		if may {
			r.w = next
		}
	}
	names, err := r.p.List()
	if err != nil {
		r.t.Fatal(err)
	}
	return names
}

// rightOrError fails when the store says something that is not so. Errors are
// in order.
func (r *rig) rightOrError() {
	for i := range r.w.logs {
		var got raft.Log
		if err := r.s.GetLog(i, &got); err == nil && !sameLog(got, r.w.logs[i]) {
			r.t.Fatalf("entry %d is %+v, was %+v", i, got, r.w.logs[i])
		} else if errors.Is(err, raft.ErrLogNotFound) {
			r.t.Fatalf("entry %d is forgotten", i)
		}
	}
}

// TestStoreNoticesRot: a bit that turns is an error, or does not matter. It never
// is another entry, and never a shorter log.
func TestStoreNoticesRot(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRig(t)
		names := r.history()
		f := r.d.names[rapid.SampledFrom(names).Draw(t, "file")]
		used := len(f.cached)
		if rapid.IntRange(0, 9).Draw(t, "where") > 0 { // mostly where something is
			for used > 1 && f.cached[used-1] == 0 {
				used--
			}
		}
		f.cached[rapid.IntRange(0, used-1).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		r.rightOrError() // under a store that is open
		r.close()
		err := r.open(0)
		var d *damage
		switch {
		case err != nil && !errors.As(err, &d):
			t.Fatalf("open: %v", err)
		case err != nil:
			if _, ok := r.d.names[d.file]; !ok {
				t.Fatalf("the error names no file: %v", err)
			}
		default:
			if problem := r.w.differs(r.s); problem != "" {
				t.Fatal(problem)
			}
		}
	})
}

// TestStoreMissesFiles: a log of which a file is gone, or is cut short, is refused.
func TestStoreMissesFiles(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRig(t)
		names := r.history()
		r.close()
		i := rapid.IntRange(0, len(names)-1).Draw(t, "file")
		f := r.d.names[names[i]]
		used := len(f.cached)
		for used > 0 && f.cached[used-1] == 0 {
			used--
		}
		if cut := rapid.Bool().Draw(t, "cut"); cut {
			f.cached = f.cached[:rapid.IntRange(0, used-1).Draw(t, "length")]
		} else if i < len(names)-1 {
			delete(r.d.names, names[i])
		} else {
			return // that there was a newer one nobody can know
		}
		var d *damage
		err := r.open(0)
		if errors.As(err, &d) {
			return
		}
		if err != nil {
			t.Fatalf("open: %v", err)
		}
		if problem := r.w.differs(r.s); problem != "" {
			t.Fatal(problem)
		}
	})
}

// TestDamageIsNamed: what an operator reads.
func TestDamageIsNamed(t *testing.T) {
	for _, tc := range []struct {
		name   string
		rot    func(b []byte)
		offset string
	}{
		{"head of the file", func(b []byte) { b[17] ^= 1 }, "at offset 0: the head of the file"},
		{"a batch with others behind", func(b []byte) { b[150] ^= 1 }, "at offset 96: batch 1 cannot be read, and batch 2 is behind it at offset"},
		{"head of the last batch", func(b []byte) { b[lastBatch(b)+5] ^= 1 }, "the head of batch 3 is damaged"},
		{"the last batch", func(b []byte) { b[lastBatch(b)+70] ^= 1 }, "all sectors of batch 3 were written"},
		{"version", func(b []byte) {
			head := appendSegmentHead(nil, 1, 7, int64(len(b)))
			copy(b, head)
			b[7]++
			copy(b[28:], sum32(checksum(7, 0, b[:28], nil)))
		}, `format "weftlog\x02"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			s := openReal(t, dir)
			for i := range uint64(3) {
				mustStore(t, s, i+1, i+1, 1)
			}
			mustClose(t, s)
			path := filepath.Join(dir, segmentName(1))
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			tc.rot(b)
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = Open(t.Context(), Config{Dir: dir, Log: quiet})
			if err == nil || !strings.Contains(err.Error(), tc.offset) || !strings.Contains(err.Error(), segmentName(1)) || !strings.Contains(err.Error(), "weft node rm --force") {
				t.Fatalf("%v, want %q", err, tc.offset)
			}
			if after, err := os.ReadFile(path); err != nil || string(after) != string(b) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
}

// lastBatch is the offset of the last batch of a file.
func lastBatch(b []byte) int {
	var r replay
	if err := r.segment("x", 1, b); err != nil {
		panic(err)
	}
	return int(r.last)
}

func sum32(v uint32) []byte { return []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)} }
