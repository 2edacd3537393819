package api

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/weftnet/weft"
)

// A request is honoured or refused, field by field. The conversion of a request
// reads some fields; rules name exactly those, and everything else must be at
// its default. What no rule names is refused, so a field that a newer version
// of the API brings is refused until somebody has decided about it.

// fieldRule says what may stand in a field.
type fieldRule struct {
	isHonoured bool  // the conversion reads it, all values
	isAbsent   bool  // a nil pointer only: its presence alone has a meaning
	only       []any // exactly these values: what weft does anyway
}

// ruleSet maps a field's path, with [] for the elements of a list, to its rule.
type ruleSet map[string]fieldRule

// fieldRules are the rule sets of all request bodies.
type fieldRules struct {
	service, network, node, init, cluster ruleSet
}

func newFieldRules() fieldRules {
	return fieldRules{
		service: serviceRules(), network: networkRules(), node: nodeRules(),
		init: initRules(), cluster: clusterRules(),
	}
}

func honoured() fieldRule          { return fieldRule{isHonoured: true} }
func absent() fieldRule            { return fieldRule{isAbsent: true} }
func only(values ...any) fieldRule { return fieldRule{only: values} }

// honour adds several paths below one prefix.
func (r ruleSet) honour(prefix string, names ...string) {
	for _, n := range names {
		r[prefix+n] = honoured()
	}
}

// check walks v, a struct, and refuses all fields that the rules do not allow,
// in the order of the struct.
func (r ruleSet) check(v any) error {
	var faults []string
	r.walk("", "", reflect.ValueOf(v), func(f string) { faults = append(faults, f) })
	return joined(weft.ErrUnsupported, faults)
}

func (r ruleSet) walk(path, pattern string, v reflect.Value, fault func(string)) {
	rule, isListed := r[pattern]
	switch {
	case rule.isHonoured:
		return
	case len(rule.only) > 0:
		r.walkOnly(path, v, rule.only, fault)
		return
	case rule.isAbsent || (isListed && v.Kind() == reflect.Pointer):
		if !v.IsNil() {
			fault(path + " is not supported yet")
		}
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		switch {
		case v.IsNil():
		case v.Elem().Kind() == reflect.Struct:
			r.walk(path, pattern, v.Elem(), fault)
		default: // that it is set at all is a choice
			fault(path + " is not supported yet")
		}
	case reflect.Struct:
		fields := jsonFields(v.Type())
		if len(fields) == 0 && !v.IsZero() {
			fault(path + " is not supported yet") // opaque, as netip.Addr
		}
		for _, f := range fields {
			r.walk(joinPath(path, f.name), joinPath(pattern, f.name), v.FieldByIndex(f.index), fault)
		}
	case reflect.Slice:
		if v.Len() > 0 && !r.hasBelow(pattern+"[]") {
			fault(path + " is not supported yet")
			return
		}
		for i := range v.Len() {
			r.walk(fmt.Sprintf("%s[%d]", path, i), pattern+"[]", v.Index(i), fault)
		}
	case reflect.Map:
		for _, k := range sortedKeys(v) {
			fault(fmt.Sprintf("%s[%q] is not supported yet", path, k))
		}
	default:
		if !v.IsZero() {
			fault(path + " is not supported yet")
		}
	}
}

// walkOnly compares with the values allowed; a nil pointer is always allowed.
func (r ruleSet) walkOnly(path string, v reflect.Value, values []any, fault func(string)) {
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return
		}
		v = v.Elem()
	}
	for _, want := range values {
		if w := reflect.ValueOf(want); w.CanConvert(v.Type()) && v.Equal(w.Convert(v.Type())) {
			return
		}
	}
	fault(fmt.Sprintf("%s %s is not supported yet (only %s)", path, show(v.Interface()), show(values[len(values)-1])))
}

// hasBelow reports whether any rule lies at or below a pattern.
func (r ruleSet) hasBelow(pattern string) bool {
	for p := range maps.Keys(r) {
		if p == pattern || strings.HasPrefix(p, pattern+".") {
			return true
		}
	}
	return false
}

func sortedKeys(v reflect.Value) []string {
	var keys []string
	for _, k := range v.MapKeys() {
		keys = append(keys, fmt.Sprint(k.Interface()))
	}
	slices.Sort(keys)
	return keys
}

// show prints a value as its JSON would look.
func show(v any) string {
	if rv := reflect.ValueOf(v); rv.Kind() == reflect.String {
		return fmt.Sprintf("%q", rv.String())
	}
	return fmt.Sprint(v)
}
