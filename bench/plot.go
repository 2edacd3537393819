package main

import (
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// Geometry of the plot in pixels: our own choices, for a README's width.
const (
	plotWidth  = 990
	plotLeft   = 330 // the labels end here
	plotRight  = 760 // the values begin here
	rowHeight  = 24
	panelHead  = 34
	panelFoot  = 34
	plotTop    = 56
	plotBottom = 42
	maxTicks   = 6
)

// noLimit is below every limit there can be.
const noLimit = -1

// panel is the rows of one unit on one axis from 0.
type panel struct {
	Unit  string
	Rows  []Row
	Limit []float64 // of each row; noLimit = none
}

// panels groups the rows by unit in the order of their first row, ratios last.
func (r Result) panels() []panel {
	var out, ratios []panel
	for _, row := range r.Rows {
		list := &out
		if row.Unit == unitRatio {
			list = &ratios
		}
		var p *panel
		for i := range *list {
			if (*list)[i].Unit == row.Unit {
				p = &(*list)[i]
			}
		}
		if p == nil {
			*list = append(*list, panel{Unit: row.Unit})
			p = &(*list)[len(*list)-1]
		}
		most := float64(noLimit)
		for _, v := range r.Limits {
			if v.Baseline == row.Baseline && v.Case == row.Case && v.Metric == row.Metric {
				most = v.Limit
			}
		}
		p.Rows, p.Limit = append(p.Rows, row), append(p.Limit, most)
	}
	return append(out, ratios...)
}

// top is the largest value that the axis must show.
func (p panel) top() float64 {
	top := 0.0
	if p.Unit == unitRatio {
		top = 1
	}
	for i, r := range p.Rows {
		top = max(top, r.Max, p.Limit[i])
	}
	return top
}

// ticks are round numbers from 0 to at least top, at most maxTicks+1 of them,
// in steps of 1, 2 or 5 times a power of ten.
func ticks(top float64) []float64 {
	if !(top > 0) || math.IsInf(top, 0) {
		return []float64{0, 1}
	}
	power := math.Pow(10, math.Floor(math.Log10(top/maxTicks)))
	step := power
	for _, f := range []float64{1, 2, 5, 10} {
		if step = f * power; top/step <= maxTicks {
			break
		}
	}
	var out []float64
	for i := 0; ; i++ {
		out = append(out, significant(float64(i)*step))
		if float64(i)*step >= top {
			return out
		}
	}
}

// canvas collects SVG elements.
type canvas struct{ b strings.Builder }

func (c *canvas) line(x1, y1, x2, y2 float64, class string) {
	fmt.Fprintf(&c.b, "<line class=%q x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"/>\n", class, x1, y1, x2, y2)
}

func (c *canvas) dot(x, y float64, class string) {
	fmt.Fprintf(&c.b, "<circle class=%q cx=\"%.1f\" cy=\"%.1f\" r=\"4.5\"/>\n", class, x, y)
}

func (c *canvas) text(x, y float64, class, s string) {
	var esc strings.Builder
	if xml.EscapeText(&esc, []byte(s)) != nil {
		return // a strings.Builder takes everything
	}
	fmt.Fprintf(&c.b, "<text class=%q x=\"%.1f\" y=\"%.1f\">%s</text>\n", class, x, y, esc.String())
}

const plotStyle = `<style>
text { font: 13px sans-serif; fill: #222 }
.title { font-size: 17px; font-weight: bold }
.unit { font-weight: bold }
.label { text-anchor: end }
.tick { text-anchor: middle; font-size: 11px; fill: #666 }
.foot { font-size: 11px; fill: #666 }
.grid { stroke: #e4e4e4 }
.one { stroke: #888; stroke-dasharray: 4 3 }
.range { stroke: #2563a8; stroke-width: 2 }
.range-base { stroke: #888; stroke-width: 2 }
.limit { stroke: #c0392b; stroke-width: 3 }
.dot { fill: #2563a8 }
.dot-base { fill: #888 }
</style>
`

// writeSVG draws every row as a dot at the median and a bar from minimum to
// maximum; baselines are grey, limits red, and ratios have a line at 1.
func (r Result) writeSVG(w io.Writer) error {
	var c canvas
	c.text(16, 26, "title", r.Bench)
	c.text(16, 45, "foot", "dot: median; bar: minimum to maximum; grey: baseline; red: limit")
	y := float64(plotTop)
	var bases []string // of the noise rows: all cases' first, then some cases' own
	for _, row := range r.Rows {
		if row.Baseline != "" && row.Baseline == row.Case && !slices.Contains(bases, row.Baseline) {
			bases = append(bases, row.Baseline)
		}
	}
	for _, p := range r.panels() {
		y = p.draw(&c, y, bases)
	}
	m := r.Machine
	c.text(16, y+20, "foot", fmt.Sprintf("%s, weft %s, Linux %s, %d cores, load %s to %s", m.Date.Format("2006-01-02"), m.Weft, m.Kernel, m.Cores, number(m.LoadBefore), number(m.LoadAfter)))
	if m.Guest != "" {
		c.text(16, y+34, "foot", "measured in a guest with "+m.Guest)
	}
	height := y + plotBottom
	_, err := fmt.Fprintf(w, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%.0f\" viewBox=\"0 0 %d %.0f\">\n%s<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n%s</svg>\n",
		plotWidth, height, plotWidth, height, plotStyle, c.b.String())
	return err
}

// draw puts the panel at y and returns where the next one begins.
func (p panel) draw(c *canvas, y float64, bases []string) float64 {
	base := ""
	if len(bases) > 0 {
		base = bases[0]
	}
	scale := ticks(p.top())
	last := scale[len(scale)-1]
	x := func(v float64) float64 { return plotLeft + 12 + v/last*(plotRight-plotLeft-24) }
	head := p.Unit
	if p.Unit == unitRatio {
		head = "ratio to " + base
	}
	c.text(16, y+20, "unit", head)
	top := y + panelHead
	bottom := top + float64(rowHeight*len(p.Rows))
	for _, t := range scale {
		c.line(x(t), top, x(t), bottom, "grid")
		c.text(x(t), bottom+16, "tick", number(t))
	}
	if p.Unit == unitRatio {
		c.line(x(1), top, x(1), bottom, "one")
	}
	for i, row := range p.Rows {
		mid := top + rowHeight*(float64(i)+0.5)
		suffix := ""
		if slices.Contains(bases, row.Case) && (row.Baseline == "" || row.Baseline == row.Case) {
			suffix = "-base"
		}
		label := row.Case + ": " + row.Metric
		if row.Baseline == base && row.Case == base {
			label = "noise: " + row.Metric
		} else if row.Baseline == row.Case {
			label = "noise of " + row.Case + ": " + row.Metric
		} else if row.Baseline != "" && row.Baseline != base {
			label = row.Case + " to " + row.Baseline + ": " + row.Metric
		}
		c.text(plotLeft, mid+4, "label", shorten(label, 46))
		c.line(x(row.Min), mid, x(row.Max), mid, "range"+suffix)
		for _, end := range []float64{row.Min, row.Max} {
			c.line(x(end), mid-5, x(end), mid+5, "range"+suffix)
		}
		if p.Limit[i] != noLimit {
			c.line(x(p.Limit[i]), mid-9, x(p.Limit[i]), mid+9, "limit")
		}
		c.dot(x(row.Median), mid, "dot"+suffix)
		c.text(plotRight+6, mid+4, "value", fmt.Sprintf("%s (%s..%s)", number(row.Median), number(row.Min), number(row.Max)))
	}
	return bottom + panelFoot
}

// shorten keeps a label inside its column.
func shorten(s string, most int) string {
	if r := []rune(s); len(r) > most {
		return string(r[:most-1]) + "…"
	}
	return s
}
