package logstore

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

// twin is what a store must say, the slow way.
type twin struct {
	logs map[uint64]raft.Log
	keys map[string][]byte
}

func newTwin() twin { return twin{map[uint64]raft.Log{}, map[string][]byte{}} }

func (w twin) clone() twin { return twin{maps.Clone(w.logs), maps.Clone(w.keys)} }

func (w twin) span() (first, last uint64) {
	if len(w.logs) == 0 {
		return 0, 0
	}
	all := slices.Sorted(maps.Keys(w.logs))
	return all[0], all[len(all)-1]
}

// op is one call; exactly one of its fields counts.
type op struct {
	logs     []*raft.Log
	from, to uint64
	key      string
	value    []byte
}

func (o op) String() string {
	switch {
	case o.logs != nil:
		return fmt.Sprintf("store %d entries from %d", len(o.logs), o.logs[0].Index)
	case o.key != "":
		return fmt.Sprintf("set %s", o.key)
	}
	return fmt.Sprintf("delete %d to %d", o.from, o.to)
}

func (o op) do(s *Store) error {
	switch {
	case o.logs != nil:
		return s.StoreLogs(o.logs)
	case o.key != "":
		return s.Set([]byte(o.key), o.value)
	}
	return s.DeleteRange(o.from, o.to)
}

// with is the twin after o, and whether o is a call that may be made.
func (w twin) with(o op) (twin, bool) {
	out := w.clone()
	first, last := w.span()
	switch {
	case o.logs != nil:
		for i, l := range o.logs {
			if (last != 0 || i > 0) && l.Index != last+1 {
				return w, false
			}
			out.logs[l.Index], last = *l, l.Index
		}
	case o.key != "":
		out.keys[o.key] = o.value
	default:
		if o.from > first && o.to < last && o.from <= o.to {
			return w, false
		}
		for i := range out.logs {
			if i >= o.from && i <= o.to {
				delete(out.logs, i)
			}
		}
	}
	return out, true
}

// differs says where a store differs from the twin; "" = nowhere.
func (w twin) differs(s *Store) string {
	first, last := w.span()
	gotFirst, err1 := s.FirstIndex()
	gotLast, err2 := s.LastIndex()
	if err1 != nil || err2 != nil || gotFirst != first || gotLast != last {
		return fmt.Sprintf("entries %d to %d (%v, %v), want %d to %d", gotFirst, gotLast, err1, err2, first, last)
	}
	for i := max(first, 3) - 3; i < last+3; i++ {
		if problem := w.differsAt(s, i); problem != "" {
			return problem
		}
	}
	for _, k := range []string{"a", "b", "c"} {
		got, err := s.Get([]byte(k))
		want, ok := w.keys[k]
		if (err == nil) != ok || !bytes.Equal(got, want) || !ok && err.Error() != "not found" {
			return fmt.Sprintf("%s = %q (%v), want %q", k, got, err, want)
		}
	}
	return ""
}

func (w twin) differsAt(s *Store, i uint64) string {
	var got raft.Log
	err := s.GetLog(i, &got)
	want, ok := w.logs[i]
	switch {
	case !ok && !errors.Is(err, raft.ErrLogNotFound):
		return fmt.Sprintf("entry %d: %v, want none", i, err)
	case ok && err != nil:
		return fmt.Sprintf("entry %d: %v", i, err)
	case ok && !sameLog(got, want):
		return fmt.Sprintf("entry %d is %+v, want %+v", i, got, want)
	}
	return ""
}

func sameLog(a, b raft.Log) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && a.AppendedAt.Equal(b.AppendedAt) &&
		bytes.Equal(a.Data, b.Data) && bytes.Equal(a.Extensions, b.Extensions)
}

// drawOp draws a call; one in ten or so may not be made.
func drawOp(t *rapid.T, w twin) op {
	first, last := w.span()
	size := rapid.OneOf(rapid.IntRange(0, 40), rapid.IntRange(0, 1500), rapid.IntRange(0, 9000))
	switch rapid.IntRange(0, 9).Draw(t, "call") {
	case 0, 1:
		return op{key: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "key"), value: fill(t, rapid.IntRange(0, 60).Draw(t, "bytes"))}
	case 2: // from the front
		return op{from: first, to: rapid.Uint64Range(max(first, 1)-1, last+1).Draw(t, "to")}
	case 3, 4: // from the end
		return op{from: rapid.Uint64Range(max(first, 1)-1, last+1).Draw(t, "from"), to: last}
	case 5: // anywhere
		return op{from: rapid.Uint64Range(0, last+2).Draw(t, "from"), to: rapid.Uint64Range(0, last+2).Draw(t, "to")}
	}
	begin := last + 1
	if last == 0 || rapid.IntRange(0, 19).Draw(t, "jump") == 0 {
		begin = rapid.Uint64Range(1, 1000).Draw(t, "begin")
	}
	var logs []*raft.Log
	for i := range rapid.IntRange(1, 6).Draw(t, "entries") {
		l := &raft.Log{Index: begin + uint64(i), Term: rapid.Uint64Range(1, 9).Draw(t, "term"), Type: raft.LogType(rapid.IntRange(0, 5).Draw(t, "type")),
			Data: fill(t, size.Draw(t, "bytes")), Extensions: fill(t, rapid.IntRange(0, 9).Draw(t, "extensions"))}
		if rapid.Bool().Draw(t, "dated") {
			l.AppendedAt = time.Unix(rapid.Int64Range(-9e9, 9e9).Draw(t, "seconds"), rapid.Int64Range(0, 999999999).Draw(t, "ns"))
		}
		logs = append(logs, l)
	}
	return op{logs: logs}
}

// fill makes n bytes without zeros: a torn write is told from damage by zeros.
func fill(t *rapid.T, n int) []byte {
	if n == 0 {
		return nil
	}
	b, x := make([]byte, n), rapid.Uint32().Draw(t, "fill")
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x>>24) | 1
	}
	return b
}

// rig is a store on a fake disk, and its twin.
type rig struct {
	t   *rapid.T
	d   *fakeDisk
	p   *fakeProcess
	s   *Store
	w   twin
	ids uint64
}

func newRig(t *rapid.T) *rig {
	r := &rig{t: t, w: newTwin()}
	r.d = newFakeDisk(func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "disk") })
	return r
}

var quiet = slog.New(slog.DiscardHandler)

// open opens the store in a process that dies within its calls-th call; 0: it
// lives.
func (r *rig) open(calls int) error {
	r.p = r.d.process(r.t)
	r.p.left = calls - 1
	s, err := open(r.t.Context(), Config{SegmentBytes: minSegmentBytes, Log: quiet}, r.p, func() uint64 {
		r.ids += 0x9e3779b97f4a7c15
		return r.ids
	})
	r.s = s
	return err
}

// TestStoreSurvives: whatever the calls, and wherever a power cut, a kill or a
// disk that fails comes, the store then is what it was after the last call
// that returned, or that with the call under way in whole.
func TestStoreSurvives(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRig(t)
		r.reopen(nil)
		for range rapid.IntRange(1, 40).Draw(t, "calls") {
			o := drawOp(t, r.w)
			end := rapid.IntRange(0, 9).Draw(t, "end")
			if end < 4 {
				r.p.left, r.p.eio = rapid.IntRange(0, 7).Draw(t, "left"), end == 3
			}
			next, may := r.w.with(o)
			err := o.do(r.s)
			switch {
			case !may && err == nil && !r.p.dead:
				t.Fatalf("%v was done", o)
			case err == nil:
				r.w = next
				r.p.left, r.p.eio = -1, false
			case r.p.dead:
				r.after(o)
			case errors.Is(err, errEIO):
				r.afterEIO(o)
			case may:
				t.Fatalf("%v: %v", o, err)
			}
			if problem := r.w.differs(r.s); problem != "" {
				t.Fatalf("after %v: %s", o, problem)
			}
			if end == 9 { // power goes at rest
				r.d.powerCut()
				r.p.dead = true
				r.reopen(nil)
			}
			if end == 8 { // stop and start
				r.close()
				r.reopen(nil)
			}
		}
		r.close()
	})
}

func (r *rig) close() {
	if err := r.s.Close(); err != nil && !r.p.dead {
		r.t.Fatal(err)
	}
	if r.p.handles != 0 {
		r.t.Fatalf("%d files are left open", r.p.handles)
	}
}

// after: the process died in o.
func (r *rig) after(o op) {
	r.close()
	if r.d.coin() {
		r.d.powerCut()
	}
	r.reopen(&o)
}

// afterEIO: the disk failed in o. The store must take no more, and say what it
// said before.
func (r *rig) afterEIO(o op) {
	if err := r.s.Set([]byte("a"), []byte("later")); err == nil || !errors.Is(err, errEIO) {
		r.t.Fatalf("a write after the disk failed: %v", err)
	}
	select {
	case <-r.s.Failed():
	default:
		r.t.Fatal("nobody is told that the disk failed")
	}
	if next, _ := r.w.with(o); r.w.differs(r.s) != "" && next.differs(r.s) != "" {
		r.t.Fatalf("the disk failed in %v: %s", o, r.w.differs(r.s))
	}
	r.after(o)
}

// reopen opens the store, sometimes through more deaths while it opens. o was
// under way, if it is not nil. Once it is open, another power cut changes
// nothing: it must not show what is not on the disk.
func (r *rig) reopen(o *op) {
	for range rapid.IntRange(0, 2).Draw(r.t, "deaths") {
		if err := r.open(rapid.IntRange(1, 9).Draw(r.t, "left")); err == nil {
			break
		} else if !errors.Is(err, errDead) {
			r.t.Fatalf("open: %v", err)
		}
		if r.d.coin() {
			r.d.powerCut()
		}
	}
	if r.p == nil || r.p.dead || r.d.alive == nil {
		if err := r.open(0); err != nil {
			r.t.Fatalf("open: %v", err)
		}
	}
	r.p.left = -1
	r.settle(o)
	if r.d.coin() {
		r.d.powerCut()
		r.p.dead = true
		if err := r.open(0); err != nil {
			r.t.Fatalf("open again: %v", err)
		}
	}
	r.settle(nil)
}

// settle finds out whether o was done.
func (r *rig) settle(o *op) {
	problem := r.w.differs(r.s)
	if problem != "" && o != nil {
		if next, _ := r.w.with(*o); next.differs(r.s) == "" {
			r.w, problem = next, ""
		}
	}
	if problem != "" {
		r.t.Fatalf("after %v: %s", o, problem)
	}
}
