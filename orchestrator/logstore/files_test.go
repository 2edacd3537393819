package logstore

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

// Tests on real files.

var update = flag.Bool("update", false, "write the files in testdata anew")

func openReal(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: dir, SegmentBytes: minSegmentBytes, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustClose(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// mustStore stores entries from to to of a term in one call.
func mustStore(t testing.TB, s *Store, from, to, term uint64) {
	t.Helper()
	var logs []*raft.Log
	for i := from; i <= to; i++ {
		logs = append(logs, &raft.Log{Index: i, Term: term, Data: fmt.Appendf(nil, "entry %d of term %d", i, term)})
	}
	if err := s.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
}

// TestSuffixThatWasDeleted: a follower whose log went another way than its
// leader's deletes the end of it and writes on. The log must open again: with
// raft-wal 0.4.0 it never did.
func TestSuffixThatWasDeleted(t *testing.T) {
	dir := t.TempDir()
	s := openReal(t, dir)
	mustStore(t, s, 1, 20, 1)
	if err := s.DeleteRange(15, 20); err != nil {
		t.Fatal(err)
	}
	mustStore(t, s, 15, 18, 2)
	for round := uint64(0); ; round++ {
		mustClose(t, s)
		s = openReal(t, dir)
		if last, err := s.LastIndex(); err != nil || last != 18 {
			t.Fatalf("round %d: the last entry is %d (%v)", round, last, err)
		}
		for i := uint64(1); i <= 18; i++ {
			var got raft.Log
			want := uint64(1)
			if i >= 15 {
				want = round + 2
			}
			if err := s.GetLog(i, &got); err != nil || got.Term != want || string(got.Data) != fmt.Sprintf("entry %d of term %d", i, want) {
				t.Fatalf("round %d: entry %d is %+v (%v)", round, i, got, err)
			}
		}
		if round == 100 {
			break
		}
		if err := s.DeleteRange(15, 18); err != nil {
			t.Fatal(err)
		}
		mustStore(t, s, 15, 18, round+3)
	}
	mustClose(t, s)
	if all, err := filepath.Glob(filepath.Join(dir, "*.log")); err != nil || len(all) < 5 {
		t.Errorf("%d segments (%v): the rounds were to need more than one", len(all), err)
	}
}

// TestRealDisk: the folder of files does what the fake one does.
func TestRealDisk(t *testing.T) {
	dirs := t.TempDir()
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		dir := filepath.Join(dirs, fmt.Sprint(n), "deeper")
		s, w := openReal(t, dir), newTwin()
		for range rapid.IntRange(1, 15).Draw(rt, "calls") {
			o := drawOp(rt, w)
			next, may := w.with(o)
			if err := o.do(s); (err == nil) != may {
				rt.Fatalf("%v: %v", o, err)
			}
			if may {
				w = next
			}
			if rapid.IntRange(0, 4).Draw(rt, "restart") == 0 {
				if err := s.Close(); err != nil {
					rt.Fatal(err)
				}
				s = openReal(t, dir)
			}
			if problem := w.differs(s); problem != "" {
				rt.Fatalf("after %v: %s", o, problem)
			}
		}
		if err := s.Close(); err != nil {
			rt.Fatal(err)
		}
	})
}

func TestOneOwner(t *testing.T) {
	dir := t.TempDir()
	s := openReal(t, dir)
	if _, err := Open(t.Context(), Config{Dir: dir, Log: quiet}); err == nil || !strings.Contains(err.Error(), "is in use: another weft daemon runs") {
		t.Fatalf("a second owner: %v", err)
	}
	mustStore(t, s, 1, 1, 1) // the first is not disturbed
	mustClose(t, s)
	mustClose(t, s) // again
	if err := s.StoreLog(&raft.Log{Index: 2}); !errors.Is(err, errClosed) {
		t.Errorf("a write after Close: %v", err)
	}
	var l raft.Log
	if err := s.GetLog(1, &l); err == nil {
		t.Error("a read after Close")
	}
	mustClose(t, openReal(t, dir))
}

// TestUnfinishedSegment: one that was being made when the process ended goes.
func TestUnfinishedSegment(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, segmentName(2)+tmpSuffix)
	s := openReal(t, dir)
	mustStore(t, s, 1, 3, 1)
	mustClose(t, s)
	if err := os.WriteFile(left, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = openReal(t, dir)
	defer mustClose(t, s)
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is there: %v", err)
	}
}

// TestUint64Keys: Raft's term and vote.
func TestUint64Keys(t *testing.T) {
	dir := t.TempDir()
	s := openReal(t, dir)
	if v, err := s.GetUint64([]byte("CurrentTerm")); v != 0 || err == nil || err.Error() != "not found" {
		t.Errorf("a key without value: %d, %v", v, err)
	}
	for _, v := range []uint64{1, 1<<63 + 5} {
		if err := s.SetUint64([]byte("CurrentTerm"), v); err != nil {
			t.Fatal(err)
		}
		mustClose(t, s)
		s = openReal(t, dir)
		if got, err := s.GetUint64([]byte("CurrentTerm")); got != v || err != nil {
			t.Errorf("%d (%v), want %d", got, err, v)
		}
	}
	if err := s.Set([]byte("LastVoteCand"), []byte("n1")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetUint64([]byte("LastVoteCand")); err == nil {
		t.Error("a name is a number")
	}
	mustClose(t, s)
}

// TestReadersWhileWriting: readers see whole entries or none while entries come
// and go at both ends.
func TestReadersWhileWriting(t *testing.T) {
	s := openReal(t, t.TempDir())
	defer mustClose(t, s)
	mustStore(t, s, 1, 10, 1)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				first, err1 := s.FirstIndex()
				last, err2 := s.LastIndex()
				if err := errors.Join(err1, err2); err != nil {
					t.Error(err)
					return
				}
				for i := first; i <= last; i++ {
					var l raft.Log
					if err := s.GetLog(i, &l); errors.Is(err, raft.ErrLogNotFound) {
						continue
					} else if err != nil || string(l.Data) != fmt.Sprintf("entry %d of term %d", i, l.Term) {
						t.Errorf("entry %d: %+v (%v)", i, l, err)
						return
					}
				}
			}
		})
	}
	for round := uint64(1); round <= 200; round++ {
		last, _ := s.LastIndex()
		mustStore(t, s, last+1, last+20, round)
		if err := s.DeleteRange(last+16, last+20); err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteRange(1, last); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
}

const childDir = "WEFT_LOGSTORE_CHILD"

// TestKill: a process that is killed while it writes has lost nothing that it
// was told is there.
func TestKill(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		writeUntilKilled(t, dir)
	}
	dir := t.TempDir()
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
		cmd.Env = append(os.Environ(), childDir+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var acked uint64
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			if _, err := fmt.Sscanf(lines.Text(), "acked %d", &acked); err != nil {
				t.Errorf("the child says %q", lines.Text())
			}
			if n == 40+17*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); err == nil || acked == 0 {
			t.Fatalf("the child was to be killed (%v), after entry %d", err, acked)
		}
		s := openReal(t, dir)
		first, _ := s.FirstIndex()
		last, _ := s.LastIndex()
		if last < acked || first > acked {
			t.Fatalf("round %d: entries %d to %d, entry %d was acknowledged", round, first, last, acked)
		}
		for i := first; i <= last; i++ {
			var l raft.Log
			if err := s.GetLog(i, &l); err != nil || !bytes.Equal(l.Data, childData(i)) {
				t.Fatalf("round %d: entry %d of %d: %d bytes (%v)", round, i, last, len(l.Data), err)
			}
		}
		mustClose(t, s)
	}
}

func childData(i uint64) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%d,", i), int(i*37%700)+1)
}

// writeUntilKilled tells of each entry that is stored, and now and then deletes
// the oldest.
func writeUntilKilled(t *testing.T, dir string) {
	s := openReal(t, dir)
	last, err := s.LastIndex()
	for ; err == nil; last++ {
		err = s.StoreLog(&raft.Log{Index: last + 1, Term: 1, Data: childData(last + 1)})
		if err == nil && last%50 == 49 {
			err = s.DeleteRange(0, last-20)
		}
		fmt.Println("acked", last+1)
	}
	t.Fatal(err)
}

// TestFormat: what is on disk is read by later builds. The recording of a
// version is never changed.
func TestFormat(t *testing.T) {
	const id = 0x1122334455667788
	x := index{first: 3, last: 3, keys: map[string][]byte{"LastVoteCand": []byte("n1")}}
	seg := appendSegmentHead(nil, 7, id, 416)
	seg, _ = appendBatch(seg, id, int64(len(seg)), 41, x.headRecords())
	seg, _ = appendBatch(seg, id, int64(len(seg)), 42, []record{
		{kind: kindEntry, entry: raft.Log{Index: 4, Term: 2, Type: raft.LogConfiguration, Data: []byte("data"), Extensions: []byte("ext"), AppendedAt: time.Unix(1700000000, 5).UTC()}},
		{kind: kindEntry, entry: raft.Log{Index: 5, Term: 2}},
	})
	seg, _ = appendBatch(seg, id, int64(len(seg)), 43, []record{{kind: kindFirst, from: 4}})
	seg, _ = appendBatch(seg, id, int64(len(seg)), 44, []record{{kind: kindCut, from: 5}})
	golden := filepath.Join("testdata", "segment-v1.txt")
	if *update {
		if err := os.WriteFile(golden, []byte(hex.Dump(seg)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.Dump(seg); got != string(want) {
		t.Errorf("the format has changed:\n%s", got)
	}
	var r replay
	if err := r.segment("x", 7, seg); err != nil {
		t.Fatal(err)
	}
	if err := r.finish(); err != nil || r.first != 4 || r.index.last != 4 || r.next != 45 || string(r.keys["LastVoteCand"]) != "n1" {
		t.Fatalf("%+v (%v)", r, err)
	}
	p, _ := r.find(4)
	got, err := readRecord(seg[p.off:p.off+p.n], id, int64(p.off))
	if err != nil || got.entry.Type != raft.LogConfiguration || string(got.entry.Data) != "data" || string(got.entry.Extensions) != "ext" || got.entry.AppendedAt.UnixNano() != 1700000000e9+5 {
		t.Errorf("entry 4 is %+v (%v)", got.entry, err)
	}
}

// FuzzReplay: no bytes make replay panic, or take more memory than a multiple
// of what they are.
func FuzzReplay(f *testing.F) {
	x := index{first: 1, last: 1 << 60}
	f.Add(appendSegmentHead(nil, 1, 0, headBytes), false)
	f.Add([]byte{byte(kindSpan), 16, 1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, byte(kindCut), 8, 1, 0, 0, 0, 0, 0, 0, 0}, true)
	seg, _ := appendBatch(appendSegmentHead(nil, 1, 0, 96), 0, headBytes, 0, x.headRecords())
	f.Add(seg, false)
	f.Fuzz(func(t *testing.T, b []byte, sound bool) {
		if sound {
			b = soundSegment(b)
		}
		var r replay
		if err := r.segment("x", 1, b); err != nil {
			return
		}
		if len(r.positions) > len(b)/recordHead || r.end > aligned(int64(len(b))) {
			t.Fatalf("%d entries, end %d, of %d bytes", len(r.positions), r.end, len(b))
		}
		_, _ = r.tail(b)
		if err := r.finish(); err != nil || r.index.last == 0 {
			return
		}
		for i := r.first; ; i++ {
			p, ok := r.find(i)
			if !ok || int64(p.off)+int64(p.n) > r.end {
				t.Fatalf("entry %d of %d to %d is at %+v", i, r.first, r.index.last, p)
			}
			if i == r.index.last {
				break
			}
		}
	})
}

// soundSegment makes a segment with good sums of which b chooses the records:
// kind, length, body; kind 0 begins a batch.
func soundSegment(b []byte) []byte {
	seg, n := appendSegmentHead(nil, 1, 0, 0), uint64(0)
	var batch []record
	flush := func() {
		if len(batch) > 0 {
			seg, _ = appendBatch(seg, 0, int64(len(seg)), n, batch)
			batch, n = nil, n+1
		}
	}
	for len(b) >= 2 {
		k, size := kind(b[0]), min(int(b[1]), len(b)-2)
		if k == 0 {
			flush()
			b = b[1:]
			continue
		}
		if r, err := decodeBody(k, b[2:2+size]); err == nil {
			batch = append(batch, r)
		}
		b = b[2+size:]
	}
	flush()
	return append(appendSegmentHead(nil, 1, 0, int64(len(seg))), seg[headBytes:]...)
}
