package vm

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// module is one kernel module as its .modinfo section describes it.
type module struct {
	name    string // with '_', as the kernel counts it
	file    string // below the modules folder, e.g. "kernel/net/bridge/bridge.ko"
	depends []string
	aliases []string
}

// moduleName is the kernel's name of a module file: '-' and '_' are one.
func moduleName(file string) string {
	base, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(base, "-", "_")
}

// parseModinfo reads the NUL-terminated key=value strings of .modinfo.
func parseModinfo(file string, section []byte) module {
	m := module{name: moduleName(file), file: file}
	for kv := range bytes.SplitSeq(section, []byte{0}) {
		key, value, _ := strings.Cut(string(kv), "=")
		switch {
		case key == "depends" && value != "":
			for d := range strings.SplitSeq(value, ",") {
				m.depends = append(m.depends, strings.ReplaceAll(d, "-", "_"))
			}
		case key == "alias":
			m.aliases = append(m.aliases, value)
		}
	}
	return m
}

// readModules reads all modules below dir (…/lib/modules/VERSION). Newer
// kernels come with compressed modules: those are unpacked in place with xz or
// zstd, since not every modprobe can.
func readModules(dir string) (map[string]module, error) {
	all := map[string]module{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if path, err = unpackModule(path); err != nil || !strings.HasSuffix(path, ".ko") {
			return err
		}
		f, err := elf.Open(path)
		if err != nil {
			return fmt.Errorf("open module %s: %w", path, err)
		}
		defer f.Close()
		s := f.Section(".modinfo")
		if s == nil {
			return fmt.Errorf("module %s has no .modinfo section", path)
		}
		b, err := s.Data()
		if err != nil {
			return fmt.Errorf("read module %s: %w", path, err)
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		m := parseModinfo(rel, b)
		all[m.name] = m
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read kernel modules: %w", err)
	}
	return all, nil
}

func unpackModule(path string) (string, error) {
	for suffix, tool := range map[string]string{".ko.xz": "xz", ".ko.zst": "zstd"} {
		if !strings.HasSuffix(path, suffix) {
			continue
		}
		args := []string{"-d", "-q", path}
		if tool == "zstd" {
			args = append([]string{"--rm"}, args...)
		}
		if out, err := exec.Command(tool, args...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("unpack module %s with %s: %w: %s", path, tool, err, out)
		}
		return strings.TrimSuffix(path, filepath.Ext(path)), nil
	}
	return path, nil
}

// closure is the modules whose file matches one of the prefixes, or whose name
// is given, with everything they need, sorted by name.
func closure(all map[string]module, wanted []string) ([]module, error) {
	var queue []string
	for _, w := range wanted {
		found := false
		for name, m := range all {
			if strings.HasPrefix(m.file, w) || name == w {
				queue, found = append(queue, name), true
			}
		}
		if !found && !strings.Contains(w, "/") {
			continue // built into this kernel
		}
	}
	picked := map[string]module{}
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if _, ok := picked[name]; ok {
			continue
		}
		m, ok := all[name]
		if !ok {
			return nil, fmt.Errorf("a module needs %s, which the kernel package lacks", name)
		}
		picked[name] = m
		queue = append(queue, m.depends...)
	}
	out := make([]module, 0, len(picked))
	for _, m := range picked {
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b module) int { return strings.Compare(a.name, b.name) })
	return out, nil
}

// index writes modules.dep and modules.alias (depmod(8)): the package has none,
// as Debian makes them when the kernel is installed.
func index(ms []module) (dep, alias []byte) {
	files := map[string]string{}
	needs := map[string][]string{}
	for _, m := range ms {
		files[m.name], needs[m.name] = m.file, m.depends
	}
	var d, a bytes.Buffer
	for _, m := range ms {
		fmt.Fprintf(&d, "%s:", m.file)
		for _, n := range order(needs, m.name) {
			fmt.Fprintf(&d, " %s", files[n])
		}
		d.WriteByte('\n')
		for _, al := range m.aliases {
			fmt.Fprintf(&a, "alias %s %s\n", al, m.name)
		}
	}
	return d.Bytes(), a.Bytes()
}

// order is everything that name needs, the module that must be loaded last
// first, as modules.dep wants it.
func order(needs map[string][]string, name string) []string {
	var post []string
	var visit func(string)
	visit = func(n string) {
		for _, d := range needs[n] {
			if !slices.Contains(post, d) {
				visit(d)
			}
		}
		if !slices.Contains(post, n) {
			post = append(post, n)
		}
	}
	visit(name)
	post = post[:len(post)-1] // itself
	slices.Reverse(post)
	return post
}

// copyModules puts the wanted modules and their index into root.
func copyModules(kernelDir, release, root string, wanted []string) error {
	src := filepath.Join(kernelDir, "lib/modules", release)
	all, err := readModules(src)
	if err != nil {
		return err
	}
	ms, err := closure(all, wanted)
	if err != nil {
		return err
	}
	dst := filepath.Join(root, "lib/modules", release)
	for _, m := range ms {
		if err := copyFile(filepath.Join(src, m.file), filepath.Join(dst, m.file), 0o644); err != nil {
			return err
		}
	}
	dep, alias := index(ms)
	for name, b := range map[string][]byte{"modules.dep": dep, "modules.alias": alias, "modules.symbols": nil} {
		if err := os.WriteFile(filepath.Join(dst, name), b, 0o644); err != nil {
			return fmt.Errorf("write module index: %w", err)
		}
	}
	return nil
}
