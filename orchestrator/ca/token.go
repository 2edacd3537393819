package ca

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"math/big"
	"strings"

	"github.com/weftnet/weft"
)

// Docker's form of a join token (swarmkit ca/config.go): both numbers in base
// 36, padded to fixed lengths.
const (
	tokenPrefix   = "SWMTKN"
	tokenVersion  = "1"
	digestDigits  = 50 // 256 bits need 49.5
	secretDigits  = 25 // 128 bits need 24.8
	secretBytes   = 16
	tokenBase     = 36
	tokenAlphabet = "0123456789abcdefghijklmnopqrstuvwxyz"
)

// Digest is the SHA-256 of a root's certificate (DER), by which a joining node
// knows the cluster before it has any certificate.
type Digest [sha256.Size]byte

// DigestOf is the digest of a root certificate (PEM).
func DigestOf(caCert []byte) (Digest, error) {
	c, err := parseCert(caCert)
	if err != nil {
		return Digest{}, fmt.Errorf("read the cluster's certificate authority: %w", err)
	}
	return sha256.Sum256(c.Raw), nil
}

// Token is a parsed join token. Secret is the part that admits: it is never
// logged.
type Token struct {
	Digest Digest
	Secret string // 25 characters of 0-9a-z
}

// NewToken draws a token for the cluster of the root certificate (PEM). Format
// it with String.
func NewToken(caCert []byte) (Token, error) {
	d, err := DigestOf(caCert)
	if err != nil {
		return Token{}, err
	}
	var b [secretBytes]byte
	if _, err := rand.Read(b[:]); err != nil {
		return Token{}, fmt.Errorf("draw join token: %w", err)
	}
	return Token{Digest: d, Secret: base36(b[:], secretDigits)}, nil
}

// String is the token as people copy it. It contains the secret.
func (t Token) String() string {
	return strings.Join([]string{tokenPrefix, tokenVersion, base36(t.Digest[:], digestDigits), t.Secret}, "-")
}

// ParseToken reads a join token. What is wrong with it is said in words that
// do not repeat the secret; the error is weft.ErrInvalid.
func ParseToken(s string) (Token, error) {
	parts := strings.Split(strings.TrimSpace(s), "-")
	if parts[0] != tokenPrefix || len(parts) < 2 {
		return Token{}, tokenError("it is not a join token, which begins with SWMTKN-")
	}
	if parts[1] != tokenVersion {
		return Token{}, tokenError("its version is %q, this weft reads version %s; use a token of this cluster's version", cutText(parts[1]), tokenVersion)
	}
	if len(parts) != 4 {
		return Token{}, tokenError("it has %d parts between dashes, a token has 4; copy the whole line", len(parts))
	}
	if len(parts[2]) != digestDigits {
		return Token{}, tokenError("its third part has %d characters, not %d; copy the whole line", len(parts[2]), digestDigits)
	}
	if len(parts[3]) != secretDigits {
		return Token{}, tokenError("its last part has %d characters, not %d; copy the whole line", len(parts[3]), secretDigits)
	}
	var t Token
	for _, p := range parts[2:] {
		if strings.Trim(p, tokenAlphabet) != "" {
			return Token{}, tokenError("it has characters other than 0-9 and a-z")
		}
	}
	n, _ := new(big.Int).SetString(parts[2], tokenBase)
	if n.BitLen() > 8*len(t.Digest) {
		return Token{}, tokenError("its third part is no SHA-256 digest; copy the whole line")
	}
	n.FillBytes(t.Digest[:])
	t.Secret = parts[3]
	return t, nil
}

// Match reports whether two tokens are the same, in a time that does not
// depend on where they differ. A string that is no token matches nothing, not
// even itself.
func Match(presented, stored string) bool {
	p, err := ParseToken(presented)
	if err != nil {
		return false
	}
	s, err := ParseToken(stored)
	if err != nil {
		return false
	}
	// Both forms are canonical and of one length.
	return subtle.ConstantTimeCompare([]byte(p.String()), []byte(s.String())) == 1
}

func base36(b []byte, digits int) string {
	s := new(big.Int).SetBytes(b).Text(tokenBase)
	return strings.Repeat("0", digits-len(s)) + s
}

func tokenError(format string, a ...any) error {
	return fmt.Errorf("read join token: %s: %w", fmt.Sprintf(format, a...), weft.ErrInvalid)
}

// cutText keeps a stray word from filling the terminal.
func cutText(s string) string {
	if len(s) > 20 {
		return s[:20] + "…"
	}
	return s
}
