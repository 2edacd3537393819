package agent

import "errors"

// networkFailure is an error that concerns one network alone; the engines of
// overlay and balancer say so of theirs (ingress.NetworkError is one).
type networkFailure interface {
	error
	FailedNetwork() uint32
}

// failure is how a pass of the data plane went, by network. The zero value is a
// pass that succeeded.
type failure struct {
	// rest concerns every network.
	rest     error
	networks map[uint32]error
}

// sortFailure takes a tree of joined errors apart. What does not say which
// network it is about is about all of them.
func sortFailure(err error) failure {
	f := failure{networks: map[uint32]error{}}
	f.add(err, err)
	return f
}

// add files outer, of which err is the part that is looked at: the words around
// the error of one network are kept.
func (f *failure) add(outer, err error) {
	if err == nil {
		return
	}
	if !concernsNetworks(err) {
		f.rest = errors.Join(f.rest, outer)
		return
	}
	if n, ok := err.(networkFailure); ok {
		f.networks[n.FailedNetwork()] = errors.Join(f.networks[n.FailedNetwork()], outer)
		return
	}
	switch u := err.(type) {
	case interface{ Unwrap() []error }:
		for _, e := range u.Unwrap() {
			f.add(e, e)
		}
	case interface{ Unwrap() error }:
		f.add(outer, u.Unwrap())
	}
}

// concernsNetworks reports whether any part of err names its network.
func concernsNetworks(err error) bool {
	var n networkFailure
	return errors.As(err, &n)
}

// of is what went wrong for a task on these networks.
func (f failure) of(vnis []uint32) error {
	err := f.rest
	for _, v := range vnis {
		err = errors.Join(err, f.networks[v])
	}
	return err
}
