package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write the golden files")

// example is a result with everything that can be in one.
func example(t *testing.T) Result {
	t.Helper()
	rows, err := twoCases().rows()
	if err != nil {
		t.Fatal(err)
	}
	limits, err := judge(rows, []limit{
		{Case: "weft", Metric: "time", Most: 10}, {Case: "weft", Metric: "failed", EveryRound: true},
		{Case: "weft", Metric: "time", Over: "raw", Least: 3.5}, {Case: "slow", Metric: "time", Over: "weft", Least: 0.5, EveryRound: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	return Result{
		Version: resultVersion, Bench: "example", About: `weft | against "raw" <links> & more`, Seconds: 61,
		Machine: Machine{
			Date: time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC), Commit: "0123456789ab", Weft: "v0.1.0", Go: "go1.26",
			Kernel: "6.18.0", CPU: "Example CPU", Cores: 2, MemMB: 4096, LoadBefore: 0.5, LoadAfter: 1.25,
			Guest: "Linux 6.12 on one processor",
		},
		Rows: rows, Limits: limits,
	}
}

func TestGolden(t *testing.T) {
	r := example(t)
	for name, write := range map[string]func(io.Writer) error{"v2.json": r.writeJSON, "v2.md": r.writeMarkdown, "v2.svg": r.writeSVG} {
		var got bytes.Buffer
		if err := write(&got); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(file, got.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s has changed:\n%s", file, got.Bytes())
		}
	}
}

// TestPlotOwnBaseline: a baseline of some cases is grey where it stands for itself, and
// its noise is told from that of all others' baseline.
func TestPlotOwnBaseline(t *testing.T) {
	rows, err := withOwn().rows()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := (Result{Bench: "b", Rows: rows}).writeSVG(&b); err != nil {
		t.Fatal(err)
	}
	plot := b.String()
	for _, label := range []string{">noise: time<", ">noise of slow: time<", ">slow: time<", ">other to slow: time<", ">ratio to raw<"} {
		if !strings.Contains(plot, label) {
			t.Errorf("no label %q in\n%s", label, plot)
		}
	}
	// Raw and noise rows of both baselines; slow over raw is a case's.
	if got := strings.Count(plot, `class="dot-base"`); got != 4 {
		t.Errorf("%d grey dots, want 4", got)
	}
}

// TestResultsAreWhole: what is committed reads back as results of this form.
func TestResultsAreWhole(t *testing.T) {
	files, err := filepath.Glob("results/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range append(files, "testdata/v1.json", "testdata/v2.json") {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		r, err := readResult(f)
		if err != nil {
			t.Error(err)
			continue
		}
		var again bytes.Buffer
		if err := r.writeJSON(&again); err != nil {
			t.Fatal(err)
		}
		if len(r.Rows) == 0 || !bytes.Equal(b, again.Bytes()) {
			t.Errorf("%s: version %d, %d rows, or not as it was written", f, r.Version, len(r.Rows))
		}
		var raw struct{ Rows []map[string]any }
		if err := json.Unmarshal(b, &raw); err != nil {
			t.Fatal(err)
		}
		want := []string{"baseline", "bench", "case", "max", "median", "metric", "min", "rounds", "unit"}
		for _, row := range raw.Rows {
			if keys := slices.Sorted(maps.Keys(row)); !slices.Equal(keys, want) {
				t.Errorf("%s: a row has the keys %q", f, keys)
			}
		}
		noise := func(row Row) bool { return row.Baseline != "" && row.Baseline == row.Case }
		if !slices.ContainsFunc(r.Rows, noise) {
			t.Errorf("%s has no noise row", f)
		}
	}
}

func TestReadResultRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "r.json")
	for text, want := range map[string]string{
		`{"version":3}`:              "version 3, want 1 to 2",
		`{}`:                         "version 0",
		`{"version":2,"colour":"x"}`: "colour",
		`{`:                          file,
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readResult(file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestEmptyResult(t *testing.T) {
	var b bytes.Buffer
	if err := (Result{Version: 1}).writeJSON(&b); err != nil {
		t.Fatal(err)
	}
	if got := b.String(); !strings.Contains(got, `"rows": [],`) || !strings.Contains(got, `"limits": []`) {
		t.Errorf("lists are not empty lists:\n%s", got)
	}
}

func TestTicksProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		top := rapid.Float64Range(1e-9, 1e12).Draw(t, "top")
		got := ticks(top)
		if got[0] != 0 || got[len(got)-1] < top*(1-1e-9) || len(got) < 3 || len(got) > maxTicks+2 {
			t.Fatalf("ticks up to %v: %v", top, got)
		}
		if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
			t.Fatalf("ticks up to %v do not rise: %v", top, got)
		}
		if waste := got[len(got)-2]; waste > top {
			t.Fatalf("ticks up to %v go on after it: %v", top, got)
		}
	})
	if got := ticks(0); len(got) != 2 {
		t.Errorf("ticks of nothing: %v", got)
	}
}

// TestSVGProperty: whatever the names and values, the plot is XML and every
// mark is inside the axis.
func TestSVGProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		value := rapid.Float64Range(0, 1e9)
		r := Result{Bench: rapid.String().Draw(t, "bench")}
		for range rapid.IntRange(0, 5).Draw(t, "rows") {
			v := []float64{value.Draw(t, "a"), value.Draw(t, "b"), value.Draw(t, "c")}
			slices.Sort(v)
			r.Rows = append(r.Rows, Row{
				Case: rapid.String().Draw(t, "case"), Metric: rapid.String().Draw(t, "metric"),
				Unit: rapid.SampledFrom([]string{"s", "MB", unitRatio}).Draw(t, "unit"), Min: v[0], Median: v[1], Max: v[2],
			})
		}
		var b bytes.Buffer
		if err := r.writeSVG(&b); err != nil {
			t.Fatal(err)
		}
		d := xml.NewDecoder(&b)
		for {
			tok, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			el, ok := tok.(xml.StartElement)
			if !ok || el.Name.Local != "circle" {
				continue
			}
			for _, a := range el.Attr {
				if x := a.Value; a.Name.Local == "cx" && (len(x) > 5 || x < "330" || x > "760") {
					t.Fatalf("a dot is at x = %s", x)
				}
			}
		}
	})
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new", "r.json")
	write := func(s string, err error) func(io.Writer) error {
		return func(w io.Writer) error { io.WriteString(w, s); return err }
	}
	if err := writeFile(path, write("one", nil)); err != nil {
		t.Fatal(err)
	}
	full := errors.New("disk full")
	if err := writeFile(path, write("tw", full)); !errors.Is(err, full) {
		t.Errorf("error %v, want %v", err, full)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "one" {
		t.Errorf("after a failed write the file holds %q, %v", b, err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
