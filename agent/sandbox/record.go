package sandbox

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weftnet/weft"
)

// recordVersion is the version of a record.
const recordVersion = 1

const (
	recordName     = "left.json"    // in a task's folder
	hostRecordName = "gateway.json" // beside the tasks' folders
	namesName      = "names.json"   // in a task's folder
	bootIDPath     = "/proc/sys/kernel/random/boot_id"
)

// record is a memory as a file, by which the next daemon tells what others have
// changed from what it wishes differently. It decides nothing else: one that is
// missing, damaged or of another version is as none.
type record struct {
	Version int
	// What it is about: the kernel, the node, and by its inode the task's namespace.
	Boot  string
	Node  weft.ID
	NetNS uint64 `json:",omitempty"`

	Bridge  int `json:",omitempty"`
	Objects []recordObject
	Unsure  []recordObject `json:",omitempty"`
}

// recordObject names its class: numbers change when a class is added.
type recordObject struct {
	Class, Name string
	Value       string `json:",omitempty"`
}

// record is the memory in a record that says what it is about.
func (m memory) record(about record) record {
	r := record{Version: recordVersion, Boot: about.Boot, Node: about.Node, NetNS: about.NetNS, Bridge: m.bridge}
	for _, op := range Diff(nil, m.left, nil, false) {
		r.Objects = append(r.Objects, recordObject{op.Class.String(), op.Name, op.Value})
	}
	unsure := State{}
	for o := range m.unsure {
		unsure[o] = ""
	}
	for _, op := range Diff(nil, unsure, nil, false) {
		r.Unsure = append(r.Unsure, recordObject{Class: op.Class.String(), Name: op.Name})
	}
	return r
}

// memory is what the record says if it is about the same; a class that is not known
// is another version's and left out.
func (r record) memory(about record) memory {
	if r.Version != recordVersion || r.Boot != about.Boot || r.Boot == "" || r.Node != about.Node || r.NetNS != about.NetNS {
		return memory{}
	}
	m := memory{left: State{}, bridge: r.Bridge}
	for _, o := range r.Objects {
		if i := slices.Index(classNames[:], o.Class); i >= 0 {
			m.left[Object{Class(i), o.Name}] = o.Value
		}
	}
	for _, o := range r.Unsure {
		if i := slices.Index(classNames[:], o.Class); i >= 0 {
			if m.unsure == nil {
				m.unsure = map[Object]bool{}
			}
			m.unsure[Object{Class(i), o.Name}] = true
		}
	}
	return m
}

func readRecord(path string) record {
	var r record
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &r) != nil {
		return record{}
	}
	return r
}

// names are what resolv.conf was made with, which clients in the container go by for as
// long as it lives. The file itself does not tell: the container may write it.
type names struct {
	Version int
	Search  []string
}

// readNames says no without such a file, and if it is damaged or of another version.
func readNames(path string) (n names, ok bool) {
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &n) != nil || n.Version != recordVersion {
		return names{}, false
	}
	return n, true
}

func (r record) write(path string) error { return writeJSON(path, r) }

// writeJSON puts a file there at once or not at all.
func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o755)
	}
	if err == nil {
		err = os.WriteFile(path+".new", b, 0o644)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// bootID is "" where the kernel does not tell it: no record is believed then.
func bootID() string {
	b, err := os.ReadFile(bootIDPath)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
