// Command dns is CoreDNS with what a table of names needs, for bench dns: the
// Corefile is the first argument.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/hosts"
)

func main() {
	dnsserver.Directives = []string{"bind", "hosts"}
	coremain.Run()
}
