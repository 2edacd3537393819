package vm

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

func TestParseModinfo(t *testing.T) {
	m := parseModinfo("kernel/net/nf-nat.ko", []byte("license=GPL\x00depends=nf_conntrack,nf-tables\x00alias=ip-nat\x00alias=a=b\x00name=nf_nat\x00"))
	if m.name != "nf_nat" || !slices.Equal(m.depends, []string{"nf_conntrack", "nf_tables"}) || !slices.Equal(m.aliases, []string{"ip-nat", "a=b"}) {
		t.Errorf("got %+v", m)
	}
	if m := parseModinfo("x.ko", []byte("depends=\x00")); len(m.depends) != 0 {
		t.Errorf("no depends read as %q", m.depends)
	}
}

func TestIndex(t *testing.T) {
	all := map[string]module{
		"a": {name: "a", file: "k/a.ko", depends: []string{"b", "c"}, aliases: []string{"net-pf-1"}},
		"b": {name: "b", file: "k/b.ko", depends: []string{"c"}},
		"c": {name: "c", file: "k/c.ko"},
		"d": {name: "d", file: "other/d.ko"},
	}
	ms, err := closure(all, []string{"a", "built_in"})
	if err != nil {
		t.Fatal(err)
	}
	dep, alias := index(ms)
	if got, want := string(dep), "k/a.ko: k/b.ko k/c.ko\nk/b.ko: k/c.ko\nk/c.ko:\n"; got != want {
		t.Errorf("modules.dep:\n%swant:\n%s", got, want)
	}
	if got, want := string(alias), "alias net-pf-1 a\n"; got != want {
		t.Errorf("modules.alias: %q, want %q", got, want)
	}
	if ms, err = closure(all, []string{"other/"}); err != nil || len(ms) != 1 || ms[0].name != "d" {
		t.Errorf("by folder: %v, %v", ms, err)
	}
	delete(all, "c")
	if _, err := closure(all, []string{"a"}); err == nil {
		t.Error("a missing need passed")
	}
}

// TestCables: both ends of a cable are on its own hub, each with its own address.
func TestCables(t *testing.T) {
	if got := cables(0); len(got) != 0 {
		t.Errorf("no cables are %q", got)
	}
	all := strings.Join(cables(2), "\n")
	hubs := map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^hubport,id=(\S+),(hubid=\d)$`).FindAllStringSubmatch(all, -1) {
		hubs[m[2]]++
		if strings.Count(all, "netdev="+m[1]+",") != 1 {
			t.Errorf("no card, or two, at %s:\n%s", m[1], all)
		}
	}
	if hubs["hubid=0"] != 2 || hubs["hubid=1"] != 2 || len(hubs) != 2 {
		t.Errorf("ends by hub: %v\n%s", hubs, all)
	}
	for cable := range 2 {
		for end := range 2 {
			mac := CardMAC(cable, end)
			if strings.Count(all, mac.String()) != 1 || mac[0]&3 != 2 {
				t.Errorf("%s is not one card's, or no local address:\n%s", mac, all)
			}
		}
	}
	m := Machine{cfg: Config{Cables: 1}}
	if args := strings.Join(m.qemuArgs(nil), "\n"); !strings.Contains(args, strings.Join(cables(1), "\n")) {
		t.Errorf("a machine with a cable is\n%s", args)
	}
}

// TestClocks: the clock of each guest counts instructions, and idle time passes or is
// leapt over.
func TestClocks(t *testing.T) {
	for want, leaps := range map[string]bool{"shift=0,sleep=on": false, "shift=0,sleep=off": true} {
		m, got := Machine{cfg: Config{Leaps: leaps}}, ""
		args := m.qemuArgs(nil)
		if i := slices.Index(args, "-icount"); i >= 0 {
			got = args[i+1]
		}
		if got != want {
			t.Errorf("leaps %v: the clock is %q, want %q", leaps, got, want)
		}
	}
}

// TestLoadOrder: whatever the needs, each module comes once, after all that it
// needs.
func TestLoadOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 8).Draw(t, "n")
		all := map[string]module{}
		var wanted []string
		for i := range n {
			m := module{name: fmt.Sprint(i), file: fmt.Sprintf("k/%d.ko", i)}
			for j := range i {
				if rapid.Bool().Draw(t, fmt.Sprintf("%d needs %d", i, j)) {
					m.depends = append(m.depends, fmt.Sprint(j))
				}
			}
			all[m.name] = m
			if rapid.Bool().Draw(t, fmt.Sprintf("%d wanted", i)) {
				wanted = append(wanted, m.name)
			}
		}
		out, err := loadOrder(all, wanted)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, m := range out {
			if seen[m.name] {
				t.Fatalf("%s comes twice", m.name)
			}
			for _, d := range m.depends {
				if !seen[d] {
					t.Fatalf("%s comes before %s, which it needs", m.name, d)
				}
			}
			seen[m.name] = true
		}
		for _, w := range wanted {
			if !seen[w] {
				t.Fatalf("%s is missing", w)
			}
		}
	})
}

// TestInitramfsUnpacks gives the archive to cpio(1), where there is one.
func TestInitramfsUnpacks(t *testing.T) {
	dir := t.TempDir()
	body := filepath.Join(dir, "body")
	if err := os.WriteFile(body, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "x.gz")
	if err := writeInitramfs(out, map[string]string{"init": body, "a/b/c": body, "a/l": "->b/c"}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	archive, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(archive, []byte(cpioMagic)) || len(archive)%cpioAlign != 0 {
		t.Errorf("%d bytes, begin with %q", len(archive), archive[:6])
	}
	cmd := exec.CommandContext(t.Context(), "busybox", "cpio", "-t")
	cmd.Stdin = bytes.NewReader(archive)
	list, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		netnstest.Missing(t, "vm", fmt.Errorf("no busybox to read it with: %w", err))
	}
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Fields(string(list)), []string{"a", "a/b", "a/b/c", "a/l", "init"}; !slices.Equal(got, want) {
		t.Errorf("archive holds %q, want %q", got, want)
	}
}

func TestNote(t *testing.T) {
	values := map[string]string{}
	for line, ok := range map[string]bool{
		"[    1.2] something":        true,
		"WEFT-RESULT demo 0":         true,
		"noise WEFT-RESULT up 0 1 2": true,
		"WEFT-RESULT ":               false,
	} {
		if err := note(values, line); (err == nil) != ok {
			t.Errorf("note(%q) = %v", line, err)
		}
	}
	if values["demo"] != "0" || values["up"] != "0 1 2" || len(values) != 2 {
		t.Errorf("values %q", values)
	}
	if err := note(values, "WEFT-RESULT demo 1"); err == nil {
		t.Error("a result that comes twice passed")
	}
}

func TestBuildNamesWhatIsMissing(t *testing.T) {
	_, err := Build(t.Context(), Config{Kernel: filepath.Join(t.TempDir(), "kernel"), Dir: t.TempDir()})
	if !errors.Is(err, weft.ErrUnsupported) || !strings.Contains(err.Error(), "need.sh kernel") {
		t.Errorf("got %v", err)
	}
	if _, err := findTool("no-such-tool"); !errors.Is(err, weft.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
}
