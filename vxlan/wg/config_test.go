package wg

import (
	"errors"
	"io"
	"log/slog"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/vxlantest"
)

func TestNewRefuses(t *testing.T) {
	good := Config{Node: "n", NetNSDir: "/x", RunDir: "/y", KeyFile: "/z", Overlay: &vxlantest.Kernel{}, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	for name, spoil := range map[string]func(*Config){
		"no overlay": func(c *Config) { c.Overlay = nil }, "no key file": func(c *Config) { c.KeyFile = "" },
		"unknown engine": func(c *Config) { c.Engine = "ipsec" }, "no second port": func(c *Config) { c.Port = 65535 },
	} {
		c := good
		spoil(&c)
		if _, err := New(c); !errors.Is(err, weft.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
