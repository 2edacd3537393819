package api

import (
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// filters are the `filters` of a list request: for each key the values of
// which one must match (for labels: all).
type filters map[string][]string

// parseFilters reads both shapes that clients send: {"key":{"value":true}}
// (the docker command) and {"key":["value"]} (docker-py). A key outside
// `known` is refused, as Docker does, because a filter that is ignored shows
// or removes more than was asked for.
func parseFilters(text string, known ...string) (filters, error) {
	f := filters{}
	if text == "" {
		return f, nil
	}
	var raw map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &raw); err != nil {
		return nil, invalidf("invalid filters: a JSON object of lists is expected")
	}
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		if !slices.Contains(known, key) {
			return nil, invalidf("Invalid filter '%s'", key)
		}
		var list []string
		var set map[string]bool
		switch {
		case json.Unmarshal(raw[key], &list) == nil:
		case json.Unmarshal(raw[key], &set) == nil:
			list = slices.Sorted(maps.Keys(set))
		default:
			return nil, invalidf("invalid filter '%s': a list of strings is expected", key)
		}
		if len(list) > 0 {
			f[key] = list
		}
	}
	return f, nil
}

func (c *call) filters(known ...string) (filters, error) {
	return parseFilters(c.query.Get("filters"), known...)
}

// has reports whether value is wanted: one of the key's values equals it, or
// the key is not filtered.
func (f filters) has(key, value string) bool {
	want, ok := f[key]
	return !ok || slices.Contains(want, value)
}

// prefix is has, by beginning: ids and the names of cluster objects.
func (f filters) prefix(key string, values ...string) bool {
	want, ok := f[key]
	if !ok {
		return true
	}
	return slices.ContainsFunc(want, func(w string) bool {
		return slices.ContainsFunc(values, func(v string) bool { return strings.HasPrefix(v, w) })
	})
}

// matches is has, by regular expression, which a plain part of a name is, too:
// the names of containers and networks (moby filters.Args.Match). Docker keeps
// a slash before the names of containers, so "^/web" is in use beside "^web".
func (f filters) matches(key, value string) bool {
	want, ok := f[key]
	return !ok || slices.ContainsFunc(want, func(w string) bool {
		re, err := regexp.Compile(w)
		return err == nil && (re.MatchString(value) || re.MatchString("/"+value)) || w == value
	})
}

// labels reports whether all wanted labels are there: "key" or "key=value".
func (f filters) labels(key string, have map[string]string) bool {
	for _, w := range f[key] {
		k, v, hasValue := strings.Cut(w, "=")
		got, ok := have[k]
		if !ok || (hasValue && got != v) {
			return false
		}
	}
	return true
}

// flag reads a boolean filter: present and all values true, or all false.
func (f filters) flag(key string) (value, isSet bool, err error) {
	for i, w := range f[key] {
		v := false
		switch strings.ToLower(w) {
		case "1", "true":
			v = true
		case "0", "false":
		default:
			return false, false, invalidf("invalid filter '%s=%s': true or false is expected", key, w)
		}
		if i > 0 && v != value {
			return false, false, invalidf("invalid filter '%s': both true and false", key)
		}
		value, isSet = v, true
	}
	return value, isSet, nil
}

// oneOf refuses values of a key that can never match.
func (f filters) oneOf(key string, allowed ...string) error {
	for _, w := range f[key] {
		if !slices.Contains(allowed, w) {
			return invalidf("Invalid %s filter: '%s'", key, w)
		}
	}
	return nil
}
