//go:build !race

// It has no concurrency, and reads all sources: not twice.

package weft_test

import (
	"bytes"
	"cmp"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The rules of the house, as tests: who may import whom, who owns which
// third-party module, how large things may grow, and gofmt.

const modulePath = "github.com/weftnet/weft"

// rule of one package: what of weft it may import besides the root ("root"
// itself may be forbidden with noRoot), and nothing else.
type rule struct {
	may    []string
	noRoot bool
	any    bool // composition: may import everything
}

// packages is the architecture. A package that is not in it does not exist.
var packages = map[string]rule{
	"":                          {noRoot: true},
	"ipam":                      {},
	"vxlan":                     {},
	"vxlan/netns":               {}, // free to all, see freeToAll; of the root it uses the sentinel errors
	"vxlan/netns/netnstest":     {},
	"vxlan/linux":               {may: []string{"vxlan"}},
	"vxlan/pmtu":                {},                                      // of the root it uses the sentinel errors and log keys
	"vxlan/bpf":                 {may: []string{"vxlan", "vxlan/linux"}}, // linux: veths and facts of the host, made one way by all engines
	"vxlan/native":              {may: []string{"vxlan"}},
	"vxlan/wg":                  {may: []string{"vxlan"}},
	"vxlan/vxlantest":           {may: []string{"vxlan"}},
	"dns":                       {},
	"ingress":                   {},
	"ingress/ipvs":              {may: []string{"ingress", "ingress/nft"}}, // nft: the table on a network's bridge is of one package
	"ingress/nft":               {may: []string{"ingress"}},
	"ingress/bpf":               {may: []string{"ingress", "vxlan", "vxlan/bpf", "vxlan/netns"}}, // vxlan: the hardware address as a map key
	"ingress/ingresstest":       {may: []string{"ingress", "vxlan"}},                             // vxlan: its rig is a real overlay, whose engine each test brings
	"gossip":                    {},
	"gossip/gossiptest":         {may: []string{"gossip"}}, // virtual time, for gossip's tests and bench
	"orchestrator/ca":           {},
	"orchestrator/wire":         {may: []string{"orchestrator/ca"}},
	"orchestrator/state":        {may: []string{"ipam"}},
	"orchestrator/logstore":     {noRoot: true},
	"orchestrator/reconcile":    {},
	"orchestrator/schedule":     {},
	"orchestrator/dispatch":     {may: []string{"orchestrator/state", "orchestrator/wire"}},
	"orchestrator":              {may: []string{"orchestrator/*", "ipam"}},
	"agent/task":                {},
	"agent/runtime":             {},
	"agent/runtime/containerd":  {may: []string{"agent/runtime"}},
	"agent/runtime/imagetest":   {may: []string{"agent/runtime"}},
	"agent/runtime/runtimetest": {may: []string{"agent/runtime"}},
	"agent/sandbox":             {},
	"agent/sandbox/sandboxtest": {may: []string{"agent/sandbox"}},
	"agent/netstate":            {may: []string{"vxlan", "dns", "ingress"}},
	"agent":                     {may: []string{"agent/*", "vxlan", "dns", "ingress", "gossip", "orchestrator/wire", "orchestrator/ca"}},
	"api":                       {},
	"api/apitest":               {may: []string{"api"}},
	"lab":                       {},
	"lab/vm":                    {},
	"cmd/weft":                  {any: true},
	"bench":                     {any: true},
}

// freeToAll is the one package of weft that every other may import: it knows
// nothing of weft but its errors.
const freeToAll = "vxlan/netns"

// owners of third-party modules: an import path belongs to the longest prefix
// here, and only these packages may import it outside tests. "*" is everyone.
var owners = map[string][]string{
	"golang.org/x/sys":                        {"*"}, // the kernel's interface, as package syscall is frozen
	"golang.org/x/sync":                       {"*"},
	"github.com/vishvananda/netns":            {"vxlan/netns"},
	"github.com/vishvananda/netlink":          {"vxlan/linux", "vxlan/bpf", "vxlan/wg", "ingress/ipvs", "ingress/nft", "ingress/bpf", "agent/sandbox", "lab"},
	"github.com/cilium/ebpf":                  {"vxlan/bpf", "ingress/bpf"},
	"golang.zx2c4.com/wireguard":              {"vxlan/wg"},
	"github.com/miekg/dns":                    {"dns"},
	"github.com/moby/ipvs":                    {"ingress/ipvs"},
	"github.com/google/nftables":              {"ingress/nft"},
	"github.com/hashicorp/serf":               {"gossip"},
	"github.com/hashicorp/memberlist":         {"gossip"},
	"github.com/hashicorp/raft":               {"orchestrator", "orchestrator/logstore", "cmd/weft"}, // cmd: joins its transport to the wire port
	"github.com/hashicorp/go-memdb":           {"orchestrator/state"},
	"github.com/fxamacker/cbor":               {"orchestrator/state", "orchestrator/wire", "gossip"},
	"google.golang.org/grpc":                  {"orchestrator/wire", "agent/runtime/containerd"}, // the latter dials containerd
	"github.com/containerd":                   {"agent/runtime/containerd"},
	"github.com/google/go-containerregistry":  {"agent/runtime/containerd"},
	"github.com/opencontainers":               {"agent/runtime/containerd"},
	"github.com/moby/sys/signal":              {"agent/runtime/containerd", "cmd/weft"},
	"github.com/moby/sys/user":                {"agent/runtime/containerd"},
	"github.com/moby/profiles/seccomp":        {"agent/runtime/containerd"},
	"github.com/distribution/reference":       {"agent/runtime/containerd", "api", "cmd/weft"},
	"github.com/docker/go-units":              {"cmd/weft", "api"}, // "Up 3 minutes" is part of the API's answers
	"github.com/moby/docker-image-spec":       {"api"},             // the API's image configuration
	"github.com/opencontainers/go-digest":     {"agent/runtime/containerd", "api"},
	"github.com/moby/moby/api":                {"api", "cmd/weft", "bench"},
	"github.com/moby/moby/client":             {"cmd/weft", "bench"},
	"github.com/spf13/cobra":                  {"cmd/weft"},
	"github.com/compose-spec/compose-go":      {"cmd/weft"},
	"github.com/prometheus/client_golang":     {"cmd/weft"},
	"github.com/rogpeppe/go-internal":         {}, // tests only
	"github.com/anishathalye/porcupine":       {}, // tests only
	"pgregory.net/rapid":                      {}, // tests only
	"github.com/coreos/go-systemd/v22/daemon": {"cmd/weft"},
	"github.com/hashicorp/go-hclog":           {"orchestrator"},
	"github.com/hashicorp/go-metrics":         {"orchestrator", "gossip"},
	"github.com/armon/go-metrics":             {"orchestrator", "gossip"},
	"github.com/hashicorp/go-msgpack":         {"gossip"},
	"google.golang.org/protobuf":              {"agent/runtime/containerd"},
	"github.com/sirupsen/logrus":              {"agent/runtime/containerd"},
	"github.com/urfave/cli":                   {"agent/runtime/containerd"},
	"golang.org/x/net":                        {"orchestrator/wire", "dns"}, // dns: the list of public suffixes
}

// Limits of size. They are smoke alarms: an exception needs its reason here.
const (
	maxFileLines = 600
	maxFuncLines = 80
	maxParams    = 5
	maxMethods   = 7
	maxFields    = 20
)

// exceptions: "file", "file:func", "file:type" and why.
var exceptions = map[string]string{
	"agent/agent.go:Config":             "one field for each seam of a node; groups of them would have no meaning of their own",
	"agent/runtime/runtime.go:Spec":     "a container as it is stored: its wish and what the node has prepared for it",
	"agent/task/step.go:Controller":     "one method for each step of a task's life, and Readiness",
	"cmd/weft/member.go:member":         "the parts of a node, made together and ended together",
	"orchestrator/wire/calls.go:follow": "one generic call with its connection and its attempt; a struct would be used once",
}

// source is one parsed Go file.
type source struct {
	path string // from the module root
	pkg  string // folder, "" for the root
	test bool
	text []byte
	ast  *ast.File
}

// isTest: a test file, or a package that only tests import.
func (s source) isTest() bool { return s.test || strings.HasSuffix(s.pkg, "test") }

func sources(t *testing.T, fset *token.FileSet) []source {
	t.Helper()
	var out []source
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			nested := false
			if path != "." {
				_, err := os.Stat(filepath.Join(path, "go.mod"))
				nested = err == nil // a module of its own keeps its own house
			}
			if name == "testdata" || nested || path != "." && strings.HasPrefix(name, ".") || path == "bin" {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(fset, path, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir := filepath.ToSlash(filepath.Dir(path))
		if dir == "." {
			dir = ""
		}
		out = append(out, source{path: path, pkg: dir, test: strings.HasSuffix(name, "_test.go"), text: text, ast: file})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 10 {
		t.Fatalf("only %d Go files found: the rules would hold of nothing", len(out))
	}
	return out
}

func imports(s source) []string {
	var paths []string
	for _, i := range s.ast.Imports {
		if p, err := strconv.Unquote(i.Path.Value); err == nil {
			paths = append(paths, p)
		}
	}
	return paths
}

// checkInternal says what is wrong with pkg importing target (both folders of
// weft, "" = root); "" = nothing.
func checkInternal(pkg, target string) string {
	r, ok := packages[pkg]
	if !ok {
		return fmt.Sprintf("package %q is not in the table of packages", pkg)
	}
	if r.any || target == pkg || target == freeToAll && pkg != "" {
		return ""
	}
	if target == "" {
		if r.noRoot {
			return "may import nothing of weft, not even the root"
		}
		return ""
	}
	for _, m := range r.may {
		family, wild := strings.CutSuffix(m, "/*")
		if m == target || wild && strings.HasPrefix(target, family+"/") {
			return ""
		}
	}
	return fmt.Sprintf("may not import %s; allowed are %v", target, r.may)
}

// checkThirdParty says what is wrong with pkg importing a foreign path.
func checkThirdParty(pkg, path string) string {
	best := ""
	for prefix := range owners {
		if (path == prefix || strings.HasPrefix(path, prefix+"/")) && len(prefix) > len(best) {
			best = prefix
		}
	}
	if best == "" {
		return fmt.Sprintf("imports %s, which has no owner: add it to the table, and to a DESIGN.md with the reason", path)
	}
	if o := owners[best]; !slices.Contains(o, "*") && !slices.Contains(o, pkg) && pkg != "bench" {
		return fmt.Sprintf("imports %s, which only %v may", path, o)
	}
	return ""
}

func isStandard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

func TestImports(t *testing.T) {
	for _, s := range sources(t, token.NewFileSet()) {
		if problem := checkInternal(s.pkg, s.pkg); problem != "" {
			t.Errorf("%s: %s", s.path, problem)
			continue
		}
		for _, path := range imports(s) {
			if isStandard(path) {
				continue
			}
			rel, internal := strings.CutPrefix(path, modulePath)
			var problem string
			switch {
			case internal && !s.test:
				problem = checkInternal(s.pkg, strings.TrimPrefix(rel, "/"))
			case !internal && !s.isTest():
				problem = checkThirdParty(s.pkg, path)
			}
			if problem != "" {
				t.Errorf("%s: %s", s.path, problem)
			}
		}
	}
}

// TestImportRules: the rules above must be able to fail.
func TestImportRules(t *testing.T) {
	for _, tc := range []struct {
		pkg, path string
		ok        bool
	}{
		{"api", "", true},
		{"api", "orchestrator", false},
		{"", "ipam", false},
		{"vxlan/netns", "", true},
		{"vxlan/netns", "vxlan", false},
		{"vxlan", "dns", false},
		{"orchestrator", "orchestrator/state", true},
		{"orchestrator", "agent", false},
		{"agent", "agent/task", true},
		{"agent", "orchestrator/wire", true},
		{"agent", "orchestrator/state", false},
		{"cmd/weft", "agent", true},
		{"util", "", false},
	} {
		if got := checkInternal(tc.pkg, tc.path); (got == "") != tc.ok {
			t.Errorf("%q importing %q: %q, want ok = %v", tc.pkg, tc.path, got, tc.ok)
		}
	}
	for _, tc := range []struct {
		pkg, path string
		ok        bool
	}{
		{"dns", "github.com/miekg/dns", true},
		{"api", "github.com/miekg/dns", false},
		{"orchestrator", "github.com/hashicorp/raft", true},
		{"orchestrator/logstore", "github.com/hashicorp/raft", true},
		{"gossip", "github.com/hashicorp/raft", false},
		{"lab", "github.com/moby/moby/client", false},
		{"cmd/weft", "github.com/moby/moby/client", true},
		{"cmd/weft", "example.com/new", false},
		{"dns", "pgregory.net/rapid", false},
	} {
		if got := checkThirdParty(tc.pkg, tc.path); (got == "") != tc.ok {
			t.Errorf("%q importing %q: %q, want ok = %v", tc.pkg, tc.path, got, tc.ok)
		}
	}
}

func TestGofmt(t *testing.T) {
	for _, s := range sources(t, token.NewFileSet()) {
		formatted, err := format.Source(s.text)
		if err != nil {
			t.Errorf("%s: %v", s.path, err)
		} else if !bytes.Equal(formatted, s.text) {
			t.Errorf("%s: not gofmt'ed", s.path)
		}
	}
}

// TestSizes watches files, functions, parameters, interfaces and structs.
// Tests may be long: tables are.
func TestSizes(t *testing.T) {
	fset := token.NewFileSet()
	for _, s := range sources(t, fset) {
		if lines := bytes.Count(s.text, []byte("\n")); lines > maxFileLines {
			alarm(t, s.path, fmt.Sprintf("%d lines, at most %d", lines, maxFileLines))
		}
		if s.test {
			continue
		}
		ast.Inspect(s.ast, func(n ast.Node) bool {
			for _, p := range sizeProblems(fset, n) {
				alarm(t, s.path+":"+p.name, p.text)
			}
			return true
		})
	}
}

func alarm(t *testing.T, what, problem string) {
	t.Helper()
	if exceptions[what] == "" {
		t.Errorf("%s: %s", what, problem)
	}
}

type sizeProblem struct{ name, text string }

func sizeProblems(fset *token.FileSet, n ast.Node) []sizeProblem {
	var out []sizeProblem
	add := func(name, what string, got, most int) {
		if got > most {
			out = append(out, sizeProblem{name, fmt.Sprintf("%d %s, at most %d", got, what, most)})
		}
	}
	switch n := n.(type) {
	case *ast.FuncDecl:
		add(n.Name.Name, "lines", fset.Position(n.End()).Line-fset.Position(n.Pos()).Line+1, maxFuncLines)
		add(n.Name.Name, "parameters", n.Type.Params.NumFields(), maxParams)
	case *ast.TypeSpec:
		switch t := n.Type.(type) {
		case *ast.InterfaceType:
			add(n.Name.Name, "methods", t.Methods.NumFields(), maxMethods)
		case *ast.StructType:
			add(n.Name.Name, "fields", t.Fields.NumFields(), maxFields)
		}
	}
	return out
}

// TestSizeRules: the alarms must be able to ring.
func TestSizeRules(t *testing.T) {
	fields := strings.Repeat("x int;", maxFields+1)
	src := "package p\nfunc f(a, b, c, d, e, f int) {" + strings.Repeat("\n", maxFuncLines) + "}\n" +
		"type i interface {" + strings.Repeat("m();", maxMethods+1) + "}\ntype s struct {" + fields + "}\n"
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, "x.go", src, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	ast.Inspect(file, func(n ast.Node) bool {
		for _, p := range sizeProblems(fset, n) {
			got = append(got, p.name+" "+strings.Fields(p.text)[1])
		}
		return true
	})
	slices.Sort(got)
	if want := []string{"f lines,", "f parameters,", "i methods,", "s fields,"}; !slices.Equal(got, want) {
		t.Errorf("alarms %q, want %q", got, want)
	}
}

// forbidden calls, with the packages and files that may use them.
var forbidden = []struct {
	pkg, name string
	allowed   func(source) bool
	why       string
}{
	{"context", "TODO", func(source) bool { return false }, "pass the caller's context"},
	{"context", "Background", func(s source) bool { return s.isTest() || s.pkg == "cmd/weft" || s.pkg == "bench" }, "only main and tests start a context"},
	{"time", "Sleep", func(s source) bool { return !s.test }, "tests wait for what they wait for, or use testing/synctest"},
}

func TestForbiddenCalls(t *testing.T) {
	fset := token.NewFileSet()
	all := sources(t, fset)
	// A package whose tests run in bubbles sleeps in virtual time, wherever
	// its rig stands.
	bubbles := map[string]bool{}
	for _, s := range all {
		if bytes.Contains(s.text, []byte(`"testing/synctest"`)) {
			bubbles[s.pkg] = true
		}
	}
	for _, s := range all {
		bubble := bubbles[s.pkg]
		ast.Inspect(s.ast, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			x, ok := sel.X.(*ast.Ident)
			if !ok {
				return true
			}
			for _, f := range forbidden {
				if x.Name == f.pkg && sel.Sel.Name == f.name && !f.allowed(s) && !(f.name == "Sleep" && bubble) {
					t.Errorf("%s: %s.%s: %s", fset.Position(n.Pos()), f.pkg, f.name, f.why)
				}
			}
			return true
		})
	}
}

// TestSkips: a test skips by netnstest.Missing only, so that every skip can be
// turned into a failure.
func TestSkips(t *testing.T) {
	fset := token.NewFileSet()
	for _, s := range sources(t, fset) {
		for _, pos := range skips(s.ast) {
			if s.path != "vxlan/netns/netnstest/netnstest.go" {
				t.Errorf("%s: skip with netnstest.Missing, which WEFT_TEST_REQUIRE can forbid", fset.Position(pos))
			}
		}
	}
}

// skips finds calls of a test's ways to skip, by whatever name the test goes.
func skips(file *ast.File) []token.Pos {
	var out []token.Pos
	ast.Inspect(file, func(n ast.Node) bool {
		if c, ok := n.(*ast.CallExpr); ok {
			if sel, ok := c.Fun.(*ast.SelectorExpr); ok && slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, sel.Sel.Name) {
				out = append(out, c.Pos())
			}
		}
		return true
	})
	return out
}

// TestSkipRule: the rule must be able to find one.
func TestSkipRule(t *testing.T) {
	const src = "package p\nfunc f() { t.Skip(1); r.t.Skipf(``); tb().SkipNow(); t.Skipped(); Skip() }"
	file, err := parser.ParseFile(token.NewFileSet(), "x.go", src, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(skips(file)); got != 3 {
		t.Errorf("%d skips found, want 3", got)
	}
}

// TestLabTestsAreChosen: lab/vm/tiers.sh and the Makefile choose the tests of the
// lab by these beginnings; one of another name would never run.
func TestLabTestsAreChosen(t *testing.T) {
	fset := token.NewFileSet()
	n := 0
	for _, s := range sources(t, fset) {
		if !strings.HasPrefix(s.path, "lab/") || !strings.HasSuffix(s.path, "_lab_test.go") {
			continue
		}
		for _, d := range s.ast.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || !strings.HasPrefix(f.Name.Name, "Test") {
				continue
			}
			n++
			if name := f.Name.Name; !strings.HasPrefix(name, "TestLab") && !strings.HasPrefix(name, "TestFaults") && !strings.HasPrefix(name, "TestSoak") {
				t.Errorf("%s: %s must begin with TestLab, TestFaults or TestSoak", fset.Position(f.Pos()), name)
			}
		}
	}
	if n < 10 {
		t.Errorf("only %d tests of the lab found", n)
	}
}

// TestNoInit: two nodes live in one process; nothing happens by being linked.
func TestNoInit(t *testing.T) {
	fset := token.NewFileSet()
	for _, s := range sources(t, fset) {
		for _, d := range s.ast.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" && !s.test {
				t.Errorf("%s: no init functions", fset.Position(f.Pos()))
			}
		}
	}
}

// TestPackagesAreDocumented: every package has a doc comment.
func TestPackagesAreDocumented(t *testing.T) {
	documented, seen := map[string]bool{}, map[string]string{}
	for _, s := range sources(t, token.NewFileSet()) {
		if s.test {
			continue
		}
		seen[s.pkg] = cmp.Or(seen[s.pkg], s.path)
		if s.ast.Doc != nil {
			documented[s.pkg] = true
		}
	}
	for pkg, file := range seen {
		if !documented[pkg] {
			t.Errorf("%s: its package has no doc comment", file)
		}
	}
}

// TestExceptionsAreNeeded keeps the list of exceptions honest: one whose file
// is gone goes, too.
func TestExceptionsAreNeeded(t *testing.T) {
	for what := range exceptions {
		file, _, _ := strings.Cut(what, ":")
		if _, err := os.Stat(file); err != nil {
			t.Errorf("exception %s: %v", what, err)
		}
	}
}
