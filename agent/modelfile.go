package agent

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/wire"
)

// modelFile writes one model after the other, each with the message that made it of
// the last. What it writes is what json.Marshal makes of the model; of thousands of
// objects it encodes those anew that the message is about. The zero value is ready;
// it is used by one goroutine at a time.
type modelFile struct {
	tasks, specs, networks, services, nodes section
	buf                                     []byte // of the last file
}

// save writes m, which the message a made of the model that was saved last. After
// an error the next message must be a full one.
func (f *modelFile) save(path string, m *model, a wire.Assignments) error {
	if err := f.follow(m, a); err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	b, err := f.append(f.buf[:0], m)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	f.buf = b
	return writeFile(path, b)
}

// follow encodes what a message has changed, all after a full one.
func (f *modelFile) follow(m *model, a wire.Assignments) error {
	if a.Full {
		*f = modelFile{buf: f.buf}
	}
	err := cmp.Or(
		turn(&f.tasks, m.Tasks, a.Tasks, a.GoneTasks, func(t *weft.Task) weft.ID { return t.ID }),
		turn(&f.networks, m.Networks, a.Networks, a.GoneNetworks, func(n *weft.Network) weft.ID { return n.ID }),
		turn(&f.services, m.Services, a.Services, a.GoneServices, func(v *wire.ServiceView) weft.ID { return v.ID }),
		turn(&f.nodes, m.Nodes, a.Nodes, a.GoneNodes, func(v *wire.NodeView) weft.ID { return v.ID }),
	)
	// Specifications go without a word with the last task that has them.
	texts := map[string][]byte{}
	for i := range a.Specs {
		k := specKey{a.Specs[i].Service, a.Specs[i].Version}
		if _, ok := m.Specs[k]; !ok {
			continue
		}
		name := string(k.Service) + "/" + strconv.FormatUint(k.Version, 10)
		var failed error
		texts[name], failed = entryText(name, &a.Specs[i])
		err = cmp.Or(err, failed)
	}
	f.specs.put(texts)
	if len(f.specs) > len(m.Specs) {
		f.specs = slices.DeleteFunc(f.specs, func(e entry) bool {
			var k specKey
			return k.UnmarshalText([]byte(e.key)) != nil || !hasKey(m.Specs, k)
		})
	}
	return err
}

// turn encodes the objects of a message that are in the model.
func turn[V any](s *section, in map[weft.ID]V, puts []V, gone []weft.ID, id func(*V) weft.ID) error {
	if len(gone) > 0 {
		*s = slices.DeleteFunc(*s, func(e entry) bool { return !hasKey(in, weft.ID(e.key)) })
	}
	texts := make(map[string][]byte, len(puts))
	for i := range puts {
		k := id(&puts[i])
		v, ok := in[k]
		if !ok {
			continue // put and gone in one message
		}
		var err error
		if texts[string(k)], err = entryText(string(k), v); err != nil {
			return err
		}
	}
	s.put(texts)
	return nil
}

// section is one map of the file: its entries, in the order of their keys.
type section []entry

// entry is `"key":value`.
type entry struct {
	key  string
	text []byte
}

func entryText(key string, v any) ([]byte, error) {
	k, err := json.Marshal(key)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return slices.Concat(k, []byte{':'}, b), nil
}

// put adds and replaces entries.
func (s *section) put(texts map[string][]byte) {
	if len(texts) == 0 {
		return
	}
	old := *s
	out := make(section, 0, len(old)+len(texts))
	for _, k := range slices.Sorted(maps.Keys(texts)) {
		at, found := slices.BinarySearchFunc(old, k, func(e entry, k string) int { return cmp.Compare(e.key, k) })
		out = append(out, old[:at]...)
		out = append(out, entry{k, texts[k]})
		if old = old[at:]; found {
			old = old[1:]
		}
	}
	*s = append(out, old...)
}

func (s section) append(b []byte) []byte {
	b = append(b, '{')
	for i, e := range s {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, e.text...)
	}
	return append(b, '}')
}

// append writes the fields of m in their order.
func (f *modelFile) append(b []byte, m *model) ([]byte, error) {
	b = strconv.AppendInt(append(b, `{"Version":`...), int64(m.Version), 10)
	b = strconv.AppendUint(append(b, `,"Seq":`...), m.Seq, 10)
	for _, s := range []struct {
		name string
		section
	}{{"Tasks", f.tasks}, {"Specs", f.specs}, {"Networks", f.networks}, {"Services", f.services}, {"Nodes", f.nodes}} {
		b = s.append(append(append(append(b, `,"`...), s.name...), `":`...))
	}
	cluster, err := json.Marshal(&m.Cluster)
	if err != nil {
		return nil, err
	}
	b = append(append(b, `,"Cluster":`...), cluster...)
	if m.Index != 0 {
		b = strconv.AppendUint(append(b, `,"Index":`...), m.Index, 10)
	}
	if len(m.Ended) > 0 {
		ended, err := json.Marshal(m.Ended)
		if err != nil {
			return nil, err
		}
		b = append(append(b, `,"Ended":`...), ended...)
	}
	return append(b, '}'), nil
}
