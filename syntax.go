package weft

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Lengths of names.
const (
	maxDNSLabel   = 63  // RFC 1035 section 2.3.4
	maxDNSName    = 253 // RFC 1035 section 2.3.4, without the root's dot
	maxObjectName = 128 // ours: names of networks and volumes appear in paths
	maxImageName  = 255 // OCI distribution specification: repository name
	maxTag        = 128 // OCI distribution specification: tag
)

// checkName accepts what Docker accepts as a service name or alias: a DNS
// label (RFC 1123 section 2.1) in which '_' is allowed too, since `stack
// deploy` names services STACK_SERVICE.
func checkName(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%w: a name is missing", ErrInvalid)
	case len(s) > maxDNSLabel:
		return fmt.Errorf("%w: %q: a name has at most %d characters", ErrInvalid, s, maxDNSLabel)
	case !isAlphanumeric(s[0]) || !isAlphanumeric(s[len(s)-1]):
		return fmt.Errorf("%w: %q: a name begins and ends with a letter or digit", ErrInvalid, s)
	}
	for i := range len(s) {
		if !isAlphanumeric(s[i]) && s[i] != '-' && s[i] != '_' {
			return fmt.Errorf("%w: %q: a name has letters, digits, '-' and '_' only", ErrInvalid, s)
		}
	}
	return nil
}

// FoldName is a name as DNS compares it (RFC 4343 section 3): ASCII letters in
// lower case, all other bytes as they are.
func FoldName(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' {
			r += 'a' - 'A'
		}
		return r
	}, s)
}

// checkHostname accepts RFC 1123 names; "" means the container's id.
func checkHostname(s string) error {
	if s == "" {
		return nil
	}
	if strings.Contains(s, "{{") {
		return fmt.Errorf("%w: %q: templates are not built", ErrUnsupported, s)
	}
	if len(s) > maxDNSName {
		return fmt.Errorf("%w: a host name has at most %d characters", ErrInvalid, maxDNSName)
	}
	for label := range strings.SplitSeq(s, ".") {
		if checkName(label) != nil || strings.Contains(label, "_") {
			return fmt.Errorf("%w: %q: a host name is labels of letters, digits and '-', joined by dots", ErrInvalid, s)
		}
	}
	return nil
}

// isObjectName reports whether s may name a network or a volume.
func isObjectName(s string) bool {
	if s == "" || !isAlphanumeric(s[0]) {
		return false
	}
	for i := range len(s) {
		if !isAlphanumeric(s[i]) && s[i] != '_' && s[i] != '.' && s[i] != '-' {
			return false
		}
	}
	return true
}

// CheckNetworkName accepts what Docker's users call networks and what DNS can have behind
// the names of services: letters, digits, '_', '-' and dots, beginning with a letter or
// digit, with 1 to 63 characters between dots. The longest CONTAINER (SERVICE.NODE.TASK,
// 115 characters) fits before it (RFC 1035 section 2.3.4). Errors wrap ErrInvalid.
func CheckNetworkName(s string) error {
	if !isObjectName(s) || len(s) > maxObjectName {
		return fmt.Errorf("%w: %q: use up to %d letters, digits, '_', '.' and '-', beginning with a letter or digit", ErrInvalid, s, maxObjectName)
	}
	for label := range strings.SplitSeq(s, ".") {
		switch {
		case label == "":
			return fmt.Errorf("%w: %q: it stands behind names of services in DNS, where nothing between two dots or behind the last one is no name: leave that dot out", ErrInvalid, s)
		case len(label) > maxDNSLabel:
			return fmt.Errorf("%w: %q: it stands behind names of services in DNS, where a part between dots has at most %d characters: shorten %q", ErrInvalid, s, maxDNSLabel, label)
		}
	}
	return nil
}

// checkLabels refuses labels that weft would have to obey and does not know.
func checkLabels(field string, labels map[string]string) error {
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if k == "" {
			return invalid(field, "a label has an empty name")
		}
		if strings.HasPrefix(k, weftLabelPrefix) {
			return at(fmt.Sprintf("%s[%q]", field, k), fmt.Errorf("%w: unknown label; names beginning with %q are kept for weft", ErrUnsupported, weftLabelPrefix))
		}
	}
	return nil
}

func checkEnv(e string) error {
	key, _, ok := strings.Cut(e, "=")
	switch {
	case !ok:
		return fmt.Errorf("%w: %q: write KEY=value", ErrInvalid, e)
	case key == "":
		return fmt.Errorf("%w: %q: the name is missing", ErrInvalid, e)
	case strings.ContainsRune(e, 0):
		return fmt.Errorf("%w: variable %q contains a zero byte", ErrInvalid, key)
	}
	return nil
}

// checkImage accepts [HOST[:PORT]/]PATH[:TAG][@sha256:DIGEST]. The runtime
// parses references fully; this refuses what can never be one before it is
// stored.
func checkImage(ref string) error {
	fail := func(why string) error { return fmt.Errorf("%w: image %q: %s", ErrInvalid, ref, why) }
	if ref == "" {
		return fmt.Errorf("%w: an image is missing", ErrInvalid)
	}
	name, digest, pinned := strings.Cut(ref, "@")
	if pinned {
		hex, ok := strings.CutPrefix(digest, "sha256:")
		if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
			return fail("the digest is sha256: and 64 hexadecimal digits in lower case")
		}
	}
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		if !isTag(name[i+1:]) {
			return fail("the tag is up to 128 letters, digits, '_', '.' and '-', beginning with a letter, digit or '_'")
		}
		name = name[:i]
	}
	if len(name) > maxImageName {
		return fail("the name is longer than 255 characters")
	}
	parts := strings.Split(name, "/")
	if len(parts) > 1 && isRegistry(parts[0]) {
		parts = parts[1:]
	}
	for _, p := range parts {
		if !isPathPart(p) {
			return fail("the name is lower-case letters and digits, separated by '.', '_', '-' and '/'")
		}
	}
	return nil
}

func isTag(s string) bool {
	if s == "" || len(s) > maxTag || s[0] == '.' || s[0] == '-' {
		return false
	}
	return isObjectName("a" + s)
}

// isRegistry tells a host from the first part of a path, as Docker does: it
// has a dot or a port, or is localhost, or has an upper-case letter.
func isRegistry(s string) bool {
	host, port, hasPort := strings.Cut(s, ":")
	if strings.HasPrefix(s, "[") { // an IPv6 literal
		end := strings.IndexByte(s, ']')
		return end > 0 && (end == len(s)-1 || s[end+1] == ':' && isDigits(s[end+2:]))
	}
	if hasPort && !isDigits(port) || checkHostname(host) != nil || host == "" {
		return false
	}
	return hasPort || strings.Contains(host, ".") || host == "localhost" || host != strings.ToLower(host)
}

func isDigits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// isPathPart: lower-case letters and digits with single separators between.
func isPathPart(s string) bool {
	isWord := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
	if s == "" || !isWord(s[0]) || !isWord(s[len(s)-1]) {
		return false
	}
	for i := range len(s) {
		if !isWord(s[i]) && s[i] != '.' && s[i] != '_' && s[i] != '-' {
			return false
		}
	}
	return !strings.Contains(s, "..") && !strings.Contains(s, "___") && !strings.Contains(s, "._") && !strings.Contains(s, "_.")
}

func isAlphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}
