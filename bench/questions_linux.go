package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/weftnet/weft/lab/vm"
)

// questionsBench: the resolver on the instruction clock.
func questionsBench() benchmark {
	cases := slices.DeleteFunc(slices.Clone(namesBench().Choices.Cases), func(c string) bool { return strings.HasPrefix(c, serverCore) })
	return benchmark{
		Name:    "questions",
		About:   fmt.Sprintf("what a question costs the resolver in instructions: questions (as names asks them, %d sockets with %d under way each) that are answered in 10^9 of them of the server's, kernel included, against servers that echo, in a guest whose clock counts them", nameSockets, nameWindow),
		Choices: choices{Cases: cases, Usual: cases, Metrics: []string{perCPU}},
		Linked:  true,
		Away: func(ctx context.Context, o options) (away, error) {
			s, kernel, err := inGuest(ctx, o, vm.Config{MemoryMiB: 1024, DiskMiB: 512}, guestCommand(o, "-names"))
			if err != nil {
				return away{}, err
			}
			return away{
				Series: s, Guest: "Linux " + kernel + " on one processor, whose clock counts instructions",
				Limits: nameLimits(o.cases, o.metrics),
			}, nil
		},
	}
}
