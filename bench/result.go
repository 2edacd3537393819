package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// resultVersion of the JSON file. Version 2 adds limits on ratios and limits from
// below ("baseline" and "least" of a limit) and "guest"; what has none of them is
// written as in version 1.
const resultVersion = 2

// Machine says where, when and of what a result was measured: figures without
// it compare with nothing.
type Machine struct {
	Date   time.Time `json:"date"`   // when the run began, UTC
	Commit string    `json:"commit"` // of the source tree; "-dirty" when files of it were changed
	Weft   string    `json:"weft"`   // what the measured binary says of itself
	Go     string    `json:"go"`     // that the benchmark was built with
	Kernel string    `json:"kernel"`
	CPU    string    `json:"cpu"`
	Cores  int       `json:"cores"`
	MemMB  int       `json:"memMB"` // 10^6 bytes
	// Guest, in words, when the figures come from a virtual machine.
	Guest string `json:"guest,omitempty"`
	// Load averages of the last minute, before and after: what the
	// benchmark itself and everyone else on the machine wanted to run.
	LoadBefore float64 `json:"loadBefore"`
	LoadAfter  float64 `json:"loadAfter"`
}

// Result is the content of a result file.
type Result struct {
	Version int       `json:"version"`
	Bench   string    `json:"bench"`
	About   string    `json:"about"`
	Seconds float64   `json:"seconds"` // that the whole run took
	Machine Machine   `json:"machine"`
	Rows    []Row     `json:"rows"`
	Limits  []Verdict `json:"limits"`
}

// writeJSON writes rows one to a line: a diff of two results is then readable.
func (r Result) writeJSON(w io.Writer) error {
	head := r
	head.Rows, head.Limits = nil, nil
	b, err := json.MarshalIndent(head, "", "  ")
	if err != nil {
		return fmt.Errorf("encode result: %w", err)
	}
	rows, err := lines(r.Rows)
	if err != nil {
		return err
	}
	limits, err := lines(r.Limits)
	if err != nil {
		return err
	}
	// The two nulls are the last ones: no string can hold an unescaped quote.
	b = replaceLast(b, `"limits": null`, `"limits": `+limits)
	b = replaceLast(b, `"rows": null`, `"rows": `+rows)
	_, err = w.Write(append(b, '\n'))
	return err
}

func replaceLast(b []byte, old, new string) []byte {
	i := bytes.LastIndex(b, []byte(old))
	return append(b[:i:i], append([]byte(new), b[i+len(old):]...)...)
}

// lines encodes a list with one element per line.
func lines[T any](list []T) (string, error) {
	if len(list) == 0 {
		return "[]", nil
	}
	var out []string
	for _, e := range list {
		b, err := json.Marshal(e)
		if err != nil {
			return "", fmt.Errorf("encode row: %w", err)
		}
		out = append(out, "    "+string(b))
	}
	return "[\n" + strings.Join(out, ",\n") + "\n  ]", nil
}

// writeMarkdown writes the result for readers.
func (r Result) writeMarkdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s\n\n%s\n\n", r.Bench, r.About)
	m := r.Machine
	guest := ""
	if m.Guest != "" {
		guest = "; in a guest with " + m.Guest
	}
	fmt.Fprintf(&b, "Measured %s in %.0f s, weft %s (tree %s, %s), Linux %s, %d cores of %s, %d MB of memory, load average %s before and %s after%s.\n\n",
		m.Date.Format("2006-01-02 15:04 MST"), r.Seconds, m.Weft, m.Commit, m.Go, m.Kernel, m.Cores, cell(m.CPU), m.MemMB, number(m.LoadBefore), number(m.LoadAfter), guest)
	fmt.Fprintf(&b, "| Case | Metric | Median (min..max) | Unit | Divided by | Rounds |\n|---|---|---:|---|---|---:|\n")
	for _, row := range r.Rows {
		over, name := row.Baseline, row.Case
		if over == row.Case {
			name, over = name+", again", over+" (noise)"
		}
		fmt.Fprintf(&b, "| %s | %s | %s (%s..%s) | %s | %s | %d |\n", cell(name), cell(row.Metric),
			number(row.Median), number(row.Min), number(row.Max), cell(row.Unit), cell(over), row.Rounds)
	}
	if len(r.Limits) > 0 {
		fmt.Fprintf(&b, "\n| Limit on | Metric | Wanted | Measured | Unit | Held |\n|---|---|---:|---:|---|---|\n")
	}
	for _, v := range r.Limits {
		held, unit, bound := "yes", v.Unit, "at most"
		if !v.Held {
			held = "**no**"
		}
		if v.Baseline != "" {
			unit = "of " + v.Baseline
		}
		if v.Least {
			bound = "at least"
		}
		fmt.Fprintf(&b, "| %s | %s | %s %s | %s %s | %s | %s |\n", cell(v.Case), cell(v.Metric), bound, number(v.Limit), v.Of, number(v.Value), cell(unit), held)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// cell escapes what would end a table cell.
func cell(s string) string {
	return strings.NewReplacer("|", `\|`, "\n", " ").Replace(s)
}

// readResult reads a result file of this form or an earlier one.
func readResult(file string) (Result, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return Result{}, fmt.Errorf("read result: %w", err)
	}
	var r Result
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return Result{}, fmt.Errorf("read result %s: %w", file, err)
	}
	if r.Version < 1 || r.Version > resultVersion {
		return Result{}, fmt.Errorf("read result %s: version %d, want 1 to %d", file, r.Version, resultVersion)
	}
	return r, nil
}
