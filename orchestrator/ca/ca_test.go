package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

var testNow = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

func newRoot(t testing.TB) Root {
	t.Helper()
	r, err := NewRoot("test", testNow)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func signed(t testing.TB, r Root, id Identity, now time.Time) Bundle {
	t.Helper()
	key, csr, err := NewCSR()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := Sign(r, csr, id, now)
	if err != nil {
		t.Fatal(err)
	}
	return Bundle{Cert: cert, Key: key, CA: r.Cert}
}

func at(now time.Time) func() time.Time { return func() time.Time { return now } }

func TestSign(t *testing.T) {
	root := newRoot(t)
	for _, role := range []weft.Role{weft.RoleWorker, weft.RoleManager} {
		id := Identity{Node: weft.NewID(), Role: role, Cluster: weft.NewID()}
		c, err := NewCredentials(signed(t, root, id, testNow), at(testNow))
		if err != nil {
			t.Fatal(err)
		}
		if c.Identity() != id {
			t.Errorf("identity %+v, want %+v", c.Identity(), id)
		}
		leaf := c.current.Load().Leaf
		if got, want := leaf.Subject.String(), "CN="+string(id.Node)+",OU=swarm-"+role.String()+",O="+string(id.Cluster); got != want {
			t.Errorf("subject %q, want %q", got, want)
		}
		nb, na := c.Validity()
		if !nb.Equal(testNow.Add(-time.Hour)) || !na.Equal(testNow.Add(90*24*time.Hour)) {
			t.Errorf("valid %v to %v", nb, na)
		}
		if leaf.IsCA || leaf.KeyUsage&x509.KeyUsageCertSign != 0 {
			t.Error("a node certificate can sign others")
		}
	}
}

func TestSignNeverOutlivesRoot(t *testing.T) {
	root := newRoot(t)
	end := testNow.Add(rootLifetime)
	c, err := NewCredentials(signed(t, root, Identity{weft.NewID(), 0, weft.NewID()}, end.Add(-time.Hour)), at(testNow))
	if err != nil {
		t.Fatal(err)
	}
	if _, na := c.Validity(); !na.Equal(end) {
		t.Errorf("certificate ends %v, root %v", na, end)
	}
	_, csr, _ := NewCSR()
	if _, err := Sign(root, csr, Identity{weft.NewID(), 0, weft.NewID()}, end.Add(time.Hour)); !errors.Is(err, weft.ErrUnavailable) {
		t.Errorf("an expired root signs: %v", err)
	}
}

func TestSignRefuses(t *testing.T) {
	root := newRoot(t)
	_, good, err := NewCSR()
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	request := func(key any) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			t.Fatal(err)
		}
		return encodeBlock(blockCSR, der)
	}
	der, _ := decodeBlock(good, blockCSR)
	forged := append([]byte(nil), der...)
	forged[len(forged)-3] ^= 1 // in the signature
	id := Identity{weft.NewID(), weft.RoleWorker, weft.NewID()}
	for name, k := range map[string]struct {
		csr []byte
		id  Identity
	}{
		"no PEM":          {[]byte("hello"), id},
		"empty":           {nil, id},
		"other PEM":       {root.Cert, id},
		"not DER":         {encodeBlock(blockCSR, []byte{1, 2, 3}), id},
		"forged":          {encodeBlock(blockCSR, forged), id},
		"RSA":             {request(rsaKey), id},
		"P-384":           {request(p384), id},
		"node not an id":  {good, Identity{"h1", weft.RoleWorker, weft.NewID()}},
		"no cluster":      {good, Identity{weft.NewID(), weft.RoleWorker, ""}},
		"role of nowhere": {good, Identity{weft.NewID(), 7, weft.NewID()}},
	} {
		if _, err := Sign(root, k.csr, k.id, testNow); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := newRoot(t)
	if _, err := Sign(Root{Cert: root.Cert, Key: other.Key}, good, id, testNow); !errors.Is(err, weft.ErrInvalid) {
		t.Errorf("key of another root: %v", err)
	}
}

func TestTokenRoundTrip(t *testing.T) {
	ca := newRoot(t).Cert
	want, err := DigestOf(ca)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for range 50 {
		tok, err := NewToken(ca)
		if err != nil {
			t.Fatal(err)
		}
		s := tok.String()
		if len(s) != len("SWMTKN-1-")+50+1+25 || seen[s] {
			t.Fatalf("token %q", s)
		}
		seen[s] = true
		got, err := ParseToken("  " + s + "\n")
		if err != nil || got != tok || got.Digest != want {
			t.Fatalf("parse: %+v, %v", got, err)
		}
		if !Match(s, s) {
			t.Fatal("a token does not match itself")
		}
	}
}

func TestTokenProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tok Token
		copy(tok.Digest[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "digest"))
		tok.Secret = rapid.StringMatching(`[0-9a-z]{25}`).Draw(t, "secret")
		got, err := ParseToken(tok.String())
		if err != nil || got != tok {
			t.Fatalf("%v came back as %v, %v", tok, got, err)
		}
		// One changed character is another token, or none.
		b := []byte(tok.String())
		i := rapid.IntRange(0, len(b)-1).Draw(t, "at")
		c := rapid.Byte().Draw(t, "byte")
		if b[i] == c {
			return
		}
		b[i] = c
		if Match(string(b), tok.String()) {
			t.Fatalf("%q matches %q", b, tok)
		}
	})
}

func TestParseTokenRefuses(t *testing.T) {
	d, s := strings.Repeat("0", 50), strings.Repeat("a", 25)
	for in, want := range map[string]string{
		"":                                              "not a join token",
		"SWMTKN":                                        "not a join token",
		"SWMKEY-1-" + d + "-" + s:                       "not a join token",
		"swmtkn-1-" + d + "-" + s:                       "not a join token",
		"SWMTKN-2-" + d + "-" + s:                       `version is "2"`,
		"SWMTKN-1-" + d:                                 "3 parts",
		"SWMTKN-1-" + d + "-" + s + "-x":                "5 parts",
		"SWMTKN-1-" + d[1:] + "-" + s:                   "49 characters",
		"SWMTKN-1-" + d + "-" + s[1:]:                   "24 characters",
		"SWMTKN-1-" + d + "-" + s + "a":                 "26 characters",
		"SWMTKN-1-" + d + "-" + s[1:] + "A":             "other than 0-9 and a-z",
		"SWMTKN-1-" + d[1:] + "_-" + s:                  "other than 0-9 and a-z",
		"SWMTKN-1-" + d[2:] + "é-" + s:                  "other than 0-9 and a-z",
		"SWMTKN-1-" + strings.Repeat("z", 50) + "-" + s: "no SHA-256 digest",
	} {
		_, err := ParseToken(in)
		if !errors.Is(err, weft.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want %q in it", in, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "aaaa") {
			t.Errorf("%q: the error repeats the secret: %v", in, err)
		}
		if Match(in, in) {
			t.Errorf("%q matches itself", in)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add("SWMTKN-1-" + strings.Repeat("0", 50) + "-" + strings.Repeat("a", 25))
	f.Add("SWMTKN-1--")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseToken(s)
		if err != nil {
			if !errors.Is(err, weft.ErrInvalid) {
				t.Fatalf("error without sentinel: %v", err)
			}
			return
		}
		if tok.String() != strings.TrimSpace(s) {
			t.Fatalf("%q is read as %q", s, tok)
		}
	})
}

func TestRenewAt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		life := time.Duration(rapid.Int64Range(int64(time.Minute), int64(rootLifetime)).Draw(t, "life"))
		j := rapid.Float64Range(-1, 2).Draw(t, "jitter") // also what callers should not pass
		share := float64(RenewAt(testNow, testNow.Add(life), j).Sub(testNow)) / float64(life)
		if share < 0.4499 || share > 0.5501 {
			t.Fatalf("renewed at %.3f of its life", share)
		}
	})
}
