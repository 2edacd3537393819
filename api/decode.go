package api

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// decode reads the JSON body of c into v, a pointer to one of Docker's request
// structs. Wrong types and fields that the struct does not have are refused
// with their path; `ignored` are fields that older clients send and that ask
// for what we do anyway.
func decode(c *call, v any, ignored ...string) error {
	ct := c.Header.Get("Content-Type")
	if media, _, err := mime.ParseMediaType(ct); ct != "" && (err != nil || media != "application/json") {
		return invalidf("unsupported Content-Type header (%s): must be 'application/json'", ct)
	}
	body, err := io.ReadAll(http.MaxBytesReader(c.w, c.Body, maxBody))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return fmt.Errorf("the body is larger than %d bytes: %w", maxBody, err)
	}
	if err != nil {
		return invalidf("read body: %v", err)
	}
	return decodeJSON(body, v, ignored...)
}

// decodeJSON is decode without the HTTP around it.
func decodeJSON(body []byte, v any, ignored ...string) error {
	if len(bytes.TrimSpace(body)) == 0 {
		return invalidf("the body is empty: a JSON object is expected")
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	var tree any
	if err := d.Decode(&tree); err != nil {
		return invalidf("parse body: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return invalidf("parse body: there is something behind the JSON value")
	}
	object, ok := tree.(map[string]any)
	if !ok {
		return invalidf("the body is %s: a JSON object is expected", jsonKind(tree))
	}
	for k := range object {
		if slices.Contains(ignored, k) {
			delete(object, k)
		}
	}
	if err := checkTree("", object, reflect.TypeOf(v).Elem()); err != nil {
		return err
	}
	if err := json.Unmarshal(body, v); err != nil {
		return invalidf("parse body: %v", err)
	}
	return nil
}

// jsonField is one field of a struct as encoding/json sees it.
type jsonField struct {
	name  string
	index []int
	typ   reflect.Type
}

// jsonFields lists a struct's fields in order, those of embedded structs in
// their place.
func jsonFields(t reflect.Type) []jsonField {
	var out []jsonField
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" || !f.IsExported() {
			continue
		}
		if f.Anonymous && name == "" && f.Type.Kind() == reflect.Struct {
			for _, sub := range jsonFields(f.Type) {
				sub.index = append([]int{i}, sub.index...)
				out = append(out, sub)
			}
			continue
		}
		if name == "" {
			name = f.Name
		}
		out = append(out, jsonField{name, f.Index, f.Type})
	}
	return out
}

// checkTree compares a decoded JSON value with the type that will hold it. It
// is stricter than encoding/json (unknown names) and says the path, which the
// standard decoder does not for types that parse text.
func checkTree(path string, v any, t reflect.Type) error {
	if v == nil {
		return nil // null leaves the field as it is
	}
	if t.Kind() == reflect.Pointer {
		return checkTree(path, v, t.Elem())
	}
	p := reflect.PointerTo(t)
	if p.Implements(reflect.TypeFor[json.Unmarshaler]()) {
		return checkParsed(path, v, t)
	}
	if p.Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
		if _, ok := v.(string); !ok {
			return wrongType(path, v, "a string")
		}
		return checkParsed(path, v, t)
	}
	switch t.Kind() {
	case reflect.Struct:
		return checkStruct(path, v, t)
	case reflect.Map:
		return checkMap(path, v, t)
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return checkParsed(path, v, t)
		}
		return checkList(path, v, t)
	case reflect.Array:
		return checkList(path, v, t)
	case reflect.Interface:
		return nil
	default:
		return checkScalar(path, v, t)
	}
}

// checkParsed lets a type's own parser judge.
func checkParsed(path string, v any, t reflect.Type) error {
	text, err := json.Marshal(v)
	if err == nil {
		err = json.Unmarshal(text, reflect.New(t).Interface())
	}
	if err != nil {
		if s, ok := v.(string); ok && t == reflect.TypeFor[netip.Prefix]() {
			return invalidf("%s: %s", path, noRange(s))
		}
		return invalidf("%s: %v", path, err)
	}
	return nil
}

// noRange says what an address range looks like to who has written s for one.
func noRange(s string) string {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return fmt.Sprintf("%q is no range like 10.20.30.0/24 or fd00:20:30::/64", s)
	case a.Is6():
		return fmt.Sprintf("%q has no prefix length: write %s/64", s, s)
	}
	return fmt.Sprintf("%q has no prefix length: write %s/24", s, s)
}

func checkStruct(path string, v any, t reflect.Type) error {
	object, ok := v.(map[string]any)
	if !ok {
		return wrongType(path, v, "an object")
	}
	fields := jsonFields(t)
	for _, name := range slices.Sorted(maps.Keys(object)) {
		// As encoding/json: the exact name first, then any case.
		i := slices.IndexFunc(fields, func(f jsonField) bool { return f.name == name })
		if i < 0 {
			i = slices.IndexFunc(fields, func(f jsonField) bool { return strings.EqualFold(f.name, name) })
		}
		switch {
		case i >= 0:
			if err := checkTree(joinPath(path, fields[i].name), object[name], fields[i].typ); err != nil {
				return err
			}
		case object[name] != nil:
			return invalidf("unknown field %s in the body", joinPath(path, name))
		}
	}
	return nil
}

func checkMap(path string, v any, t reflect.Type) error {
	object, ok := v.(map[string]any)
	if !ok {
		return wrongType(path, v, "an object")
	}
	for _, k := range slices.Sorted(maps.Keys(object)) {
		if err := checkTree(fmt.Sprintf("%s[%q]", path, k), object[k], t.Elem()); err != nil {
			return err
		}
	}
	return nil
}

func checkList(path string, v any, t reflect.Type) error {
	list, ok := v.([]any)
	if !ok {
		return wrongType(path, v, "a list")
	}
	for i, e := range list {
		if err := checkTree(fmt.Sprintf("%s[%d]", path, i), e, t.Elem()); err != nil {
			return err
		}
	}
	return nil
}

func checkScalar(path string, v any, t reflect.Type) error {
	switch t.Kind() {
	case reflect.String:
		if _, ok := v.(string); !ok {
			return wrongType(path, v, "a string")
		}
	case reflect.Bool:
		if _, ok := v.(bool); !ok {
			return wrongType(path, v, "true or false")
		}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		n, ok := v.(json.Number)
		if !ok {
			return wrongType(path, v, "a number")
		}
		if _, err := strconv.ParseInt(n.String(), 10, t.Bits()); err != nil {
			return invalidf("%s: %s is not a whole number of %d bits", path, n, t.Bits())
		}
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		n, ok := v.(json.Number)
		if !ok {
			return wrongType(path, v, "a number")
		}
		if _, err := strconv.ParseUint(n.String(), 10, t.Bits()); err != nil {
			return invalidf("%s: %s is not a whole number from 0 of %d bits", path, n, t.Bits())
		}
	case reflect.Float32, reflect.Float64:
		n, ok := v.(json.Number)
		if !ok {
			return wrongType(path, v, "a number")
		}
		if _, err := strconv.ParseFloat(n.String(), t.Bits()); err != nil {
			return invalidf("%s: %s is not a number of %d bits", path, n, t.Bits())
		}
	}
	return nil
}

func wrongType(path string, v any, want string) error {
	return invalidf("%s is %s: %s is expected", path, jsonKind(v), want)
}

func jsonKind(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case string:
		return "a string"
	case bool:
		return "a boolean"
	case json.Number:
		return "a number"
	case []any:
		return "a list"
	default:
		return "an object"
	}
}

func joinPath(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}
